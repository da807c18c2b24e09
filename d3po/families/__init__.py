"""What a denoiser, a text encoder and an image decoder are, behind one protocol; and guidance.

A family holds the networks of one kind of model and the few things that only it knows: how its
latents are scaled, how its text is padded, what its denoiser wants to be called with. It knows no
loss, no optimizer, and no file besides weights. Adding one is a file here and a line in FAMILIES.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from d3po.sampling import Predict
from d3po.schedule import NoiseSchedule
from fifa.config import InputError

FAMILIES: dict[str, str] = {
    # `_class_name` in a model's model_index.json -> where its family lives
    "StableDiffusionPipeline": "d3po.families.sd:StableDiffusion",
}

MINI = Path(__file__).parent.parent / "mini_sd" / "weights"
"""The folder that the model name "mini" stands for."""


class Family(Protocol):
    """One kind of diffusion model, ready to use; its networks are frozen and in eval mode.

    Images are float32 (N, 3, H, W) in [0, 1]; latents are float32 (N, C, h, w), scaled as the
    denoiser wants them; conditioning is (N, L, D).
    """

    name: str  # the folder or Hub id it was loaded from
    denoiser: nn.Module  # the bare network; a Policy makes (part of) it trainable
    schedule: NoiseSchedule
    latent_shape: tuple[int, int, int]  # (C, h, w)
    image_size: int  # pixels a side
    denoiser_folder: str  # where a diffusers folder keeps the denoiser: "unet", "transformer"

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        ...

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Conditioning (N, L, D) of the prompts; "" is the unconditional one."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents of images: the mean of the posterior, scaled; nothing is drawn."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, clamped to [0, 1]."""
        ...

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Network output (B, C, h, w) in the dtype of x_t; `denoiser` may be a wrapped one."""
        ...

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Trade time for memory in the denoiser's backward pass."""
        ...

    def save_lora(self, folder: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write LoRA weights of the denoiser as the family's diffusers pipeline loads them."""
        ...

    def load_lora(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `save_lora` wrote: (weights, metadata)."""
        ...


def guided(
    family: Family,
    denoiser: nn.Module,
    cond: Tensor,
    uncond: Tensor | None = None,
    scale: float = 1.0,
) -> Predict:
    """`predict(x_t, t)` with classifier-free guidance (Ho & Salimans 2022, eq. 6).

        pred = uncond + scale * (cond - uncond)

    One doubled forward, as in diffusers' pipelines (scale = their guidance_scale). At scale 1
    the unconditional half would cancel and is not computed. cond is (B, L, D), uncond (B, L, D) or
    (1, L, D). This is the only copy of guidance in the project.
    """
    if scale == 1.0:
        return lambda x_t, t: family.predict(denoiser, x_t, t, cond)
    if uncond is None:
        raise InputError(f"guidance scale {scale} needs the embedding of the empty prompt")
    both = torch.cat([uncond.expand_as(cond), cond])

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        pred = family.predict(denoiser, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        without, with_text = pred.chunk(2)
        return without + scale * (with_text - without)

    return predict


def load_family(
    model: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Family:
    """Load "mini", a diffusers folder, or a Hub id; only what training needs, frozen, in eval mode.

    Raises InputError if the model is not there, is not reachable, or is of a kind without a family.
    """
    source = _source(model)
    kind = _pipeline_class(source)
    if kind not in FAMILIES:
        raise InputError(f"{model} is a {kind}; supported are {', '.join(FAMILIES)}")
    module, name = FAMILIES[kind].split(":")
    family: Family = getattr(importlib.import_module(module), name).load(source, dtype, device)
    return family


def _source(model: str | Path) -> str:
    if str(model) != "mini":
        return str(model)
    if not (MINI / "model_index.json").is_file():
        raise InputError(
            f"the mini model's weights are not in this installation (looked in {MINI}):"
            " install the package again, or name a diffusers folder"
        )
    return str(MINI)


def _pipeline_class(source: str) -> str:
    """`_class_name` of the model_index.json in a folder or on the Hub."""
    folder = Path(source)
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            raise InputError(f"{source} is no diffusers folder: it has no model_index.json")
    else:
        index = _hub_file(source, "model_index.json")
    try:
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index} does not name a pipeline: {error!r}") from None


def _hub_file(model: str, name: str) -> Path:
    """A file of a Hub repository, from the local cache or downloaded into it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(model, name))
    except HFValidationError:
        reason = "there is no such folder and it is no Hub id"
    except OSError as error:
        reason = first_line(error)
    raise InputError(
        f"model {model}: {reason} (give 'mini', the path of a diffusers folder, or a Hub id;"
        f" offline, a Hub id works after one 'hf download {model}')"
    )


def first_line(error: Exception) -> str:
    """The first line of what a library has to say, for an InputError in one sentence."""
    return str(error).strip().partition("\n")[0]

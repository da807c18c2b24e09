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
from pydantic import Field
from torch import Tensor, nn

from d3po.families.conditioning import Conditioning
from d3po.families.pipeline import UNREADABLE, Source, first_line
from d3po.sampling import Predict
from d3po.schedule import Schedule
from fifa.config import Config, InputError

FAMILIES: dict[str, str] = {
    # `_class_name` in a model's model_index.json -> where its family lives
    "StableDiffusionPipeline": "d3po.families.sd:StableDiffusion",
    "StableDiffusionXLPipeline": "d3po.families.sdxl:StableDiffusionXL",
    "StableDiffusion3Pipeline": "d3po.families.sd3:StableDiffusion3",
    "FluxPipeline": "d3po.families.flux:Flux",
}

MINI = Path(__file__).parent.parent / "mini_sd" / "weights"
"""The folder that the model name "mini" stands for."""


class FamilyConfig(Config):
    """How a model is opened."""

    image_size: int | None = Field(
        None,
        ge=8,
        description="Pixels a side of the pictures; null: what the model was made for.",
    )
    t5: bool = Field(
        True,
        description="Load the third text encoder of SD3, 9.5 GB in half precision; zeros stand in "
        "for it otherwise.",
    )
    t5_tokens: int | None = Field(
        None,
        ge=1,
        le=512,
        description="Tokens of T5 a prompt, for SD3 and FLUX; null: 256 and 512, as their "
        "pipelines do. A prompt's conditioning in a cache is as long.",
    )
    embedded_guidance: float = Field(
        3.5,
        ge=0,
        description="Guidance that FLUX.1-dev is told to imitate (its pipeline: 3.5); "
        "sampler.guidance comes on top.",
    )
    description: str | None = Field(
        None,
        description="For a model in one safetensors file: diffusers folder or Hub id with the "
        "configs and tokenizers of its kind; null: recognised by its weights.",
    )


class Family(Protocol):
    """One kind of diffusion model, ready to use; its networks are frozen and in eval mode.

    Images are float32 (N, 3, H, W) in [0, 1]; latents are float32 (N, C, h, w), scaled as the
    denoiser wants them; conditioning is a few tensors of N rows.
    """

    name: str  # the folder, Hub id or file it was loaded from
    source: Source  # where its parts are
    denoiser: nn.Module  # the bare network; a Policy makes (part of) it trainable
    schedule: Schedule
    latent_shape: tuple[int, int, int]  # (C, h, w)
    image_size: int  # pixels a side
    denoiser_folder: str  # where a diffusers folder keeps the denoiser: "unet", "transformer"

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        ...

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of N prompts; "" is the unconditional one."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents of images: the mean of the posterior, scaled; nothing is drawn."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, clamped to [0, 1]."""
        ...

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
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
    cond: Conditioning,
    uncond: Conditioning | None = None,
    scale: float = 1.0,
) -> Predict:
    """`predict(x_t, t)` with classifier-free guidance (Ho & Salimans 2022, eq. 6).

        pred = uncond + scale * (cond - uncond)

    One doubled forward, as in diffusers' pipelines (scale = their guidance_scale). At scale 1
    the unconditional half would cancel and is not computed. cond has B rows, uncond B or one.
    This is the only copy of guidance in the project.
    """
    if scale == 1.0:
        return lambda x_t, t: family.predict(denoiser, x_t, t, cond)
    if uncond is None:
        raise InputError(f"guidance scale {scale} needs the embedding of the empty prompt")
    both = Conditioning.cat([uncond.expand(len(cond)), cond])

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        pred = family.predict(denoiser, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        without, with_text = pred.chunk(2)
        return without + scale * (with_text - without)

    return predict


def load_family(
    model: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    config: FamilyConfig | None = None,
) -> Family:
    """Load "mini", a diffusers folder, a Hub id or one safetensors file, frozen, in eval mode.

    Only what training needs is loaded. Raises InputError if the model is not there, is not
    reachable, or is of a kind without a family.
    """
    config = config or FamilyConfig()
    source = find_source(model, config.description)
    family: Family = family_class(source).load(source, dtype, device, config)
    family.source = source
    return family


def family_class(source: Source) -> Any:
    """The class of a model's family, not yet loaded; InputError for a kind without one."""
    kind = str(source.index["_class_name"])
    if kind not in FAMILIES:
        raise InputError(f"{source.name} is a {kind}; supported are {', '.join(FAMILIES)}")
    module, name = FAMILIES[kind].split(":")
    return getattr(importlib.import_module(module), name)


def find_source(model: str | Path, description: str | None = None) -> Source:
    """Where the parts of a model are; `description` as in FamilyConfig."""
    name = str(model)
    if name == "mini":
        if not (MINI / "model_index.json").is_file():
            raise InputError(
                f"the mini model's weights are not in this installation (looked in {MINI}):"
                " install the package again, or name a diffusers folder"
            )
        name = str(MINI)
    if name.endswith(".safetensors"):
        if not Path(name).is_file():
            raise InputError(f"model {name}: there is no such file")
        description = description or _recognised(Path(name))
        return Source(name, _index(description), description)
    return Source(name, _index(name))


def _recognised(file: Path) -> str:
    """The Hub id of a model whose parts have the shapes of those in this file."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from safetensors import safe_open

    try:
        with safe_open(file, "pt") as weights:  # shapes stand in the header
            shapes = {
                name: torch.empty(weights.get_slice(name).get_shape(), device="meta")
                for name in list(weights.keys())
            }
    except UNREADABLE as error:
        raise InputError(f"model {file}: {first_line(error)}") from None
    return str(fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])


def _index(source: str) -> dict[str, Any]:
    """The model_index.json in a folder or on the Hub."""
    folder = Path(source)
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            raise InputError(f"{source} is no diffusers folder: it has no model_index.json")
    elif source.startswith(("/", ".", "~")):
        raise InputError(
            f"model {source}: there is no such folder (expected 'mini', the path of a diffusers "
            "folder, one safetensors file, or a Hub id)"
        )
    else:
        index = _hub_file(source, "model_index.json")
    try:
        found: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        found["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index} does not name a pipeline: {error!r}") from None
    return found


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
        f"model {model}: {reason} (give 'mini', the path of a diffusers folder, a Hub id, or one"
        " safetensors file with its diffusers folder or Hub id as family.description; offline, a"
        f" Hub id works after one 'hf download {model}')"
    )

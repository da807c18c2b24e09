"""What the families share: parts of a diffusers pipeline, a VAE, a denoiser, LoRA files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from d3po.schedule import Schedule
from fifa.config import InputError, atomic_path

# What diffusers, transformers and safetensors raise for files that are missing, cut short or of
# another model.
UNREADABLE = (OSError, ValueError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Source:
    """Where a model's parts are: a diffusers folder, a Hub id, or one file with a description."""

    name: str  # as it was given: a folder, a Hub id, a safetensors file
    index: Mapping[str, Any]  # model_index.json: the class of each part, and a few settings
    description: str | None = None  # of one file: the folder or Hub id with its configs

    def has(self, part: str) -> bool:
        """Whether the pipeline has this optional part."""
        return bool(self.index.get(part, [None])[0])

    def parts(self, classes: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Every part by name, networks in `dtype`; InputError names the one that is unusable."""
        if self.description is not None:
            return self._of_one_file(classes, dtype)
        return {name: self._of_folder(name, kind, dtype) for name, kind in classes.items()}

    def _of_folder(self, name: str, kind: Any, dtype: torch.dtype) -> Any:
        network = issubclass(kind, torch.nn.Module)
        kwargs = {_dtype_argument(kind): dtype} if network else {}
        try:
            return kind.from_pretrained(self.name, subfolder=name, **kwargs)
        except UNREADABLE as error:
            reason = first_line(error)
            raise InputError(f"model {self.name}: no usable {name}: {reason}") from error

    def pipeline(self, without: Collection[str] = ()) -> Any:
        """The whole diffusers pipeline in float32, with None for some of its parts.

        One file has no safety checker, which is None then. Raises InputError as `parts` does.
        """
        import diffusers

        nothing = dict.fromkeys(without)
        if self.description is not None:
            return self._pipeline_of_one_file(torch.float32, nothing)
        try:
            return diffusers.DiffusionPipeline.from_pretrained(self.name, **nothing)
        except UNREADABLE as error:
            raise InputError(f"model {self.name}: {first_line(error)}") from error

    def _pipeline_of_one_file(self, dtype: torch.dtype, nothing: Mapping[str, None]) -> Any:
        import diffusers
        from diffusers.loaders.single_file_utils import SingleFileComponentError

        kind = getattr(diffusers, self.index["_class_name"])
        try:
            return kind.from_single_file(
                self.name, config=self.description, torch_dtype=dtype, **nothing
            )
        except (*UNREADABLE, SingleFileComponentError, KeyError, AttributeError) as error:
            raise InputError(
                f"{self.name} does not hold the parts of {self.description}: {first_line(error)}"
            ) from error

    def _of_one_file(self, classes: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        unwanted = [name for name, kind in self.index.items() if _is_extra(kind, name, classes)]
        pipe = self._pipeline_of_one_file(dtype, dict.fromkeys(unwanted))
        parts = {name: getattr(pipe, name) for name in classes}
        parts["scheduler"] = classes["scheduler"].from_config(pipe.scheduler.config)
        return parts


def _dtype_argument(kind: Any) -> str:
    """transformers renamed it, diffusers did not."""
    return "dtype" if kind.__module__.startswith("transformers.") else "torch_dtype"


def _is_extra(kind: Any, name: str, classes: Mapping[str, Any]) -> bool:
    """An entry of model_index.json for a part that training does without."""
    return isinstance(kind, list) and name not in classes


def first_line(error: Exception) -> str:
    """The first line of what a library has to say, for an InputError in one sentence."""
    return str(error).strip().partition("\n")[0]


# ---- text ---------------------------------------------------------------------------------------


def check_vocabulary(name: str, tokenizer: Any, encoder: Any, padded: int = 1) -> None:
    """InputError if a tokenizer is not that of its encoder, whose table may have < `padded` more.

    transformers makes up an empty vocabulary where the files of a tokenizer are missing.
    """
    known = encoder.config.vocab_size
    if not 0 <= known - len(tokenizer) < padded:
        raise InputError(
            f"{name}: no usable tokenizer: it has {len(tokenizer)} tokens, the text encoder knows"
            f" {known}"
        )


def clip_tokens(tokenizer: Any, encoder: Any, prompts: Sequence[str]) -> Any:
    """Token ids (N, L) and their mask, on the encoder's device; longer prompts are cut at L."""
    positions = encoder.config.max_position_embeddings
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=min(tokenizer.model_max_length, positions),
        truncation=True,
        return_tensors="pt",
    ).to(encoder.device)


def clip_penultimate(tokenizer: Any, encoder: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(last but one hidden states (N, L, D), projected pooled output (N, E)): SDXL and SD3."""
    tokens = clip_tokens(tokenizer, encoder, prompts)
    out = encoder(tokens.input_ids, output_hidden_states=True)
    return out.hidden_states[-2], out[0]


def t5_states(tokenizer: Any, encoder: Any, prompts: Sequence[str], length: int) -> Tensor:
    """Last hidden states (N, length, D) of T5; padding is attended to, as the pipelines do."""
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    ).to(encoder.device)
    states: Tensor = encoder(tokens.input_ids)[0]
    return states


# ---- networks -----------------------------------------------------------------------------------


class PipelineFamily:
    """The part of a `Family` (see there) that does not depend on the kind of model.

    The denoiser is in eval mode for good: a dropout layer would make a policy differ from itself.
    Gradients do not need train mode.
    """

    source: Source  # set by load_family
    denoiser_folder: ClassVar[str]  # "unet" or "transformer"
    pipeline: ClassVar[str]  # the diffusers pipeline that loads the LoRA

    def __init__(
        self,
        name: str,
        vae: Any,
        denoiser: Any,
        schedule: Schedule,
        latent_shape: tuple[int, int, int],
    ) -> None:
        self.name = name
        self.vae = vae
        self.denoiser = denoiser
        self.schedule = schedule
        self.latent_shape = latent_shape
        self.vae_factor = vae_factor(vae)
        self.image_size = latent_shape[1] * self.vae_factor
        for part in vars(self).values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return torch.device(self.denoiser.device)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """(N, C, h, w) float32 from images (N, 3, H, W) in [0, 1]; H, W multiples of the factor."""
        sides = images.shape[2:]
        if images.ndim != 4 or images.shape[1] != 3 or any(s % self.vae_factor for s in sides):
            raise InputError(
                f"images have shape {tuple(images.shape)}, expected (N, 3, H, W) with H and W"
                f" multiples of {self.vae_factor}"
            )
        pixels = (2 * images - 1).to(self.vae.device, self.vae.dtype)
        mean = self.vae.encode(pixels).latent_dist.mean.float()
        return (mean - self._shift) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(N, 3, H, W) float32 in [0, 1] from latents (N, C, h, w)."""
        raw = latents.float() / self.vae.config.scaling_factor + self._shift
        pixels = self.vae.decode(raw.to(self.vae.device, self.vae.dtype)).sample.float()
        return (pixels / 2 + 0.5).clamp(0, 1)

    @property
    def _shift(self) -> float:
        return self.vae.config.get("shift_factor") or 0.0

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        if enabled:
            self.denoiser.enable_gradient_checkpointing()
        else:
            self.denoiser.disable_gradient_checkpointing()

    def save_lora(self, folder: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write `pytorch_lora_weights.safetensors`, with rank and alpha among its metadata."""
        from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

        part = self.denoiser_folder
        with atomic_path(folder / LORA_WEIGHT_NAME_SAFE) as path:
            self._pipeline_class().save_lora_weights(
                path.parent,
                weight_name=path.name,
                **{f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": metadata},
            )

    def load_lora(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(weights, metadata) of the denoiser's LoRA in a folder that `save_lora` wrote."""
        from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

        file = folder / LORA_WEIGHT_NAME_SAFE
        if not file.is_file():
            raise InputError(f"{folder} holds no {LORA_WEIGHT_NAME_SAFE}")
        try:
            state, *_, metadata = self._pipeline_class().lora_state_dict(
                folder, weight_name=file.name, return_lora_metadata=True
            )
        except UNREADABLE as error:
            raise InputError(f"{file} is no readable LoRA: {first_line(error)}") from error
        prefix = f"{self.denoiser_folder}."
        return _below(prefix, state), _below(prefix, metadata or {})

    def _pipeline_class(self) -> Any:
        import diffusers

        return getattr(diffusers, self.pipeline)


def vae_factor(vae: Any) -> int:
    """Pixels a side of one latent."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def latent_side(name: str, asked: int | None, own: int, factor: int, patch: int = 1) -> int:
    """Latents a side: the model's `own` number, or that of images of `asked` pixels.

    InputError if `asked` is no multiple of the pixels of a patch.
    """
    side = own if asked is None else asked // factor
    if asked is not None and asked % (factor * patch):
        raise InputError(
            f"family.image_size is {asked}, for {name} it must be a multiple of {factor * patch}"
        )
    return side


def _below(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}

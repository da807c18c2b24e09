"""Stable Diffusion 1.x and 2.x, the embedded mini model included: CLIP text, a UNet, a VAE."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from d3po.families import first_line
from d3po.schedule import NoiseSchedule
from fifa.config import InputError, atomic_path

# What diffusers, transformers and safetensors raise for files that are missing, cut short or of
# another model.
_UNREADABLE = (OSError, ValueError, RuntimeError, SafetensorError)


class StableDiffusion:
    """A `Family` (see there) over the parts of a StableDiffusionPipeline.

    The UNet is in eval mode for good: a dropout layer would make a policy differ from itself.
    Gradients do not need train mode.
    """

    denoiser_folder = "unet"

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        denoiser: Any,
        schedule: NoiseSchedule,
    ) -> None:
        channels, size = denoiser.config.in_channels, denoiser.config.sample_size
        if channels != vae.config.latent_channels:
            raise InputError(
                f"{name}: the UNet takes {channels} channels, the VAE has"
                f" {vae.config.latent_channels}; inpainting and editing models are not supported"
            )
        if len(tokenizer) != text_encoder.config.vocab_size:
            # transformers makes up an empty vocabulary where the files of a tokenizer are missing
            raise InputError(
                f"{name}: no usable tokenizer: it has {len(tokenizer)} tokens, the text encoder"
                f" knows {text_encoder.config.vocab_size}"
            )
        for part in (text_encoder, vae, denoiser):
            part.requires_grad_(False).eval()
        self.name = name
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.vae = vae
        self.denoiser = denoiser
        self.schedule = schedule
        self.vae_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape = (channels, height, width)
        self.image_size = height * self.vae_factor

    @classmethod
    def load(cls, source: str, dtype: torch.dtype, device: torch.device | str) -> StableDiffusion:
        """Load the five parts, without the safety checker, from a diffusers folder or a Hub id."""
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        def part(kind: Any, subfolder: str, **kwargs: Any) -> Any:
            try:
                return kind.from_pretrained(source, subfolder=subfolder, **kwargs)
            except _UNREADABLE as error:
                reason = first_line(error)
                raise InputError(f"model {source}: no usable {subfolder}: {reason}") from error

        # StableDiffusionPipeline forces these two on old configs; the same pictures need the same.
        scheduler = part(DDIMScheduler, "scheduler", steps_offset=1, clip_sample=False)
        return cls(
            name=source,
            tokenizer=part(CLIPTokenizer, "tokenizer"),
            text_encoder=part(CLIPTextModel, "text_encoder").to(device, dtype),
            vae=part(AutoencoderKL, "vae", torch_dtype=dtype).to(device),
            denoiser=part(UNet2DConditionModel, "unet", torch_dtype=dtype).to(device),
            schedule=NoiseSchedule.from_diffusers(scheduler),
        )

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return torch.device(self.denoiser.device)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """(N, L, D): last hidden states of CLIP; longer prompts are cut at L tokens."""
        positions = self.text_encoder.config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=min(self.tokenizer.model_max_length, positions),
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask if masked else None
        hidden: Tensor = self.text_encoder(tokens.input_ids, attention_mask=mask)[0]
        return hidden

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

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """UNet output (B, C, h, w) in the dtype of x_t; the UNet computes in its own."""
        dtype = self.denoiser.dtype
        pred: Tensor = denoiser(x_t.to(dtype), t.to(x_t.device), cond.to(dtype)).sample
        return pred.to(x_t.dtype)

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        if enabled:
            self.denoiser.enable_gradient_checkpointing()
        else:
            self.denoiser.disable_gradient_checkpointing()

    def save_lora(self, folder: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write `pytorch_lora_weights.safetensors`, with rank and alpha among its metadata."""
        from diffusers import StableDiffusionPipeline
        from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

        with atomic_path(folder / LORA_WEIGHT_NAME_SAFE) as path:
            StableDiffusionPipeline.save_lora_weights(
                path.parent,
                unet_lora_layers=weights,
                weight_name=path.name,
                unet_lora_adapter_metadata=metadata,
            )

    def load_lora(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(weights, metadata) of the UNet's LoRA in a folder that `save_lora` wrote."""
        from diffusers import StableDiffusionPipeline
        from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

        file = folder / LORA_WEIGHT_NAME_SAFE
        if not file.is_file():
            raise InputError(f"{folder} holds no {LORA_WEIGHT_NAME_SAFE}")
        try:
            state, _, metadata = StableDiffusionPipeline.lora_state_dict(
                folder, weight_name=file.name, return_lora_metadata=True
            )
        except _UNREADABLE as error:
            raise InputError(f"{file} is no readable LoRA: {first_line(error)}") from error
        return _below("unet.", state), _below("unet.", metadata or {})


def _below(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}

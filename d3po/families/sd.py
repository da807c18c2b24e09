"""Stable Diffusion 1.x and 2.x, the embedded mini model included: CLIP text, a UNet, a VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d3po.families import FamilyConfig
from d3po.families.conditioning import Conditioning
from d3po.families.pipeline import (
    PipelineFamily,
    Source,
    check_vocabulary,
    clip_tokens,
    latent_side,
    vae_factor,
)
from d3po.schedule import NoiseSchedule
from fifa.config import InputError


class StableDiffusion(PipelineFamily):
    """A `Family` (see there) over the parts of a StableDiffusionPipeline."""

    denoiser_folder = "unet"
    pipeline = "StableDiffusionPipeline"

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        denoiser: Any,
        schedule: NoiseSchedule,
        image_size: int | None = None,
    ) -> None:
        check_vocabulary(name, tokenizer, text_encoder)
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        shape = unet_latents(name, denoiser, vae, image_size)
        super().__init__(name, vae, denoiser, schedule, shape)

    @classmethod
    def load(
        cls, source: Source, dtype: torch.dtype, device: torch.device | str, config: FamilyConfig
    ) -> StableDiffusion:
        """Load the five parts, without the safety checker."""
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        parts = source.parts(
            {
                "scheduler": DDIMScheduler,
                "tokenizer": CLIPTokenizer,
                "text_encoder": CLIPTextModel,
                "vae": AutoencoderKL,
                "unet": UNet2DConditionModel,
            },
            dtype,
        )
        _, schedule = cls.outline(source.name, parts, config.image_size)
        return cls(
            name=source.name,
            tokenizer=parts["tokenizer"],
            text_encoder=parts["text_encoder"].to(device),
            vae=parts["vae"].to(device),
            denoiser=parts["unet"].to(device),
            schedule=schedule,
            image_size=config.image_size,
        )

    @staticmethod
    def outline(
        name: str, parts: Mapping[str, Any], image_size: int | None
    ) -> tuple[tuple[int, int, int], NoiseSchedule]:
        """(C, h, w) of the latents, and the noise schedule: what needs no weights."""
        from diffusers import DDIMScheduler

        # StableDiffusionPipeline forces these two on old configs; the same pictures need the same.
        scheduler = DDIMScheduler.from_config(
            parts["scheduler"].config, steps_offset=1, clip_sample=False
        )
        shape = unet_latents(name, parts["unet"], parts["vae"], image_size)
        return shape, NoiseSchedule.from_diffusers(scheduler)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """text (N, L, D): last hidden states of CLIP; longer prompts are cut at L tokens."""
        tokens = clip_tokens(self.tokenizer, self.text_encoder, prompts)
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask if masked else None
        return Conditioning({"text": self.text_encoder(tokens.input_ids, attention_mask=mask)[0]})

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """UNet output (B, C, h, w) in the dtype of x_t; the UNet computes in its own."""
        dtype = self.denoiser.dtype
        text = cond.tensors["text"].to(dtype)
        pred: Tensor = denoiser(x_t.to(dtype), t.to(x_t.device), text).sample
        return pred.to(x_t.dtype)


def unet_latents(name: str, unet: Any, vae: Any, image_size: int | None) -> tuple[int, int, int]:
    """(C, h, w) of a UNet's latents; InputError if it wants more than the VAE makes."""
    channels, size = unet.config.in_channels, unet.config.sample_size
    if channels != vae.config.latent_channels:
        raise InputError(
            f"{name}: the UNet takes {channels} channels, the VAE has"
            f" {vae.config.latent_channels}; inpainting and editing models are not supported"
        )
    own = size if isinstance(size, int) else size[0]
    halvings = 2 ** (len(unet.config.block_out_channels) - 1)
    side = latent_side(name, image_size, own, vae_factor(vae), halvings)
    return channels, side, side

"""Stable Diffusion XL: two CLIP text encoders, a pooled embedding, sizes, a UNet, a VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d3po.families import FamilyConfig
from d3po.families.conditioning import Conditioning
from d3po.families.pipeline import PipelineFamily, Source, check_vocabulary, clip_penultimate
from d3po.families.sd import unet_latents
from d3po.schedule import NoiseSchedule


class StableDiffusionXL(PipelineFamily):
    """A `Family` (see there) over the parts of a StableDiffusionXLPipeline.

    Micro-conditioning says what the pipeline says by default: a picture of the model's size, not
    cropped. (The published Diffusion-DPO trains with the same.)
    """

    denoiser_folder = "unet"
    pipeline = "StableDiffusionXLPipeline"

    def __init__(
        self,
        name: str,
        tokenizers: tuple[Any, Any],
        text_encoder: Any,
        text_encoder_2: Any,
        vae: Any,
        denoiser: Any,
        schedule: NoiseSchedule,
        zeros_for_empty: bool,
        image_size: int | None = None,
    ) -> None:
        for tokenizer, encoder in zip(tokenizers, (text_encoder, text_encoder_2), strict=True):
            check_vocabulary(name, tokenizer, encoder)
        self.tokenizers = tokenizers
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.zeros_for_empty = zeros_for_empty
        shape = unet_latents(name, denoiser, vae, image_size)
        super().__init__(name, vae, denoiser, schedule, shape)

    @classmethod
    def load(
        cls, source: Source, dtype: torch.dtype, device: torch.device | str, config: FamilyConfig
    ) -> StableDiffusionXL:
        """Load the seven parts; the VAE in float32 where it must not be in float16."""
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        parts = source.parts(
            {
                "scheduler": DDIMScheduler,
                "tokenizer": CLIPTokenizer,
                "tokenizer_2": CLIPTokenizer,
                "text_encoder": CLIPTextModel,
                "text_encoder_2": CLIPTextModelWithProjection,
                "vae": AutoencoderKL,
                "unet": UNet2DConditionModel,
            },
            dtype,
        )
        vae = parts["vae"]
        if dtype == torch.float16 and vae.config.force_upcast:
            vae = vae.float()  # the original VAE overflows in half precision
        _, schedule = cls.outline(source.name, parts, config.image_size)
        return cls(
            name=source.name,
            tokenizers=(parts["tokenizer"], parts["tokenizer_2"]),
            text_encoder=parts["text_encoder"].to(device),
            text_encoder_2=parts["text_encoder_2"].to(device),
            vae=vae.to(device),
            denoiser=parts["unet"].to(device),
            schedule=schedule,
            zeros_for_empty=bool(source.index.get("force_zeros_for_empty_prompt", True)),
            image_size=config.image_size,
        )

    @staticmethod
    def outline(
        name: str, parts: Mapping[str, Any], image_size: int | None
    ) -> tuple[tuple[int, int, int], NoiseSchedule]:
        """(C, h, w) of the latents, and the noise schedule: what needs no weights."""
        shape = unet_latents(name, parts["unet"], parts["vae"], image_size)
        return shape, NoiseSchedule.from_diffusers(parts["scheduler"])

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """text (N, L, D1 + D2): both encoders' last but one states; pooled (N, E): the second's.

        The empty prompt is all zeros where the pipeline's settings say so, as they do for SDXL.
        """
        first, second = self.tokenizers
        one, _ = clip_penultimate(first, self.text_encoder, prompts)
        two, pooled = clip_penultimate(second, self.text_encoder_2, prompts)
        text = torch.cat([one, two], -1)
        if self.zeros_for_empty:
            empty = torch.tensor([not prompt for prompt in prompts], device=text.device)
            text = text.masked_fill(empty[:, None, None], 0)
            pooled = pooled.masked_fill(empty[:, None], 0)
        return Conditioning({"text": text, "pooled": pooled})

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """UNet output (B, C, h, w) in the dtype of x_t; the UNet computes in its own."""
        dtype, size = self.denoiser.dtype, float(self.image_size)
        # original height and width, top and left of the crop, height and width aimed at
        times = torch.tensor([size, size, 0, 0, size, size], dtype=dtype, device=x_t.device)
        added = {
            "text_embeds": cond.tensors["pooled"].to(dtype),
            "time_ids": times.expand(len(x_t), 6),
        }
        text = cond.tensors["text"].to(dtype)
        pred: Tensor = denoiser(
            x_t.to(dtype), t.to(x_t.device), text, added_cond_kwargs=added
        ).sample
        return pred.to(x_t.dtype)

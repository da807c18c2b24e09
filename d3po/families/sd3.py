"""Stable Diffusion 3 and 3.5: a flow model with two CLIP encoders, T5, a transformer, a VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d3po.families import FamilyConfig
from d3po.families.conditioning import Conditioning
from d3po.families.pipeline import (
    PipelineFamily,
    Source,
    check_vocabulary,
    clip_penultimate,
    latent_side,
    t5_states,
    vae_factor,
)
from d3po.schedule import FlowSchedule
from fifa.config import InputError

T5_TOKENS = 256  # StableDiffusion3Pipeline's default
T5_PADDING = 128  # T5's embedding table is padded to a multiple of it


class StableDiffusion3(PipelineFamily):
    """A `Family` (see there) over the parts of a StableDiffusion3Pipeline.

    The third text encoder may be absent: then zeros stand for its tokens, as in the pipeline.
    """

    denoiser_folder = "transformer"
    pipeline = "StableDiffusion3Pipeline"

    def __init__(
        self,
        name: str,
        tokenizers: Sequence[Any],
        text_encoder: Any,
        text_encoder_2: Any,
        text_encoder_3: Any | None,
        vae: Any,
        denoiser: Any,
        schedule: FlowSchedule,
        latent_shape: tuple[int, int, int],
        t5_tokens: int = T5_TOKENS,
    ) -> None:
        encoders = (text_encoder, text_encoder_2, text_encoder_3)
        for tokenizer, encoder, padding in zip(
            tokenizers, encoders, (1, 1, T5_PADDING), strict=False
        ):
            check_vocabulary(name, tokenizer, encoder, padding)
        self.tokenizers = tokenizers
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.text_encoder_3 = text_encoder_3
        self.t5_tokens = t5_tokens
        super().__init__(name, vae, denoiser, schedule, latent_shape)

    @classmethod
    def load(
        cls, source: Source, dtype: torch.dtype, device: torch.device | str, config: FamilyConfig
    ) -> StableDiffusion3:
        """Load the parts, T5 unless it is absent or not wanted."""
        from diffusers import (
            AutoencoderKL,
            FlowMatchEulerDiscreteScheduler,
            SD3Transformer2DModel,
        )
        from transformers import (
            AutoTokenizer,
            CLIPTextModelWithProjection,
            CLIPTokenizer,
            T5EncoderModel,
        )

        classes: dict[str, Any] = {
            "scheduler": FlowMatchEulerDiscreteScheduler,
            "tokenizer": CLIPTokenizer,
            "tokenizer_2": CLIPTokenizer,
            "text_encoder": CLIPTextModelWithProjection,
            "text_encoder_2": CLIPTextModelWithProjection,
            "vae": AutoencoderKL,
            "transformer": SD3Transformer2DModel,
        }
        if config.t5 and source.has("text_encoder_3"):
            classes |= {"tokenizer_3": AutoTokenizer, "text_encoder_3": T5EncoderModel}
        parts = source.parts(classes, dtype)
        vae, transformer, t5 = parts["vae"], parts["transformer"], parts.get("text_encoder_3")
        shape, schedule = cls.outline(source.name, parts, config.image_size)
        return cls(
            name=source.name,
            tokenizers=[parts[part] for part in parts if part.startswith("tokenizer")],
            text_encoder=parts["text_encoder"].to(device),
            text_encoder_2=parts["text_encoder_2"].to(device),
            text_encoder_3=None if t5 is None else t5.to(device),
            vae=vae.to(device),
            denoiser=transformer.to(device),
            schedule=schedule,
            latent_shape=shape,
            t5_tokens=config.t5_tokens or T5_TOKENS,
        )

    @staticmethod
    def outline(
        name: str, parts: Mapping[str, Any], image_size: int | None
    ) -> tuple[tuple[int, int, int], FlowSchedule]:
        """(C, h, w) of the latents, and the noise schedule: what needs no weights."""
        transformer, scheduler = parts["transformer"], parts["scheduler"]
        shape = _latents(name, transformer, parts["vae"], image_size)
        tokens = (shape[1] // transformer.config.patch_size) ** 2
        return shape, FlowSchedule.from_diffusers(scheduler, tokens, last=scheduler.sigma_min)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """text (N, L + T, D): CLIP's states, zeros up to D, then T5's; pooled (N, E1 + E2)."""
        one, pooled_one = clip_penultimate(self.tokenizers[0], self.text_encoder, prompts)
        two, pooled_two = clip_penultimate(self.tokenizers[1], self.text_encoder_2, prompts)
        clip = torch.cat([one, two], -1)
        width = self.denoiser.config.joint_attention_dim
        if self.text_encoder_3 is None:
            t5 = clip.new_zeros(len(prompts), self.t5_tokens, width)
        else:
            t5 = t5_states(self.tokenizers[2], self.text_encoder_3, prompts, self.t5_tokens)
        text = torch.cat([F.pad(clip, (0, width - clip.shape[-1])), t5], -2)
        return Conditioning({"text": text, "pooled": torch.cat([pooled_one, pooled_two], -1)})

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Velocity (B, C, h, w) in the dtype of x_t; the transformer computes in its own."""
        dtype = self.denoiser.dtype
        pred: Tensor = denoiser(
            x_t.to(dtype),
            encoder_hidden_states=cond.tensors["text"].to(dtype),
            pooled_projections=cond.tensors["pooled"].to(dtype),
            timestep=t.to(x_t.device, torch.float32),
        ).sample
        return pred.to(x_t.dtype)


def _latents(name: str, transformer: Any, vae: Any, image_size: int | None) -> tuple[int, int, int]:
    config, factor = transformer.config, vae_factor(vae)
    side = latent_side(name, image_size, config.sample_size, factor, config.patch_size)
    largest = config.pos_embed_max_size * config.patch_size * factor
    if side * factor > largest:
        raise InputError(
            f"family.image_size is {side * factor}, {name} has positions for {largest} at most"
        )
    return config.in_channels, side, side

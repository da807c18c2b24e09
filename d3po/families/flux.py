"""FLUX.1: a flow model with pooled CLIP text, T5, a transformer over 2 x 2 patches, a VAE."""

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
    t5_states,
    vae_factor,
)
from d3po.families.sd3 import T5_PADDING
from d3po.schedule import FlowSchedule

T5_TOKENS = 512  # FluxPipeline's default
PATCH = 2  # latents a side of a token
SIDE = 128  # latents a side that FluxPipeline draws by default: 1024 px


class Flux(PipelineFamily):
    """A `Family` (see there) over the parts of a FluxPipeline.

    FLUX.1-dev was distilled from guided predictions and is told how strong guidance is to look
    (`family.embedded_guidance`); the sampler's own guidance comes on top and is 1 in most uses.
    """

    denoiser_folder = "transformer"
    pipeline = "FluxPipeline"

    def __init__(
        self,
        name: str,
        tokenizers: tuple[Any, Any],
        text_encoder: Any,
        text_encoder_2: Any,
        vae: Any,
        denoiser: Any,
        schedule: FlowSchedule,
        latent_shape: tuple[int, int, int],
        embedded_guidance: float,
        t5_tokens: int = T5_TOKENS,
    ) -> None:
        check_vocabulary(name, tokenizers[0], text_encoder)
        check_vocabulary(name, tokenizers[1], text_encoder_2, T5_PADDING)
        self.tokenizers = tokenizers
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.embedded_guidance = embedded_guidance
        self.t5_tokens = t5_tokens
        super().__init__(name, vae, denoiser, schedule, latent_shape)

    @classmethod
    def load(
        cls, source: Source, dtype: torch.dtype, device: torch.device | str, config: FamilyConfig
    ) -> Flux:
        """Load the seven parts."""
        from diffusers import (
            AutoencoderKL,
            FlowMatchEulerDiscreteScheduler,
            FluxTransformer2DModel,
        )
        from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, T5EncoderModel

        parts = source.parts(
            {
                "scheduler": FlowMatchEulerDiscreteScheduler,
                "tokenizer": CLIPTokenizer,
                "tokenizer_2": AutoTokenizer,
                "text_encoder": CLIPTextModel,
                "text_encoder_2": T5EncoderModel,
                "vae": AutoencoderKL,
                "transformer": FluxTransformer2DModel,
            },
            dtype,
        )
        vae, transformer = parts["vae"], parts["transformer"]
        shape, schedule = cls.outline(source.name, parts, config.image_size)
        return cls(
            name=source.name,
            tokenizers=(parts["tokenizer"], parts["tokenizer_2"]),
            text_encoder=parts["text_encoder"].to(device),
            text_encoder_2=parts["text_encoder_2"].to(device),
            vae=vae.to(device),
            denoiser=transformer.to(device),
            schedule=schedule,
            latent_shape=shape,
            embedded_guidance=config.embedded_guidance,
            t5_tokens=config.t5_tokens or T5_TOKENS,
        )

    @staticmethod
    def outline(
        name: str, parts: Mapping[str, Any], image_size: int | None
    ) -> tuple[tuple[int, int, int], FlowSchedule]:
        """(C, h, w) of the latents, and the noise schedule: what needs no weights."""
        side = latent_side(name, image_size, SIDE, vae_factor(parts["vae"]), PATCH)
        channels = parts["transformer"].config.in_channels // PATCH**2
        tokens = (side // PATCH) ** 2
        schedule = FlowSchedule.from_diffusers(parts["scheduler"], tokens, last=None)
        return (channels, side, side), schedule

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """text (N, T, D): T5's last hidden states; pooled (N, E): CLIP's pooled output."""
        tokens = clip_tokens(self.tokenizers[0], self.text_encoder, prompts)
        pooled = self.text_encoder(tokens.input_ids).pooler_output
        text = t5_states(self.tokenizers[1], self.text_encoder_2, prompts, self.t5_tokens)
        return Conditioning({"text": text, "pooled": pooled.to(text.dtype)})

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Velocity (B, C, h, w) in the dtype of x_t; the transformer computes in its own."""
        dtype, device = self.denoiser.dtype, x_t.device
        text = cond.tensors["text"].to(dtype)
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((len(x_t),), self.embedded_guidance, device=device)
        pred = denoiser(
            pack(x_t.to(dtype)),
            encoder_hidden_states=text,
            pooled_projections=cond.tensors["pooled"].to(dtype),
            timestep=t.to(device, torch.float32) / FlowSchedule.scale,
            img_ids=positions(x_t).to(device, dtype),
            txt_ids=torch.zeros(text.shape[1], 3, device=device, dtype=dtype),
            guidance=guidance,
        ).sample
        return unpack(pred, *x_t.shape[2:]).to(x_t.dtype)


def pack(latents: Tensor) -> Tensor:
    """Tokens (B, h/2 * w/2, 4 C) of latents (B, C, h, w): a token is a patch of 2 x 2."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents (B, C, h, w) of tokens (B, h/2 * w/2, 4 C): the inverse of `pack`."""
    batch, _, size = tokens.shape
    shape = (batch, height // PATCH, width // PATCH, size // PATCH**2, PATCH, PATCH)
    patches = tokens.reshape(shape).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, size // PATCH**2, height, width)


def positions(latents: Tensor) -> Tensor:
    """(h/2 * w/2, 3) for rotary embeddings: 0, row and column of each token."""
    rows, columns = (torch.arange(side // PATCH) for side in latents.shape[2:])
    grid = torch.cartesian_prod(rows, columns)
    return torch.cat([torch.zeros(len(grid), 1, dtype=grid.dtype), grid], 1)

"""The mini model's UNet and text tower, trained together by plain epsilon prediction.

Scenes are rendered and encoded once; each visit words the scene's request anew, so the text tower
meets every paraphrase. Held-out requests (see `Request.split`) are never drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d3po.mini_sd.autoencoder import LATENT_CHANNELS
from d3po.mini_sd.text import WIDTH
from fifa.images import to_batch
from fifa.miniworld import Request, compose, phrase, render, sample_request

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

PROMPT_DROPOUT = 0.1  # share of empty prompts, for classifier-free guidance
EMA_DECAY = 0.999


def build_unet() -> UNet2DConditionModel:
    """An untrained UNet; initialised from the global generator, which the caller has seeded."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.x's noise schedule, with its defaults for sampling."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


@torch.no_grad()
def encode_scenes(
    vae: AutoencoderKL, count: int, seed: int, log: Callable[[int], None]
) -> tuple[Tensor, list[Request]]:
    """Latents (count, 8, 8, 8) of training scenes, and what each scene answers."""
    rng = np.random.default_rng(seed)
    latents, requests = [], []
    for start in range(0, count, 64):
        batch = [sample_request(rng, "train") for _ in range(min(64, count - start))]
        pixels = to_batch([render(compose(request, rng)) for request in batch]) * 2 - 1
        latents.append(vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor)
        requests += batch
        log(start + len(batch))
    return torch.cat(latents), requests


class Denoiser(nn.Module):
    """Text tower and UNet as one module, so that one optimizer and one average hold both."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """Predicted noise (B, C, H, W) for x_t (B, C, H, W), t (B,), tokens (B, L)."""
        words = self.text_encoder(tokens).last_hidden_state
        return self.unet(x_t, t, words).sample


def train(
    denoiser: Denoiser,
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    requests: list[Request],
    *,
    seed: int,
    steps: int,
    batch: int,
    learning_rate: float,
    time_power: float,
    log: Callable[[int, float, Denoiser], None],
) -> Denoiser:
    """Minimise the error of the predicted noise; returns the exponential average of the weights.

    Times are drawn with density proportional to t ** (time_power - 1): 1 is uniform, 2 dwells on
    the noisy times at which a picture's layout is decided.
    """
    abar = build_scheduler().alphas_cumprod
    average = deepcopy(denoiser).requires_grad_(False)
    optimizer = torch.optim.AdamW(denoiser.parameters(), learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05, anneal_strategy="cos"
    )
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        x0, tokens = _batch(
            tokenizer, latents, requests, batch, np.random.default_rng([seed, step])
        )
        t = (torch.rand(batch, generator=draw) ** (1 / time_power) * len(abar)).long()
        noise = torch.randn(x0.shape, generator=draw)
        a = abar[t].view(-1, 1, 1, 1)
        loss = F.mse_loss(denoiser(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, tokens), noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        _average(average, denoiser, min(EMA_DECAY, (1 + step) / (10 + step)))
        log(step, loss.item(), average)
    return average.eval()


def _batch(
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    requests: list[Request],
    size: int,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Random scenes with fresh wordings; some prompts are dropped."""
    rows = rng.integers(len(latents), size=size)
    texts = [
        "" if rng.random() < PROMPT_DROPOUT else phrase(requests[row], rng) for row in rows.tolist()
    ]
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return latents[torch.from_numpy(rows)].float(), tokens


@torch.no_grad()
def _average(average: nn.Module, current: nn.Module, decay: float) -> None:
    for a, c in zip(average.parameters(), current.parameters(), strict=True):
        a.lerp_(c, 1 - decay)

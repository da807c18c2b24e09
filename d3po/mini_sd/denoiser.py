"""The mini model's UNet and text tower, trained together by plain epsilon prediction.

Scenes are rendered and encoded once; each visit words the scene's request anew, so the text tower
meets every paraphrase. Held-out requests (see `Request.split`) are never drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from d3po.mini_sd.autoencoder import LATENT_CHANNELS
from d3po.mini_sd.text import WIDTH
from fifa.images import to_batch
from fifa.miniworld import Request, compose, phrase, render, sample_request
from fifa.miniworld import vocabulary as words
from fifa.miniworld.captions import pick

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

PROMPT_DROPOUT = 0.1  # share of empty prompts, for classifier-free guidance
EMA_DECAY = 0.999
MAX_WEIGHT = 4.0  # of the error at one time


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


def detailed_request(rng: np.random.Generator) -> Request:
    """A training request that says more than most people do: more is learned from each picture."""
    while True:
        request = sample_request(rng, "train")
        if request.background is None and rng.random() < 0.5:
            request = replace(request, background=pick(rng, words.BACKGROUNDS))
        if [group.count for group in request.groups] == [1, 1] and rng.random() < 0.5:
            request = replace(request, relation=pick(rng, words.RELATIONS))
        if request.split == "train":
            return request


@torch.no_grad()
def encode_scenes(
    vae: AutoencoderKL, count: int, seed: int, log: Callable[[int], None]
) -> tuple[Tensor, list[Request]]:
    """Latents (count, 8, 8, 8) of training scenes, and what each scene answers."""
    rng = np.random.default_rng(seed)
    latents, requests = [], []
    for start in range(0, count, 64):
        batch = [detailed_request(rng) for _ in range(min(64, count - start))]
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
        states = self.text_encoder(tokens).last_hidden_state
        return self.unet(x_t, t, states).sample


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
    snr_power: float,
    log: Callable[[int, float, Denoiser], None],
) -> Denoiser:
    """Minimise the error of the predicted noise; returns the exponential average of the weights.

    The error at time t weighs SNR(t) ** -snr_power, at most MAX_WEIGHT. Unweighted, the noisy times
    at which backdrop and layout are decided hardly count: there the noise is nearly all of x_t, and
    a picture that ignores its prompt costs next to nothing (cf. Yu et al. 2023, arXiv 2310.08442,
    whose weight is the power 1/2).
    """
    abar = build_scheduler().alphas_cumprod
    weights = ((1 - abar) / abar).pow(snr_power).clamp(max=MAX_WEIGHT)
    average = deepcopy(denoiser).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        denoiser.parameters(), learning_rate, weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05, anneal_strategy="cos"
    )
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        x0, tokens = _batch(
            tokenizer, latents, requests, batch, np.random.default_rng([seed, step])
        )
        t = _spread_times(batch, len(abar), draw)
        noise = torch.randn(x0.shape, generator=draw)
        a = abar[t].view(-1, 1, 1, 1)
        with half_precision():
            pred = denoiser(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, tokens)
        loss = (weights[t] * (pred.float() - noise).square().mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        _average(average, denoiser, min(EMA_DECAY, (1 + step) / (10 + step)))
        log(step, loss.item(), average)
    return average.eval()


def _spread_times(batch: int, steps: int, draw: torch.Generator) -> Tensor:
    """Times (batch,), each uniform over the schedule, together spread evenly over it."""
    spread = (torch.arange(batch) + torch.rand(1, generator=draw)) / batch
    return (spread * steps).long().clamp(max=steps - 1)


@contextmanager
def half_precision() -> Iterator[None]:
    """bfloat16 where it pays on a CPU: 1.7 times the speed of float32 for this network.

    Fused attention is left out: its backward pass in bfloat16 took half of a training step.
    """
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel([SDPBackend.MATH]):
        yield


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

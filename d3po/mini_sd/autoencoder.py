"""The mini model's VAE: 32 x 32 pixels to 8 x 8 latents of 8 channels, whitened exactly.

Trained as a plain autoencoder with noise on its latents (a KL term strong enough to regularise
collapsed channels in a prototype, and a global scaling factor hid it). Afterwards the whitening of
the latents is folded into the two 1 x 1 convolutions around them, so that every channel has unit
variance and scaling_factor is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fifa.images import to_batch
from fifa.miniworld import render, sample_scene

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Log = Callable[[int, float, "AutoencoderKL"], None]
"""Called after each step with its number, its loss and the model."""

LATENT_CHANNELS = 8
PATCH = 4  # pixels a latent cell and side
LATENT_NOISE = 0.1  # standard deviations of a channel: what the decoder learns to forgive
POSTERIOR_LOGVAR = -9.0  # written into the folded encoder: `sample()` differs from `mean` by 0.01


def build() -> AutoencoderKL:
    """An untrained VAE; initialised from the global generator, which the caller has seeded."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
        force_upcast=False,
    )


def scene_batch(seed: int, step: int, size: int) -> Tensor:
    """Rendered scenes (size, 3, 32, 32) in [-1, 1]; depends on (seed, step) only."""
    rng = np.random.default_rng([seed, step])
    return to_batch([render(sample_scene(rng)[0]) for _ in range(size)]) * 2 - 1


def train(
    vae: AutoencoderKL,
    seed: int,
    steps: int,
    batch: int,
    learning_rate: float,
    log: Log,
    guided_share: float = 0.0,
    decoder_only: bool = False,
) -> None:
    """One cycle of training, in place, then the whitening of its latents is folded in.

    During the first `guided_share` of the steps the encoder is also pulled to the best linear code.
    `decoder_only` leaves the latents exactly as they are: a UNet trained on them still fits.
    """
    vae.train().to(memory_format=torch.channels_last)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(not decoder_only)
    descent = _Descent((p for p in vae.parameters() if p.requires_grad), learning_rate, steps)
    noise = torch.Generator().manual_seed(seed)
    codes = principal_components(scene_batch(seed + 1, 0, 512))
    for step in range(steps):
        x = scene_batch(seed, step, batch).to(memory_format=torch.channels_last)
        z = vae.encode(x).latent_dist.mean
        loss = 0.02 * _whiteness(z) + _loss(vae, x, z, noise)
        if step < guided_share * steps:
            loss = loss + (1 - step / (guided_share * steps)) * F.mse_loss(z, codes(x))
        descent.step(loss)
        log(step, loss.item(), vae)
    vae.eval().requires_grad_(True).to(memory_format=torch.contiguous_format)
    if decoder_only:
        return
    with torch.no_grad():
        batches = [scene_batch(seed + 1, i, 64) for i in range(16)]
        fold_whitening(vae, torch.cat([vae.encode(x).latent_dist.mean for x in batches]))


class _Descent:
    """AdamW with one cycle of the learning rate."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], learning_rate: float, steps: int
    ) -> None:
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=1e-3)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, learning_rate, total_steps=steps, pct_start=0.05
        )

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()


def principal_components(x: Tensor) -> Callable[[Tensor], Tensor]:
    """The whitened leading components of 4 x 4 patches, as a function of images; fitted to `x`.

    Left alone, the encoder first finds one or two channels and takes thousands of steps to open the
    others. Guided by the best linear code for a few hundred, it starts with all of them in use.
    """
    patches = _patches(x)
    mean = patches.mean(0)
    eigenvalues, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    leading = vectors[:, -LATENT_CHANNELS:] * eigenvalues[-LATENT_CHANNELS:].rsqrt()

    def code(images: Tensor) -> Tensor:
        side = images.shape[-1] // PATCH
        flat = ((_patches(images) - mean) @ leading).float()
        return flat.view(len(images), side, side, LATENT_CHANNELS).permute(0, 3, 1, 2)

    return code


def _patches(x: Tensor) -> Tensor:
    """(B, 3, H, W) to float64 (B * H/4 * W/4, 48)."""
    return F.pixel_unshuffle(x.double(), PATCH).permute(0, 2, 3, 1).flatten(0, 2)


def _whiteness(z: Tensor) -> Tensor:
    """Squared distance of the channels' covariance from identity, and of their mean from 0."""
    flat = z.movedim(1, 0).flatten(1)
    excess = torch.cov(flat) - torch.eye(len(flat))
    return (excess**2).sum() + (flat.mean(1) ** 2).sum()


def _loss(vae: AutoencoderKL, x: Tensor, z: Tensor, noise: torch.Generator) -> Tensor:
    """Absolute error of pixels and of edges; objects weigh four times the background."""
    spread = z.detach().std((0, 2, 3), keepdim=True)
    y = vae.decode(z + LATENT_NOISE * spread * torch.randn(z.shape, generator=noise)).sample
    backdrop = x.flatten(2).median(2).values[..., None, None]
    weight = 1 + 3 * ((x - backdrop).abs().amax(1, keepdim=True) > 0.3)
    pixels = (weight * (y - x).abs()).mean()
    edges = (torch.diff(y - x, dim=2).abs().mean() + torch.diff(y - x, dim=3).abs().mean()) / 2
    return pixels + edges + F.mse_loss(y, x)


@torch.no_grad()
def fold_whitening(vae: AutoencoderKL, latents: Tensor) -> None:
    """Make the latents white: z' = W (z - mean), in quant_conv; undone in post_quant_conv.

    Args:
        latents: (N, C, H, W) encoder means that the statistics are taken from.
    """
    z = latents.double().movedim(1, 0).flatten(1)  # (C, N*H*W)
    mean = z.mean(1)
    eigenvalues, vectors = torch.linalg.eigh(torch.cov(z))
    whiten = vectors @ torch.diag(eigenvalues.rsqrt()) @ vectors.T
    colour = vectors @ torch.diag(eigenvalues.sqrt()) @ vectors.T
    encode, decode, c = vae.quant_conv, vae.post_quant_conv, len(mean)
    weight, bias = encode.weight.double()[:c, :, 0, 0], encode.bias.double()[:c]
    encode.weight[:c, :, 0, 0] = whiten @ weight
    encode.bias[:c] = whiten @ (bias - mean)
    encode.weight[c:] = 0
    encode.bias[c:] = POSTERIOR_LOGVAR
    weight = decode.weight.double()[:, :, 0, 0]
    decode.bias += weight @ mean
    decode.weight[:, :, 0, 0] = weight @ colour

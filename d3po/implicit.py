"""The reward that a tuned policy implies, as one more judge: `d3po.implicit:ImplicitReward:RUN`.

Training on preferences makes a policy the optimum of some reward under a KL penalty (Rafailov et
al. 2023, arXiv 2305.18290, eq. 5); up to a constant of the prompt that reward is

    r(image, prompt) = beta * mean_k [log p(image | t_k, eps_k) - log p_ref(image | t_k, eps_k)]

with the re-noised likelihoods of Diffusion-DPO (see `d3po.likelihood`) at fixed times and noise,
the same for every image and both networks: what is compared is the images, not the draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from d3po.draws import derive_seed
from d3po.families import guided
from d3po.families.conditioning import Conditioning
from d3po.generate import encode_prompts
from d3po.likelihood import renoise_logp
from d3po.pair_cache import fitted
from d3po.recipe import load_run
from d3po.run_folder import RunFolder
from d3po.sampling import image_noise
from d3po.trainer import reference_logp
from fifa.config import InputError, fingerprint
from fifa.images import to_batch, to_uint8


class ImplicitReward:
    """How much likelier a run's policy finds an image than its reference does, times beta.

    Args:
        path: a run folder, finished or not.
        draws: times and noises an image is looked at with; one in each of as many equal parts of
            the noise schedule, so that few suffice.
        beta: scale of the score, as in the loss on likelihoods per element (published: 2000).
        seed: of the draws.
        batch: images a forward pass; scores do not depend on it but for rounding.
    """

    name = "implicit"
    needs = "the folder of a run"
    differentiable = False

    def __init__(
        self,
        path: str | Path,
        draws: int = 16,
        beta: float = 2000.0,
        seed: int = 0,
        batch: int = 32,
    ) -> None:
        if draws < 1 or batch < 1 or beta <= 0:
            raise InputError(
                f"an implicit reward needs draws >= 1, batch >= 1 and beta > 0, "
                f"got {draws}, {batch} and {beta:g}"
            )
        self.path, self.beta, self.batch = Path(path), beta, batch
        _, self.policy = load_run(path)
        self.family = self.policy.family
        self.name = f"implicit:{Path(path).name}"
        self.version = _version(Path(path), f"{draws} {beta} {seed}")
        shape, schedule = self.family.latent_shape, self.family.schedule
        seeds = [derive_seed(seed, "implicit noise", k) for k in range(draws)]
        times = [
            schedule.random_time(
                derive_seed(seed, "implicit time", k), (k / draws, (k + 1) / draws)
            )
            for k in range(draws)
        ]
        self.noise = image_noise(seeds, shape, 0)  # (K, C, h, w)
        self.times = torch.tensor(times, dtype=schedule.time_dtype)  # (K,)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 (N,) of images (N, 3, H, W) in [0, 1], cut and resized to the model's."""
        if len(images) != len(prompts):
            raise InputError(
                f"reward '{self.name}' got {len(images)} images but {len(prompts)} prompts"
            )
        parts = [
            self._scored(images[i : i + self.batch], prompts[i : i + self.batch])
            for i in range(0, len(images), self.batch)
        ]
        return torch.cat(parts).to(images.device) if parts else torch.empty(0)

    def to(self, device: str) -> ImplicitReward:
        """Open the run anew on another device."""
        if torch.device(device) != self.family.device:
            _, self.policy = load_run(self.path, device)
            self.family = self.policy.family
        return self

    @torch.no_grad()
    def _scored(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        side = self.family.image_size
        if images.shape[2:] != (side, side):
            images = to_batch([fitted(hwc, side) for hwc in to_uint8(images)])
        device = self.family.device
        x0 = self.family.encode_images(images.to(device))
        cond = encode_prompts(self.family, prompts)
        policy = self._logp(self.policy.bare, x0, cond)
        ref = reference_logp(self.policy, lambda denoiser: self._logp(denoiser, x0, cond))
        return self.beta * (policy - ref).mean(1).float()

    def _logp(self, denoiser: nn.Module, x0: Tensor, cond: Conditioning) -> Tensor:
        """Log-likelihoods (N, K) without their constant, float64: their difference is small."""
        count = len(x0)
        noise = self.noise.to(x0.device).expand(count, *self.noise.shape)
        times = self.times.to(x0.device).expand(count, -1)
        predict = guided(self.family, denoiser, cond)
        return renoise_logp(predict, self.family.schedule, x0, noise, times).double()


def _version(path: Path, settings: str) -> str:
    """Changes with the weights of the run, and with how they are asked."""
    weights = RunFolder(path).weights
    newest = RunFolder(path).newest()
    if weights.is_dir():
        return fingerprint(weights, settings)
    return fingerprint(*([newest.path] if newest else []), settings)

"""Noise schedules as values: how much signal and noise a time holds, and which times a path visits.

    x_t = alpha_t * x0 + sigma_t * eps

    NoiseSchedule (DDPM)           alpha_t = sqrt(abar_t),  sigma_t = sqrt(1 - abar_t)
    FlowSchedule (rectified flow)  alpha_t = 1 - s,         sigma_t = s = t / 1000

Everything here is float64 and stays on the CPU: schedules are a few kilobytes, and looking a value
up there never makes a GPU wait. `per_image` is the only place where a value per image meets a
tensor of images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from fifa.config import InputError

Prediction = Literal["epsilon", "v_prediction", "sample"]
Spacing = Literal["leading", "trailing", "linspace"]


def append_dims(x: Tensor, ndim: int) -> Tensor:
    """View (B,) as (B, 1, ..., 1) with `ndim` axes; anything but one value per row is an error."""
    if x.ndim != 1:
        raise ValueError(f"expected one value per row, shape (B,), got shape {tuple(x.shape)}")
    return x.reshape(-1, *[1] * (ndim - 1))


def per_image(values: Tensor, x: Tensor) -> Tensor:
    """One value per image, (B,), as a factor of x (B, ...), on its device and in its dtype.

    A single value is not spread over a batch: (1,) against B = 3 is an error, as it is a mistake.
    """
    if values.shape != (len(x),):
        raise ValueError(f"expected one value per image, ({len(x)},), got {tuple(values.shape)}")
    return append_dims(values, x.ndim).to(x)


class Schedule(Protocol):
    """What sampling and likelihood ask of a schedule; t (B,) is of `time_dtype`, on any device."""

    time_dtype: ClassVar[torch.dtype]

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), each (B,) float64 on the CPU."""
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t * x0 + sigma_t * noise for x0, noise (B, ...)."""
        ...

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a perfect network outputs for x_t = add_noise(x0, noise, t)."""
        ...

    def to_x0_eps(self, pred: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) that the network output `pred` at x_t stands for, in the dtype of x_t."""
        ...

    def grid(self, steps: int, eta: float) -> TimeGrid:
        """The path of `steps` steps with noise level eta; InputError if there is none."""
        ...

    def random_time(self, draw: int, part: tuple[float, float]) -> float:
        """The time that `draw`, uniform in [0, 2^63), falls on.

        Uniform over a `part` of the schedule, from 0 (clean) to 1 (pure noise).
        """
        ...


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving schedule over the model times 0 .. N-1, and what the network predicts.

    `spacing` and `steps_offset` say which of the N times a shorter path visits;
    `final_alpha_cumprod` is the signal level that the last step of every path arrives at.
    """

    alphas_cumprod: Tensor  # (N,) float64, abar_t, decreasing
    prediction: Prediction
    final_alpha_cumprod: float
    steps_offset: int = 0
    spacing: Spacing = "leading"

    time_dtype: ClassVar[torch.dtype] = torch.long

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule that `DDIMScheduler.from_config(scheduler.config)` would sample with.

        Any diffusers scheduler over discrete times will do; only its config is read. Clipping of
        x0 is never applied, as in StableDiffusionPipeline. Raises InputError for thresholding, for
        predicted noise at zero SNR, and for schedules that are not of the DDPM kind.
        """
        from diffusers import DDIMScheduler

        config = dict(scheduler.config)
        name = type(scheduler).__name__
        prediction = config.get("prediction_type", "epsilon")
        has_abar = hasattr(scheduler, "alphas_cumprod")
        if not has_abar or prediction not in get_args(Prediction):
            raise InputError(
                f"the scheduler {name} (prediction_type {prediction!r}) has no DDPM noise schedule;"
                f" supported are schedulers with prediction_type {', '.join(get_args(Prediction))}"
            )
        if config.get("thresholding", False):
            raise InputError(f"{name}: thresholding=True is not supported, it has no log-density")
        ddim = DDIMScheduler.from_config(scheduler.config)
        if prediction == "epsilon" and float(ddim.alphas_cumprod.min()) <= 0:
            raise InputError(
                f"{name}: at zero terminal SNR the predicted noise says nothing of the picture;"
                " rescale_betas_zero_snr goes with prediction_type v_prediction or sample"
            )
        return cls(
            alphas_cumprod=ddim.alphas_cumprod.double(),
            prediction=prediction,
            final_alpha_cumprod=float(ddim.final_alpha_cumprod),
            steps_offset=ddim.config.steps_offset,
            spacing=ddim.config.timestep_spacing,
        )

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def abar(self, t: Tensor) -> Tensor:
        """abar_t (B,) float64 on the CPU for model times t (B,) long; an index, never a wrap."""
        t = t.cpu()
        if t.ndim != 1 or t.is_floating_point():
            raise ValueError(f"t must be (B,) integers, got {tuple(t.shape)} {t.dtype}")
        if t.numel() and (int(t.min()) < 0 or int(t.max()) >= len(self)):
            raise ValueError(f"t must lie in 0..{len(self) - 1}, got {t.tolist()}")
        return self.alphas_cumprod[t]

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), each (B,) float64 on the CPU, for model times t (B,) long."""
        abar = self.abar(t)
        return abar.sqrt(), (1 - abar).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t * x0 + sigma_t * noise for x0, noise (B, ...) and t (B,) (DDPM eq. 4)."""
        alpha, sigma = (per_image(v, x0) for v in self.alpha_sigma(t))
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a perfect network outputs for x_t = add_noise(x0, noise, t).

        epsilon: noise; v_prediction: alpha_t * noise - sigma_t * x0 (Salimans & Ho 2022,
        section 4); sample: x0.
        """
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        alpha, sigma = (per_image(v, x0) for v in self.alpha_sigma(t))
        return alpha * noise - sigma * x0

    def to_x0_eps(self, pred: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) that the network output `pred` (B, ...) at x_t (B, ...), t (B,) stands for.

        Computed in the dtype of x_t (float32 or float64); `pred` is cast up to it.
        """
        pred = pred.to(x_t.dtype)
        alpha, sigma = (per_image(v, x_t) for v in self.alpha_sigma(t))
        if self.prediction == "epsilon":
            return (x_t - sigma * pred) / alpha, pred
        if self.prediction == "sample":
            return pred, (x_t - alpha * pred) / sigma
        return alpha * x_t - sigma * pred, alpha * pred + sigma * x_t

    def grid(self, steps: int, eta: float) -> TimeGrid:
        """`ddim_grid` of this schedule."""
        return ddim_grid(self, steps, eta)

    def random_time(self, draw: int, part: tuple[float, float]) -> int:
        """One of the N times, uniform over those of `part`."""
        low, high = (round(share * len(self)) for share in part)
        low = min(low, len(self) - 1)  # a part narrower than a time is its nearest one
        return low + draw % max(1, high - low)


@dataclass(frozen=True, eq=False)
class FlowSchedule:
    """Rectified flow (Liu et al. 2023): x_s = (1 - s) x0 + s eps, the network predicts eps - x0.

    The model time is t = 1000 s, a float. Both a path's steps and random times are spread evenly
    over u in (0, 1] and then shifted to the noisy side, more so for large images:

        s = k u / (1 + (k - 1) u) = u / (u + (1 - u) / k)

    with k = shift (Esser et al. 2024, eq. 23).
    """

    shift: float = 1.0  # k
    last: float | None = None  # u where the last step of a path begins; None: 1 / steps

    time_dtype: ClassVar[torch.dtype] = torch.float64
    scale: ClassVar[float] = 1000.0  # model time of pure noise

    @classmethod
    def from_diffusers(cls, scheduler: Any, tokens: int, last: float | None) -> FlowSchedule:
        """The schedule of a FlowMatchEulerDiscreteScheduler for images of `tokens` patches.

        `last` is how the family's pipeline spaces its steps (see the class). A dynamic shift is
        interpolated between two numbers of tokens and is exp(mu), or mu where it is linear; either
        is one k. Raises InputError for settings of the scheduler that make another path.
        """
        config = scheduler.config
        made_otherwise = [
            name
            for name in (
                "use_karras_sigmas",
                "use_exponential_sigmas",
                "use_beta_sigmas",
                "invert_sigmas",
                "shift_terminal",
                "stochastic_sampling",
            )
            if config.get(name)
        ]
        if made_otherwise or config.num_train_timesteps != cls.scale:
            raise InputError(
                f"the scheduler {type(scheduler).__name__} sets"
                f" {', '.join(made_otherwise) or 'num_train_timesteps'}; supported are 1000 times"
                " with a static or a dynamic shift"
            )
        if not config.use_dynamic_shifting:
            return cls(float(config.shift), last)
        slope = (config.max_shift - config.base_shift) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
        return cls(math.exp(mu) if config.time_shift_type == "exponential" else mu, last)

    def shifted(self, u: Tensor) -> Tensor:
        """s of u, elementwise."""
        return u / (u + (1 - u) / self.shift)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(1 - s, s), each (B,) float64 on the CPU, for model times t = 1000 s (B,)."""
        t = t.cpu().double()
        if t.ndim != 1 or bool(((t < 0) | (t > self.scale)).any()):
            raise ValueError(f"t must be (B,) numbers in 0..{self.scale:g}, got {t.tolist()}")
        s = t / self.scale
        return 1 - s, s

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_s = (1 - s) x0 + s noise for x0, noise (B, ...) and t (B,)."""
        alpha, sigma = (per_image(v, x0) for v in self.alpha_sigma(t))
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity noise - x0, at every time."""
        return noise - x0

    def to_x0_eps(self, pred: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_s - s v, x_s + (1 - s) v) for a predicted velocity v, in the dtype of x_t."""
        pred = pred.to(x_t.dtype)
        alpha, sigma = (per_image(v, x_t) for v in self.alpha_sigma(t))
        return x_t - sigma * pred, x_t + alpha * pred

    def grid(self, steps: int, eta: float) -> TimeGrid:
        """`flow_grid` of this schedule; eta is the noise level of Flow-GRPO."""
        return flow_grid(self, steps, eta)

    def random_time(self, draw: int, part: tuple[float, float]) -> float:
        """A time whose u is uniform over `part`: as often as long paths pass there."""
        low, high = part
        u = low + (high - low) * (draw + 1) / 2**63  # a time of 0 would have no noise
        return float(self.shifted(torch.tensor(u, dtype=torch.float64))) * self.scale


@dataclass(frozen=True, eq=False)
class TimeGrid:
    """The T steps of a path, noisiest first; row i goes from x_t at `times[i]` to a less noisy x_s.

        x_s = to_x0 * x0 + to_eps * eps + sigma * noise

    where (x0, eps) is what the network makes of x_t. The last row is a row like any other: its
    `to_x0` is where the path ends, and its sigma may be 0 (see `stochastic`).
    """

    times: Tensor  # (T,) descending: the model time of x_t, long or float64
    to_x0: Tensor  # (T,) float64
    to_eps: Tensor  # (T,) float64
    sigma: Tensor  # (T,) float64, standard deviation of the noise added by the step

    def __len__(self) -> int:
        return len(self.times)

    @property
    def stochastic(self) -> list[int]:
        """The steps with sigma > 0: those that have a density and can be scored or trained on.

        All of them for eta > 0 and an SD scheduler; all but the last for a flow, where a path ends
        at abar = 1 (`set_alpha_to_one=True`), or where it starts and ends at the same time
        (`steps_offset=0` with `set_alpha_to_one=False`); none for eta = 0.
        """
        return [i for i, sigma in enumerate(self.sigma.tolist()) if sigma > 0]


def ddim_grid(schedule: NoiseSchedule, steps: int, eta: float) -> TimeGrid:
    """The grid of `steps` DDIM steps; eta 0 is deterministic, 1 has the noise of DDPM.

    DDIM (Song et al. 2021) eq. 16:

        sigma^2 = eta^2 * (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)

    Times and neighbours are those of diffusers' DDIMScheduler, its last step included. Raises
    InputError for a number of steps or an eta that the schedule cannot hold.
    """
    if not 1 <= steps <= len(schedule):
        raise InputError(f"the number of steps is {steps}, it must lie in 1..{len(schedule)}")
    if eta < 0:
        raise InputError(f"eta is {eta}, it must not be negative (0 deterministic, 1 like DDPM)")
    times = _times(schedule, steps)
    if int(times.max()) >= len(schedule):
        raise InputError(
            f"{steps} steps with steps_offset {schedule.steps_offset} visit time"
            f" {int(times.max())}, the schedule ends at {len(schedule) - 1}: use fewer steps"
        )
    abar_t = schedule.abar(times)
    previous = times - len(schedule) // steps
    final = torch.full_like(abar_t, schedule.final_alpha_cumprod)
    abar_s = torch.where(previous < 0, final, schedule.abar(previous.clamp(min=0)))
    variance = (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)
    sigma = eta * variance.sqrt()
    if bool((1 - abar_s - sigma**2 < 0).any()):
        raise InputError(
            f"eta is {eta}, a step would add more noise than it may end with; use <= 1"
        )
    return TimeGrid(times, abar_s.sqrt(), (1 - abar_s - sigma**2).sqrt(), sigma)


def flow_grid(schedule: FlowSchedule, steps: int, eta: float) -> TimeGrid:
    """The grid of `steps` steps of a flow from s = 1 to 0; eta 0 is Euler's method on the ODE.

    Else the Euler-Maruyama steps of Flow-GRPO's SDE (Liu et al. 2025, eq. 9 and 12), which has the
    marginals of the ODE. From s to s' = s - h, with std^2 = eta^2 s / (1 - s):

        x' = x - h v - h std^2 / (2 s) * (x + (1 - s) v) + std * sqrt(h) * noise

    Here x - h v = (1 - s') x0 + s' eps and x + (1 - s) v = eps, so all of it is
    (1 - s') x0 + (s' - sigma^2 / (2 s)) eps + sigma * noise with sigma = std * sqrt(h). At s = 1,
    where std has no bound, 1 - s is taken at the step's end, as in the published code.

    The last step adds no noise: it would stay in the picture. (The published code adds some there,
    and leaves that step out of training.)
    """
    if steps < 1:
        raise InputError(f"the number of steps is {steps}, it must be at least 1")
    if eta < 0:
        raise InputError(f"eta is {eta}, it must not be negative (0 deterministic, published 0.7)")
    last = 1 / steps if schedule.last is None else schedule.last
    s = schedule.shifted(torch.linspace(1.0, last, steps, dtype=torch.float64))
    after = torch.cat([s[1:], s.new_zeros(1)])
    left = torch.where(s < 1, 1 - s, 1 - after)
    sigma = eta * (s / left * (s - after)).sqrt()
    sigma[-1] = 0
    return TimeGrid(s * schedule.scale, 1 - after, after - sigma**2 / (2 * s), sigma)


def _times(schedule: NoiseSchedule, steps: int) -> Tensor:
    """(steps,) long, descending; the three spacings of Lin et al. 2024, table 2."""
    n = len(schedule)
    if schedule.spacing == "leading":
        return torch.arange(steps).flip(0) * (n // steps) + schedule.steps_offset
    if schedule.spacing == "trailing":
        ends = n - torch.arange(steps, dtype=torch.float64) * (n / steps)
        return ends.round().long() - 1
    return torch.linspace(0, n - 1, steps, dtype=torch.float64).round().long().flip(0)

"""Rectified flow against diffusers' scheduler, Flow-GRPO's formulas, and a known Gaussian."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from d3po.sampling import step_mean
from d3po.schedule import FlowSchedule, NoiseSchedule, TimeGrid
from fifa.config import InputError

KINDS = ["sd3", "sd3-dynamic", "flux", "flux-linear", "schnell"]
TOKENS = 1024


def scheduler_and_schedule(
    kind: str, steps: int
) -> tuple[FlowMatchEulerDiscreteScheduler, FlowSchedule]:
    """A scheduler with its times set as the pipeline of its kind sets them, and ours of it."""
    dynamic = kind in ("sd3-dynamic", "flux", "flux-linear")
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0 if kind == "schnell" else 3.0,
        use_dynamic_shifting=dynamic,
        time_shift_type="linear" if kind == "flux-linear" else "exponential",
    )
    sd3 = kind.startswith("sd3")
    schedule = FlowSchedule.from_diffusers(
        scheduler, TOKENS, last=scheduler.sigma_min if sd3 else None
    )
    mu = calculate_shift(TOKENS) if dynamic else None
    sigmas = None if sd3 else np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(steps, sigmas=sigmas, mu=mu)
    return scheduler, schedule


@pytest.mark.parametrize("steps", [1, 2, 10, 28])
@pytest.mark.parametrize("kind", KINDS)
def test_the_grid_visits_the_times_of_diffusers(kind: str, steps: int) -> None:
    scheduler, schedule = scheduler_and_schedule(kind, steps)
    grid = schedule.grid(steps, 0.0)
    assert grid.times.dtype == torch.float64
    torch.testing.assert_close(grid.times, scheduler.timesteps.double(), rtol=2e-7, atol=0)
    torch.testing.assert_close(1 - grid.to_x0, scheduler.sigmas[1:].double(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_every_step_is_that_of_diffusers(kind: str) -> None:
    scheduler, schedule = scheduler_and_schedule(kind, 10)
    scheduler.sigmas = scheduler.sigmas.double()
    grid = schedule.grid(10, 0.0)
    assert grid.stochastic == []
    generator = torch.Generator().manual_seed(0)
    x_t, v = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64, generator=generator)
    x_t = x_t.float().double()  # diffusers rounds the latents to float32
    for i, t in enumerate(scheduler.timesteps):  # the last one included
        want = scheduler.step(v, t, x_t).prev_sample
        got = step_mean(grid, schedule, i, x_t, v)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0.3, 0.7, 1.0])
def test_with_noise_every_step_is_that_of_flow_grpo(kind: str, level: float) -> None:
    """Mean and spread written from Flow-GRPO's eq. 12 in x and v, as its authors compute them."""
    _, schedule = scheduler_and_schedule(kind, 10)
    s = torch.cat([schedule.grid(10, 0.0).times / 1000, torch.zeros(1)])
    grid = schedule.grid(10, level)
    assert grid.stochastic == list(range(9))
    x_t, v = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    for i in grid.stochastic:
        now, dt = float(s[i]), float(s[i + 1] - s[i])
        std = level * math.sqrt(now / (1 - (float(s[1]) if now == 1 else now)))
        mean = x_t * (1 + std**2 / (2 * now) * dt)
        mean = mean + v * (1 + std**2 * (1 - now) / (2 * now)) * dt
        torch.testing.assert_close(step_mean(grid, schedule, i, x_t, v), mean, rtol=0, atol=1e-12)
        assert float(grid.sigma[i]) == pytest.approx(std * math.sqrt(-dt), abs=1e-12)


def test_worked_example_of_the_sde() -> None:
    # Two steps, no shift, level 1/2: s = 1, 1/2, 0.
    #   first: 1 - s is taken at the end, 1/2; std^2 = 1/4 * 1 / (1/2) = 1/2; sigma^2 = 1/2 * 1/2
    #          to_x0 = 1/2; to_eps = 1/2 - (1/4) / 2 = 3/8
    #   last:  to_x0 = 1, to_eps = 0, no noise
    grid = FlowSchedule().grid(2, 0.5)
    assert grid.times.tolist() == [1000, 500]
    assert grid.sigma.tolist() == [0.5, 0]
    assert grid.to_x0.tolist() == [0.5, 1]
    assert grid.to_eps.tolist() == [0.375, 0]


def moments_at_the_end(grid: TimeGrid, mean: float, spread: float) -> tuple[float, float]:
    """Mean and variance of the end of a path where x0 ~ N(mean, spread^2), without sampling.

    x_s is Gaussian with variance V = (1 - s)^2 spread^2 + s^2, so a perfect network predicts
    E[eps | x] = s / V * (x - (1 - s) mean) and E[x0 | x] = mean + (1 - s) spread^2 / V * (...).
    Each step is then linear in x, and moments go through it exactly.
    """
    first, second = 0.0, 1.0  # of pure noise
    for i in range(len(grid)):
        s = float(grid.times[i]) / 1000
        variance = (1 - s) ** 2 * spread**2 + s**2
        to_x0, to_eps, sigma = (float(row[i]) for row in (grid.to_x0, grid.to_eps, grid.sigma))
        slope = to_x0 * (1 - s) * spread**2 / variance + to_eps * s / variance
        first = to_x0 * mean + slope * (first - (1 - s) * mean)
        second = slope**2 * second + sigma**2
    return first, second


@pytest.mark.parametrize("level", [0.0, 0.3, 0.7, 1.0])
def test_ode_and_sde_end_in_the_data_as_steps_grow(level: float) -> None:
    mean, spread = 1.5, 0.6
    errors = []
    for steps in (20, 200, 2000):
        first, second = moments_at_the_end(FlowSchedule(shift=2.0).grid(steps, level), mean, spread)
        errors.append(abs(first - mean) + abs(second - spread**2))
    assert errors[2] < 2e-3
    assert errors[0] > errors[1] > errors[2]
    if level == 0:  # of first order, as Euler's method is
        assert errors[0] > 8 * errors[1] > 64 * errors[2]


def test_noise_target_and_their_inverse() -> None:
    schedule = FlowSchedule(shift=3.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    x0, noise = torch.randn(2, 4, 4, 8, 8, dtype=torch.float64)
    t = scheduler.timesteps[[0, 300, 700, 999]]
    x_t = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, scheduler.scale_noise(x0, t, noise), rtol=0, atol=2e-7)
    got = schedule.to_x0_eps(schedule.target(x0, noise, t), x_t, t)
    torch.testing.assert_close(got[0], x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(got[1], noise, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="t must be"):
        schedule.add_noise(x0[:1], noise[:1], torch.tensor([1001.0]))


def test_random_times_are_as_often_as_long_paths_pass() -> None:
    schedule = FlowSchedule(shift=3.0)
    draws = range(0, 2**63, 2**63 // 1000)
    times = torch.tensor([schedule.random_time(draw, (0.0, 1.0)) for draw in draws])
    path = schedule.grid(len(times), 0.0).times.flip(0).float()
    torch.testing.assert_close(times, path, rtol=0, atol=4.0)
    assert float(times.min()) > 0
    assert float(times.max()) <= 1000
    noisy = [schedule.random_time(draw, (0.5, 1.0)) for draw in draws]
    assert min(noisy) == pytest.approx(750, abs=1)  # u = 1/2 is s = 3/4 at shift 3
    assert schedule.random_time(2**63 - 1, (0.0, 1.0)) == 1000


def test_random_times_of_ddpm_are_indices_of_the_part() -> None:
    schedule = NoiseSchedule(torch.linspace(0.99, 0.01, 10).double(), "epsilon", 0.99)
    assert {schedule.random_time(draw, (0.5, 1.0)) for draw in range(100)} == {5, 6, 7, 8, 9}
    assert {schedule.random_time(draw, (0.99, 1.0)) for draw in range(9)} == {9}


@pytest.mark.parametrize(
    "settings",
    [
        {"use_karras_sigmas": True},
        {"stochastic_sampling": True},
        {"invert_sigmas": True},
        {"shift_terminal": 0.1},
        {"num_train_timesteps": 100},
    ],
)
def test_other_paths_are_refused_by_name(settings: dict[str, object]) -> None:
    (name,) = settings
    with pytest.raises(InputError, match=name):
        FlowSchedule.from_diffusers(FlowMatchEulerDiscreteScheduler(**settings), 64, None)


@pytest.mark.parametrize(("steps", "eta", "says"), [(0, 0.7, "at least 1"), (4, -0.1, "negative")])
def test_impossible_grids_are_refused(steps: int, eta: float, says: str) -> None:
    with pytest.raises(InputError, match=says):
        FlowSchedule().grid(steps, eta)

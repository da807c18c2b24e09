from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d3po.families import guided, load_family
from d3po.sampling import image_noise, logp, path_noise, rollout, step_logp, step_mean
from d3po.schedule import NoiseSchedule, ddim_grid
from fifa.config import InputError

STEPS = 20


def double_ddim(prediction: str, to_one: bool) -> DDIMScheduler:
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=to_one,
        clip_sample=False,
        prediction_type=prediction,
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(STEPS)
    return scheduler


@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_step_is_that_of_diffusers(prediction: str, eta: float, to_one: bool) -> None:
    scheduler = double_ddim(prediction, to_one)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    grid = ddim_grid(schedule, STEPS, eta)
    generator = torch.Generator().manual_seed(0)
    x_t, pred, noise = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64, generator=generator)
    for i, t in enumerate(scheduler.timesteps.tolist()):  # the last one included
        mean = step_mean(grid, schedule, i, x_t, pred)
        still = scheduler.step(pred, t, x_t, eta=eta, variance_noise=torch.zeros_like(noise))
        moved = scheduler.step(pred, t, x_t, eta=eta, variance_noise=noise)
        torch.testing.assert_close(mean, still.prev_sample, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            mean + grid.sigma[i] * noise, moved.prev_sample, rtol=0, atol=1e-6
        )
        sigma = (moved.prev_sample - still.prev_sample).std() / noise.std()
        assert float(grid.sigma[i]) == pytest.approx(float(sigma), abs=1e-6)


def test_steps_may_differ_from_image_to_image() -> None:
    schedule = NoiseSchedule.from_diffusers(double_ddim("v_prediction", False))
    grid = ddim_grid(schedule, STEPS, 1.0)
    x_t, pred = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    rows = torch.tensor([19, 0, 7])
    together = step_mean(grid, schedule, rows, x_t, pred)
    for b, i in enumerate(rows.tolist()):
        alone = step_mean(grid, schedule, i, x_t[b : b + 1], pred[b : b + 1])
        assert torch.equal(together[b : b + 1], alone)
    with pytest.raises(ValueError, match="one step per image"):
        step_mean(grid, schedule, torch.tensor([1, 2]), x_t, pred)


def test_logp_is_the_normal_density() -> None:
    generator = torch.Generator().manual_seed(0)
    x_s, mean = torch.randn(2, 3, 4, 2, 5, dtype=torch.float64, generator=generator)
    sigma = torch.tensor([0.02, 0.3, 1.0], dtype=torch.float64)
    want = torch.stack(
        [torch.distributions.Normal(mean[b], sigma[b]).log_prob(x_s[b]).flatten() for b in range(3)]
    )
    torch.testing.assert_close(logp(x_s, mean, sigma, "sum"), want.sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(logp(x_s, mean, sigma, "mean"), want.mean(1), rtol=1e-12, atol=0)


def test_logp_worked_example() -> None:
    # one element, one standard deviation off, sigma 1/2: -1/2 - ln(1/2) - 1/2 ln(2 pi)
    x_s, mean = torch.full((1, 1, 1, 1), 1.5), torch.ones(1, 1, 1, 1)
    got = logp(x_s, mean, torch.tensor([0.5], dtype=torch.float64))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(-0.5 + math.log(2) - 0.5 * math.log(2 * math.pi), abs=1e-6)


def test_a_step_without_noise_has_no_logp() -> None:
    x = torch.zeros(2, 1, 1, 1)
    with pytest.raises(InputError, match="sigma 0"):
        logp(x, x, torch.tensor([0.5, 0.0]))
    with pytest.raises(InputError, match="reduce"):
        logp(x, x, torch.ones(2), "max")  # type: ignore[arg-type]


def zero(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.zeros_like(x_t)


@pytest.mark.parametrize(("eta", "to_one", "scored"), [(0.0, False, 0), (1.0, True, 19)])
def test_deterministic_steps_are_walked_but_not_scored(
    eta: float, to_one: bool, scored: int
) -> None:
    schedule = NoiseSchedule.from_diffusers(double_ddim("epsilon", to_one))
    grid = ddim_grid(schedule, STEPS, eta)
    x_T = image_noise([1, 2], (4, 8, 8), -1)
    path = rollout(zero, grid, schedule, x_T, path_noise([1, 2], (4, 8, 8)))
    assert path.logp.isfinite().sum(1).tolist() == [scored] * 2
    assert grid.stochastic == list(range(scored))
    with pytest.raises(InputError, match="sigma 0"):
        step_logp(zero, grid, schedule, STEPS - 1, path.latents[:, -2], path.latents[:, -1])


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sd_v"])
def test_rescoring_under_the_same_weights_is_bitwise_equal(
    name: str, scale: float, request: pytest.FixtureRequest
) -> None:
    family = load_family(request.getfixturevalue(name))
    cond, uncond = family.encode_text(["a red circle", "two stars"]), family.encode_text([""])
    predict = guided(family, family.denoiser, cond, uncond, scale)
    grid = ddim_grid(family.schedule, 5, 1.0)
    shape = family.latent_shape
    path = rollout(
        predict, grid, family.schedule, image_noise([3, 3], shape, -1), path_noise([4, 5], shape)
    )
    assert path.latents.shape == (2, 6, *shape)
    assert path.latents.dtype == path.logp.dtype == torch.float32
    for i in grid.stochastic:
        x_t, x_s = path.latents[:, i], path.latents[:, i + 1]
        again = step_logp(predict, grid, family.schedule, i, x_t, x_s)
        assert torch.equal(again, path.logp[:, i])


def test_rollout_equals_the_diffusers_pipeline(tiny_sd: Path) -> None:
    from diffusers import StableDiffusionPipeline

    family = load_family(tiny_sd)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red circle above a blue square", "two small green triangles"]
    x_T = image_noise([1, 2], family.latent_shape, -1)
    want = pipe(
        prompts, num_inference_steps=4, guidance_scale=3.0, latents=x_T, output_type="pt", eta=0.0
    ).images
    cond, uncond = family.encode_text(prompts), family.encode_text([""])
    predict = guided(family, family.denoiser, cond, uncond, 3.0)
    grid = ddim_grid(family.schedule, 4, 0.0)
    path = rollout(predict, grid, family.schedule, x_T, path_noise([1, 2], family.latent_shape))
    torch.testing.assert_close(family.decode(path.x0), want, rtol=0, atol=1e-5)


SEEDS = st.integers(0, 2**64 - 1)


@given(st.lists(SEEDS, min_size=1, max_size=5), st.integers(-1, 1000))
@settings(max_examples=25, deadline=None)
def test_noise_does_not_depend_on_the_batch(seeds: list[int], step: int) -> None:
    together = image_noise(seeds, (2, 3), step)
    for row, seed in zip(together, seeds, strict=True):
        assert torch.equal(row, image_noise([seed], (2, 3), step)[0])


def test_noise_streams_are_distinct_normal_and_leave_global_state_alone() -> None:
    before = torch.get_rng_state()
    # seeds that agree in their low 32 bits, neighbours, and (seed, step) against (step, seed)
    keys = [(1, 0), (1 + 2**32, 0), (2, 0), (0, 1), (1, 1), (1, -1), (2**64 - 1, 999)]
    draws = torch.stack([image_noise([seed], (100, 100), step)[0] for seed, step in keys])
    correlation = torch.corrcoef(draws.flatten(1))
    assert float((correlation - torch.eye(len(keys))).abs().max()) < 0.05  # 5 sigma is 0.05
    assert draws.mean().abs() < 0.02
    assert (draws.std() - 1).abs() < 0.02
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_the_same_tomorrow() -> None:
    # a change here makes every published seed mean another picture
    want = [-0.19840083, 0.71615297, -1.80004609, 0.00501120]
    got = image_noise([0, 123456789], (2,), 7).flatten().tolist()
    assert got == pytest.approx(want, abs=1e-6)


def test_seeds_outside_64_bits_are_refused() -> None:
    for seed in (-1, 2**64):
        with pytest.raises(InputError, match="seed"):
            image_noise([seed], (2,), 0)
    with pytest.raises(ValueError, match="step"):
        image_noise([0], (2,), -2)

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from d3po.schedule import NoiseSchedule, append_dims, ddim_grid, per_image
from fifa.config import InputError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ddim(**kwargs: object) -> DDIMScheduler:
    settings = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False, **kwargs}
    return DDIMScheduler(**SD, **settings)


def test_append_dims_refuses_what_is_not_one_value_per_row() -> None:
    assert append_dims(torch.ones(3), 4).shape == (3, 1, 1, 1)
    for shape in [(), (3, 1), (1, 3)]:
        with pytest.raises(ValueError, match=r"shape \(B,\)"):
            append_dims(torch.ones(shape), 4)


def test_one_value_is_not_spread_over_a_batch() -> None:
    x = torch.zeros(3, 4, 8, 8)
    schedule = NoiseSchedule.from_diffusers(ddim())
    for calls in (
        lambda: per_image(torch.ones(1), x),
        lambda: schedule.add_noise(x, x, torch.tensor([5])),
        lambda: schedule.to_x0_eps(x, x, torch.tensor([5, 6])),
    ):
        with pytest.raises(ValueError, match=r"one value per image, \(3,\)"):
            calls()


@pytest.mark.parametrize("batch", [1, 3, 4, 8])
def test_a_value_per_image_never_lands_on_another_axis(batch: int) -> None:
    # B collides with C, H, W in turn: a wrong broadcast would go unnoticed by shape alone
    schedule = NoiseSchedule.from_diffusers(ddim())
    x0, noise = torch.randn(2, batch, 4, 8, 3, dtype=torch.float64)
    t = torch.linspace(0, 999, batch).long()
    together = schedule.add_noise(x0, noise, t)
    for b in range(batch):
        abar = schedule.alphas_cumprod[t[b]]
        alone = abar.sqrt() * x0[b] + (1 - abar).sqrt() * noise[b]
        torch.testing.assert_close(together[b], alone, rtol=0, atol=1e-15)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_target_equal_diffusers(prediction: str) -> None:
    scheduler = DDPMScheduler(**SD, prediction_type=prediction)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    schedule = NoiseSchedule.from_diffusers(scheduler)
    x0, noise = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64)
    t = torch.tensor([0, 1, 500, 998, 999])
    x_t = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, noise, t), rtol=0, atol=1e-12)
    want = noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(schedule.target(x0, noise, t), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_network_gives_back_image_and_noise(prediction: str) -> None:
    schedule = NoiseSchedule.from_diffusers(ddim(prediction_type=prediction))
    x0, noise = torch.randn(2, 6, 4, 8, 8, dtype=torch.float64)
    t = torch.tensor([0, 1, 20, 500, 998, 999])
    pred = schedule.target(x0, noise, t)
    got_x0, got_noise = schedule.to_x0_eps(pred, schedule.add_noise(x0, noise, t), t)
    torch.testing.assert_close(got_x0, x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(got_noise, noise, rtol=0, atol=1e-10)


def test_low_precision_predictions_are_cast_up_to_the_latents() -> None:
    schedule = NoiseSchedule.from_diffusers(ddim())
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([1, 999])
    x0, eps = schedule.to_x0_eps(torch.randn(2, 4, 8, 8).bfloat16(), x_t, t)
    assert x0.dtype == eps.dtype == torch.float32


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_the_grid_visits_the_times_of_diffusers(spacing: str, steps: int) -> None:
    scheduler = ddim(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    grid = ddim_grid(NoiseSchedule.from_diffusers(scheduler), steps, 1.0)
    assert grid.times.tolist() == scheduler.timesteps.tolist()
    assert len(grid) == steps


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler, DDPMScheduler])
def test_any_ddpm_scheduler_becomes_the_ddim_of_its_config(kind: type) -> None:
    scheduler = kind(**SD, prediction_type="v_prediction", steps_offset=1)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    want = DDIMScheduler.from_config(scheduler.config)
    assert schedule.prediction == "v_prediction"
    assert schedule.steps_offset == 1
    assert schedule.final_alpha_cumprod == float(want.final_alpha_cumprod)
    assert torch.equal(schedule.alphas_cumprod, want.alphas_cumprod.double())


def test_worked_example_of_sigma() -> None:
    # Two steps at abar 0.25 and 0.64, ending at 0.81; eta 1. By DDIM eq. 16:
    #   0.25 -> 0.64:  (0.36 / 0.75) * (1 - 0.25 / 0.64) = 0.48 * 0.609375    = 0.2925
    #   0.64 -> 0.81:  (0.19 / 0.36) * (1 - 0.64 / 0.81) = 0.52777 * 0.209876 = 0.1107681755...
    schedule = NoiseSchedule(torch.tensor([0.64, 0.25], dtype=torch.float64), "epsilon", 0.81)
    grid = ddim_grid(schedule, 2, 1.0)
    assert grid.times.tolist() == [1, 0]
    assert (grid.sigma**2).tolist() == pytest.approx([0.2925, 0.19 / 0.36 * 0.17 / 0.81], abs=1e-15)
    assert (ddim_grid(schedule, 2, 0.5).sigma / grid.sigma).tolist() == [0.5, 0.5]


def test_which_steps_have_a_density() -> None:
    def stochastic(eta: float, **kwargs: object) -> list[int]:
        return ddim_grid(NoiseSchedule.from_diffusers(ddim(**kwargs)), 4, eta).stochastic

    assert stochastic(1.0) == [0, 1, 2, 3]
    assert stochastic(0.0) == []
    assert stochastic(1.0, set_alpha_to_one=True) == [0, 1, 2]
    assert stochastic(1.0, steps_offset=0) == [0, 1, 2]  # it ends at the time it started from


@pytest.mark.parametrize(
    ("steps", "eta", "says"),
    [(0, 1.0, "1..1000"), (1001, 1.0, "1..1000"), (20, -0.1, "eta"), (20, 3.0, "eta")],
)
def test_impossible_grids_are_refused(steps: int, eta: float, says: str) -> None:
    with pytest.raises(InputError, match=says):
        ddim_grid(NoiseSchedule.from_diffusers(ddim()), steps, eta)


def test_an_offset_past_the_end_of_the_schedule_is_refused() -> None:
    with pytest.raises(InputError, match="visit time 1000"):
        ddim_grid(NoiseSchedule.from_diffusers(ddim()), 1000, 1.0)


def test_times_are_indices_and_never_wrap() -> None:
    schedule = NoiseSchedule.from_diffusers(ddim())
    for bad in (torch.tensor([-1]), torch.tensor([1000]), torch.tensor(3), torch.tensor([0.5])):
        with pytest.raises(ValueError, match="t must"):
            schedule.alpha_sigma(bad)


def test_schedules_without_a_density_are_refused() -> None:
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler"):
        NoiseSchedule.from_diffusers(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(InputError, match="zero terminal SNR"):
        NoiseSchedule.from_diffusers(ddim(rescale_betas_zero_snr=True))
    with pytest.raises(InputError, match="thresholding"):
        NoiseSchedule.from_diffusers(ddim(thresholding=True))

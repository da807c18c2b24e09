from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d3po.families import guided, load_family
from d3po.likelihood import gaussian_kl, log_peak, path_logp, path_score, renoise_logp
from d3po.objectives import dpo
from d3po.sampling import Predict, image_noise, path_noise, rollout
from d3po.schedule import NoiseSchedule, ddim_grid
from fifa.config import InputError


def schedule_of(prediction: str) -> NoiseSchedule:
    abar = torch.linspace(0.999, 0.005, 100, dtype=torch.float64)
    return NoiseSchedule(abar, prediction, float(abar[0]), steps_offset=1)  # type: ignore[arg-type]


def linear(gain: float) -> Predict:
    """A network that also looks at the time, so that a mix-up of times shows."""
    return lambda x_t, t: gain * x_t + t.to(x_t).reshape(-1, 1, 1, 1) / 1000


def doubles(*shape: int) -> Tensor:
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))
    )


# ---- along the stored path ----------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_path_logp_is_the_published_formula(reduce: str) -> None:
    # written out again from the fact sheet of the authors' sampler, scalar by scalar
    schedule = schedule_of("epsilon")
    grid = ddim_grid(schedule, 5, 1.0)
    latents = doubles(2, 6, 3, 2, 4)
    steps = torch.tensor([[3, 0], [1, 4]])
    got = path_logp(linear(0.3), grid, schedule, latents, steps, reduce)  # type: ignore[arg-type]
    for b in range(2):
        for s in range(2):
            i = int(steps[b, s])
            t = 100 // 5 * (4 - i) + 1
            a_t = float(schedule.alphas_cumprod[t])
            a_s = float(schedule.alphas_cumprod[t - 20] if t >= 20 else schedule.alphas_cumprod[0])
            variance = (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
            x_t, x_s = latents[b, i], latents[b, i + 1]
            eps = 0.3 * x_t + t / 1000
            x0 = (x_t - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
            mean = math.sqrt(a_s) * x0 + math.sqrt(1 - a_s - variance) * eps
            per_element = (
                -((x_s - mean) ** 2) / (2 * variance)
                - 0.5 * math.log(variance)
                - 0.5 * math.log(2 * math.pi)
            )
            want = per_element.mean() if reduce == "mean" else per_element.sum()
            assert float(got[b, s]) == pytest.approx(float(want), rel=1e-10)
    together = path_logp(linear(0.3), grid, schedule, latents, steps, reduce, together=True)  # type: ignore[arg-type]
    torch.testing.assert_close(together, got, rtol=1e-12, atol=0)


@pytest.mark.parametrize("grad", [False, True])
def test_stored_scores_come_back_bit_for_bit(tiny_sd: Path, grad: bool) -> None:
    family = load_family(tiny_sd)
    cond, uncond = family.encode_text(["a red circle", "a star"]), family.encode_text([""])
    predict = guided(family, family.denoiser, cond, uncond, 3.0)
    grid, shape = ddim_grid(family.schedule, 6, 1.0), family.latent_shape
    x_T = image_noise([7, 7], shape, -1)
    path = rollout(predict, grid, family.schedule, x_T, path_noise([1, 2], shape))
    steps = torch.tensor([5, 0, 3])
    family.denoiser.requires_grad_(grad)
    again = path_logp(predict, grid, family.schedule, path.latents, steps)
    assert again.requires_grad == grad
    assert torch.equal(again.detach(), path.logp[:, steps])
    # images at different steps in one call: other times side by side, so close, not equal
    rows = torch.tensor([[5, 1], [0, 2]])
    mixed = path_logp(predict, grid, family.schedule, path.latents, rows)
    torch.testing.assert_close(mixed.detach(), path.logp.gather(1, rows), rtol=1e-4, atol=1e-4)


def test_a_path_that_does_not_fit_the_grid_is_refused() -> None:
    schedule = schedule_of("epsilon")
    with pytest.raises(ValueError, match="5 latents do not fit the 5 steps"):
        path_logp(
            linear(1.0),
            ddim_grid(schedule, 5, 1.0),
            schedule,
            doubles(2, 5, 1, 2, 2),
            torch.tensor([0]),
        )


# ---- by re-noising ------------------------------------------------------------------------------


def test_renoise_logp_gives_the_published_inside_term() -> None:
    # The inside of the logsigmoid in Diffusion-DPO's training code, model and reference errors
    # being means over C, H, W:  -0.5 * beta * ((mse_w - mse_l)_model - (mse_w - mse_l)_ref)
    schedule, beta = schedule_of("epsilon"), 5000.0
    x_w, x_l = doubles(2, 4, 3, 2, 5)
    noise, t = doubles(4, 1, 3, 2, 5), torch.tensor([3, 50, 0, 99])
    model, ref = linear(0.30), linear(0.28)
    abar = schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)

    def mse(network: Predict, x0: Tensor) -> Tensor:
        eps = noise[:, 0]
        x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
        return (network(x_t, t) - eps).pow(2).mean(dim=[1, 2, 3])

    model_diff = mse(model, x_w) - mse(model, x_l)
    ref_diff = mse(ref, x_w) - mse(ref, x_l)
    inside = -0.5 * beta * (model_diff - ref_diff)

    rows = [
        renoise_logp(network, schedule, x0, noise, t[:, None])
        for network, x0 in [(model, x_w), (model, x_l), (ref, x_w), (ref, x_l)]
    ]
    win, lose, ref_win, ref_lose = rows
    assert win.shape == (4, 1)
    h = (win - ref_win) - (lose - ref_lose)
    torch.testing.assert_close(beta * h[:, 0], inside, rtol=1e-9, atol=1e-9)
    loss = dpo(win, lose, ref_win, ref_lose, beta=beta)[:, 0]
    torch.testing.assert_close(loss, -F.logsigmoid(inside), rtol=1e-9, atol=1e-9)


def test_sum_is_the_mean_times_the_number_of_elements() -> None:
    schedule, x0, noise = schedule_of("epsilon"), doubles(2, 3, 2, 5), doubles(2, 4, 3, 2, 5)
    t = torch.randint(0, 100, (2, 4))
    args = (linear(0.1), schedule, x0, noise, t)
    torch.testing.assert_close(renoise_logp(*args, "sum"), 30 * renoise_logp(*args, "mean"))
    with pytest.raises(InputError, match="reduce"):
        renoise_logp(*args, "median")  # type: ignore[arg-type]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_network_that_knows_the_answer_scores_zero(prediction: str) -> None:
    schedule, x0, noise = schedule_of(prediction), doubles(3, 2, 4, 4), doubles(3, 2, 2, 4, 4)
    t = torch.tensor([[1, 99], [50, 2], [98, 3]])
    answers = [schedule.target(x0, noise[:, s], t[:, s]) for s in range(2)]
    perfect = iter(answers)
    got = renoise_logp(lambda x_t, times: next(perfect), schedule, x0, noise, t)
    assert torch.equal(got, torch.zeros(3, 2, dtype=torch.float64))
    off = iter(answers)  # one off everywhere: -1/2 * 1^2
    got = renoise_logp(lambda x_t, times: next(off) + 1, schedule, x0, noise, t)
    torch.testing.assert_close(got, torch.full((3, 2), -0.5, dtype=torch.float64))


def test_low_precision_networks_are_scored_in_float32() -> None:
    schedule = schedule_of("epsilon")
    x0, noise = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 1, 2, 2)
    got = renoise_logp(
        lambda x_t, t: torch.zeros_like(x_t).bfloat16(), schedule, x0, noise, torch.tensor([[5]])
    )
    assert got.dtype == torch.float32
    assert got.item() == -0.5


# ---- what single images need besides ------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_path_score_adds_the_means_and_changes_nothing(reduce: str) -> None:
    schedule = schedule_of("v_prediction")
    grid, latents, steps = ddim_grid(schedule, 5, 0.8), doubles(3, 6, 2, 4, 4), torch.tensor([4, 1])
    given = (linear(0.3), grid, schedule, latents, steps, reduce)
    score = path_score(*given)  # type: ignore[arg-type]
    assert torch.equal(score.logp, path_logp(*given))  # type: ignore[arg-type]
    peak = log_peak(grid, steps, 2 * 4 * 4, reduce)  # type: ignore[arg-type]
    for column, i in enumerate(steps.tolist()):
        sigma = float(grid.sigma[i])
        normal = torch.distributions.Normal(score.mean[:, column] * sigma, sigma)
        density = normal.log_prob(latents[:, i + 1]).flatten(1)
        want = density.mean(1) if reduce == "mean" else density.sum(1)
        torch.testing.assert_close(score.logp[:, column], want, rtol=1e-12, atol=1e-12)
        highest = normal.log_prob(normal.mean).flatten(1)
        want = highest.mean(1) if reduce == "mean" else highest.sum(1)
        torch.testing.assert_close(peak[column].expand(3), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_gaussian_kl_is_that_of_torch(reduce: str) -> None:
    ours, theirs, sigma = doubles(2, 3, 2, 4, 4), doubles(2, 3, 2, 4, 4) * 0.3 + 0.1, 0.7
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(ours * sigma, sigma),
        torch.distributions.Normal(theirs * sigma, sigma),
    ).flatten(2)
    want = kl.mean(2) if reduce == "mean" else kl.sum(2)
    got = gaussian_kl(ours, theirs, reduce)  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

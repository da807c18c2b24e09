"""Inverted paths: the walk back, what is scored along it, and what is kept of it on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pair_files import write_pairs
from torch import Tensor
from torch.distributions import Normal

from d3po.draws import derive_seed, shuffled
from d3po.families import load_family
from d3po.inversion import InversionConfig, InvertedPaths, points_within
from d3po.likelihood import renoise_logp
from d3po.losses import BoundObjective, ObjectiveConfig
from d3po.offline import OfflineConfig, OfflineSource
from d3po.pair_cache import PairCache, cached_pairs
from d3po.policy import Policy, PolicyConfig
from d3po.run import Run, RunConfig
from d3po.sampling import invert, rollout, step_mean
from d3po.schedule import FlowSchedule, NoiseSchedule, Schedule
from d3po.speed import SpeedConfig
from d3po.trainer import Learner, OptimConfig, train_step
from fifa.config import InputError

SEED = 5


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(RunConfig(dir=str(tmp_path / "run"), seed=SEED))
    yield run
    run.close()


# ---- the walk -----------------------------------------------------------------------------------


def noise_schedule(prediction: Any) -> NoiseSchedule:
    abar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)
    return NoiseSchedule(abar, prediction, float(abar[0]), steps_offset=1)


SCHEDULES: dict[str, Schedule] = {
    "epsilon": noise_schedule("epsilon"),
    "v": noise_schedule("v_prediction"),
    "sample": noise_schedule("sample"),
    "flow": FlowSchedule(shift=3.0),
}


def network(x: Tensor, t: Tensor) -> Tensor:
    """A smooth prediction of x and t that is no function of x alone, float64."""
    angle = t.double().view(-1, 1, 1, 1) / 1000
    return 0.5 * torch.sin(x + angle) + 0.1 * x.roll(1, -1)


def pictures(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 4, 4, generator=generator, dtype=torch.float64)


def test_it_is_the_inversion_of_diffusers(tiny_sd: Path) -> None:
    """The path of DDIMInverseScheduler around the real UNet, float64."""
    from diffusers import DDIMInverseScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet").double()
    scheduler = DDIMInverseScheduler.from_pretrained(tiny_sd, subfolder="scheduler")
    scheduler.register_to_config(clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.initial_alpha_cumprod = scheduler.initial_alpha_cumprod.double()
    scheduler.set_timesteps(8)
    family = load_family(tiny_sd, torch.float64)
    cond = family.encode_text(["a star", "two circles"])
    text = cond.tensors["text"]
    x_0 = pictures()[:, :1].repeat(1, 4, 2, 2)
    want = [x_0]
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps = unet(want[-1], t, text).sample
            want.append(scheduler.step(eps, t, want[-1]).prev_sample)
    got = invert(
        lambda x, t: family.predict(family.denoiser, x, t, cond),
        family.schedule.grid(8, 0.0),
        family.schedule,
        x_0,
    )
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.stack(want[::-1], 1), rtol=0, atol=1e-9)
    assert float((got[:, 0] - x_0).abs().max()) > 0.1


@pytest.mark.parametrize("name", ["epsilon", "v", "flow"])
def test_more_iterations_lead_back_to_the_picture(name: str) -> None:
    schedule, x_0 = SCHEDULES[name], pictures()
    grid = schedule.grid(6, 0.0)
    errors = []
    for iterations in (1, 3, 80):
        path = invert(network, grid, schedule, x_0, iterations)
        x = path[:, 0]
        for i in range(len(grid)):
            x = step_mean(grid, schedule, i, x, network(x, grid.times[[i, i]]))
        errors.append(float((x - x_0).abs().max()))
    assert errors[2] < 1e-9
    assert errors[2] < errors[1] < errors[0]
    # and by the sampler as it is, in float32
    again = rollout(network, grid, schedule, path[:, 0], lambda step: torch.zeros(()))
    torch.testing.assert_close(again.x0, x_0.float(), rtol=0, atol=1e-4)


def test_a_path_with_noise_or_without_a_way_back_is_refused() -> None:
    schedule = SCHEDULES["epsilon"]
    with pytest.raises(InputError, match="only a deterministic path"):
        invert(network, schedule.grid(4, 1.0), schedule, pictures())
    forgets = dataclasses.replace(noise_schedule("sample"), final_alpha_cumprod=1.0)
    with pytest.raises(InputError, match="keeps nothing of the latent before it"):
        invert(network, forgets.grid(4, 0.0), forgets, pictures())


# ---- what is scored -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_score_is_the_density_of_the_picture_one_jump_away(name: str) -> None:
    """log N(x_0; x0_hat, s^2), less its peak, written with torch's own Gaussian."""
    schedule, x_0 = SCHEDULES[name], pictures()
    grid = schedule.grid(5, 0.0)
    path = invert(network, grid, schedule, x_0)
    for i in range(5):
        x_t, t = path[:, i], grid.times[[i, i]]
        alpha, sigma = (float(value[0]) for value in schedule.alpha_sigma(t))
        found = renoise_logp(
            network, schedule, x_0, ((x_t - alpha * x_0) / sigma)[:, None], t[:, None], "sum"
        )
        pred = network(x_t, t)
        if name == "epsilon":
            jump, spread = (x_t - sigma * pred) / alpha, sigma / alpha
        elif name == "sample":
            jump, spread = pred, 1.0
        else:
            jump, spread = alpha * x_t - sigma * pred if name == "v" else x_t - sigma * pred, sigma
        gaussian = Normal(jump, spread)
        want = (gaussian.log_prob(x_0) - gaussian.log_prob(jump)).flatten(1).sum(1)
        torch.testing.assert_close(found[:, 0], want, rtol=1e-9, atol=1e-9)


def test_what_a_step_of_the_path_leaves_over_is_the_predicted_noise() -> None:
    """Why steps are not scored (docs/methods.md): x_s - mean is no draw, as along a rollout.

    With eta > 0 the mean of a step falls short of the deterministic one by a multiple of eps, the
    same for every picture; with eta = 0 nothing is left.
    """
    schedule, x_0 = SCHEDULES["epsilon"], pictures()
    noisy, quiet = schedule.grid(6, 1.0), schedule.grid(6, 0.0)
    path = invert(network, quiet, schedule, x_0, 80)
    for i in range(6):
        x_t, x_s = path[:, i], path[:, i + 1]
        eps = network(x_t, quiet.times[[i, i]])
        left = x_s - step_mean(noisy, schedule, i, x_t, eps)
        short = float(quiet.to_eps[i] - noisy.to_eps[i])
        assert short > 0
        torch.testing.assert_close(left, short * eps, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("part", "want"),
    [((0.0, 1.0), [0, 1, 2, 3]), ((0.5, 1.0), [0, 1]), ((0.0, 0.5), [2, 3]), ((0.9, 1.0), [0])],
)
def test_the_part_of_the_schedule_chooses_steps(part: tuple[float, float], want: list[int]) -> None:
    assert points_within(4, part) == want


def test_a_part_without_a_step_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"none of the 4 steps .* begins: take more"):
        points_within(4, (0.6, 0.7))


# ---- the cache ----------------------------------------------------------------------------------


def config_of(tmp_path: Path, **more: Any) -> OfflineConfig:
    data = tmp_path / "pairs.parquet"
    if not data.exists():
        write_pairs(data, 7)  # 6 pairs and a tie
    given = {"data": str(data), "cache": str(tmp_path / "cache"), "encode_batch": 4, **more}
    return OfflineConfig.model_validate({"path": "inverted", **given})


def source_of(
    tiny_sd: Path, config: OfflineConfig, run: Run, optim: OptimConfig | None = None
) -> OfflineSource:
    family = load_family(tiny_sd)
    policy = Policy(family, PolicyConfig())
    cache = cached_pairs(config, family, run)
    return OfflineSource(config, optim or OptimConfig(), family, policy, cache, run)


def paths_of(source: OfflineSource) -> InvertedPaths:
    assert source.paths is not None
    return source.paths


def calls(source: OfflineSource) -> list[int]:
    """Grows by the rows of every forward pass."""
    rows: list[int] = []
    source.policy.bare.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


def test_what_is_kept_is_the_noise_of_each_point(tmp_path: Path, tiny_sd: Path, run: Run) -> None:
    config = config_of(tmp_path, inversion={"steps": 4, "guidance": 2.0}, noise=(0.5, 1.0))
    source = source_of(tiny_sd, config, run)
    paths, family, cache = paths_of(source), source.family, source.cache
    assert paths.rows == list(range(6))
    assert paths.times.tolist() == [751, 501]
    scheduler_path = {}
    with source.policy.reference():
        for side, stored in (("win", cache.win), ("lose", cache.lose)):
            x_0 = torch.from_numpy(stored[[5]].copy())
            cond, empty = cache.conditioning([int(cache.prompt[5])]), cache.conditioning([0])

            def guided_by_hand(x: Tensor, t: Tensor, cond: Any = cond, empty: Any = empty) -> Any:
                with_text, without = (
                    family.predict(source.policy.bare, x, t, c) for c in (cond, empty)
                )
                return without + 2.0 * (with_text - without)

            grid = family.schedule.grid(4, 0.0)
            scheduler_path[side] = invert(guided_by_hand, grid, family.schedule, x_0)[0], x_0[0]
    for point, t in enumerate((751, 501)):
        win, lose = paths.noise([5], [point])
        for found, (path, x_0) in zip((win, lose), scheduler_path.values(), strict=True):
            alpha, sigma = family.schedule.alpha_sigma(torch.tensor([t]))
            want = (path[point] - float(alpha) * x_0) / float(sigma)
            torch.testing.assert_close(found, want, rtol=0, atol=2e-4)


def test_paths_are_made_once_and_under_the_reference(
    tmp_path: Path, tiny_sd: Path, run: Run
) -> None:
    config = config_of(tmp_path, inversion={"steps": 3})
    source = source_of(tiny_sd, config, run)
    with torch.no_grad():
        for p in source.policy.trainable():
            p += 1.0  # a policy far from its reference
    rows = calls(source)
    assert paths_of(source).rows == list(range(6))
    assert rows == [8] * 3 + [4] * 3  # batches of 4 and 2 pairs, 3 steps each
    again = source_of(tiny_sd, config, run)
    rows = calls(again)
    assert torch.equal(
        paths_of(again).noise(paths_of(again).rows, [1] * 6),
        paths_of(source).noise(range(6), [1] * 6),
    )
    assert rows == []


def test_what_changes_the_path_changes_the_key(tmp_path: Path, tiny_sd: Path, run: Run) -> None:
    plain = config_of(tmp_path)
    changes: list[dict[str, Any]] = [
        {},
        {"inversion": {"steps": 9}},
        {"inversion": {"guidance": 2.0}},
        {"inversion": {"iterations": 2}},
        {"noise": (0.5, 1.0)},
        {"encode_batch": 3},
    ]
    keys = [
        paths_of(source_of(tiny_sd, config_of(tmp_path, **change), run)).key for change in changes
    ]
    family = load_family(tiny_sd)
    cache = cached_pairs(plain, family, run)
    next(family.denoiser.parameters()).data.add_(1e-3)
    other = OfflineSource(plain, OptimConfig(), family, Policy(family, PolicyConfig()), cache, run)
    keys.append(paths_of(other).key)
    assert len(set(keys)) == len(changes) + 1


def test_the_batch_does_not_change_the_paths(tmp_path: Path, tiny_sd: Path, run: Run) -> None:
    found = []
    for batch in (1, 4):
        paths = paths_of(source_of(tiny_sd, config_of(tmp_path, encode_batch=batch), run))
        found.append(paths.noise(paths.rows, [0] * 6))
    # float32 kernels differ with the batch, and the differences grow along the path
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-3)


def test_an_interrupted_inversion_goes_on_where_it_was(
    tmp_path: Path, tiny_sd: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d3po.inversion.PART", 2)
    config = config_of(tmp_path, encode_batch=2, inversion={"steps": 3})
    source = source_of(tiny_sd, config, run)
    whole = paths_of(source).noise(paths_of(source).rows, [2] * 6)
    files = sorted(paths_of(source).folder.glob("part-*.bin"))
    assert len(files) == 3
    files[1].unlink()
    again = source_of(tiny_sd, config, run)
    rows = calls(again)
    assert torch.equal(paths_of(again).noise(paths_of(again).rows, [2] * 6), whole)
    assert rows == [4] * 3  # the missing part alone


def test_a_path_that_is_not_finite_costs_its_pair_alone(
    tmp_path: Path, tiny_sd: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, inversion={"steps": 2})
    source = source_of(tiny_sd, config, run, OptimConfig(micro_batch=5))
    broken = np.array(source.cache.win)
    broken[2] = np.nan
    cache: PairCache = dataclasses.replace(source.cache, win=broken)
    other = OfflineSource(config, source.optim, source.family, source.policy, cache, run)
    (update,) = other.round(0).updates
    assert paths_of(other).rows == [0, 1, 3, 4, 5]
    assert bool(update.chunks[0].logp(source.policy.bare).isfinite().all())
    assert "1 of 6 pairs are left out: the inversion of a picture is not finite" in (
        capsys.readouterr().out
    )
    everything = dataclasses.replace(source.cache, win=np.full_like(broken, np.nan))
    for file in paths_of(other).folder.iterdir():
        file.unlink()
    lost = OfflineSource(config, source.optim, source.family, source.policy, everything, run)
    with pytest.raises(InputError, match="no inverted path is finite"):
        lost.round(0)


# ---- updates ------------------------------------------------------------------------------------


def inpo_loss(learner: Learner, source: OfflineSource, pairs: list[tuple[int, int]]) -> Tensor:
    """The loss of InPO's code: errors of the noise that leads from the picture to its point."""
    cache, bare, paths = source.cache, learner.policy.bare, paths_of(source)
    schedule = source.family.schedule
    losses = []
    for epoch, row in pairs:
        point = derive_seed(SEED, "point", epoch, row) % len(paths.points)
        t = paths.times[[point]]
        cond = cache.conditioning([int(cache.prompt[row])]).tensors["text"]
        alpha, sigma = (float(value[0]) for value in schedule.alpha_sigma(t))

        def error(
            latents: Any,
            noise: Tensor,
            t: Any = t,
            cond: Any = cond,
            a: float = alpha,
            s: float = sigma,
        ) -> Tensor:
            noisy = a * torch.from_numpy(latents.copy())[None] + s * noise[None]
            return (bare(noisy, t, cond).sample[0] - noise).square().mean()

        win, lose = paths.noise([row], [point])
        difference = error(cache.win[row], win) - error(cache.lose[row], lose)
        with learner.policy.reference():
            reference = error(cache.win[row], win) - error(cache.lose[row], lose)
        losses.append(torch.nn.functional.softplus(0.5 * 2000.0 * (difference - reference)))
    return torch.stack(losses).mean()


def test_an_update_is_the_loss_of_inpo(tmp_path: Path, tiny_sd: Path, run: Run) -> None:
    optim = OptimConfig(micro_batch=2, accumulation=2, max_grad_norm=None, learning_rate=1.0)
    source = source_of(tiny_sd, config_of(tmp_path), run, optim)
    policy, generator = source.policy, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.trainable():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    sgd = torch.optim.SGD(policy.trainable(), lr=1.0)
    policy.denoiser, wrapped = run.accelerator.prepare(policy.bare, sgd)
    objective = BoundObjective.from_config(ObjectiveConfig(name="dpo", beta=2000.0))
    learner = Learner(policy, wrapped, objective, optim)
    paths_of(source)._make_own()
    order = shuffled(SEED, 6, 4, 8)
    loss = inpo_loss(learner, source, [(0, order[0]), (0, order[1]), (1, order[2]), (1, order[3])])
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.trainable())])
    before = [p.detach().clone() for p in policy.trainable()]
    result = train_step(learner, next(source.round(1).updates), run, 0)
    moved = [(b - p.detach()).flatten() for b, p in zip(before, policy.trainable(), strict=True)]
    assert float((torch.cat(moved) - want).abs().max() / want.abs().max()) < 3e-4
    assert result["loss"] == pytest.approx(loss.item(), rel=5e-4)  # float32, beta 2000
    assert result["pairs"] == 4


def test_settings_of_an_inversion_that_is_not_made_are_refused() -> None:
    with pytest.raises(ValueError, match="inversion goes with path inverted, and only with it"):
        OfflineConfig(data="x", inversion=InversionConfig(steps=5))


def test_scores_are_kept_for_the_numbers_that_they_were_made_with(
    tmp_path: Path, tiny_sd: Path, run: Run
) -> None:
    """Kernels, formats and precision change low digits: those are other scores."""
    config = config_of(tmp_path, path="renoise", noise_draws=1)
    speeds: list[dict[str, Any]] = [
        {},
        {"attention": "math"},
        {"channels_last": True},
        {"tf32": True},
        {"compile": "eager"},
    ]
    family = load_family(tiny_sd)
    policy, cache = Policy(family, PolicyConfig()), cached_pairs(config, family, run)

    def folder(given: OfflineConfig = config, **speed: Any) -> Path:
        source = OfflineSource(
            given, OptimConfig(), family, policy, cache, run, speed=SpeedConfig(**speed)
        )
        assert source.reference is not None
        return source.reference.folder

    folders = [folder(**speed) for speed in speeds]
    folders += [folder(config.model_copy(update={"path": "inverted"}))]
    assert len(set(folders)) == len(speeds) + 1
    assert folder(offload_encoders=True) == folders[0]  # moves networks, changes no number
    half = Policy(load_family(tiny_sd, torch.bfloat16), PolicyConfig())
    source = OfflineSource(config, OptimConfig(), half.family, half, cache, run)
    assert source.reference is not None
    assert source.reference.folder not in folders
    schedule = family.schedule
    family.schedule = dataclasses.replace(schedule, prediction="v_prediction")  # type: ignore[type-var]
    assert folder() not in folders
    family.schedule = schedule
    rough = Run(RunConfig(dir=str(tmp_path / "rough"), seed=SEED, mixed_precision="bf16"))
    source = OfflineSource(config, OptimConfig(), family, policy, cache, rough)
    assert source.reference is not None
    assert source.reference.folder not in folders
    rough.close()

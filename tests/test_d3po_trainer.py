"""The step and the loop: objectives, gradients that are not finite, exact resumption."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d3po.families import Family, load_family
from d3po.losses import BoundObjective, ObjectiveConfig
from d3po.objectives import dpo
from d3po.optimizers import Kind
from d3po.policy import Policy, PolicyConfig
from d3po.run import Run, RunConfig
from d3po.run_folder import RunFolder
from d3po.trainer import Learner, OptimConfig, fit, train_step, whole_rounds
from d3po.updates import Chunk, Round, Update
from fifa.config import InputError

COND_SEED, ROWS = 3, 4


def open_run(folder: Path, **settings: Any) -> Run:
    config = RunConfig(dir=str(folder), checkpoint_every=2, **settings)
    run = Run(config)
    run.open(config)
    return run


def learner_of(model: Path, run: Run, policy: PolicyConfig | None = None, **optim: Any) -> Learner:
    family = load_family(model)
    config = OptimConfig(**{"learning_rate": 1e-3, "max_steps": 6, **optim})
    objective = BoundObjective.from_config(ObjectiveConfig(name="dpo", beta=100.0))
    return Learner.prepare(Policy(family, policy or PolicyConfig()), objective, config, run)


def score(family: Family, denoiser: nn.Module, seed: int, factor: float = 1.0) -> Tensor:
    """Some log-probabilities (ROWS, 1) that depend on all trained weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, *family.latent_shape, generator=generator)
    cond = family.encode_text(["a red circle"] * ROWS)
    pred = family.predict(denoiser, x, torch.full((ROWS,), 500), cond)
    return -(pred - x).square().flatten(1).mean(1, keepdim=True) * factor


class Repeat:
    """A source of the simplest kind: round i compares two images with two others."""

    updates_per_round = 1

    def __init__(self, family: Family, factor: Callable[[int], float] = lambda index: 1.0) -> None:
        self.family, self.factor = family, factor

    def round(self, index: int) -> Round:
        logp = partial(self._logp, index)
        chunk = Chunk(logp, torch.tensor([0, 1]), torch.tensor([2, 3]), steps=1)
        return Round({}, iter([Update([chunk], pairs=2)]))

    def _logp(self, index: int, denoiser: nn.Module) -> Tensor:
        return score(self.family, denoiser, index, self.factor(index))


def metrics(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.folder.metrics.read_text().splitlines()]


def weights(learner: Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learner.policy.trainable()]).clone()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = open_run(tmp_path / "run")
    yield run
    run.close()


# ---- settings -----------------------------------------------------------------------------------


def test_the_warm_up_is_linear_and_then_constant() -> None:
    config = OptimConfig(learning_rate=1.0, warmup_steps=4)
    assert [config.rate(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert OptimConfig(learning_rate=1.0).rate(0) == 1.0


def test_an_objective_gets_its_numbers_and_keeps_its_defaults() -> None:
    bound = BoundObjective.from_config(ObjectiveConfig(name="d3po_clipped", beta=2.0))
    assert bound.arguments == {"beta": 2.0, "clip": 0.1}
    bound = BoundObjective.from_config(
        ObjectiveConfig(name="d3po_clipped", beta=2.0, options={"clip": 0.2})
    )
    far, zero = torch.tensor(5.0), torch.tensor(0.0)
    # both ratios are clipped: 2 * (log 1.2 - log 0.8)
    expected = math.log1p(math.exp(-2 * (math.log(1.2) - math.log(0.8))))
    assert float(bound(far, -far, zero, zero)) == pytest.approx(expected)
    watched = bound.watch({"win": far, "lose": -far, "ref_win": zero, "ref_lose": zero})
    assert {k: float(v) for k, v in watched.items()} == {
        "accuracy": 1.0,
        "margin": 20.0,
        "win_ratio": 5.0,
        "lose_ratio": -5.0,
        "clipped": 1.0,
    }


def test_an_objective_from_outside_is_found() -> None:
    bound = BoundObjective.from_config(ObjectiveConfig(name="d3po.objectives:dpo", beta=1.0))
    assert bound.function is dpo


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("dop", {}, "unknown objective 'dop'; did you mean 'dpo'?"),
        ("dpo", {"clip": 0.1}, "objective.options.clip: dpo takes no such option, allowed: none"),
        ("robust", {"clip": 0.1}, "allowed: label_smoothing"),
        ("dpo", {"beta": 0.1}, "takes no such option"),
        ("d3po_clipped", {"clip": 1.0}, "options.clip is 1.0, it must lie between 0.0 and 1.0"),
        ("robust", {"label_smoothing": 0.5}, "it must lie between 0.0 and 0.5"),
        ("nowhere:dpo", {}, "cannot import 'nowhere:dpo'"),
        ("d3po.objectives:nothing", {}, "cannot import"),
    ],
)
def test_a_wrong_objective_is_one_sentence(
    name: str, options: dict[str, float], sentence: str
) -> None:
    with pytest.raises(InputError) as error:
        BoundObjective.from_config(ObjectiveConfig(name=name, beta=1.0, options=options))
    assert sentence in str(error.value)


def test_rounds_are_never_cut() -> None:
    assert [whole_rounds(steps, 4) for steps in (1, 4, 5, 8)] == [4, 4, 8, 8]


# ---- one step -----------------------------------------------------------------------------------


def test_a_step_reports_the_means_over_pairs(tiny_sd: Path, run: Run) -> None:
    learner = learner_of(tiny_sd, run, warmup_steps=2)
    policy = learner.policy
    with torch.no_grad():  # away from the reference, where every log-ratio is 0
        for p in policy.trainable():
            p.add_(0.1)
    logp = score(policy.family, policy.bare, 7)
    with policy.reference():
        ref = score(policy.family, policy.bare, 7)
    ratio = (logp - ref)[:, 0]
    h = ratio[[0, 1]] - ratio[[2, 3]]
    loss = torch.log1p(torch.exp(-100 * h)).mean()
    gradients = torch.autograd.grad(loss, policy.trainable())

    result = train_step(learner, next(Repeat(policy.family).round(7).updates), run, step=0)
    assert result == pytest.approx(
        {
            "loss": loss.item(),
            "accuracy": (h > 0).float().mean().item(),
            "margin": 100 * h.mean().item(),
            "win_ratio": ratio[:2].mean().item(),
            "lose_ratio": ratio[2:].mean().item(),
            "clipped": 0.0,
            "grad_norm": torch.cat([g.flatten() for g in gradients]).norm().item(),
            "learning_rate": 0.5e-3,
            "pairs": 2.0,
            "skipped": 0.0,
        },
        rel=1e-3,
    )


def test_the_weights_after_a_step_are_those_of_adamw(tiny_sd: Path, run: Run) -> None:
    learner = learner_of(tiny_sd, run, max_grad_norm=0.5, warmup_steps=2)
    own = [p.detach().clone().requires_grad_() for p in learner.policy.trainable()]
    reference_optimizer = torch.optim.AdamW(own, lr=1e-3, weight_decay=1e-4)
    source = Repeat(learner.policy.family)
    for step in range(3):
        update = next(source.round(step).updates)
        logp = update.chunks[0].logp(learner.policy.bare)
        with learner.policy.reference():
            ref = update.chunks[0].logp(learner.policy.bare)
        h = (logp - ref)[[0, 1]] - (logp - ref)[[2, 3]]
        loss = -torch.nn.functional.logsigmoid(100 * h).mean()
        gradients = torch.autograd.grad(loss, learner.policy.trainable())
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        for p, gradient in zip(own, gradients, strict=True):
            p.grad = gradient * min(1.0, 0.5 / float(norm))
        reference_optimizer.param_groups[0]["lr"] = (0.5e-3, 1e-3, 1e-3)[step]
        reference_optimizer.step()
        train_step(learner, update, run, step)
        expected = torch.cat([p.detach().flatten() for p in own])
        assert torch.allclose(weights(learner), expected, atol=2e-5), step


def test_chunks_of_any_size_give_the_same_gradient(tiny_sd: Path, run: Run) -> None:
    learner = learner_of(tiny_sd, run)
    family, policy = learner.policy.family, learner.policy
    policy.bare.double()
    with torch.no_grad():
        for p in policy.trainable():
            p.add_(0.1)
    x = torch.randn(8, *family.latent_shape, generator=torch.Generator().manual_seed(0)).double()
    cond = family.encode_text(["a red circle"])

    def chunk(first: int, last: int) -> Chunk:
        """Images first..last-1: each wins against the next one, all steps of it in one go."""

        def logp(denoiser: nn.Module) -> Tensor:
            rows = x[first:last]
            times = [torch.full((len(rows),), t) for t in (300, 700)]
            preds = [family.predict(denoiser, rows, t, cond.expand(len(rows))) for t in times]
            return torch.stack([-(pred - rows).square().flatten(1).mean(1) for pred in preds], 1)

        win = torch.arange(last - first - 1)
        return Chunk(logp, win, win + 1, steps=2)

    def gradient(chunks: list[Chunk]) -> Tensor:
        sgd = torch.optim.SGD(policy.trainable(), lr=1.0)
        plain = replace(learner, optimizer=run.accelerator.prepare(sgd))
        start = [p.detach().clone() for p in policy.trainable()]
        config = OptimConfig(learning_rate=1.0, max_grad_norm=None)
        train_step(replace(plain, config=config), Update(chunks, 6), run, 0)
        moved = [s - p.detach() for s, p in zip(start, policy.trainable(), strict=True)]
        with torch.no_grad():
            for p, s in zip(policy.trainable(), start, strict=True):
                p.copy_(s)
        return torch.cat([part.flatten() for part in moved])

    def together() -> Chunk:
        """The pairs of images 0..2 and of 3..7, 2 + 4 of them, in one chunk."""
        whole = chunk(0, 8)
        win = torch.tensor([0, 1, 3, 4, 5, 6])
        return Chunk(whole.logp, win, win + 1, steps=2)

    split = gradient([chunk(0, 3), chunk(3, 8)])
    whole = gradient([together()])
    assert split.dtype == torch.float64
    assert float((split - whole).abs().max() / whole.abs().max()) < 1e-10


def test_a_gradient_that_is_not_finite_leaves_everything_alone(tiny_sd: Path, run: Run) -> None:
    learner = learner_of(tiny_sd, run)
    source = Repeat(learner.policy.family, lambda index: math.nan if index == 1 else 1.0)
    train_step(learner, next(source.round(0).updates), run, 0)
    before = weights(learner)
    result = train_step(learner, next(source.round(1).updates), run, 1)
    assert result["skipped"] == 1
    assert torch.equal(weights(learner), before)
    assert train_step(learner, next(source.round(2).updates), run, 2)["skipped"] == 0
    assert not torch.equal(weights(learner), before)


def test_the_average_follows_the_weights_and_not_a_skipped_step(tiny_sd: Path, run: Run) -> None:
    learner = learner_of(tiny_sd, run, PolicyConfig(ema_decay=0.9))
    source = Repeat(learner.policy.family, lambda index: math.nan if index == 1 else 1.0)
    before = weights(learner)
    for step in range(2):
        train_step(learner, next(source.round(step).updates), run, step)
    expected = before + 0.9 * (weights(learner) - before)  # the first update has a decay of 0.1
    with learner.policy.averaged():
        assert torch.allclose(weights(learner), expected, atol=1e-7)


def test_a_step_without_a_pair_moves_nothing(tiny_sd: Path, run: Run) -> None:
    learner = learner_of(tiny_sd, run)
    before = weights(learner)
    assert train_step(learner, Update([], pairs=0), run, 0)["pairs"] == 0
    assert torch.equal(weights(learner), before)


# ---- the loop -----------------------------------------------------------------------------------


def test_the_run_stops_after_too_many_steps_without_a_gradient(
    tiny_sd: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    learner = learner_of(tiny_sd, run, max_skipped=2, max_steps=9)
    source = Repeat(learner.policy.family, lambda index: math.nan if index in (1, 3, 4) else 1.0)
    with pytest.raises(InputError, match="stopped at step 5: the gradient was not finite 2 times"):
        fit(learner, source, run)
    assert capsys.readouterr().out.count("was skipped") == 3
    assert [row["skipped"] for row in metrics(run)] == [0, 1, 0, 1, 1]
    assert metrics(run)[1]["loss"] is None


def test_evaluations_and_checkpoints_come_when_they_are_due(tiny_sd: Path, run: Run) -> None:
    learner = learner_of(tiny_sd, run, max_steps=5)
    seen: list[int] = []
    fit(learner, Repeat(learner.policy.family), run, seen.append, evaluate_every=3)
    assert seen == [0, 3, 5]
    kept = sorted(path.name for path in run.folder.checkpoints.iterdir())
    assert kept == ["step-000004", "step-000005"]
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("policy", "optim"),
    [
        (PolicyConfig(), {}),
        (PolicyConfig(ema_decay=0.9), {"fused": True}),
        (PolicyConfig(method="full"), {"offload": True}),
        (PolicyConfig(method="full"), {"kind": "adamw_8bit"}),
        (PolicyConfig(), {"kind": "adafactor"}),
    ],
    ids=["lora", "ema", "full", "8bit", "adafactor"],
)
def test_a_resumed_run_is_the_same_run(
    tiny_sd: Path, tmp_path: Path, policy: PolicyConfig, optim: dict[str, Any]
) -> None:
    finals, rows = [], []
    for name, parts in (("whole", [6]), ("in parts", [4, 6])):
        for steps in parts:
            run = open_run(tmp_path / name)
            learner = learner_of(tiny_sd, run, policy, max_steps=steps, warmup_steps=5, **optim)
            fit(learner, Repeat(learner.policy.family), run)
            run.close()
        finals.append(learner.policy.state_dict())
        rows.append(metrics(run))
    assert rows[0] == rows[1]
    assert rows[0][0] != rows[0][-1]
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])


def test_another_reference_is_refused_on_resume(
    tiny_sd: Path, make_tiny_sd: Callable[..., Path], tmp_path: Path
) -> None:
    run = open_run(tmp_path / "run")
    learner = learner_of(tiny_sd, run, max_steps=2)
    fit(learner, Repeat(learner.policy.family), run)
    run.close()

    other = make_tiny_sd("other")
    from safetensors.torch import load_file, save_file

    path = other / "unet" / "diffusion_pytorch_model.safetensors"
    changed = load_file(path)
    changed["conv_in.bias"] += 1e-3
    save_file(changed, path, metadata={"format": "pt"})
    run = open_run(tmp_path / "run")
    learner = learner_of(other, run, max_steps=4)
    with pytest.raises(InputError, match="was trained against another reference"):
        fit(learner, Repeat(learner.policy.family), run)
    run.close()


def test_another_kind_of_optimizer_is_refused_on_resume(tiny_sd: Path, tmp_path: Path) -> None:
    kinds: tuple[Kind, ...] = ("adamw", "adamw_8bit", "adafactor")
    for kind in kinds:
        run = open_run(tmp_path / kind)
        learner = learner_of(tiny_sd, run, max_steps=2, kind=kind)
        fit(learner, Repeat(learner.policy.family), run)
        run.close()
    for kind, other in zip(kinds, (*kinds[1:], kinds[0]), strict=True):
        start = tmp_path / kind / "checkpoints" / "step-000002"
        run = open_run(tmp_path / f"{other} after {kind}", resume=str(start))
        learner = learner_of(tiny_sd, run, max_steps=4, kind=other)
        with pytest.raises(InputError, match=rf"with optim\.kind={kind}, not {other}: keep"):
            fit(learner, Repeat(learner.policy.family), run)
        run.close()


def test_weights_are_gone_while_a_finished_run_goes_on(tiny_sd: Path, tmp_path: Path) -> None:
    def more(steps: int, **options: Any) -> None:
        run = open_run(tmp_path / "run")
        try:
            learner = learner_of(tiny_sd, run, max_steps=steps)
            end = fit(learner, Repeat(learner.policy.family), run, **options)
            run.save_weights(learner.policy.saver(), end.step)
        finally:
            run.close()

    def interrupted(step: int) -> None:
        raise KeyboardInterrupt

    folder = RunFolder(tmp_path / "run")
    more(2)
    with pytest.raises(KeyboardInterrupt):
        more(4, evaluate=interrupted)
    assert (folder.weights.exists(), folder.step_of_weights()) == (False, 2)
    more(4)
    assert (folder.weights.exists(), folder.step_of_weights()) == (True, 4)
    more(4)
    # a checkpoint that cannot be read costs no weights
    (folder.checkpoints / "step-000004" / "optimizer.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="is damaged"):
        more(6)
    assert folder.weights.exists()


def test_bf16_trains_float32_weights(tiny_sd: Path, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", mixed_precision="bf16")
    learner = learner_of(tiny_sd, run, max_steps=2)
    before = weights(learner)
    seen: list[torch.dtype] = []
    layer = next(m for n, m in learner.policy.bare.named_modules() if n.endswith("conv_out"))
    layer.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    fit(learner, Repeat(learner.policy.family), run)
    assert set(seen) == {torch.bfloat16}
    assert weights(learner).dtype == torch.float32
    assert not torch.equal(weights(learner), before)
    run.close()
    # the next run of this process is not bound to it
    run = open_run(tmp_path / "next", mixed_precision="no")
    assert run.accelerator.mixed_precision == "no"
    run.close()

"""What one of several processes does for tests/test_d3po_zero.py; accelerate launch starts it.

    with_zero.py plan.json

The plan names a model, a folder for what is found, and trainings as lists of overrides, with a port
for each group of processes. Whatever does not hold ends the process with its AssertionError.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from in_pieces import answer, carry_out, close

from d3po import recipe
from d3po.families import load_family
from d3po.losses import BoundObjective, ObjectiveConfig
from d3po.policy import Policy, PolicyConfig
from d3po.run import Run, RunConfig
from d3po.trainer import Learner, OptimConfig, reference_logp
from fifa.config import InputError

LIMIT = 1e-3  # far below the gradients' norms: what is stepped with is clipped
RATE = 1e-3


def main(plan_file: str) -> None:
    """Check the engine, then train as the plan says."""

    def checks(plan: dict[str, Any], run: Run, folder: Path) -> None:
        assert run.division == "zero2"
        for method in ("lora", "full"):
            check_steps(plan["model"], method, run)
        check_half_precision_base(plan["model"], run)
        check_refusals(plan["trainings"][0], run)

    carry_out(plan_file, checks, check_half_precision_arithmetic)


def learner_of(policy: Policy, run: Run) -> Learner:
    """A learner under the engine of the run, with AdamW's defaults of `check_steps`."""
    objective = BoundObjective.from_config(ObjectiveConfig(name="dpo", beta=1.0))
    config = OptimConfig(learning_rate=RATE, epsilon=1e-4, max_grad_norm=LIMIT)
    return Learner.prepare(policy, objective, config, run)


def check_steps(model: str, method: str, run: Run) -> None:
    """Three steps of two ways back each against torch's AdamW on whole weights in one process.

    Each process has losses of its own; the reference is asked between forward and backward. The
    second step's gradient is not finite on the last process: nobody steps, nothing of it remains.
    """
    plain = Policy(load_family(model), PolicyConfig(method=method))
    adamw = torch.optim.AdamW(plain.trainable(), RATE, eps=1e-4, weight_decay=1e-4)
    learner = learner_of(Policy(load_family(model), PolicyConfig(method=method)), run)
    policy, engine = learner.policy, learner.engine(run)
    me = run.accelerator.process_index
    for step in (0, 1, 2):
        for i in (0, 1):
            loss = answer(policy.denoiser, shift=me + i).square().mean()
            reference_logp(policy, answer)
            broken = step == 1 and me == run.processes - 1
            engine.backward(loss * (math.nan if broken else 1.0))
        before = [p.detach().clone() for p in policy.trainable()]
        norm, stepped = engine.step(RATE)
        if step == 1:
            assert not stepped
            assert not math.isfinite(norm)
            assert all(map(torch.equal, before, policy.trainable()))
            continue
        adamw.zero_grad()
        for shift in [rank + i for rank in range(run.processes) for i in (0, 1)]:
            (answer(plain.bare, shift=shift).square().mean() / run.processes).backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.trainable(), LIMIT)
        adamw.step()
        assert stepped
        assert norm == pytest.approx(float(expected), rel=1e-4)
        assert norm > 10 * LIMIT
        for p, other in zip(policy.trainable(), plain.trainable(), strict=True):
            close(p.detach(), other.detach())
    check_shares(learner, plain, run)
    with policy.reference():
        assert torch.equal(answer(policy.bare), answer(load_family(model).denoiser))


def check_shares(learner: Learner, plain: Policy, run: Run) -> None:
    """Each process holds its part of the moments, the first one gets all of them on request."""
    total = sum(p.numel() for p in plain.trainable())
    state = learner.optimizer.optimizer.state.values()
    held = sum(value.numel() for own in state for value in own.values() if value.ndim)
    assert abs(held / (2 * total) - 1 / run.processes) < 0.05
    tensors = learner.engine(run).tensors()
    assert bool(tensors) == run.main
    whole = {i: p.shape for i, p in enumerate(plain.trainable())}
    for name, tensor in tensors.items():
        number, kind = name.split(".")
        assert tensor.shape == (() if kind == "step" else whole[int(number)])
        assert kind != "step" or float(tensor) == 2


def check_half_precision_base(model: str, run: Run) -> None:
    """LoRA in float32 over a base that stays in bfloat16."""
    policy = Policy(load_family(model, torch.bfloat16), PolicyConfig())
    learner = learner_of(policy, run)
    trained = {id(p) for p in policy.trainable()}
    for p in policy.bare.parameters():
        assert p.dtype == (torch.float32 if id(p) in trained else torch.bfloat16)
    engine = learner.engine(run)
    engine.backward(answer(policy.denoiser, dtype=torch.bfloat16).float().square().mean())
    _, stepped = engine.step(RATE)
    assert stepped


def check_half_precision_arithmetic(model: str, folder: Path) -> None:
    """A learner computes in bfloat16 over float32 weights, to the bit as it does under DDP."""
    run = Run(RunConfig(dir=str(folder / "bf16"), mixed_precision="bf16"))
    plain, own = (Policy(load_family(model), PolicyConfig()) for _ in range(2))
    exact = answer(plain.bare)
    as_ever = run.accelerator.prepare_model(plain.bare, evaluation_mode=True)
    found, expected = answer(learner_of(own, run).policy.denoiser), answer(as_ever)
    assert torch.equal(found, expected)
    assert 1e-4 < float((expected - exact).detach().abs().max()) < 0.1  # it did round
    run.close()


def check_refusals(overrides: list[str], run: Run) -> None:
    """What stretches do not go with is one sentence, before anything is loaded."""
    settings = ("optim.kind=adafactor", "optim.offload=true", "speed.channels_last=true")
    for setting in (*settings, "speed.compile=eager", "optim.kind=adamw_8bit"):
        config = recipe.load(None, [*overrides, setting])
        named = setting.removesuffix("=true").removesuffix("=eager")
        with pytest.raises(InputError, match=f"^{named} cannot be had with gradients in pieces"):
            recipe._check_division(config, run)


if __name__ == "__main__":
    main(sys.argv[1])

"""What one of several processes does for tests/test_d3po_sharding.py; accelerate launch starts it.

    in_pieces.py plan.json

The plan names a model and some of other families, a folder for what is found, and trainings as
lists of overrides, with a port for each group of processes. Whatever does not hold ends the process
with its AssertionError.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor, nn

from d3po import recipe
from d3po.families import FamilyConfig, load_family
from d3po.losses import BoundObjective, ObjectiveConfig
from d3po.policy import Policy, PolicyConfig
from d3po.run import Run, RunConfig
from d3po.sampling import image_noise
from d3po.sharding import in_pieces, local, whole
from d3po.trainer import Learner, OptimConfig
from fifa.config import InputError


def main(plan_file: str) -> None:
    """Check policies in pieces, then train as the plan says."""

    def checks(plan: dict[str, Any], run: Run, folder: Path) -> None:
        for method in ("lora", "full"):
            check_policy(plan["model"], method, run, folder)
        check_half_precision_base(plan["model"], run)
        check_refusals(plan["trainings"][0], run)
        for model in plan["families"]:
            check_family(model, run, folder)

    carry_out(plan_file, checks, check_half_precision_arithmetic)


def carry_out(
    plan_file: str,
    checks: Callable[[dict[str, Any], Run, Path], None],
    check_arithmetic: Callable[[str, Path], None],
) -> None:
    """Checks within a run, those of half precision in one of its own, then the trainings."""
    plan = json.loads(Path(plan_file).read_text())
    folder = Path(plan["folder"])
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # a process group for each training
    meet(plan["ports"].pop())
    run = Run(RunConfig(dir=str(folder / "checks")))
    checks(plan, run, folder)
    run.close()
    meet(plan["ports"].pop())
    check_arithmetic(plan["model"], folder)
    for overrides, port in zip(plan["trainings"], plan["ports"], strict=True):
        meet(port)
        recipe.train(recipe.load(None, overrides))


def meet(port: int) -> None:
    """Let the next Run make a process group of its own."""
    PartialState._reset_state()
    os.environ["MASTER_PORT"] = str(port)


def check_policy(model: str, method: str, run: Run, folder: Path) -> None:
    """A policy in pieces against a whole one of the same base, everything but training."""
    config = PolicyConfig(method=method, ema_decay=0.5)
    plain = Policy(load_family(model), config)
    cut = Policy(load_family(model), config, run.mesh)
    assert cut.fingerprint() == plain.fingerprint()
    check_shares(cut, plain, run)
    with plain.reference(), cut.reference():
        base = answer(plain.bare)
        assert torch.equal(answer(cut.bare), base)
    learn(plain)
    learn(cut, plain)
    check_same_state(cut, plain, run)
    drift = {f"ema.{name}": value + 0.1 for name, value in plain.state_dict().items()}
    state = {name: drift.get(name, value) for name, value in plain.state_dict().items()}
    for policy in (plain, cut):
        policy.load_state_dict(state)
    check_swaps(cut, plain, base)
    with plain.averaged(), cut.averaged():
        save = cut.saver()
        if run.main:
            save(folder / f"{method}-cut")
            plain.save(folder / f"{method}-plain")


def check_shares(cut: Policy, plain: Policy, run: Run) -> None:
    """Each process holds about its share of the elements, all together hold each once."""
    parameters = list(cut.bare.parameters())
    assert all(in_pieces(p) for p in parameters)
    total = sum(p.numel() for p in plain.bare.parameters())
    own = sum(local(p).numel() for p in parameters)
    stored = sum(local(p).untyped_storage().nbytes() // p.element_size() for p in parameters)
    assert abs(own / total - 1 / run.processes) < 0.05
    assert stored < 1.1 * own  # what is not its own is not in memory either
    assert run.total([own]) == [total]


def learn(policy: Policy, same_as: Policy | None = None) -> None:
    """Two AdamW steps; gradients and clipped norm must be those of the other policy's last step.

    Each backward pass goes over two forward passes, and the reference is asked between them.
    """
    adamw = torch.optim.AdamW(policy.trainable(), lr=1e-3)
    for _ in range(2):
        adamw.zero_grad()
        scores = [answer(policy.bare)]
        with policy.reference():
            answer(policy.bare)
        scores.append(answer(policy.bare, 1.0))
        sum(score.square().mean() for score in scores).backward()
        adamw.step()
        policy.ema_update()
    if same_as is None:
        return
    for p, other in zip(policy.trainable(), same_as.trainable(), strict=True):
        close(p.grad.full_tensor(), other.grad)
    moments = [value for state in adamw.state.values() for value in state.values() if value.ndim]
    held, total = sum(local(m).numel() for m in moments), sum(m.numel() for m in moments)
    assert total == 2 * sum(p.numel() for p in policy.trainable())
    assert abs(held / total - 0.5) < 0.05


def check_same_state(cut: Policy, plain: Policy, run: Run) -> None:
    """Weights and average have gone the same way; the first process has them, whole."""
    found = cut.state_dict()
    assert bool(found) == run.main
    for name, value in plain.state_dict().items() if run.main else ():
        close(found[name], value)


def check_swaps(cut: Policy, plain: Policy, base: Tensor) -> None:
    """Average and reference take effect, and leave the weights as they were."""
    before = [local(p).clone() for p in cut.trainable()]
    own = answer(cut.bare)
    assert torch.equal(own, answer(plain.bare))
    with plain.averaged(), cut.averaged():
        averaged = answer(plain.bare)
        assert torch.equal(answer(cut.bare), averaged)
    with cut.reference():
        assert torch.equal(answer(cut.bare), base)
    assert not torch.allclose(averaged, own)
    assert not torch.allclose(base, own)
    assert all(torch.equal(local(p), b) for p, b in zip(cut.trainable(), before, strict=True))


def check_family(model: str, run: Run, folder: Path) -> None:
    """A denoiser of another class in pieces: its answer, its gradient, its file."""
    answers, gradients = [], []
    for mesh in (None, run.mesh):
        family = load_family(model, config=FamilyConfig(image_size=64))
        policy = Policy(family, PolicyConfig(method="full"), mesh)
        x_t = image_noise([1, 2], family.latent_shape, -1)
        times = torch.tensor([7.0, 400.0]).to(family.schedule.time_dtype)
        cond = family.encode_text(["a red circle", "two stars"])
        answers.append(family.predict(policy.bare, x_t, times, cond))
        answers[-1].square().mean().backward()
        gradients.append([p.grad for p in policy.trainable()])
        save = policy.saver()
        if run.main:
            save(folder / f"{Path(model).name}-{'plain' if mesh is None else 'cut'}")
    assert torch.equal(*answers)
    for plain, cut in zip(*gradients, strict=True):
        if plain is not None:  # a norm that the last block of SD3 does not use
            close(cut.full_tensor(), plain)


def check_half_precision_base(model: str, run: Run) -> None:
    """LoRA in float32 over a base in bfloat16, in one block of pieces; the reference asked first.

    Gradients to two digits: bfloat16 has not many more, and products differ by where weights lie.
    """
    found = []
    for mesh in (None, run.mesh):
        policy = Policy(load_family(model, torch.bfloat16), PolicyConfig(), mesh)
        policy.family.gradient_checkpointing(True)
        with policy.reference():
            answer(policy.bare, dtype=torch.bfloat16)
        answer(policy.bare, dtype=torch.bfloat16).float().square().mean().backward()
        gradients = [whole(p.grad) for p in policy.trainable()]
        assert {g.dtype for g in gradients} == {torch.float32}
        found.append(torch.cat([g.flatten() for g in gradients]))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-2


def check_half_precision_arithmetic(model: str, folder: Path) -> None:
    """A learner computes in bfloat16 over float32 pieces, as it does over whole weights."""
    run = Run(RunConfig(dir=str(folder / "bf16"), mixed_precision="bf16"))
    plain, cut = (Policy(load_family(model), PolicyConfig(), mesh) for mesh in (None, run.mesh))
    exact = answer(plain.bare)
    whole_network = run.accelerator.prepare_model(plain.bare, evaluation_mode=True)
    objective = BoundObjective.from_config(ObjectiveConfig(name="dpo", beta=1.0))
    learner = Learner.prepare(cut, objective, OptimConfig(), run)
    found, expected = answer(learner.policy.denoiser), answer(whole_network)
    assert found.dtype == torch.float32
    off = float((expected - exact).abs().max())
    assert 1e-4 < off < 0.1  # it did round
    assert float((found - expected).abs().max()) < off
    run.close()


def check_refusals(overrides: list[str], run: Run) -> None:
    """What pieces do not go with is one sentence, before anything is loaded."""
    settings = ("optim.kind=adafactor", "optim.offload=true", "speed.channels_last=true")
    for setting in (*settings, "speed.compile=eager"):
        config = recipe.load(None, [*overrides, setting])
        named = setting.removesuffix("=true").removesuffix("=eager")
        with pytest.raises(InputError, match=f"^{named} cannot be had with weights in pieces"):
            recipe._check_division(config, run)


def answer(network: nn.Module, shift: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The network's output at fixed inputs, the same on every process."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator) + shift
    text = torch.randn(2, 5, 16, generator=generator)
    found: Tensor = network(x.to(dtype), torch.tensor(7), text.to(dtype)).sample
    return found


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    main(sys.argv[1])

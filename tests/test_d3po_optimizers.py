"""Optimizers by name: what each does to the weights, and where its state is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d3po import optimizers
from d3po.optimizers import Kind, Offloaded, build_optimizer
from fifa.config import InputError

SETTINGS: dict[str, Any] = {
    "learning_rate": 0.01,
    "betas": (0.8, 0.9),
    "epsilon": 1e-6,
    "weight_decay": 0.1,
}


def trained(kind: Kind, steps: int = 5, **options: bool) -> tuple[Tensor, torch.optim.Optimizer]:
    """A 64 x 80 matrix after steps on seeded gradients, the third step at half the rate."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 80, generator=generator))
    optimizer = build_optimizer([weight], kind, **SETTINGS, **options)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.005 if step == 2 else 0.01
        weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()
    return weight.detach(), optimizer


def adamw(steps: int = 5) -> Tensor:
    """Decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), in float64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 80, generator=generator).double()
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, steps + 1):
        rate = 0.005 if step == 3 else 0.01
        gradient = torch.randn(weight.shape, generator=generator).double()
        m = 0.8 * m + 0.2 * gradient
        v = 0.9 * v + 0.1 * gradient**2
        direction = (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-6)
        weight = weight - rate * 0.1 * weight - rate * direction
    return weight


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_is_the_published_algorithm(fused: bool) -> None:
    weight, optimizer = trained("adamw", fused=fused)
    torch.testing.assert_close(weight.double(), adamw(), rtol=0, atol=1e-6)
    assert bool(optimizer.param_groups[0]["fused"]) is fused


def test_8_bits_are_close_and_a_quarter_of_the_memory() -> None:
    weight, optimizer = trained("adamw_8bit")
    moved = (adamw() - trained("adamw", steps=0)[0].double()).norm()
    assert float((weight.double() - adamw()).norm() / moved) < 0.05
    (state,) = optimizer.state.values()
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert state["state1"].nbytes * 4 == weight.nbytes


def test_adafactor_keeps_a_row_and_a_column() -> None:
    # Shazeer & Stern 2018, algorithm 4, at the first step: beta2 = 1 - 1 ** -0.8 = 0
    before, _ = trained("adafactor", steps=0)
    generator = torch.Generator().manual_seed(0)
    torch.randn(64, 80, generator=generator)
    squares = torch.randn(64, 80, generator=generator).double()
    gradient, squares = squares, squares**2 + 1e-30
    row, column = squares.mean(1, keepdim=True), squares.mean(0, keepdim=True)
    direction = gradient / (row * column / row.mean()).sqrt()
    direction = direction / direction.square().mean().sqrt().clamp(min=1.0)
    expected = before.double() * (1 - 0.01 * 0.1) - 0.01 * direction
    weight, optimizer = trained("adafactor", steps=1)
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-6)
    (state,) = optimizer.state.values()
    assert state["exp_avg_sq_row"].shape == (64,)
    assert state["exp_avg_sq_col"].shape == (80,)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "adafactor"])
def test_an_offloaded_optimizer_does_the_same_elsewhere(kind: Kind) -> None:
    expected, _ = trained(kind)
    weight, optimizer = trained(kind, offload=True)
    assert torch.equal(weight, expected)
    assert isinstance(optimizer, Offloaded)
    assert not optimizer.state  # nothing beside the weights on the device
    (state,) = optimizer.inner.state.values()
    assert all(value.device.type == "cpu" for value in state.values() if torch.is_tensor(value))


def test_an_offloaded_optimizer_goes_on_from_a_checkpoint() -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(4, 4, generator=generator) for _ in range(4)]

    def run(weight: nn.Parameter, optimizer: torch.optim.Optimizer, part: slice) -> Tensor:
        for gradient in gradients[part]:
            weight.grad = gradient.clone()
            optimizer.step()
        return weight.detach().clone()

    whole, half, resumed = (nn.Parameter(torch.ones(4, 4)) for _ in range(3))
    make = [build_optimizer([w], "adamw", **SETTINGS, offload=True) for w in (whole, half, resumed)]
    expected = run(whole, make[0], slice(0, 4))
    with torch.no_grad():
        resumed.copy_(run(half, make[1], slice(0, 2)))
    make[2].load_state_dict(make[1].state_dict())
    assert torch.equal(run(resumed, make[2], slice(2, 4)), expected)


def test_what_cannot_be_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match=r"optim\.fused goes with optim\.kind=adamw, not with adaf"
    ):
        trained("adafactor", fused=True)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'd3po-fifa\[bitsandbytes\]'"):
        trained("adamw_8bit")

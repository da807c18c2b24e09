"""What the scripts that time the package against a straight way have in common."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from d3po.families import load_family
from d3po.policy import Policy, PolicyConfig


class Keep(torch.optim.SGD):
    """An optimizer that keeps the gradient and leaves the weights alone."""

    grads: list[Tensor]

    def step(self, closure: Any = None) -> None:
        """Hold on to the gradient of every parameter."""
        self.grads = [p.grad for group in self.param_groups for p in group["params"]]

    @property
    def kept(self) -> Tensor:
        """The gradient of the last step, one parameter after the other."""
        return torch.cat([grad.flatten() for grad in self.grads])


def policy_near_reference(method: str) -> Policy:
    """The mini model, a little way from its reference, so that no log-ratio is exactly 0."""
    policy = Policy(load_family("mini"), PolicyConfig(method=method))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.trainable():
            p.add_(1e-3 * torch.randn(p.shape, generator=generator))
    return policy


def gradient_left_by(work: Callable[[], object], policy: Policy) -> Tensor:
    """The gradient that `work` leaves in the policy's parameters, cleared afterwards."""
    work()
    grads = torch.cat([p.grad.flatten() for p in policy.trainable() if p.grad is not None])
    policy.bare.zero_grad(set_to_none=True)
    return grads


def seconds_of(work: Callable[[], object]) -> float:
    """Processor seconds of `work`, on one thread: a neighbour's work hardly counts."""
    start = time.process_time()
    work()
    return time.process_time() - start


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in `work`."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def matrix_rate(size: int = 1024) -> float:
    """GFLOP/s of a float32 matrix product on this machine, on the threads in use."""
    a = torch.randn(size, size)
    seconds = []
    for _ in range(9):
        start = time.process_time()
        a @ a
        seconds.append(time.process_time() - start)
    return 2 * size**3 / statistics.median(seconds) / 1e9


def apart(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm())


def megabytes(module: Any) -> float:
    """Memory of a network's parameters."""
    return round(sum(p.nbytes for p in module.parameters()) / 1e6, 1)

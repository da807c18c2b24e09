"""Optimizers by name, and one whose state stays in CPU memory.

`adamw` keeps two float32 moments a weight, `adamw_8bit` the same in a quarter of the memory
(Dettmers et al. 2022, blockwise quantisation, bitsandbytes), `adafactor` a row and a column a
matrix (Shazeer & Stern 2018, transformers; the choice of Diffusion-DPO for SDXL).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from fifa.config import InputError

Kind = Literal["adamw", "adamw_8bit", "adafactor"]

# bitsandbytes: smaller weights keep float32 moments; of larger ones a block has one float32 scale
SMALLEST_8BIT = 4096
BLOCK_8BIT = 256


def build_optimizer(
    parameters: Sequence[nn.Parameter],
    kind: Kind,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    fused: bool = False,
    offload: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of `parameters`; with `offload` its state and a copy of them are on the CPU.

    Adafactor takes neither betas nor epsilon: its own defaults, with a fixed learning rate. Raises
    InputError for a package that is not installed, or a choice that the kind does not have.
    """
    if fused and kind != "adamw":
        raise InputError(f"optim.fused goes with optim.kind=adamw, not with {kind}")
    if kind == "adamw_8bit" and find_spec("bitsandbytes") is None:
        raise InputError(
            "optim.kind=adamw_8bit needs bitsandbytes; pip install 'd3po-fifa[bitsandbytes]' "
            "brings it, or choose adamw or adafactor"
        )

    def build(own: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        if kind == "adafactor":
            from transformers import Adafactor

            return Adafactor(
                own,
                lr=learning_rate,
                weight_decay=weight_decay,
                scale_parameter=False,
                relative_step=False,
            )
        settings: dict[str, Any] = {
            "lr": learning_rate,
            "betas": betas,
            "eps": epsilon,
            "weight_decay": weight_decay,
        }
        if kind == "adamw_8bit":
            from bitsandbytes.optim.adamw import AdamW8bit

            return AdamW8bit(own, **settings)
        return torch.optim.AdamW(own, fused=fused or None, **settings)

    return Offloaded(parameters, build) if offload else build(parameters)


# What each kind alone keeps for a weight.
_MARKS: dict[str, Kind] = {"exp_avg": "adamw", "state1": "adamw_8bit", "RMS": "adafactor"}


def kind_of(state: Iterable[str]) -> Kind | None:
    """Whose state it is by its names, "<parameter number>.<name>"; None for an empty one."""
    found = {_MARKS[name] for name in (key.rpartition(".")[2] for key in state) if name in _MARKS}
    return found.pop() if found else None


def state_bytes(kind: Kind, shapes: Iterable[Sequence[int]]) -> float:
    """What the state of an optimizer of weights of these shapes takes, single numbers aside."""
    return sum(_state_of_one(kind, shape) for shape in shapes)


def _state_of_one(kind: Kind, shape: Sequence[int]) -> float:
    count = math.prod(shape)
    if kind == "adafactor" and len(shape) > 1:
        return 4.0 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])
    if kind == "adafactor":
        return 4.0 * count
    if kind == "adamw_8bit" and count >= SMALLEST_8BIT:
        return 2.0 * (count + 4 * math.ceil(count / BLOCK_8BIT))
    return 8.0 * count


class Offloaded(torch.optim.Optimizer):
    """An optimizer that works on copies of the weights in CPU memory.

    A step brings the gradients there and the new weights back; on the device remain the weights
    and their gradients. The idea of ZeRO-Offload (Ren et al. 2021), without its overlap.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        build: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self.twins = [nn.Parameter(p.detach().cpu().clone()) for p in parameters]
        self.inner = build(self.twins)
        super().__init__(parameters, dict(self.inner.defaults))

    @property
    def _own(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of the inner optimizer, at the learning rate of this one."""
        for twin, p in zip(self.twins, self._own, strict=True):
            twin.grad = None if p.grad is None else p.grad.cpu()
        for own, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner["lr"] = own["lr"]
        self.inner.step()
        for twin, p in zip(self.twins, self._own, strict=True):
            p.copy_(twin)
            twin.grad = None

    def state_dict(self) -> dict[str, Any]:
        """That of the inner optimizer."""
        return self.inner.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the inner optimizer; the weights, loaded before it, are copied once more."""
        self.inner.load_state_dict(state_dict)
        for twin, p in zip(self.twins, self._own, strict=True):
            twin.copy_(p)

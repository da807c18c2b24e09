"""Who takes gradients back, adds them up over the processes, clips them and steps.

accelerate does it for one process, for whole weights (DDP) and for pieces (FSDP2); DeepSpeed with
an engine of its own (see zero).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from d3po.policy import Policy
from d3po.run_folder import flatten
from d3po.sharding import gathered, piece_of, whole

if TYPE_CHECKING:
    from accelerate import Accelerator


class Engine(Protocol):
    """The way back and the step, for all processes together."""

    def alone(self) -> AbstractContextManager[None]:
        """Gradients of ways back in this block may stay on their process until the next one."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, averaged over the processes, to that of this step."""

    def step(self, rate: float) -> tuple[float, bool]:
        """Clip, step, clear; (norm before clipping, whether the weights moved)."""

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state as {"<parameter number>.<name>": whole tensor}.

        Its settings live in the config. Where weights or state are cut up: for the first process.
        """

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave; the weights have been put back before."""


class Accelerated:
    """The engine of accelerate around an optimizer that it has prepared."""

    def __init__(
        self,
        accelerator: Accelerator,
        policy: Policy,
        optimizer: Any,
        max_grad_norm: float | None,
    ) -> None:
        self.accelerator = accelerator
        self.policy = policy
        self.optimizer = optimizer
        self.limit = math.inf if max_grad_norm is None else max_grad_norm

    def alone(self) -> AbstractContextManager[None]:
        """See Engine: gradients of the processes meet once, on the last way back."""
        found: AbstractContextManager[None] = self.accelerator.no_sync(self.policy.denoiser)
        return found

    def backward(self, loss: Tensor) -> None:
        """See Engine."""
        self.accelerator.backward(loss)

    def step(self, rate: float) -> tuple[float, bool]:
        """See Engine."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = float(whole(self.accelerator.clip_grad_norm_(self.policy.trainable(), self.limit)))
        stepped = math.isfinite(norm)
        # The fp16 scaler wants to see overflows: it skips the step itself and lowers its scale.
        if stepped or self.accelerator.scaler is not None:
            self.optimizer.step()
            stepped = stepped and not self.optimizer.step_was_skipped
        self.optimizer.zero_grad(set_to_none=True)
        return norm, stepped

    def tensors(self) -> dict[str, Tensor]:
        """See Engine. 8-bit Adam nests part of its state in a dict: names with another dot."""
        state: dict[int, dict[str, Any]] = self.optimizer.state_dict()["state"]
        named = {
            f"{i}.{name}": torch.as_tensor(value)
            for i, own in state.items()
            for name, value in flatten(own).items()
        }
        tensors = gathered(named, self.policy.mesh)
        seen: set[int] = set()
        for name, tensor in tensors.items():
            if tensor.data_ptr() in seen:  # 8-bit Adam: one table of levels for all weights
                tensors[name] = tensor.clone()
            seen.add(tensor.data_ptr())
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See Engine."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            number, *inner, name = key.split(".")
            own = state.setdefault(int(number), {})
            for part in inner:
                own = own.setdefault(part, {})
            counts = value.ndim == 0 and value.dtype == torch.int64  # was a Python number
            parameter = parameters[int(number)]
            if value.shape == parameter.shape:
                value = piece_of(value, like=parameter)
            own[name] = value.item() if counts else value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

"""Gradients and optimizer state in pieces, weights whole: DeepSpeed's ZeRO-2.

DeepSpeed lays the trained weights end to end and gives each process one stretch of them. Every way
back adds gradients up over the processes, where each keeps those of its stretch; the optimizer
steps on the stretches, and then everyone gets all of the weights (Rajbhandari et al. 2020). So all
processes have to go back equally often, and an optimizer has to treat each element alone, as AdamW
does.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Elements that travel at once. DeepSpeed's own 5e8 is a buffer of 2 GB beside small networks.
_BUCKET = 50_000_000


class Zero:
    """DeepSpeed's engine around a network and the optimizer of its trained parameters; together.

    The parameters keep their names and shapes, but their memory is one long tensor from now on.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None,
    ) -> None:
        deepspeed = _deepspeed(parameters[0].device)
        self.parameters = list(parameters)
        self.optimizer = optimizer  # steps on this process's stretch
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # for its log only
            "managed_gradient_accumulation": False,  # a step may have any number of ways back
            "gradient_clipping": max_grad_norm or 0.0,
            "zero_allow_untested_optimizer": True,  # "tested" are its own
            "zero_optimization": {
                "stage": 2,
                "reduce_bucket_size": _BUCKET,
                "allgather_bucket_size": _BUCKET,
            },
        }
        self.network: Any
        self.network, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)

    @property
    def _zero(self) -> Any:
        return self.network.optimizer

    def alone(self) -> AbstractContextManager[None]:
        """Nothing: gradients cut up have to meet on every way back."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, averaged over the processes, to that of this step."""
        self.network.backward(loss)

    def step(self, rate: float) -> tuple[float, bool]:
        """Clip, step, clear; (norm before clipping, whether the weights moved)."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with warnings.catch_warnings():
            # torch 2.14 renames what DeepSpeed 0.19 calls
            warnings.simplefilter("ignore", FutureWarning)
            self.network.step()
        stepped: bool = self.network.was_step_applied()
        return float(self.network.get_global_grad_norm()) if stepped else math.inf, stepped

    def tensors(self) -> dict[str, Tensor]:
        """The state as {"<parameter number>.<name>": whole tensor} for the first process."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found = {}
        for own in self.optimizer.state.values():  # one stretch, or none before the first step
            for i, parameter in enumerate(self.parameters):
                for name, value in own.items():
                    if name != "step":
                        value = safe_get_full_optimizer_state(parameter, name)
                    found[f"{i}.{name}"] = value.cpu().clone()  # one step serves all
        return found if self.network.global_rank == 0 else {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave, after the weights, of which the optimizer has a copy."""
        import torch
        from deepspeed.utils import safe_set_full_optimizer_state

        self._zero.refresh_fp32_params()
        if not tensors:
            return
        ((stretch,),) = (group["params"] for group in self.optimizer.param_groups)
        names = {key.split(".")[1] for key in tensors} - {"step"}
        state = {name: torch.zeros_like(stretch) for name in sorted(names)}
        state["step"] = torch.stack([v for k, v in tensors.items() if k.endswith(".step")]).max()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
        # DeepSpeed finds the stretch's state after the first step only, unless it is told.
        self._zero._lazy_init_hp_params_optimizer_state()
        for key, value in tensors.items():
            number, name = key.split(".")
            if name != "step":
                safe_set_full_optimizer_state(self.parameters[int(number)], value, name)


def leave() -> None:
    """End the process group with all that DeepSpeed remembers of it; the next run has another."""
    from deepspeed import comm

    if comm.is_initialized():
        comm.destroy_process_group()


def _deepspeed(device: torch.device) -> Any:
    """The package, told to do without kernels: on a CPU it would compile one for a minute."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed

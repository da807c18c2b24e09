"""What accelerate launch was asked to divide among the processes, and whether this trainer does it.

Nothing (DDP), gradients and optimizer state (DeepSpeed's ZeRO-2), or the weights too (FSDP2): this
is chosen by the launcher, like the number of processes, and changes a run by rounding only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

from fifa.config import InputError

Division = Literal["ddp", "zero2", "fsdp2"]

# What accelerate launch sets when it is asked for an engine.
_MEGATRON, _DEEPSPEED, _FSDP = (
    f"ACCELERATE_USE_{name}" for name in ("MEGATRON_LM", "DEEPSPEED", "FSDP")
)

# The settings of an engine that change what is computed where, with the one value each may have.
_FSDP_SETTINGS = {
    "FSDP_VERSION": ("2", "1 is another library"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "weights change between two forward passes"),
    "FSDP_OFFLOAD_PARAMS": ("false", "weights stay on the device"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "optim.gradient_checkpointing does it"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "every process loads the model"),
}
_DEEPSPEED_SETTINGS = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("2", "fsdp2.yaml beside it divides as stage 3 does"),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("none", "the trainer writes DeepSpeed's settings"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("none", "its state stays on the device"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("none", "weights stay on the device"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "optim.accumulation does it"),
    "ACCELERATE_GRADIENT_CLIPPING": ("none", "optim.max_grad_norm does it"),
}
_ONE_IF_UNSET = {"FSDP_VERSION": "1"}


def division() -> Division:
    """What the launcher wants divided, by the file of configs/accelerate that asks for it.

    Raises InputError, before anything is loaded, where it asks for what this trainer cannot do.
    """
    if _set(_MEGATRON):
        raise InputError(
            "accelerate was told to use Megatron-LM, which this trainer does not support: launch "
            "with configs/accelerate/ddp.yaml, or with fsdp2.yaml beside it, which divides "
            "weights, gradients and optimizer state"
        )
    if _set(_FSDP):
        _check(_FSDP_SETTINGS, "fsdp2.yaml")
        return "fsdp2"
    if _set(_DEEPSPEED):
        _check(_DEEPSPEED_SETTINGS, "deepspeed_zero2.yaml")
        if find_spec("deepspeed") is None:
            raise InputError(
                "accelerate was told to use DeepSpeed, which is not installed; pip install "
                "'d3po-fifa[deepspeed]' brings it"
            )
        return "zero2"
    return "ddp"


def _check(settings: Mapping[str, tuple[str, str]], file: str) -> None:
    for variable, (only, reason) in settings.items():
        value = os.environ.get(variable, _ONE_IF_UNSET.get(variable, only)).lower()
        if value != only:
            name = variable.lower().removeprefix("accelerate_").removeprefix("deepspeed_")
            raise InputError(
                f"accelerate was told {name}={value}, which must be {only} here ({reason}): "
                f"launch with configs/accelerate/{file}"
            )


@contextmanager
def plain_processes() -> Iterator[None]:
    """Inside the block accelerate knows of no engine: it joins processes, this trainer divides.

    Its FSDP plugin would make new parameters after the policy has taken hold of them, and forgets
    itself without a word where there is no GPU (accelerate 1.15). Its DeepSpeed plugin wants to
    know beforehand how many ways back a step has, and steps with the last of them.
    """
    told = {name: os.environ.pop(name) for name in (_FSDP, _DEEPSPEED) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(told)


def _set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")

"""What accelerate launch was asked to do with the weights, and whether this trainer does it.

Whole weights on every process (DDP) or pieces of them (FSDP2) are chosen by the launcher, like the
number of processes, and change a run by rounding only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from fifa.config import InputError

_FSDP = "ACCELERATE_USE_FSDP"

# What accelerate launch sets when it is asked for engines that are none of ours.
_REFUSED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}

# The settings of FSDP that change what is computed where, and the one value each may have.
_FSDP_SETTINGS = {
    "FSDP_VERSION": ("2", "1 is another library"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "weights change between two forward passes"),
    "FSDP_OFFLOAD_PARAMS": ("false", "weights stay on the device"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "optim.gradient_checkpointing does it"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "every process loads the model"),
}


def in_pieces() -> bool:
    """Whether the launcher asks for weights in pieces, FSDP2.

    Raises InputError, before anything is loaded, where it asks for what this trainer cannot do.
    """
    for variable, name in _REFUSED.items():
        if _set(variable):
            raise InputError(
                f"accelerate was told to use {name}, which this trainer does not support: launch "
                "with configs/accelerate/ddp.yaml, or with fsdp2.yaml beside it, which cuts "
                "weights, gradients and optimizer state up as ZeRO-3 does"
            )
    if not _set(_FSDP):
        return False
    for variable, (only, reason) in _FSDP_SETTINGS.items():
        value = os.environ.get(variable, "1" if variable == "FSDP_VERSION" else only).lower()
        if value != only:
            raise InputError(
                f"accelerate was told {variable.lower()}={value}, which must be {only} here "
                f"({reason}): launch with configs/accelerate/fsdp2.yaml"
            )
    return True


@contextmanager
def plain_processes() -> Iterator[None]:
    """Inside the block accelerate knows of no FSDP: it joins processes, the policy cuts up.

    Its own plugin would make new parameters after the policy has taken hold of them, and forgets
    itself without a word where there is no GPU (accelerate 1.15).
    """
    told = os.environ.pop(_FSDP, None)
    try:
        yield
    finally:
        if told is not None:
            os.environ[_FSDP] = told


def _set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")

"""How the device computes: attention kernels, precision of products, memory layout, compilation.

None of it changes what is computed, only in which order and how exactly: results agree up to
rounding, TF32's being the coarsest. Where the hardware or a package is missing, one sentence says
so; nothing is switched off in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from fifa.config import Config, InputError

Attention = Literal["sdpa", "math", "flash", "xformers"]


class SpeedConfig(Config):
    """Ways to compute the same faster."""

    attention: Attention = Field(
        "sdpa",
        description="sdpa: torch chooses; math: matrix products; flash: torch's FlashAttention "
        "kernel or an error; xformers: its kernels, on a GPU.",
    )
    tf32: bool = Field(
        False,
        description="Products of float32 matrices with 10 bits of mantissa, on an NVIDIA GPU since "
        "Ampere: up to eight times as fast.",
    )
    channels_last: bool = Field(
        False, description="Weights of convolutions in the layout that tensor cores prefer."
    )
    compile: str | None = Field(
        None,
        description="torch.compile's back end (inductor) for each of the denoiser's repeated "
        "blocks; the first steps take minutes. null: not compiled.",
    )
    offload_encoders: bool = Field(
        False,
        description="Keep text encoders and VAE in CPU memory but for the moments that need them.",
    )


def prepare_network(config: SpeedConfig, denoiser: Any) -> None:
    """Change the bare denoiser as asked: layout, xformers, compilation of its blocks."""
    if config.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if config.attention == "xformers":
        _use_xformers(denoiser)
    if config.compile is not None:
        _compile_blocks(denoiser, config.compile)


def _use_xformers(denoiser: Any) -> None:
    if find_spec("xformers") is None:
        raise InputError(
            "speed.attention=xformers: the package is not installed; pip install "
            "'d3po-fifa[xformers]' brings it where a wheel fits your torch, or choose sdpa"
        )
    if not torch.cuda.is_available():
        raise InputError("speed.attention=xformers needs a CUDA GPU; choose sdpa or math here")
    denoiser.enable_xformers_memory_efficient_attention()


def _compile_blocks(denoiser: Any, backend: str) -> None:
    """Compile in place each block that diffusers names as repeated (regional compilation)."""
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise InputError(
            f"speed.compile: torch has no back end '{backend}', it has {', '.join(known)}"
        )
    names = getattr(denoiser, "_repeated_blocks", None) or denoiser._no_split_modules
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names]
    if not blocks:
        raise InputError(
            f"speed.compile: {type(denoiser).__name__} has no repeated blocks; leave it null"
        )
    for block in blocks:
        block.compile(backend=backend)


@contextmanager
def kernels(config: SpeedConfig, device: torch.device, precision: str) -> Iterator[None]:
    """Attention and matrix products as asked, inside the block; `precision` is accelerate's.

    On a CPU, torch's fused attention goes backward ten times slower in bfloat16 than the matrix
    products that it is made of, and eats what the precision gains (torch 2.14, mini model, 64
    images on a busy core: a LoRA step takes 368 ms fused, 157 as products, 353 in float32). There
    `sdpa` means products.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    _check_tf32(config, device)
    own = {"math": [SDPBackend.MATH], "flash": [SDPBackend.FLASH_ATTENTION]}.get(config.attention)
    if config.attention == "sdpa" and device.type == "cpu" and precision == "bf16":
        own = [SDPBackend.MATH]
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    if config.tf32:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    try:
        with nullcontext() if own is None else sdpa_kernel(own):
            yield
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        raise InputError(
            "speed.attention=flash: torch has no FlashAttention kernel for these numbers on this "
            "device (a GPU wants run.mixed_precision bf16 or fp16); choose sdpa"
        ) from None
    finally:
        if config.tf32:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]


def numerics(config: SpeedConfig, device: torch.device, precision: str) -> list[Any]:
    """What a network's output depends on besides its weights and input, if only in low digits.

    For the keys of what is kept on disk; `precision` is accelerate's.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    own = [config.attention, config.tf32, config.channels_last, config.compile]
    return [*own, precision, name, torch.__version__]


def _check_tf32(config: SpeedConfig, device: torch.device) -> None:
    if not config.tf32:
        return
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if not able:
        raise InputError(
            "speed.tf32 needs an NVIDIA GPU of the Ampere generation (2020) or later, this is "
            f"{device}; leave it false"
        )


# ---- encoders -----------------------------------------------------------------------------------


def encoders(family: Any) -> list[nn.Module]:
    """Every network of a family but its denoiser."""
    parts = [part for part in vars(family).values() if isinstance(part, nn.Module)]
    return [part for part in parts if part is not family.denoiser]


@contextmanager
def encoders_at_hand(family: Any) -> Iterator[None]:
    """Inside the block the encoders are where the denoiser is; then where they were before."""
    moved = [(part, _place(part)) for part in encoders(family) if _place(part) != family.device]
    try:
        for part, _ in moved:
            part.to(family.device)
        yield
    finally:
        for part, place in moved:
            part.to(place)


def _place(part: nn.Module) -> torch.device:
    return next(part.parameters()).device

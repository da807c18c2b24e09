"""How fast a device is, by three quick measurements: arithmetic, memory, and starting anything."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLOPS_PER_BYTE = 200.0  # of the GPUs that people train on (A100 156, RTX 4090 164, H100 295)
LAUNCH = 5e-6  # seconds until a GPU has started a kernel from Python
REPEATS = 5


@dataclass(frozen=True)
class Rates:
    """Of one device; each operation takes as long as its arithmetic or its memory traffic."""

    flops: float  # a second, in matrix products
    bytes: float  # a second
    start: float  # seconds an operation takes at least

    def seconds(self, flops: float, touched: float) -> float:
        """How long an operation takes: the roofline (Williams et al. 2009) and its start."""
        return max(flops / self.flops, touched / self.bytes) + self.start

    @classmethod
    def told(cls, tflops: float) -> Rates:
        """Those of a GPU of which only the rate of matrix products is known."""
        return cls(tflops * 1e12, tflops * 1e12 / FLOPS_PER_BYTE, LAUNCH)


def measured(device: torch.device, dtype: torch.dtype = torch.float32) -> Rates:
    """Measure `device` for a moment: the best of a few tries, whatever else is running."""
    size = 512 if device.type == "cpu" else 4096
    a = torch.randn(size, size, device=device).to(dtype)
    big = torch.empty(8 * 2**20 if device.type == "cpu" else 2**28, device=device)
    small = torch.zeros(8, device=device)
    return Rates(
        flops=2 * size**3 / _best(lambda: a @ a, device, 3),
        bytes=2 * big.nbytes / _best(lambda: big.clone(), device, 1),
        start=_best(lambda: small + small, device, 500),
    )


def _best(work: Callable[[], object], device: torch.device, count: int) -> float:
    """Seconds of one `work`, the best of REPEATS times `count` in a row."""
    work()
    found = []
    for _ in range(REPEATS):
        start = _clock(device)
        for _ in range(count):
            work()
        found.append((_clock(device) - start) / count)
    return max(min(found), 1e-9)


def _clock(device: torch.device) -> float:
    """Seconds; on a CPU those that our threads really had, so that other processes do not count."""
    if device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    torch.accelerator.synchronize()
    return time.perf_counter()

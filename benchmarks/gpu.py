"""Real-size UNets on a GPU: speed, share of the card's matrix rate, memory; one row a technique.

`python benchmarks/gpu.py --out runs/gpu.json` (one GPU; with `--tiny` it runs on any machine)

The UNets of Stable Diffusion 1.5 (860 M) and SDXL (2.6 G) are built from their published configs
with random weights: nothing is downloaded, and speed does not depend on what weights say. Latents,
text and paths are random too. A D3PO update is one denoising step of one group of G images and all
its pairs, with guidance; a DPO update is a batch of pairs.

The straight loop of the same run is the published procedure: pair by pair, each image alone with
its unconditional twin, a second UNet as the reference. Every other row adds one technique to the
row that it names. A row that does not fit into memory says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from side_by_side import flops
from torch import Tensor

from d3po.likelihood import path_logp, renoise_logp
from d3po.objectives import d3po_clipped, dpo
from d3po.optimizers import build_optimizer
from d3po.policy import Policy, PolicyConfig
from d3po.sampling import Predict
from d3po.schedule import NoiseSchedule, ddim_grid
from d3po.speed import SpeedConfig, kernels, prepare_network
from fifa.config import InputError, write_atomic

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SIZES: dict[str, dict[str, Any]] = {
    # unet/config.json of stable-diffusion-v1-5 and of stable-diffusion-xl-base-1.0
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TINY = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "down_block_types": (CROSS_DOWN, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", CROSS_UP),
}


@dataclass(frozen=True)
class Case:
    """One row: what is trained, on what, and how."""

    name: str
    model: str
    method: str  # lora or full
    work: str  # d3po or dpo
    rows: int  # images of a group, or pairs
    straight: bool = False
    checkpointing: bool = False
    optimizer: Any = "adamw"
    speed: SpeedConfig = field(default_factory=SpeedConfig)


def cases(models: Sequence[str], group: int, pairs: int, compiler: str) -> Iterator[Case]:
    """The straight loop, ours, and ours with one more technique each."""
    for model in models:
        for method in ("lora", "full"):
            for work, rows in (("d3po", group), ("dpo", pairs)):
                ours = Case("ours", model, method, work, rows)
                yield replace(ours, name="straight", straight=True)
                yield ours
                yield replace(ours, name="ours, batch 1", rows=2 if work == "d3po" else 1)
                yield replace(ours, name="ours + checkpointing", checkpointing=True)
                last = SpeedConfig(channels_last=True)
                yield replace(ours, name="ours + channels_last", speed=last)
                compiled = SpeedConfig(compile=compiler)
                yield replace(ours, name="ours + compiled blocks", speed=compiled)
                if method == "full":
                    yield replace(ours, name="ours + adafactor", optimizer="adafactor")


# ---- networks and data --------------------------------------------------------------------------


def unet_of(model: str, tiny: bool, device: torch.device, dtype: torch.dtype) -> Any:
    """A UNet of that size with random weights."""
    from diffusers import UNet2DConditionModel

    config = {**SIZES[model], **(TINY if tiny else {})}
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(in_channels=4, out_channels=4, **config)
    return unet.to(dtype).requires_grad_(False).eval()


@dataclass(frozen=True)
class Data:
    """Random latents and text of N images, for one model."""

    latents: Tensor  # (N, 3, 4, h, w): a path of two steps
    text: Tensor  # (N, L, D)
    noise: Tensor  # (N, 1, 4, h, w)
    extra: dict[str, Tensor]  # of N images: SDXL's pooled text and time ids

    @classmethod
    def of(cls, unet: Any, count: int, device: torch.device) -> Data:
        """Drawn from a fixed seed."""
        draw = torch.Generator(device).manual_seed(0)
        side, config = unet.config.sample_size, unet.config

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, device=device)

        extra = {}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * 256
            extra = {"text_embeds": random(count, pooled), "time_ids": random(count, 6).abs()}
        return cls(
            random(count, 3, 4, side, side),
            random(count, 77, config.cross_attention_dim),
            random(count, 1, 4, side, side),
            extra,
        )

    def predict(self, unet: Any, rows: Tensor, guidance: float) -> Predict:
        """The network on some images, guided in one doubled forward, as the package does it."""
        twice = torch.cat([rows, rows]) if guidance != 1 else rows
        text = self.text[twice].to(unet.dtype)
        extra = {name: value[twice].to(unet.dtype) for name, value in self.extra.items()}

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            x = torch.cat([x_t, x_t]) if guidance != 1 else x_t
            times = t.to(x.device).repeat(len(x) // len(t))
            pred = unet(x.to(unet.dtype), times, text, added_cond_kwargs=extra).sample.float()
            if guidance == 1:
                return pred
            without, with_text = pred.chunk(2)
            return without + guidance * (with_text - without)

        return predict


SCHEDULE = NoiseSchedule(
    torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    .square()
    .neg()
    .add(1)
    .cumprod(0),
    "epsilon",
    final_alpha_cumprod=0.99915,
    steps_offset=1,
)
GRID = ddim_grid(SCHEDULE, 2, 1.0)


# ---- one update ---------------------------------------------------------------------------------


def d3po_logp(data: Data, unet: Any, rows: Tensor) -> Tensor:
    """(B, 1): the first step of the stored paths, at guidance 5."""
    predict = data.predict(unet, rows, 5.0)
    return path_logp(predict, GRID, SCHEDULE, data.latents[rows], torch.tensor([0]))


def dpo_logp(data: Data, unet: Any, rows: Tensor) -> Tensor:
    """(B, 1): the clean latents at noise and time that a pair shares; rows 2i and 2i + 1 pair."""
    pair = rows // 2
    t = (pair.cpu() * 37 % 1000)[:, None]
    clean, noise = data.latents[rows, -1], data.noise[pair]
    return renoise_logp(data.predict(unet, rows, 1.0), SCHEDULE, clean, noise, t)


def update_of(case: Case, policy: Policy, reference: Any, data: Data) -> Callable[[], None]:
    """The forward and backward passes of one update."""
    logp = d3po_logp if case.work == "d3po" else dpo_logp
    images = case.rows if case.work == "d3po" else 2 * case.rows
    every = list(combinations(range(images), 2))
    pairs = every if case.work == "d3po" else [(2 * i, 2 * i + 1) for i in range(case.rows)]

    def loss_of(win: Tensor, lose: Tensor, ref_win: Tensor, ref_lose: Tensor) -> Tensor:
        if case.work == "d3po":
            return d3po_clipped(win, lose, ref_win, ref_lose, beta=0.1)
        return dpo(win, lose, ref_win, ref_lose, beta=2000.0)

    def straight() -> None:
        for pair in pairs:
            rows = [torch.tensor([image], device=data.text.device) for image in pair]
            with torch.no_grad():
                refs = [logp(data, reference, row) for row in rows]
            own = [logp(data, policy.bare, row) for row in rows]
            (loss_of(*own, *refs).sum() / len(pairs)).backward()

    def ours() -> None:
        rows = torch.arange(images, device=data.text.device)
        win, lose = torch.tensor(pairs, device=rows.device).T
        with policy.reference():
            ref = logp(data, policy.bare, rows)
        own = logp(data, policy.bare, rows)
        loss_of(own[win], own[lose], ref[win], ref[lose]).mean().backward()

    return straight if case.straight else ours


# ---- measuring ----------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, size: int) -> float:
    """TFLOP/s of a bfloat16 matrix product on this device."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(12):
        wait(device)
        start = time.perf_counter()
        a @ a
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:]) / 1e12


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float | None]]:
    """{"peak_gb": ...} of the block on a GPU; None elsewhere."""
    found: dict[str, float | None] = {"peak_gb": None}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)


def measure(case: Case, tiny: bool, device: torch.device, rate: float, turns: int) -> Any:
    """Seconds, rates and memory of one row; optimizer step included."""
    frozen = torch.bfloat16 if case.method == "lora" and device.type == "cuda" else torch.float32
    unet = unet_of(case.model, tiny, device, frozen)
    prepare_network(case.speed, unet)
    if case.checkpointing:
        unet.enable_gradient_checkpointing()
    family: Any = SimpleNamespace(denoiser=unet, name=case.model)
    policy = Policy(family, PolicyConfig(method=case.method))
    reference = unet_of(case.model, tiny, device, frozen) if case.straight else None
    optimizer = build_optimizer(
        policy.trainable(),
        case.optimizer,
        learning_rate=1e-5,
        betas=(0.9, 0.999),
        epsilon=1e-8,
        weight_decay=1e-2,
    )
    images = case.rows if case.work == "d3po" else 2 * case.rows
    pairs = images * (images - 1) // 2 if case.work == "d3po" else case.rows
    update = update_of(case, policy, reference, Data.of(unet, images, device))
    seconds = []
    with kernels(case.speed, device, "bf16"), torch.autocast(device.type, torch.bfloat16):
        for _ in range(turns + 1):
            wait(device)
            start = time.perf_counter()
            update()
            optimizer.step()
            optimizer.zero_grad()
            wait(device)
            seconds.append(time.perf_counter() - start)
        plain = not case.checkpointing and case.speed == SpeedConfig()
        work = flops(update) if plain else None  # what is computed twice is no work
    median = statistics.median(seconds[1:])
    tflops = work / median / 1e12 if work else None
    return {
        "seconds": round(median, 4),
        "pairs_per_second": round(pairs / median, 3),
        "images_per_second": round(images / median, 3),
        "tflops": round(tflops, 4) if tflops else None,
        "share_of_matrix_rate": round(tflops / rate, 3) if tflops else None,
    }


def row(case: Case, tiny: bool, device: torch.device, rate: float, turns: int) -> dict[str, Any]:
    """The row of a case, or why there is none."""
    facts: dict[str, Any] = {
        "model": case.model,
        "method": case.method,
        "work": case.work,
        "name": case.name,
        "rows": case.rows,
    }
    try:
        with peak_memory(device) as memory:
            found = measure(case, tiny, device, rate, turns)
        return {**facts, **found, **memory}
    except torch.OutOfMemoryError:
        return {**facts, "failed": "does not fit into the memory of this device"}
    except InputError as error:
        return {**facts, "failed": str(error)}


def main() -> None:
    """Print one line a row; write the table when asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=sorted(SIZES), default=["sd15", "sdxl"])
    parser.add_argument("--names", help="only rows whose name holds this text")
    parser.add_argument("--group", type=int, default=7, help="images of a D3PO group")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of a DPO update")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="small networks, on any machine")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.tiny:
        parser.error("there is no CUDA GPU; --tiny runs without one, on small networks")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    rate = matrix_rate(device, 256 if arguments.tiny else 8192)
    print(f"{name}: {rate:.2f} TFLOP/s in bfloat16 matrix products", flush=True)
    rows = []
    compiler = "aot_eager" if arguments.tiny else "inductor"
    for case in cases(arguments.models, arguments.group, arguments.pairs, compiler):
        if arguments.names is None or arguments.names in case.name:
            rows.append(row(case, arguments.tiny, device, rate, arguments.turns))
            print(json.dumps(rows[-1]), flush=True)
    facts = {
        "device": name,
        "tiny": arguments.tiny,
        "torch": torch.__version__,
        "matrix_tflops": round(rate, 3),
        "rows": rows,
    }
    if arguments.out:
        write_atomic(arguments.out, json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()

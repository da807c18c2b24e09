"""What would this config take? Memory, time, disk and updates, before any weights are loaded.

The networks are built from their config files on torch's meta device (`networks`) and played
through as the trainer would run them (`playing`): sampling, decoding, the reference's scores, a
micro-batch forward and back. What the optimizer, the average and the reference's copy hold is
arithmetic. Time is a roofline over the operations, with the rates of the device (`rates`).
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from d3po.evaluate import EvalConfig
from d3po.inversion import points_within
from d3po.online.settings import groups_per_update, trained_steps
from d3po.optimizers import state_bytes
from d3po.preflight.networks import Networks, load_outline, train_outline
from d3po.preflight.playing import NOTHING, Played, play
from d3po.preflight.rates import Rates, measured
from d3po.trainer import whole_rounds
from fifa.pairs import PairTable

if TYPE_CHECKING:
    from d3po.recipe import TrainConfig

GB = 1e9
CUDA_CONTEXT = 0.6 * GB  # what a CUDA process holds before its first tensor
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to take. Bytes and seconds."""

    memory: dict[str, float]  # what is held all the time, by what it is
    peaks: dict[str, float]  # what each kind of work adds to that while it runs
    process: float  # the program itself: Python and its libraries, or a CUDA context
    updates: int
    seconds_a_step: float  # of one update, its share of a round's sampling included
    seconds: float  # of the whole run, evaluations included
    flops_a_step: float
    disk: dict[str, float]
    parameters: dict[str, int]
    trained: int
    advice: tuple[str, ...]  # settings that would lower the peak, best first

    @property
    def peak(self) -> float:
        """Most memory at one time."""
        return self.process + sum(self.memory.values()) + max(self.peaks.values())

    def to_json(self) -> str:
        """As JSON text, sums included."""
        values = {**asdict(self), "peak": self.peak, "disk_total": sum(self.disk.values())}
        return json.dumps(values, indent=1) + "\n"

    def verdict(self, available: float | None) -> str:
        """One sentence: does it fit, and what to try if not."""
        need = f"needs {self.peak / GB:.1f} GB at its peak (while {self._worst()})"
        if available is None:
            return need
        if self.peak <= available:
            return f"fits in {available / GB:.3g} GB: {need}"
        tip = f"; try {' or '.join(self.advice)}" if self.advice else ""
        return f"does not fit in {available / GB:.3g} GB: {need}{tip}"

    def _worst(self) -> str:
        return max(self.peaks, key=lambda name: self.peaks[name])


def forecast(
    config: TrainConfig,
    device: str,
    rates: Rates,
    process: Callable[[], float],
    processes: int = 1,
) -> Forecast:
    """Look ahead of `config` on one "cpu" or "cuda" device of those that `processes` share.

    `process()` is what the program itself takes, asked when its libraries are loaded. Raises
    InputError if the model's config files are not there or its class is unknown, and for settings
    of a rollout that training would refuse.
    """
    networks = load_outline(config.model, config.family)
    ahead = _Ahead(config, networks, device, rates, processes)
    memory, peaks = ahead.memory(), ahead.peaks()
    total = ahead.updates()
    return Forecast(
        memory=memory,
        peaks={name: float(played.bytes) for name, played in peaks.items()},
        process=process(),
        updates=total,
        seconds_a_step=ahead.step.seconds,
        seconds=total * ahead.step.seconds + ahead.evaluating.seconds + ahead.inversion(),
        flops_a_step=ahead.step.flops,
        disk=ahead.disk(),
        parameters=ahead.parameters,
        trained=ahead.trained,
        advice=tuple(ahead.advice(peaks)),
    )


class _Ahead:
    """The pieces of work of a run, played through once each."""

    def __init__(
        self, config: TrainConfig, networks: Networks, device: str, rates: Rates, processes: int
    ) -> None:
        self.config, self.networks, self.rates = config, networks, rates
        self.device, self.processes = device, processes
        self.parameters = networks.parameters
        half = HALF.get(str(config.run.mixed_precision))
        full = config.policy.method == "full" or device == "cpu"
        self.compute = half or torch.float32  # what the denoiser computes in
        self.stored = torch.float32 if full else self.compute  # what frozen weights are kept in
        # attention of bfloat16 on a CPU is computed as products, see Run.kernels
        self.fused = not (device == "cpu" and self.compute == torch.bfloat16)
        self.trained_steps, self.updates_a_round = self._round()
        self.rows = self._rows()
        self.sampling = self._forward(self._guided(config.sampler.batch, config.sampler.guidance))
        self.decoding = self._decoding(config.sampler.batch)
        self.encoding = self._encoding()
        self.inverting = self._inverting()
        shapes = train_outline(networks, config.policy, self.compute)
        self.trained = sum(map(math.prod, shapes))
        self.state = state_bytes(config.optim.kind, shapes)
        self.scoring = self._forward(self.rows)
        self.learning = self._learning()
        self.step = self._step()
        self.evaluating = self._evaluating(config.eval)

    # ---- the shape of the run -------------------------------------------------------------------

    def _round(self) -> tuple[int, int]:
        """Steps of a path that an update learns from, and updates of a round; 1 and 1 offline."""
        config = self.config
        if config.online is None:
            return 1, 1
        size = groups_per_update(config.online, config.optim, self.processes)
        grid = self.networks.schedule.grid(config.sampler.steps, config.sampler.eta)
        steps = trained_steps(config.online, grid)
        return len(steps), config.online.groups // size * config.online.inner_epochs

    def _at_once(self) -> int:
        """Steps of a path in one training forward."""
        online = self.config.online
        return 1 if online is None else min(online.steps_at_once, self.trained_steps)

    def _rows(self) -> int:
        """Pictures in one training forward, each at some steps, twice with guidance."""
        config, micro = self.config, self.config.optim.micro_batch
        if config.online is None:
            return 2 * micro
        scale = config.online.train_guidance
        guidance = config.sampler.guidance if scale is None else scale
        return self._guided(micro * config.online.images * self._at_once(), guidance)

    @staticmethod
    def _guided(rows: int, guidance: float) -> int:
        return rows if guidance == 1 else 2 * rows

    def updates(self) -> int:
        """Optimizer steps of the run."""
        config = self.config
        if config.online is None:
            return config.optim.max_steps
        return whole_rounds(config.optim.max_steps, self.updates_a_round)

    def _round_images(self) -> int:
        """Pictures that one process draws in a round."""
        online = self.config.online
        return 0 if online is None else -(-online.groups // self.processes) * online.images

    # ---- pieces of work -------------------------------------------------------------------------

    def _play(self, work: Callable[[], object]) -> Played:
        return play(work, self.rates, self.fused)

    def _forward(self, rows: int) -> Played:
        inputs = self.networks.inputs(rows, self.compute)
        denoiser = nn.Module.to(self.networks.denoiser, self.compute)
        with torch.no_grad():
            return self._play(lambda: denoiser(**inputs, return_dict=False))

    def _decoding(self, images: int) -> Played:
        vae = nn.Module.to(self.networks.parts["vae"], self.stored)
        latents = torch.empty(images, *self.networks.latent_shape, device="meta", dtype=self.stored)
        with torch.no_grad():
            return self._play(lambda: vae.decode(latents).sample.float())

    def _encoding(self) -> Played:
        """Stored pairs become latents; online nothing is encoded."""
        if self.config.offline is None:
            return NOTHING
        vae, side = nn.Module.to(self.networks.parts["vae"], self.stored), self.networks.image_size
        count = 2 * self.config.offline.encode_batch
        pictures = torch.empty(count, 3, side, side, device="meta", dtype=self.stored)
        with torch.no_grad():
            return self._play(lambda: vae.encode(pictures).latent_dist.mean.float())

    def _inverting(self) -> Played:
        """One step of the paths of a batch of stored pairs."""
        offline = self.config.offline
        if offline is None or offline.path != "inverted":
            return NOTHING
        return self._forward(self._guided(2 * offline.encode_batch, offline.inversion.guidance))

    def _learning(self) -> Played:
        """A micro-batch forward and back."""
        denoiser = self.networks.denoiser
        if self.config.optim.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        inputs = self.networks.inputs(self.rows, self.compute)

        def work() -> None:
            denoiser(**inputs, return_dict=False)[0].float().square().mean().backward()

        found = self._play(work)
        denoiser.zero_grad(set_to_none=True)
        return found

    def _optimizer(self) -> Played:
        """It reads weight, gradient and state, and writes weight and state back."""
        touched = 3 * 4 * self.trained + 2 * self.state
        return Played(0, 0.0, self.rates.seconds(12.0 * self.trained, touched))

    def _step(self) -> Played:
        """One update, with its share of what is done once a round."""
        config = self.config
        learning = self.learning.times(config.optim.accumulation)
        if config.online is None:
            scoring = self.scoring.times(config.optim.accumulation)
            return learning.then(scoring).then(self._optimizer())
        calls = self.trained_steps / self._at_once()
        sampling = self._drawn(self._round_images()).times(1 / self.updates_a_round)
        # of a round's blocks each trained step is scored once under the reference
        scored = self.scoring.times(config.optim.accumulation * calls / config.online.inner_epochs)
        return learning.times(calls).then(scored).then(sampling).then(self._optimizer())

    def _drawn(self, images: int) -> Played:
        """Paths and pictures of `images` drawings."""
        batches = images / self.config.sampler.batch
        return self.sampling.times(batches * self.config.sampler.steps).then(
            self.decoding.times(batches)
        )

    def _evaluating(self, config: EvalConfig) -> Played:
        """All evaluations: the reference's pictures once, the policy's each time."""
        if config.prompts is None:
            return NOTHING
        times = 1 + (self.updates() // config.every if config.every else 0)
        return self._drawn(config.count * config.images // self.processes).times(1 + times)

    # ---- what it adds up to ---------------------------------------------------------------------

    def memory(self) -> dict[str, float]:
        """What is held all the time on the device."""
        trained, full = 4.0 * self.trained, self.config.policy.method == "full"
        size = self.stored.itemsize
        frozen = {name: float(count * size) for name, count in self.parameters.items()}
        name = self.networks.denoiser_name
        own = self.parameters[name]
        found = {name: frozen[name]} if self._encoders_away() else frozen
        found |= self._of_the_optimizer() | {"gradients": self._missing_gradients()}
        if not full:
            found["LoRA"] = trained
        if full and self.device == "cpu":
            found["the reference's copy"] = trained
        if self.config.policy.ema_decay is not None:
            found["EMA"] = trained
        if self.compute.itemsize < self.stored.itemsize:
            found["weights cast by autocast"] = float(own * self.compute.itemsize)
        found["rollouts"] = self._rollouts()
        return {name: value for name, value in found.items() if value}

    def _of_the_optimizer(self) -> dict[str, float]:
        """Its state; offloaded, that and a copy of the weights are in CPU memory."""
        whose = "Adafactor" if self.config.optim.kind == "adafactor" else "Adam"
        state = {f"{whose}'s moments": self.state}
        if not self.config.optim.offload:
            return state
        return {**state, "the optimizer's copy": 4.0 * self.trained} if self.device == "cpu" else {}

    def _encoders_away(self) -> bool:
        """Whether text encoders and VAE wait in CPU memory, and that is not the device's."""
        return self.config.speed.offload_encoders and self.device != "cpu"

    def _missing_gradients(self) -> float:
        """Gradients are float32; the playing saw them in the type that is computed in."""
        return float((4 - self.compute.itemsize) * self.trained)

    def inversion(self) -> float:
        """Seconds that it takes to invert all pairs, once."""
        offline = self.config.offline
        if offline is None or self.inverting is NOTHING:
            return 0.0
        batches = self._pairs() / offline.encode_batch / self.processes
        calls = offline.inversion.steps * offline.inversion.iterations
        return batches * calls * self.inverting.seconds

    def _pairs(self) -> int:
        """At most: every row of the table; none if it is not there."""
        offline = self.config.offline
        if offline is None or not Path(offline.data).exists():
            return 0
        return PairTable.open(offline.data).num_rows

    def _rollouts(self) -> float:
        channels, height, width = self.networks.latent_shape
        path = 4 * channels * height * width * (self.config.sampler.steps + 1)
        picture = 4 * 3 * self.networks.image_size**2
        return float(self._round_images() * (path + picture + self.networks.text_bytes()))

    def peaks(self) -> dict[str, Played]:
        """What each kind of work adds while it runs."""
        found = {"learning": self.learning}
        if self.config.online is not None or self.config.eval.prompts is not None:
            found |= {
                "sampling": self._with_encoders(self.sampling),
                "decoding pictures": self._with_encoders(self.decoding),
            }
        if self.config.offline is not None:
            found["encoding pairs"] = self._with_encoders(self.encoding)
            if self.config.offline.path == "inverted":
                found["inverting pairs"] = self.inverting
        if self.config.policy.method == "full" and self.device != "cpu":
            copy = Played(4 * self.trained, 0.0, 0.0)  # the reference is swapped in from the CPU
            found["scoring the reference"] = Played(self.scoring.bytes + copy.bytes, 0.0, 0.0)
        return found

    def _with_encoders(self, work: Played) -> Played:
        """The work with the encoders brought to the device for it."""
        if not self._encoders_away():
            return work
        own = self.parameters[self.networks.denoiser_name]
        away = (sum(self.parameters.values()) - own) * self.stored.itemsize
        return replace(work, bytes=work.bytes + away)

    def disk(self) -> dict[str, float]:
        """Checkpoints, the weights, and what is cached."""
        config, trained = self.config, 4.0 * self.trained
        copies = 1 + (config.policy.ema_decay is not None)  # the weights and their average
        found = {
            "checkpoints": (copies * trained + self.state) * config.run.keep_checkpoints,
            "weights": trained,
        }
        offline, pairs = config.offline, self._pairs()
        if offline is not None and pairs:
            size = 2 if offline.cache_dtype == "float16" else 4
            channels, height, width = self.networks.latent_shape
            latents = 2.0 * channels * height * width * size
            found["encoded pairs"] = pairs * (latents + self.networks.text_bytes() * size / 4)
            if offline.path == "inverted":
                points = points_within(offline.inversion.steps, offline.noise)
                found["inverted paths"] = pairs * latents * len(points)
        return found

    def advice(self, peaks: dict[str, Played]) -> list[str]:
        """Settings that lower the highest peak."""
        config = self.config
        worst = max(peaks, key=lambda name: peaks[name].bytes)
        found = []
        if worst in ("sampling", "decoding pictures") and config.sampler.batch > 1:
            found.append(f"sampler.batch={max(1, config.sampler.batch // 4)}")
        if worst in ("encoding pairs", "inverting pairs") and config.offline is not None:
            found.append(f"offline.encode_batch={max(1, config.offline.encode_batch // 4)}")
        if worst == "learning" and not config.optim.gradient_checkpointing:
            found.append("optim.gradient_checkpointing=true")
        if worst == "learning" and config.optim.micro_batch > 1:
            half = config.optim.micro_batch // 2
            more = config.optim.accumulation * 2
            found.append(f"optim.micro_batch={half} optim.accumulation={more}")
        if config.run.mixed_precision in (None, "no") and self.device != "cpu":
            found.append("run.mixed_precision=bf16")
        if config.policy.method == "full":
            found.append("policy.method=lora")
        return found


def place(tflops: float | None, precision: str | None) -> tuple[str, Rates, Callable[[], float]]:
    """Where the run would be: "cuda" or "cpu", its rates, and what the program itself takes there.

    A GPU that is not here is known by its TFLOP/s; else what this machine has is measured.
    """
    if tflops is not None:
        return "cuda", Rates.told(tflops), lambda: CUDA_CONTEXT
    dtype = HALF.get(str(precision), torch.float32)
    if torch.cuda.is_available():
        return "cuda", measured(torch.device("cuda"), dtype), lambda: CUDA_CONTEXT
    return "cpu", measured(torch.device("cpu"), dtype), own_memory


def own_memory() -> float:
    """What this process holds now, in bytes, with the libraries that a training loads."""
    for name in ("accelerate", "diffusers.loaders.peft", "peft", "transformers.models.clip"):
        importlib.import_module(name)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0.0  # no Linux: the forecast is of the tensors alone
    import resource

    return float(pages * resource.getpagesize())


def told(ahead: Forecast, available: float | None) -> str:
    """The forecast as text, the verdict last."""
    rows: list[tuple[str, str]] = [
        (name, f"{value / GB:8.2f} GB") for name, value in ahead.memory.items()
    ]
    rows.append(("the program itself", f"{ahead.process / GB:8.2f} GB"))
    rows += [(f"while {name}", f"{value / GB:+8.2f} GB") for name, value in ahead.peaks.items()]
    weights = ", ".join(f"{name} {_count(n)}" for name, n in ahead.parameters.items())
    disk = ", ".join(f"{name} {value / GB:.2f}" for name, value in ahead.disk.items())
    lines = [
        f"weights: {weights}; trained {_count(ahead.trained)}",
        *(f"  {name:<26}{value}" for name, value in rows),
        f"disk: {sum(ahead.disk.values()) / GB:.2f} GB ({disk})",
        f"updates: {ahead.updates:,} of {_duration(ahead.seconds_a_step)} and "
        f"{ahead.flops_a_step / 1e12:.3g} TFLOP each; {_duration(ahead.seconds)} in all, without "
        "judges and text encoders",
        ahead.verdict(available),
    ]
    return "\n".join(lines)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def available_memory(device: str) -> float | None:
    """What the device has in all; None where nobody can say."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else None
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    return 1024.0 * int(text.split("MemTotal:")[1].split()[0])

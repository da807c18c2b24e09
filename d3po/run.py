"""A run in progress; the only room that knows how many processes there are.

What the processes of a run share, agree on and wait for goes through `Run`, and so does what the
main one alone writes (see `run_folder`) and shows (see `display`).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from d3po.display import Display
from d3po.launch import Division, division, plain_processes
from d3po.run_folder import STEP_FILE, Checkpoint, Progress, RunFolder, flatten
from d3po.sharding import mesh_of
from d3po.zero import leave
from fifa.config import Config, InputError, atomic_path, write_atomic

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh

    from fifa.images import Pixels

R = TypeVar("R")


class RunConfig(Config):
    """Where a run lives, how often it is saved, and in which precision it computes."""

    dir: str = Field(description="Folder of this run; running the same command again resumes it.")
    seed: int = Field(0, ge=0, description="Seed from which every draw of the run is derived.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = Field(
        None,
        description="Arithmetic of the network's forward pass; null: as told to accelerate "
        "launch, else no.",
    )
    judge_device: str | None = Field(
        None,
        description="Device that rewards score on, such as cpu; null: that of the model.",
    )
    checkpoint_every: int = Field(
        50,
        ge=0,
        description="Optimizer steps between checkpoints, rounded up to whole rounds; 0: only "
        "at the end.",
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="How many of the newest checkpoints are kept."
    )
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (),
        description="Where metrics also go, through accelerate; wandb stays offline unless "
        "WANDB_MODE says so.",
    )
    resume: str = Field(
        "auto",
        description="auto or latest: from the newest checkpoint of run.dir; never: refuse a "
        "folder that holds a run; else the path of a checkpoint.",
    )
    log_every: int = Field(
        1, ge=1, description="Optimizer steps between two progress lines when the output is piped."
    )


class ToldElsewhere(InputError):
    """An InputError of another process, which prints it; this one only has to end."""


class Run:
    """A run in progress: its folder, its processes, its devices and its progress display.

    What is below "together" must be called on every process; the rest may be called on every
    process and acts on the main one only, so that callers never ask who they are.
    """

    def __init__(self, config: RunConfig) -> None:
        _check_trackers(config.trackers)
        self.config = config
        asked = division()
        with plain_processes():
            self.accelerator = _accelerator(config)
        # what the processes divide among themselves; one process has everything
        self.division: Division = asked if self.processes > 1 else "ddp"
        # the processes among which the weights are cut up; None: each has all of them
        self.mesh: DeviceMesh | None = None
        if self.division == "fsdp2":
            self.mesh = mesh_of(self.device, self.processes)
        self.folder = RunFolder(config.dir)
        self.start: Checkpoint | None = None  # where to go on; None: from the beginning
        self._display = Display(config.log_every) if self.main else None
        self._clock = time.monotonic()
        if self.processes == 1 and _more_were_asked_for():
            self.say(
                "warning: accelerate launch started one process only, it ignores --num_processes "
                "without --multi_gpu; add --multi_gpu, which works on CPUs too"
            )

    def open(self, settings: Config, units: int | None = None) -> None:
        """Claim the folder, find out where to go on, start the trackers.

        `units` are the prompt groups or pairs of an update, on all processes together.
        Called when everything else is ready, so that a bad setting leaves no folder behind.
        """
        self.start = self.first(lambda: self.folder.claim(settings, self.config.resume, units))
        if self.config.trackers:
            self._init_trackers(settings)

    @property
    def main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.accelerator.is_main_process

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return self.accelerator.num_processes

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    # -- together

    def share(self, count: int) -> range:
        """The part of 0..count-1 that this process works on; parts differ by at most one item."""
        return share(count, self.accelerator.process_index, self.processes)

    def in_step(self, items: Sequence[R], idle: R) -> list[R]:
        """`items`, then `idle` until every process has as many; all must take part.

        For what sends items through the network: weights in pieces (FSDP), and gradients that meet
        on the way back, want equally many passes on all processes.
        """
        most = max(self.collect([len(items)]))
        return [*items, *[idle] * (most - len(items))]

    def total(self, values: Sequence[float]) -> list[float]:
        """Sum over processes, in float64; every process gets the result and must take part."""
        if self.processes == 1:
            return [float(value) for value in values]
        import torch

        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.accelerator.reduce(tensor, "sum").tolist()

    def collect(self, items: Sequence[R]) -> list[R]:
        """The items of all processes in order of rank; each gets them and must take part."""
        from accelerate.utils import gather_object

        return list(gather_object(list(items)))

    def first(self, work: Callable[[], R]) -> R:
        """Do `work` on the main process, give every process its result; if it fails, all stop."""
        from accelerate.utils import broadcast_object_list

        box: list[Any] = [None, ""]
        if self.main:
            try:
                box[0] = work()
            except InputError as error:
                broadcast_object_list([None, str(error)])
                raise
        broadcast_object_list(box)
        if box[1]:
            raise ToldElsewhere(box[1])
        return box[0]

    def everywhere(self, work: Callable[[], R]) -> R:
        """Do `work` on every process; if it fails on one, all stop, so that none waits for it."""
        try:
            result = work()
        except InputError as error:
            self.collect([str(error)])
            raise
        nothing: list[str] = []
        if failures := self.collect(nothing):
            raise ToldElsewhere(failures[0])
        return result

    # -- for the main process

    def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and the numbers to the trackers as `kind/name`."""
        if not self.main:
            return
        self.folder.append(self.folder.metrics, {"step": step, "kind": kind, **values})
        numbers = {
            f"{kind}/{k}": v for k, v in flatten(values).items() if isinstance(v, (int, float))
        }
        self.accelerator.log(numbers, step=step)

    def record_time(self, step: int, **values: float) -> None:
        """One line of timing.jsonl: seconds since the process began, and `values`."""
        if self.main:
            seconds = round(time.monotonic() - self._clock, 3)
            self.folder.append(self.folder.timing, {"step": step, "seconds": seconds, **values})

    def save(
        self,
        progress: Progress,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        spare: Collection[int] = (),
    ) -> None:
        """Write a checkpoint; the other processes wait, so that none trains on a lost step."""
        keep = self.config.keep_checkpoints
        self.first(lambda: self.folder.save(progress, tensors, keep, spare))

    def save_weights(self, write: Callable[[Path], object], step: int) -> Path:
        """Let `write` fill a folder that then becomes <run>/weights as a whole, those of `step`."""

        def replace() -> None:
            with atomic_path(self.folder.weights) as folder:
                write(folder)
                (folder / STEP_FILE).write_text(json.dumps({"step": step}) + "\n")
                if self.folder.weights.exists():
                    shutil.rmtree(self.folder.weights)

        self.first(replace)
        return self.folder.weights

    def save_image(self, name: str, hwc: Pixels) -> None:
        """Write samples/<name>.png."""
        if self.main:
            from fifa.images import encode_png

            write_atomic(self.folder.samples / f"{name}.png", encode_png(hwc))

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._display is not None:
            self._display.say(text)

    def status(self, text: str) -> None:
        """What is going on right now; only a terminal shows it."""
        if self._display is not None:
            self._display.status(text)

    def advance(self, step: int, text: str) -> None:
        """Move the progress display to `step`."""
        if self._display is not None:
            self._display.advance(step, text)

    @contextmanager
    def progress(self, total: int, done: int, name: str = "training") -> Iterator[None]:
        """Show progress from `done` to `total`: optimizer steps, or rows, or pictures."""
        if self._display is None:
            yield
            return
        with self._display.shown(total, done, name):
            yield

    def close(self) -> None:
        """Finish trackers, leave the process group, free the folder."""
        if self.division == "zero2":
            leave()
        self.accelerator.end_training()
        self.folder.release()

    def _init_trackers(self, settings: Config) -> None:
        wandb = {"mode": os.environ.get("WANDB_MODE", "offline"), "dir": str(self.folder.path)}
        self.accelerator.init_trackers(
            "d3po",
            config={key: str(value) for key, value in flatten(settings.model_dump()).items()},
            init_kwargs={"wandb": {**wandb, "name": self.folder.path.name}},
        )


def share(count: int, index: int, parts: int) -> range:
    """Part `index` of 0..count-1 cut into `parts` ranges; sizes differ by at most one."""
    return range(count * index // parts, count * (index + 1) // parts)


def _check_trackers(trackers: Sequence[str]) -> None:
    # accelerate drops a tracker whose package is missing, without a word.
    for tracker in trackers:
        if find_spec(tracker) is None:
            raise InputError(
                f"run.trackers: {tracker} is not installed; pip install 'd3po-fifa[trackers]' "
                "brings it"
            )


def _accelerator(config: RunConfig) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    # accelerate keeps the precision of the first Accelerator of a process for all later ones; a
    # notebook that trains twice must not inherit it. The process group stays as it is.
    AcceleratorState._reset_state()
    # The others wait for the main process while it encodes a data set, which may take hours.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))
    try:
        accelerator = Accelerator(
            # Without a GPU, accelerate joins the processes of a launcher only when told that they
            # use CPUs; otherwise each would train alone and believe itself the main one.
            cpu=None if _has_accelerator() else True,
            mixed_precision=config.mixed_precision,
            log_with=list(config.trackers) or None,
            project_dir=config.dir,
            kwargs_handlers=[patience],
        )
    except ValueError as error:
        if "mixed precision" not in str(error):
            raise
        raise InputError(f"run.mixed_precision={config.mixed_precision}: {error}") from None
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would compute in float32 without a word.
        raise InputError("run.mixed_precision=fp16 needs a GPU; on a CPU use bf16 or no")
    return accelerator


def _more_were_asked_for() -> bool:
    """Whether accelerate's simple launcher prepared for more processes and then started one."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    return launched and "WORLD_SIZE" not in os.environ


def _has_accelerator() -> bool:
    import torch

    if hasattr(torch, "accelerator"):  # torch >= 2.6
        return bool(torch.accelerator.is_available())
    return torch.cuda.is_available() or torch.backends.mps.is_available()

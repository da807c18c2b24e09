"""The run folder, and the only room that knows how many processes there are.

    <run>/config.yaml              the resolved settings
          metrics.jsonl            what happened, one JSON object a line; no wall-clock in it
          timing.jsonl             how long it took
          samples/                 pictures
          checkpoints/step-000123/ enough to go on as if nothing had happened
          weights/                 what was learned; always written at the end

Resuming is exact because of two rules. Every draw is a pure function of the seed and of its place
in the run (see `draws`), so there is no generator state to save. And metrics.jsonl is cut back to
the length it had when the checkpoint was written, so it reads as if the run was never interrupted.
Whatever depends on the clock goes to timing.jsonl instead.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from d3po.launch import in_pieces, plain_processes
from d3po.sharding import mesh_of
from fifa.config import Config, InputError, atomic_path, finite, take_lock, to_yaml, write_atomic

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from rich.progress import Progress as RichProgress
    from torch.distributed.device_mesh import DeviceMesh

    from fifa.images import Pixels

R = TypeVar("R")

TRACKERS = ("tensorboard", "wandb")

# What may change between a run and its resumption; anything else would make it another run.
CHANGEABLE = (
    "optim.max_steps",
    "eval.",
    "run.dir",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.trackers",
    "run.resume",
    "run.log_every",
    "health.",
)


class RunConfig(Config):
    """Where a run lives, how often it is saved, and in which precision it computes."""

    dir: str = Field(description="Folder of this run; running the same command again resumes it.")
    seed: int = Field(0, ge=0, description="Seed from which every draw of the run is derived.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = Field(
        None,
        description="Arithmetic of the network's forward pass; null: as told to accelerate "
        "launch, else no.",
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


# ---- the folder ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """How far a run is, as stored beside the tensors of a checkpoint."""

    step: int = 0  # optimizer steps done, skipped ones included
    skipped_in_a_row: int = 0  # steps without a finite gradient since the last good one
    reference: str = ""  # fingerprint of the weights the policy is compared with
    scaler: dict[str, float] | None = None  # loss scale of fp16


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder and what its progress.json says."""

    path: Path
    progress: Progress
    metrics_bytes: int

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors stored under `name`, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.path / f"{name}.safetensors")


class RunFolder:
    """Files of one run. Knows paths and order of writing; knows neither networks nor processes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.timing = self.path / "timing.jsonl"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.weights = self.path / "weights"
        self._lock: IO[str] | None = None

    def claim(self, settings: Config, resume: str) -> Checkpoint | None:
        """Make the folder ours and say where to go on; None starts from the beginning.

        Raises InputError when the folder belongs to a run with other settings, when another process
        is training in it, or when `resume` points at nothing. Going back to an older checkpoint of
        the same run drops the newer ones.
        """
        found = self._resume_point(resume)
        self._check_same_run(settings)
        self._take_lock()
        for folder in (self.samples, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
        for folder in self._checkpoint_folders():
            if found is not None and _step_of(folder) > found.progress.step:
                shutil.rmtree(folder)
        self._cut_metrics(found.metrics_bytes if found is not None and self._owns(found) else 0)
        write_atomic(self.path / "config.yaml", to_yaml(settings))
        return found

    def release(self) -> None:
        """Let another process train here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def append(self, file: Path, row: Mapping[str, Any]) -> None:
        """Add one JSON line; values that are not finite become null."""
        line = json.dumps(finite(row), allow_nan=False)
        try:
            with file.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise InputError(f"cannot write {file}: {error.strerror}") from error

    def rows(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text("utf-8").splitlines()]

    def save(
        self,
        progress: Progress,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        keep: int,
        spare: Collection[int] = (),
    ) -> Path:
        """Write checkpoints/step-N as a whole; drop all but the newest `keep` and steps `spare`."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = self.checkpoints / f"step-{progress.step:06d}"
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        with atomic_path(path) as folder:
            folder.mkdir()
            for name, values in tensors.items():
                stored = {key: value.detach().cpu().contiguous() for key, value in values.items()}
                try:
                    save_file(stored, folder / f"{name}.safetensors")
                except SafetensorError as error:  # how safetensors reports a full disk
                    raise InputError(f"cannot write {path}: {error}") from error
            note = {**asdict(progress), "metrics_bytes": size}
            (folder / "progress.json").write_text(json.dumps(note, indent=1) + "\n")
        for old in self._checkpoint_folders()[:-keep]:
            if _step_of(old) not in spare:
                shutil.rmtree(old)
        return path

    def steps(self) -> list[int]:
        """The steps of all checkpoints, oldest first."""
        return [_step_of(path) for path in self._checkpoint_folders()]

    def newest_of(self, accepted: Callable[[int], bool]) -> Checkpoint | None:
        """The last checkpoint whose step is accepted."""
        found = [path for path in self._checkpoint_folders() if accepted(_step_of(path))]
        return _read_checkpoint(found[-1]) if found else None

    def newest(self) -> Checkpoint | None:
        """The last complete checkpoint, if there is one."""
        return self.newest_of(lambda step: True)

    def _checkpoint_folders(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*"), key=_step_of)

    def _resume_point(self, resume: str) -> Checkpoint | None:
        if resume in ("auto", "latest"):
            return self.newest()
        found = None if resume == "never" else _read_checkpoint(Path(resume))
        if self._checkpoint_folders() and not (found is not None and self._owns(found)):
            raise InputError(
                f"{self.path} holds a run already; choose another run.dir, remove the folder, or "
                "resume it with run.resume=auto"
            )
        return found

    def _owns(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.path.parent.resolve() == self.checkpoints.resolve()

    def _check_same_run(self, settings: Config) -> None:
        saved = self.path / "config.yaml"
        if not self._checkpoint_folders() or not saved.exists():
            return
        import yaml

        before = flatten(yaml.safe_load(saved.read_text(encoding="utf-8")))
        now = flatten(yaml.safe_load(to_yaml(settings)))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key) and not key.startswith(CHANGEABLE):
                raise InputError(
                    f"{self.path} holds a run with {key}={before.get(key)}, not {now.get(key)}; "
                    "choose another run.dir, or keep the value to resume it"
                )

    def _cut_metrics(self, size: int) -> None:
        if self.metrics.exists():
            os.truncate(self.metrics, min(size, self.metrics.stat().st_size))

    def _take_lock(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot create the run folder {self.path}: {error.strerror}"
            ) from error
        self._lock = take_lock(self.path / ".lock")
        if self._lock is None:
            raise InputError(f"another process is training in {self.path}")


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _read_checkpoint(folder: Path) -> Checkpoint:
    try:
        note = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        size = note.pop("metrics_bytes")
        return Checkpoint(folder, Progress(**note), size)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder} is not a checkpoint of a run (expected a folder like "
            f"runs/x/checkpoints/step-000100 with a progress.json): {error}"
        ) from None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


# ---- the processes ------------------------------------------------------------------------------


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
        cut_up = in_pieces()
        with plain_processes():
            self.accelerator = _accelerator(config)
        # the processes among which the weights are cut up; None: each has all of them
        self.mesh: DeviceMesh | None = None
        if cut_up and self.processes > 1:
            self.mesh = mesh_of(self.device, self.processes)
        self.folder = RunFolder(config.dir)
        self.start: Checkpoint | None = None  # where to go on; None: from the beginning
        self._display = _Display(config.log_every) if self.main else None
        self._clock = time.monotonic()
        if self.processes == 1 and _more_were_asked_for():
            self.say(
                "warning: accelerate launch started one process only, it ignores --num_processes "
                "without --multi_gpu; add --multi_gpu, which works on CPUs too"
            )

    def open(self, settings: Config) -> None:
        """Claim the folder, find out where to go on, start the trackers.

        Called when everything else is ready, so that a bad setting leaves no folder behind.
        """
        self.start = self.first(lambda: self.folder.claim(settings, self.config.resume))
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

    def save_weights(self, write: Callable[[Path], object]) -> Path:
        """Let `write` fill a folder that then becomes <run>/weights as a whole."""

        def replace() -> None:
            with atomic_path(self.folder.weights) as folder:
                write(folder)
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


class _Display:
    """Progress on a terminal (a rich bar) or in a pipe (plain lines)."""

    def __init__(self, log_every: int) -> None:
        self.log_every = log_every
        self.bar: RichProgress | None = None
        self.task: Any = None
        self.name, self.total, self.first, self.began = "", 0, 0, 0.0

    @contextmanager
    def shown(self, total: int, done: int, name: str) -> Iterator[None]:
        self.name, self.total, self.first, self.began = name, total, done, time.monotonic()
        if not sys.stdout.isatty():
            yield
            return
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[text]}"),
        )
        with progress.Progress(*columns) as self.bar:
            self.task = self.bar.add_task(name, total=total, completed=done, text="", rate="")
            yield
        self.bar = None

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def status(self, text: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=text)

    def advance(self, step: int, text: str) -> None:
        pace = (time.monotonic() - self.began) / max(step - self.first, 1)
        rate = f"{1 / pace:.1f}/s" if pace < 1 else f"{pace:.1f} s each"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text, rate=rate)
        elif step % self.log_every == 0 or step == self.total:
            left = timedelta(seconds=round(pace * (self.total - step)))
            print(f"{self.name} {step}/{self.total}  {text}  {rate}, {left} left", flush=True)

"""The run folder, what a run leaves on disk; it knows neither networks nor processes.

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
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fifa.config import Config, InputError, atomic_path, finite, take_lock, to_yaml, write_atomic

if TYPE_CHECKING:
    import torch

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
        """The lines of metrics.jsonl so far; InputError where one is damaged."""
        return _lines(self.metrics)

    def times(self) -> list[dict[str, Any]]:
        """The lines of timing.jsonl so far; InputError where one is damaged."""
        return _lines(self.timing)

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


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [parsed(line, path) for line in path.read_text(encoding="utf-8").splitlines()]


def parsed(text: str, path: Path) -> dict[str, Any]:
    """The JSON object that `text` of the file `path` holds; InputError if it is none."""
    try:
        values: dict[str, Any] = json.loads(text)
    except ValueError:
        raise InputError(f"{path} is damaged: {text[:40]!r} is not JSON") from None
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

"""The run folder, what a run leaves on disk; it knows neither networks nor processes.

    <run>/config.yaml              the resolved settings
          metrics.jsonl            what happened, one JSON object a line; no wall-clock in it
          timing.jsonl             how long it took
          samples/                 pictures
          checkpoints/step-000123/ enough to go on as if nothing had happened
          weights/                 what was learned; written at the end, gone while more is

Resuming is exact because of two rules. Every draw is a pure function of the seed and of its place
in the run (see `draws`), so there is no generator state to save. And metrics.jsonl is cut back to
the length it had when the checkpoint was written, so it reads as if the run was never interrupted.
Whatever depends on the clock goes to timing.jsonl instead.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fifa.config import Config, InputError, atomic_path, finite, take_lock, to_yaml, write_atomic

if TYPE_CHECKING:
    import torch

STEP_FILE = "step.json"  # in weights/: after how many steps they were like this
# Factors of the units of an update: they may change where the product is known and stays.
FACTORS = ("optim.micro_batch", "optim.accumulation")
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
    units: int | None = None  # groups or pairs of an update, on all processes; None: not stored


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder and what its progress.json says."""

    path: Path
    progress: Progress
    metrics_bytes: int

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors stored under `name`, on the CPU; InputError if they cannot be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self.path / f"{name}.safetensors"
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            older = [
                p for p in _checkpoints_in(self.path.parent) if _step_of(p) < self.progress.step
            ]
            remedy = (
                f"an older checkpoint can be gone on from, run.resume={older[-1]}"
                if older
                else "there is no older checkpoint beside it, train anew in another run.dir"
            )
            raise InputError(
                f"the checkpoint {self.path} is damaged: {file.name} cannot be read ({error}); "
                f"{remedy}"
            ) from None


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

    def claim(self, settings: Config, resume: str, units: int | None = None) -> Checkpoint | None:
        """Make the folder ours and say where to go on; None starts from the beginning.

        `units` are the prompt groups or pairs of an update, on all processes together. Raises
        InputError when the folder belongs to a run with other settings or other units, when another
        process is training in it, or when `resume` points at nothing. Going back to an older
        checkpoint of the same run drops the newer ones.
        """
        found = self._resume_point(resume)
        own = found if found is not None and self._owns(found) else None
        self._check_same_run(settings, own, units)
        self._take_lock()
        for folder in (self.samples, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        for folder in self._checkpoint_folders():
            if found is not None and _step_of(folder) > found.progress.step:
                _drop(folder)
        _cut(self.metrics, own.metrics_bytes if own is not None else 0)
        _cut(self.timing, _whole_lines(self.timing))
        write_atomic(self.path / "config.yaml", to_yaml(settings))
        return found

    def step_of_weights(self, live: bool = False) -> int | None:
        """The step of what `recipe.load_run` opens; None where the folder does not say."""
        if self.weights.is_dir() and not live:
            file = self.weights / STEP_FILE
            text = file.read_text(encoding="utf-8") if file.is_file() else None
            return None if text is None else int(parsed(text, file)["step"])
        newest = self.newest()
        return None if newest is None else newest.progress.step

    def drop_weights(self) -> None:
        """Take <run>/weights away, since training goes on: they would be older than the run."""
        if self.weights.is_dir():
            _drop(self.weights)

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
        """The whole lines of metrics.jsonl so far; InputError where one is damaged."""
        return _lines(self.metrics)

    def times(self) -> list[dict[str, Any]]:
        """The whole lines of timing.jsonl so far; InputError where one is damaged."""
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
                _drop(old)
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
        return _checkpoints_in(self.checkpoints)

    def _resume_point(self, resume: str) -> Checkpoint | None:
        if resume in ("auto", "latest") or self._began_from(resume):
            found = self.newest()
            if found is None and self.weights.is_dir():
                raise InputError(
                    f"{self.path} holds the weights of a run but no checkpoint to go on from; "
                    "choose another run.dir, or remove the folder"
                )
            return found
        found = None if resume == "never" else _read_checkpoint(Path(resume))
        begun = self._checkpoint_folders() or self.weights.is_dir()
        if begun and not (found is not None and self._owns(found)):
            raise InputError(
                f"{self.path} holds a run already; choose another run.dir, remove the folder, or "
                "resume it with run.resume=auto"
            )
        return found

    def _began_from(self, resume: str) -> bool:
        """Whether the run here began from `resume`, a checkpoint of another run."""
        before = self._saved_settings().get("run.resume")
        if resume == "never" or before is None or not self._checkpoint_folders():
            return False
        given = Path(resume).resolve()
        return given == Path(before).resolve() and given.parent != self.checkpoints.resolve()

    def _owns(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.path.parent.resolve() == self.checkpoints.resolve()

    def _saved_settings(self) -> dict[str, Any]:
        """What config.yaml says, by dotted key; nothing without one."""
        saved = self.path / "config.yaml"
        if not saved.exists():
            return {}
        import yaml

        return flatten(yaml.safe_load(saved.read_text(encoding="utf-8")))

    def _check_same_run(self, settings: Config, own: Checkpoint | None, units: int | None) -> None:
        before = self._saved_settings() if self._checkpoint_folders() else {}
        if not before:
            return
        import yaml

        stored = None if own is None else own.progress.units
        known = stored is not None and units is not None
        changeable = (*CHANGEABLE, *FACTORS) if known else CHANGEABLE
        now = flatten(yaml.safe_load(to_yaml(settings)))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key) and not key.startswith(changeable):
                raise InputError(
                    f"{self.path} holds a run with {key}={before.get(key)}, not {now.get(key)}; "
                    "choose another run.dir, or keep the value to resume it"
                )
        if known and units != stored:
            raise InputError(
                f"{self.path} holds a run with optim.micro_batch x optim.accumulation x processes "
                f"= {stored}, not {units}; choose another run.dir, or keep the product to resume it"
            )

    def _sweep(self) -> None:
        """Remove what a killed process of this run left half-written."""
        own = ("weights", "config.yaml", "skipped.jsonl")
        names = [*(f".tmp-*-{name}" for name in own), "checkpoints/.tmp-*", "samples/.tmp-*"]
        for name in names:
            for left in self.path.glob(name):
                shutil.rmtree(left) if left.is_dir() else left.unlink()

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


def _checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoint folders in `folder`, oldest first; what has another name is not ours."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _drop(folder: Path) -> None:
    """Remove a folder; killed on the way, no part of it keeps the name."""
    shutil.rmtree(folder.rename(folder.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{folder.name}")))


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
    whole = path.read_bytes()[: _whole_lines(path)].decode("utf-8")
    return [parsed(line, path) for line in whole.splitlines()]


def _whole_lines(path: Path) -> int:
    """How many bytes of a file are whole lines: a killed process may leave half a line."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def _cut(path: Path, size: int) -> None:
    if path.exists():
        os.truncate(path, min(size, path.stat().st_size))


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

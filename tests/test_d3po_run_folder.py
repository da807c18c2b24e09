"""The run folder: what is resumed, what is refused, and that nothing is ever half-written."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pydantic import Field

from d3po.run_folder import Progress, RunFolder, flatten
from fifa.config import Config, InputError


class Optim(Config):
    """Part of Settings."""

    max_steps: int = Field(10, description="Steps.")
    learning_rate: float = Field(1e-3, description="Rate.")


class Settings(Config):
    """A stand-in for the settings of a run, with keys of the same names."""

    optim: Optim = Field(Optim(), description="Optimizer.")


def write_checkpoint(folder: RunFolder, step: int, keep: int = 10) -> Path:
    tensors = {"policy": {"w": torch.full((3,), float(step))}}
    return folder.save(Progress(step=step, reference="abc"), tensors, keep)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    """A claimed folder with metrics of four steps and checkpoints of steps 2 and 4."""
    folder = RunFolder(tmp_path / "run")
    assert folder.claim(Settings(), "auto") is None
    for step in range(1, 6):
        folder.append(folder.metrics, {"step": step})
        if step in (2, 4):
            write_checkpoint(folder, step)
    folder.release()
    yield folder
    folder.release()


def steps(folder: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]


def test_auto_goes_on_from_the_newest_and_forgets_what_came_after(folder: RunFolder) -> None:
    found = folder.claim(Settings(), "auto")
    assert found is not None
    assert found.progress == Progress(step=4, reference="abc")
    assert found.tensors("policy")["w"].tolist() == [4.0] * 3
    assert steps(folder) == [1, 2, 3, 4]


def test_a_half_written_line_is_cut_away(folder: RunFolder) -> None:
    with folder.metrics.open("a") as file:
        file.write('{"step": 6, "lo')
    folder.claim(Settings(), "latest")
    assert steps(folder) == [1, 2, 3, 4]


def test_an_own_checkpoint_can_be_gone_back_to(folder: RunFolder) -> None:
    older = folder.checkpoints / "step-000002"
    found = folder.claim(Settings(), str(older))
    assert found is not None
    assert (found.progress.step, steps(folder)) == (2, [1, 2])
    assert list(folder.checkpoints.iterdir()) == [older]


def test_another_runs_checkpoint_starts_a_new_folder(folder: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "other")
    found = other.claim(Settings(), str(folder.checkpoints / "step-000004"))
    assert found is not None
    assert found.progress.step == 4
    other.release()
    write_checkpoint(other, 5)
    with pytest.raises(InputError, match="holds a run already"):
        other.claim(Settings(), str(folder.checkpoints / "step-000004"))


def test_never_refuses_a_folder_with_a_run(folder: RunFolder) -> None:
    with pytest.raises(InputError, match=r"holds a run already; choose another run\.dir"):
        folder.claim(Settings(), "never")


def test_a_run_that_died_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim(Settings(), "auto")
    folder.append(folder.metrics, {"step": 1})
    folder.release()
    assert folder.claim(Settings(optim=Optim(learning_rate=1.0)), "auto") is None
    assert steps(folder) == []
    folder.release()


def test_other_settings_are_refused_by_name_and_a_longer_run_is_not(folder: RunFolder) -> None:
    with pytest.raises(InputError, match=r"a run with optim\.learning_rate=0\.001, not 0\.5"):
        folder.claim(Settings(optim=Optim(learning_rate=0.5)), "auto")
    assert folder.claim(Settings(optim=Optim(max_steps=99)), "auto") is not None


def test_two_processes_cannot_train_in_one_folder(folder: RunFolder) -> None:
    folder.claim(Settings(), "auto")
    with pytest.raises(InputError, match="another process is training in"):
        RunFolder(folder.path).claim(Settings(), "auto")


@pytest.mark.parametrize("content", [None, "{", '{"step": 1}', '{"metrics_bytes": 0, "x": 1}'])
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "progress.json").write_text(content)
    with pytest.raises(InputError, match="is not a checkpoint of a run"):
        RunFolder(tmp_path / "run").claim(Settings(), str(tmp_path))
    assert not (tmp_path / "run").exists()


def test_only_the_newest_checkpoints_are_kept(folder: RunFolder) -> None:
    write_checkpoint(folder, 1000000, keep=2)
    names = sorted(path.name for path in folder.checkpoints.iterdir())
    assert names == ["step-000004", "step-1000000"]
    newest = folder.newest()
    assert newest is not None
    assert newest.progress.step == 1000000


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A real write error: the system refuses to let any file of this process grow further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_does_not_fit_is_one_sentence_and_leaves_nothing(
    folder: RunFolder,
) -> None:
    tensors = {"policy": {"w": torch.zeros(100_000)}}
    with (
        files_no_larger_than(100_000),
        pytest.raises(InputError, match=r"cannot write .*step-"),
    ):
        folder.save(Progress(step=6), tensors, 10)
    names = sorted(path.name for path in folder.checkpoints.iterdir())
    assert names == ["step-000002", "step-000004"]


def test_metrics_that_do_not_fit_are_one_sentence(folder: RunFolder) -> None:
    with files_no_larger_than(1), pytest.raises(InputError, match=r"cannot write .*metrics\.jsonl"):
        folder.append(folder.metrics, {"step": 6})


def test_lines_come_back_as_they_were_written_and_damage_is_told(folder: RunFolder) -> None:
    folder.append(folder.timing, {"step": 1, "seconds": 0.5})
    assert folder.rows() == [{"step": step} for step in range(1, 6)]
    assert folder.times() == [{"step": 1, "seconds": 0.5}]
    for file, read in ((folder.metrics, folder.rows), (folder.timing, folder.times)):
        with file.open("a") as stream:
            stream.write('{"step": 6, "lo')
        with pytest.raises(InputError, match=rf"{file.name} is damaged: .* is not JSON"):
            read()


def test_flatten_joins_keys_with_dots() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": [3]}) == {"a.b": 1, "a.c.d": 2, "e": [3]}

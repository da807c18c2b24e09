"""The run folder: what is resumed, what is refused, and that nothing is ever half-written."""

from __future__ import annotations

import json
import resource
import shutil
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
    micro_batch: int = Field(2, description="Units at once.")
    accumulation: int = Field(1, description="Times.")


class Place(Config):
    """Part of Settings."""

    resume: str = Field("auto", description="From where.")


class Settings(Config):
    """A stand-in for the settings of a run, with keys of the same names."""

    optim: Optim = Field(Optim(), description="Optimizer.")
    run: Place = Field(Place(), description="Run.")


def write_checkpoint(
    folder: RunFolder, step: int, keep: int = 10, units: int | None = None
) -> Path:
    tensors = {"policy": {"w": torch.full((3,), float(step))}}
    return folder.save(Progress(step=step, reference="abc", units=units), tensors, keep)


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
    folder.timing.write_text('{"step": 4}\n{"st')
    folder.claim(Settings(), "latest")
    assert steps(folder) == [1, 2, 3, 4]
    folder.append(folder.timing, {"step": 5})
    assert folder.times() == [{"step": 4}, {"step": 5}]


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


def test_a_run_begun_from_anothers_checkpoint_goes_on_from_its_own(
    folder: RunFolder, tmp_path: Path
) -> None:
    other, start = RunFolder(tmp_path / "other"), folder.checkpoints / "step-000004"
    settings = Settings(run=Place(resume=str(start)))
    other.claim(settings, str(start))
    other.release()
    write_checkpoint(other, 5)
    shutil.rmtree(start)  # no longer needed
    found = other.claim(settings, str(start))
    assert found is not None
    assert found.progress.step == 5
    other.release()
    with pytest.raises(InputError, match="holds a run already"):
        other.claim(settings, str(folder.checkpoints / "step-000002"))
    # going back to an own checkpoint still means going back, also when typed twice
    write_checkpoint(other, 6)
    back = other.checkpoints / "step-000005"
    for _ in range(2):
        found = other.claim(Settings(run=Place(resume=str(back))), str(back))
        assert found is not None
        assert found.progress.step == 5
        other.release()
        write_checkpoint(other, 6)


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


@pytest.mark.parametrize("resume", ["auto", "latest", "never"])
def test_a_finished_run_whose_checkpoints_are_gone_is_never_trained_over(
    folder: RunFolder, resume: str
) -> None:
    folder.weights.mkdir()
    shutil.rmtree(folder.checkpoints)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"holds (a run already|the weights of a run but no)"):
        folder.claim(Settings(optim=Optim(learning_rate=1.0)), resume)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_the_factors_of_an_update_may_change_and_their_product_may_not(folder: RunFolder) -> None:
    write_checkpoint(folder, 6, units=4)
    others = Settings(optim=Optim(micro_batch=1, accumulation=2))
    for settings, units in ((Settings(), 2), (others, 6)):  # fewer processes; three for two
        before = (folder.path / "config.yaml").read_bytes()
        with pytest.raises(InputError, match=rf"accumulation x processes = 4, not {units}"):
            folder.claim(settings, "auto", units)
        assert (folder.path / "config.yaml").read_bytes() == before
    for settings in (others, Settings()):
        assert folder.claim(settings, "auto", 4) is not None
        folder.release()


def test_a_checkpoint_of_before_units_were_stored_goes_on(folder: RunFolder) -> None:
    note = folder.checkpoints / "step-000004" / "progress.json"
    stored = json.loads(note.read_text())
    del stored["units"]
    note.write_text(json.dumps(stored))
    others = Settings(optim=Optim(micro_batch=1, accumulation=2))
    with pytest.raises(InputError, match=r"a run with optim\.accumulation=1, not 2"):
        folder.claim(others, "auto", 2)
    assert folder.claim(Settings(), "auto", 2) is not None


def test_a_damaged_checkpoint_is_told_with_the_one_before_it(folder: RunFolder) -> None:
    older, newest = (folder.checkpoints / f"step-00000{step}" for step in (2, 4))
    for path, remedy in ((newest, rf"run\.resume={older}$"), (older, "no older checkpoint")):
        (path / "policy.safetensors").write_bytes(b"short")
        found = folder.claim(Settings(), str(path))
        assert found is not None
        with pytest.raises(InputError, match=rf"{path} is damaged: policy.* cannot .*{remedy}"):
            found.tensors("policy")
        with pytest.raises(InputError, match=r"is damaged: optimizer\.safetensors cannot be read"):
            found.tensors("optimizer")
        folder.release()


def test_a_folder_of_another_name_is_no_checkpoint_and_stays(folder: RunFolder) -> None:
    backup = folder.checkpoints / "step-000004-good"
    shutil.copytree(folder.checkpoints / "step-000004", backup)
    assert folder.steps() == [2, 4]
    assert folder.claim(Settings(), str(folder.checkpoints / "step-000002")) is not None
    assert folder.steps() == [2]
    assert backup.is_dir()


def test_what_a_killed_process_left_half_written_is_swept(folder: RunFolder) -> None:
    lefts = [folder.path / ".tmp-0a-weights", folder.checkpoints / ".tmp-0b-step-000006"]
    for left in lefts:
        left.mkdir()
        (left / "part").touch()
    other = folder.path / ".tmp-0c-exported"  # somebody may be writing it right now
    other.mkdir()
    folder.claim(Settings(), "auto")
    assert [left.exists() for left in [*lefts, other]] == [False, False, True]


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
        before = read()
        with file.open("a") as stream:
            stream.write('{"step": 6, "lo')
        assert read() == before  # the process was killed on the way, nothing else is wrong
        with file.open("a") as stream:
            stream.write("\n")
        with pytest.raises(InputError, match=rf"{file.name} is damaged: .* is not JSON"):
            read()


def test_flatten_joins_keys_with_dots() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": [3]}) == {"a.b": 1, "a.c.d": 2, "e": [3]}

"""The run folder: what is resumed, what is refused, and that nothing is ever half-written."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pydantic import Field

from d3po.run import Progress, Run, RunConfig, RunFolder, flatten, share
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


def test_flatten_joins_keys_with_dots() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": [3]}) == {"a.b": 1, "a.c.d": 2, "e": [3]}


@pytest.mark.parametrize(("count", "parts"), [(0, 2), (1, 3), (7, 2), (8, 4), (9, 4)])
def test_shares_cover_everything_once_and_evenly(count: int, parts: int) -> None:
    shares = [share(count, index, parts) for index in range(parts)]
    assert [item for own in shares for item in own] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_missing_tracker_is_said_and_not_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d3po.run.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"run\.trackers: wandb is not installed"):
        Run(RunConfig(dir=str(tmp_path), trackers=("wandb",)))


def test_fp16_without_a_gpu_is_one_sentence(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine can do it")
    with pytest.raises(InputError, match=r"mixed_precision=fp16 needs a GPU"):
        Run(RunConfig(dir=str(tmp_path / "run"), mixed_precision="fp16"))
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_numbers_of_the_main_process(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(RunConfig(dir=str(tmp_path / "run"), trackers=("tensorboard",)))
    run.open(Settings())
    run.record("update", 3, {"loss": 0.5, "nested": {"x": 2}, "word": "no number"})
    run.close()
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*.0")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    (loss,) = accumulator.Scalars("update/loss")
    assert (loss.step, loss.value) == (3, 0.5)
    assert "update/nested.x" in accumulator.Tags()["scalars"]


def test_wandb_records_offline_and_asks_for_no_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run = Run(RunConfig(dir=str(tmp_path / "run"), trackers=("wandb",)))
    run.open(Settings())
    run.record("update", 3, {"loss": 0.5})
    run.close()
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    # wandb writes from a process of its own, which may be a little behind
    until = time.monotonic() + 60
    while b"update/loss" not in record.read_bytes() and time.monotonic() < until:
        time.sleep(0.1)
    assert b"update/loss" in record.read_bytes()


def test_weights_are_replaced_as_a_whole(tmp_path: Path) -> None:
    run = Run(RunConfig(dir=str(tmp_path / "run")))
    run.open(Settings())

    def write(name: str, then: Callable[[], object] = list) -> Callable[[Path], None]:
        def fill(folder: Path) -> None:
            folder.mkdir()
            (folder / name).touch()
            then()

        return fill

    run.save_weights(write("old"))
    with pytest.raises(ZeroDivisionError):
        run.save_weights(write("broken", lambda: 1 / 0))
    assert [path.name for path in run.folder.weights.iterdir()] == ["old"]
    run.save_weights(write("new"))
    assert [path.name for path in run.folder.weights.iterdir()] == ["new"]
    run.close()


def test_piped_output_is_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(RunConfig(dir=str(tmp_path / "run"), log_every=2))
    with run.progress(5, 0):
        for step in range(1, 6):
            run.advance(step, f"loss {step}")
            run.status("sampling")
    run.say("done")
    run.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "training 2/5",
        "training 4/5",
        "training 5/5",
        "done",
    ]
    assert "left" in lines[0]


# ---- launchers ----------------------------------------------------------------------------------


def test_engines_of_others_are_refused_before_anything_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match=r"told to use DeepSpeed, .*configs/accelerate/ddp\.yaml"):
        Run(RunConfig(dir=str(tmp_path)))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    Run(RunConfig(dir=str(tmp_path))).close()


def fsdp_settings() -> dict[str, str]:
    """What accelerate launch sets for configs/accelerate/fsdp2.yaml."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = str(LAUNCHERS[0].with_name("fsdp2.yaml"))
    arguments = launch_command_parser().parse_args(["--config_file", file, "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    told = prepare_multi_gpu_env(arguments)
    return {key: value for key, value in told.items() if "FSDP" in key}


@pytest.mark.parametrize(
    ("setting", "value", "only"),
    [
        ("FSDP_VERSION", "1", "2"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "true"),
        ("FSDP_OFFLOAD_PARAMS", "true", "false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "false"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "false"),
    ],
)
def test_fsdp_of_another_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, value: str, only: str
) -> None:
    for name, told in fsdp_settings().items():
        monkeypatch.setenv(name, told)
    run = Run(RunConfig(dir=str(tmp_path)))
    assert run.mesh is None  # one process has all of the weights
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    run.close()
    monkeypatch.setenv(setting, value)
    sentence = rf"told {setting.lower()}={value}, which must be {only} here .*fsdp2\.yaml"
    with pytest.raises(InputError, match=sentence):
        Run(RunConfig(dir=str(tmp_path)))


LAUNCHERS = sorted((Path(__file__).parent.parent / "configs" / "accelerate").glob("*.yaml"))


def test_launcher_files_are_what_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    machines = {}
    for path in LAUNCHERS:
        found = load_config_from_file(str(path))  # refuses keys that it does not know
        kind = "FSDP" if path.name == "fsdp2.yaml" else "MULTI_GPU"
        assert found.distributed_type.value == kind
        machines[path.name] = (found.num_machines, found.num_processes)
    assert machines == {"ddp.yaml": (1, 8), "fsdp2.yaml": (1, 8), "nodes.yaml": (2, 16)}

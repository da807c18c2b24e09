"""A run in progress: how work is shared, what trackers are told, what launchers may ask for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import Field

from d3po.run import Run, RunConfig, share
from fifa.config import Config, InputError


class Settings(Config):
    """A stand-in for the settings of a run."""

    learning_rate: float = Field(1e-3, description="Rate.")


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

    def found() -> list[str]:
        return sorted(path.name for path in run.folder.weights.iterdir())

    run.save_weights(write("old"), 1)
    with pytest.raises(ZeroDivisionError):
        run.save_weights(write("broken", lambda: 1 / 0), 2)
    assert (found(), run.folder.step_of_weights()) == (["old", "step.json"], 1)
    run.save_weights(write("new"), 2)
    assert (found(), run.folder.step_of_weights()) == (["new", "step.json"], 2)
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
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(
        InputError, match=r"told to use Megatron-LM, .*configs/accelerate/ddp\.yaml"
    ):
        Run(RunConfig(dir=str(tmp_path)))
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "false")
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


def deepspeed_settings() -> dict[str, str]:
    """What accelerate launch sets for configs/accelerate/deepspeed_zero2.yaml."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    file = str(LAUNCHERS[0].with_name("deepspeed_zero2.yaml"))
    arguments = launch_command_parser().parse_args(["--config_file", file, "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = []  # as its launch_command adds
    _, told = prepare_deepspeed_cmd_env(arguments)
    return {k: v for k, v in told.items() if "DEEPSPEED" in k or "ACCELERATE_GRADIENT" in k}


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        (
            "DEEPSPEED_ZERO_STAGE",
            "3",
            r"zero_stage=3, which must be 2 here \(fsdp2\.yaml beside it",
        ),
        ("DEEPSPEED_CONFIG_FILE", "own.json", r"config_file=own\.json, which must be none here"),
        ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer_device=cpu, which"),
        ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu", "offload_param_device=cpu, which must be none"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", r"gradient_accumulation_steps=4, .*optim\.accum"),
        ("GRADIENT_CLIPPING", "0.5", r"gradient_clipping=0\.5, .*optim\.max_grad_norm does it"),
    ],
)
def test_deepspeed_of_another_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, value: str, sentence: str
) -> None:
    for name, told in deepspeed_settings().items():
        monkeypatch.setenv(name, told)
    run = Run(RunConfig(dir=str(tmp_path)))
    assert run.division == "ddp"  # one process has everything
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
    run.close()
    monkeypatch.setenv(f"ACCELERATE_{setting}", value)
    with pytest.raises(InputError, match=rf"told {sentence}.*deepspeed_zero2\.yaml$"):
        Run(RunConfig(dir=str(tmp_path)))


def test_deepspeed_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("d3po.launch.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed; pip install 'd3po-fifa\[deepspeed\]'"):
        Run(RunConfig(dir=str(tmp_path)))


LAUNCHERS = sorted((Path(__file__).parent.parent / "configs" / "accelerate").glob("*.yaml"))


def test_launcher_files_are_what_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    machines = {}
    for path in LAUNCHERS:
        found = load_config_from_file(str(path))  # refuses keys that it does not know
        kinds = {"fsdp2.yaml": "FSDP", "deepspeed_zero2.yaml": "DEEPSPEED"}
        assert found.distributed_type.value == kinds.get(path.name, "MULTI_GPU")
        machines[path.name] = (found.num_machines, found.num_processes)
    assert machines == {
        "ddp.yaml": (1, 8),
        "deepspeed_zero2.yaml": (1, 8),
        "fsdp2.yaml": (1, 8),
        "nodes.yaml": (2, 16),
    }

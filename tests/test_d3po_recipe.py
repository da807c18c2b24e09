"""Whole runs of real commands: settings, refusal, killing and resuming, two processes, labels."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_runs import TRAIN, environment, train_and_kill
from typer.testing import CliRunner

from d3po import cli, recipe
from d3po.families import load_family
from d3po.report.record import read_run
from d3po.run_folder import RunFolder
from fifa.config import InputError, describe, to_yaml

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture
def settings(tiny_sd: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides of a small online run in tmp_path/<name>, further ones last."""
    (tmp_path / "train.txt").write_text("a red circle\na blue square\ntwo stars\nA purple star. \n")
    (tmp_path / "eval.txt").write_text("a purple star\nthree circles\n")

    def overrides(name: str, *more: str) -> list[str]:
        return [
            f"model={tiny_sd}",
            "objective={name: dpo, beta: 20}",
            "optim={max_steps: 8, learning_rate: 1e-2, micro_batch: 1, accumulation: 2}",
            "sampler={steps: 2, guidance: 1.0}",
            f"online.prompts={tmp_path / 'train.txt'}",
            "online.groups=4",
            "online.images=2",
            "online.judges=[jpeg_incompressibility]",
            f"run={{dir: {tmp_path / name}, checkpoint_every: 4}}",
            *more,
        ]

    return overrides


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Spy:
    """A reward that says what happened to it."""

    name, version, differentiable = "spy", "", False

    def __init__(self) -> None:
        self.seen: list[str] = []

    def to(self, device: str) -> Spy:
        self.seen.append(device)
        return self

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return images.mean((1, 2, 3))


SPIES: list[Spy] = []


def make_spy() -> Spy:
    SPIES.append(Spy())
    return SPIES[-1]


def test_a_judge_is_loaded_once_and_put_where_it_shall_score(
    settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    sys.modules.setdefault("test_d3po_recipe", sys.modules[__name__])
    spy = "test_d3po_recipe:make_spy"
    judged = [f"online.judges=['{spy}']", f"eval.judges=['{spy}']", "eval.images=1"]
    asked = [f"eval.prompts={tmp_path / 'eval.txt'}", "optim.max_steps=2", *judged]
    for device in ("cpu", "meta"):
        SPIES.clear()
        recipe.train(recipe.load(None, settings(device, *asked, f"run.judge_device={device}")))
        assert [one.seen for one in SPIES] == [[device]]


# ---- settings -----------------------------------------------------------------------------------


def load(*overrides: str) -> recipe.TrainConfig:
    return recipe.load(None, ["objective={name: dpo, beta: 1}", "run.dir=x", *overrides])


def test_the_method_gets_its_section() -> None:
    online, offline = load(), load("method=dpo", "offline.data=pairs.parquet")
    assert (online.online is None, online.offline is None) == (False, True)
    assert (offline.online is None, offline.offline is None) == (True, False)
    again = recipe.TrainConfig.model_validate(online.model_dump())
    assert again == online


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["offline.data=x"], "method d3po reads 'online', not 'offline'"),
        (["method=dpo", "offline.data=x", "online.groups=2"], "reads 'offline', not 'online'"),
        (["method=dpo"], "'offline.data' is missing (Preference pairs"),
        (["method=ppo"], "'method' is 'ppo': it should be 'd3po' or 'dpo'"),
        (["optim.learning_rat=1"], "did you mean 'optim.learning_rate'?"),
        (["optim.learning_rate=fast"], "'optim.learning_rate' is 'fast'"),
        (["online.steps=late"], "step_count goes with steps random, early, late or window"),
        (["eval.prompts=heldout"], "needs method dpo and offline.held_out_fraction > 0"),
    ],
)
def test_wrong_settings_are_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(InputError) as error:
        load(*overrides)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_every_setting_says_what_it_is() -> None:
    known = describe(recipe.TrainConfig)
    assert len(known) >= 60
    assert [s.key for s in known if not s.description.endswith((".", ")"))] == []


def test_flags_stand_for_settings_that_exist() -> None:
    known = {setting.key for setting in describe(recipe.TrainConfig)}
    assert {override.split("=")[0] for override in recipe.FLAGS.values()} <= known


def run_train(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TRAIN, *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        **more,
    )


def train_main() -> Callable[[list[str]], int]:
    """train.py's main, in this process."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("train", TRAIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[list[str]], int] = module.main
    return found


def test_the_known_flags_win_over_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("objective: {name: dpo, beta: 1}\nrun: {dir: x}\noptim: {max_steps: 3}\n")
    flags = "--max_train_steps 7 --learning_rate=2e-4 --train_batch_size 2 --beta_dpo 5000 --rank 8"
    flags += (
        " --gradient_accumulation_steps 4 --mixed_precision no --seed 3 --report_to tensorboard"
    )
    flags += (
        " --output_dir runs/y --pretrained_model_name_or_path z --resume_from_checkpoint latest"
    )
    command = [str(file), *flags.split(), "online.images=3", "--dry-run"]
    assert train_main()(command) == 0
    printed = capsys.readouterr().out
    expected = recipe.load(
        file,
        [
            "optim={max_steps: 7, learning_rate: 2e-4, micro_batch: 2, accumulation: 4}",
            "objective.beta=5000",
            "policy.rank=8",
            "run={mixed_precision: no, seed: 3, trackers: [tensorboard]}",
            "run.dir=runs/y",
            "run.resume=latest",
            "model=z",
            "online.images=3",
        ],
    )
    assert printed.startswith(to_yaml(expected))
    assert not (tmp_path / "runs").exists()


def test_a_shortened_flag_sets_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_main()(["objective={name: dpo, beta: 1}", "run.dir=x", "--lr", "100", "--dry-run"])
    assert "unrecognized arguments: --lr" in capsys.readouterr().err


def test_the_arithmetic_of_a_dry_run() -> None:
    config = load(
        "online={groups: 8, images: 3, steps: random, step_count: 4, inner_epochs: 2}",
        "optim={micro_batch: 1, accumulation: 2, max_steps: 10}",
    )
    assert recipe.arithmetic(config, 2).splitlines() == [
        "one round: 8 groups x 3 images = 24 images, at most 24 pairs",
        "one update: 1 groups x 2 accumulated x 2 processes = 4 groups, at most 12 pairs x 4 steps",
        "one round: 2 updates x 2 inner epochs = 4 updates",
        "the run: 12 updates = 3 rounds = 72 images",
    ]
    # a flow of 10 steps has 9 with noise: without a step_count nothing is promised
    flow = recipe.arithmetic(recipe.load(ROOT / "configs" / "sd3_d3po.yaml"))
    assert "4 groups, at most 112 pairs x at most 10 steps\n" in flow
    offline = load("method=dpo", "offline.data=x", "optim={micro_batch: 3, max_steps: 10}")
    assert recipe.arithmetic(offline, 2).splitlines() == [
        "one update: 3 pairs x 1 accumulated x 2 processes = 6 pairs, 12 images at one time each",
        "the run: 10 updates = 60 pairs",
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_the_configs_of_the_repository_are_valid(path: Path) -> None:
    config = recipe.load(path)
    assert recipe.arithmetic(config)
    assert config.run.dir == f"runs/{path.stem}"
    for line in path.read_text().splitlines():
        if "learning_rate:" in line or "beta:" in line:
            assert "#" in line or "compressibility" not in path.name, (
                f"{path.name}: say why: {line}"
            )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["no.yaml"], "config file no.yaml does not exist"),
        (["a.yaml", "b.yaml"], "one config file at most"),
        (["model=/nowhere"], "/nowhere"),
        (["online.prompts=/nowhere.txt"], "cannot read prompts from /nowhere.txt"),
        (["online.judges=[orakel]"], "unknown reward 'orakel'; did you mean 'oracle'?"),
        (["objective.options.clip=1"], "dpo takes no such option"),
        (["sampler.eta=0"], "sampler.eta > 0"),
        (["online.groups=3"], "online.groups=3 must be a multiple"),
        (["online.steps=late", "online.step_count=9"], "wants 9 steps, but 2 of the 2"),
        (["run.resume=/nowhere"], "/nowhere is not a checkpoint of a run"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_folder(
    settings: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    assert train_main()([*settings("run"), *arguments]) == 2
    printed = capsys.readouterr().err
    (line,) = [text for text in printed.splitlines() if text.startswith("error: ")]
    assert sentence in line
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


# ---- prompts ------------------------------------------------------------------------------------


def test_prompts_of_the_evaluation_are_never_trained_on(
    settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    config = recipe.load(None, settings("run", f"eval.prompts={tmp_path / 'eval.txt'}"))
    assert config.online is not None
    held_out = recipe.evaluation_prompts(config)
    assert held_out == ["a purple star", "three circles"]
    kept = recipe._training_prompts(config.online, 0, held_out)
    assert kept == ["a red circle", "a blue square", "two stars"]  # not "A purple star. "
    with pytest.raises(InputError, match=r"every prompt of .* is also one of eval\.prompts"):
        recipe._training_prompts(config.online, 0, [*kept, *held_out])


def test_prompts_of_the_mini_world_are_split() -> None:
    train, held_out = (
        recipe.read_prompts(f"miniworld:{part}", 50, 0) for part in ("train", "heldout")
    )
    assert (len(set(train)), len(set(held_out))) == (50, 50)
    assert not set(train) & set(held_out)
    with pytest.raises(InputError, match="give miniworld:train, miniworld:heldout or a text file"):
        recipe.read_prompts("miniworld:all", 5, 0)


# ---- whole runs ---------------------------------------------------------------------------------


def test_a_killed_run_resumes_to_the_last_digit(
    settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    evaluation = f"eval={{prompts: {tmp_path / 'eval.txt'}, every: 2, images: 2}}"
    judge = "eval.judges=[jpeg_compressibility]"
    uninterrupted = settings("whole", evaluation, judge)
    assert train_main()(uninterrupted) == 0

    again = settings("killed", evaluation, judge)
    moment = train_and_kill(again, tmp_path / "killed", 2, 14)  # lines of metrics
    assert not (tmp_path / "killed" / "weights").exists()

    assert train_main()(again) == 0
    whole, killed = (tmp_path / name / "metrics.jsonl" for name in ("whole", "killed"))
    assert killed.read_text() == whole.read_text(), f"killed after {moment} lines"
    first, second = (
        load_file(tmp_path / name / "weights" / WEIGHTS) for name in ("whole", "killed")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    # and once more: there is nothing left to do, and nothing changes
    assert train_main()(settings("killed", evaluation, judge)) == 0
    assert killed.read_text() == whole.read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_processes_learn_what_one_learns(
    settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Half the groups each. Round 0 has a tie on the second process alone, round 1 on the first.

    Tolerance: 1e-4 of the largest trained weight. Float32 sums in another order differ by 1e-7;
    AdamW divides small gradients by their own size, which makes more of it.
    """
    ties = {(0, 1), (1, 0), (2, 0), (2, 1)}
    scores = [
        {
            "round": r,
            "group": g,
            "scores": [0, 0] if (r, g % 2) in ties else [(r + g) % 2, (r + g + 1) % 2],
        }
        for r in range(4)
        for g in range(4)
    ]
    labels = tmp_path / "labels.jsonl"
    labels.write_text("\n".join(map(json.dumps, scores)))
    more = [f"online.labels={labels}", "optim.accumulation=1"]
    more.append("eval={images: 2, every: 0, judges: [jpeg_compressibility]}")
    more.append(f"eval.prompts={tmp_path / 'eval.txt'}")
    assert train_main()([*settings("one"), *more, "optim.micro_batch=2"]) == 0
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
    ]
    launch += ["--main_process_port", str(free_port())]
    result = subprocess.run(
        [*launch, TRAIN, *settings("two"), *more, "optim.micro_batch=1"],
        capture_output=True,
        text=True,
        env=environment(CUDA_VISIBLE_DEVICES=""),
        check=False,
        timeout=600,  # processes that wait for each other wait for ever
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("training 8/8") == 1  # the first process alone prints
    one, two = (load_file(tmp_path / name / "weights" / WEIGHTS) for name in ("one", "two"))
    largest = max(float(value.abs().max()) for key, value in one.items() if "lora_B" in key)
    assert largest > 0.01
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-4 * largest
    ours, theirs = (lines(tmp_path / name) for name in ("one", "two"))
    assert [row.get("pairs") for row in ours] == [row.get("pairs") for row in theirs]
    assert [row["pairs"] for row in ours if row["kind"] == "update"] == [1, 1, 1, 1, 0, 0, 2, 2]
    last, other = (rows[-1]["judges"]["jpeg_compressibility"] for rows in (ours, theirs))
    assert last["policy"] == pytest.approx(other["policy"], abs=0.01)  # a rounded pixel is bytes
    assert last["policy"] != last["reference"]


def test_a_launcher_that_starts_fewer_processes_is_told_apart(
    settings: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert train_main()(settings("run", "model=/nowhere")) == 2
    assert "accelerate launch started one process only" in capsys.readouterr().out


def test_people_label_and_the_same_command_goes_on(
    settings: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.jsonl"
    command = settings("run", f"online.labels={labels}", "optim.max_steps=4", "eval.prompts=null")
    pictures = tmp_path / "run" / "samples"
    assert train_main()(command) == 2
    assert "4 groups of round 0 have no labels" in capsys.readouterr().err
    shown = {path.name: path.read_bytes() for path in (pictures / "round-000000").glob("*.png")}
    assert len(shown) == 8
    for round_ in range(2):
        with labels.open("a") as file:
            for group in range(4):
                row = {"round": round_, "group": group, "scores": [1, 0]}
                file.write(json.dumps(row) + "\n")
        assert train_main()(command) == (2 if round_ == 0 else 0)
    assert "4 groups of round 1 have no labels" in capsys.readouterr().err
    assert [row["step"] for row in lines(tmp_path / "run") if row["kind"] == "update"] == [
        1,
        2,
        3,
        4,
    ]


def test_a_run_can_be_opened_again(settings: Callable[..., list[str]], tmp_path: Path) -> None:
    config = recipe.load(None, settings("run", "optim.max_steps=2", "policy.ema_decay=0.5"))
    folder = recipe.train(config)
    _, policy = recipe.load_run(folder.path)
    stored = load_file(folder.weights / WEIGHTS)
    own = {name: p for name, p in policy.state_dict().items() if not name.startswith("ema")}
    assert len(own) == len(stored)
    newest = folder.newest()
    assert newest is not None
    average = newest.tensors("policy")
    for name, value in own.items():  # what is saved is the average
        if name != "ema_updates":
            assert torch.allclose(value, average[f"ema.{name}"], atol=1e-6)
    # a run that is not over yet gives its newest checkpoint, averaged like what is saved
    folder.drop_weights()
    _, policy = recipe.load_run(folder.path, live=True)
    assert all(torch.equal(p, average[name]) for name, p in policy.state_dict().items())
    _, policy = recipe.load_run(folder.path)
    state = policy.state_dict()
    for name in own.keys() - {"ema_updates"}:
        assert torch.equal(state[name], average[f"ema.{name}"])
    assert not all(torch.equal(state[name], average[name]) for name in own)


def test_a_run_that_goes_on_is_not_taken_for_what_it_was(
    settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Labels for two rounds: a run of one is continued, and waits before its third."""
    labels = tmp_path / "labels.jsonl"
    rows = [
        {"round": round_, "group": group, "scores": [1, 0]}
        for round_ in range(2)
        for group in range(4)
    ]
    labels.write_text("\n".join(map(json.dumps, rows)))
    more = [f"online.labels={labels}", f"eval.prompts={tmp_path / 'eval.txt'}", "eval.every=1"]
    more += ["eval.judges=[jpeg_compressibility]", "eval.images=1"]
    folder = recipe.train(recipe.load(None, settings("run", *more, "optim.max_steps=2")))
    old = load_file(folder.weights / WEIGHTS)
    with pytest.raises(InputError, match="of round 2 have no labels"):
        recipe.train(recipe.load(None, settings("run", *more, "optim.max_steps=6")))
    out = tmp_path / "exported"
    command = ["export", str(folder.path), "--out", str(out)]
    result = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    new = load_file(out / WEIGHTS)
    newest = folder.newest()
    assert newest is not None
    assert newest.progress.step == 4
    stored = list(newest.tensors("policy").values())
    for name, value in new.items():
        assert any(value.shape == p.shape and torch.equal(value, p) for p in stored), name
    assert any(not torch.equal(new[name], old[name]) for name in new)
    assert "At step 4," in (out / "README.md").read_text()
    with pytest.raises(InputError, match="has not ended"):
        read_run(folder.path)


def test_other_micro_batches_of_one_product_go_on(
    settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    recipe.train(recipe.load(None, settings("run", "optim.max_steps=2")))
    others = ["optim.micro_batch=2", "optim.accumulation=1", "optim.max_steps=4"]
    recipe.train(recipe.load(None, settings("run", *others)))
    assert [row["round"] for row in lines(tmp_path / "run") if row["kind"] == "round"] == [0, 1]
    with pytest.raises(InputError, match=r"accumulation x processes = 2, not 1; choose"):
        recipe.train(recipe.load(None, settings("run", *others, "optim.micro_batch=1")))


@pytest.mark.parametrize("content", [None, "model: x\n"])
def test_a_folder_that_is_no_run_is_one_sentence(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(InputError, match=r"is not a run folder|'objective' is missing"):
        recipe.load_run(tmp_path)


def test_diffusers_loads_what_was_trained(
    settings: Callable[..., list[str]], tiny_sd: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    folder: RunFolder = recipe.train(recipe.load(None, settings("run")))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd)
    draw = {"prompt": "a red circle", "num_inference_steps": 2, "output_type": "np"}
    pipe.set_progress_bar_config(disable=True)
    before = pipe(**draw, generator=torch.Generator().manual_seed(0)).images
    pipe.load_lora_weights(folder.weights)
    after = pipe(**draw, generator=torch.Generator().manual_seed(0)).images
    assert abs(before - after).max() > 1e-4
    assert load_family(tiny_sd).name == str(tiny_sd)

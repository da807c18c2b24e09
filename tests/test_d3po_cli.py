"""The `d3po` commands, called as a person calls them, on a run that a command made."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from d3po import recipe
from d3po.cli import main
from fifa.config import InputError
from fifa.images import decode


@pytest.fixture(scope="module")
def run(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run, evaluated on two prompts."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "train.txt").write_text("a red circle\na blue square\n")
    (folder / "eval.txt").write_text("a star\nthree circles\n")
    overrides = [
        f"model={tiny_sd}",
        "objective={name: dpo, beta: 20}",
        "optim={max_steps: 2, learning_rate: 5e-2}",
        "policy={ema_decay: 0.5}",
        "sampler={steps: 2, guidance: 2.0}",
        "online={groups: 2, images: 2, judges: [jpeg_compressibility]}",
        f"online.prompts={folder / 'train.txt'}",
        "eval={images: 2, every: 0, judges: [jpeg_compressibility]}",
        f"eval.prompts={folder / 'eval.txt'}",
        f"run.dir={folder / 'run'}",
    ]
    return recipe.train(recipe.load(None, overrides)).path


def d3po(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["d3po", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_sample_draws_policy_and_reference_from_equal_noise(
    run: Path, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--prompt", "a red circle", "--prompt", "a star", "--images", 2]
    assert d3po(monkeypatch, "sample", run, *options, "--out", tmp_path / "after") == 0
    assert d3po(monkeypatch, "sample", run, *options, "--before", "--out", tmp_path / "before") == 0
    plain = ["--steps", 2, "--guidance", 2.0, "--out", tmp_path / "base"]
    assert d3po(monkeypatch, "sample", tiny_sd, *options, *plain) == 0
    names = ["0000-0.png", "0000-1.png", "0001-0.png", "0001-1.png", "grid.png"]
    assert sorted(path.name for path in (tmp_path / "after").iterdir()) == names
    for name in names:
        before, base, after = (
            (tmp_path / k / name).read_bytes() for k in ("before", "base", "after")
        )
        assert before == base
        assert before != after
    assert decode((tmp_path / "after" / names[0]).read_bytes(), "").shape == (64, 64, 3)


def test_evaluate_judges_as_the_training_did(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert d3po(monkeypatch, "evaluate", run) == 0
    found = json.loads((run / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "eval"][-1]
    own = last["judges"]["jpeg_compressibility"]
    assert found["judges"][0]["difference"] == pytest.approx(own["difference"], abs=1e-3)
    assert (found["prompts"], found["images"]) == (2, 2)
    assert decode((run / "evaluation.png").read_bytes(), "").size
    assert "jpeg_compressibility" in capsys.readouterr().out

    (tmp_path / "p.txt").write_text("two squares\n")
    options = [
        "--prompts",
        tmp_path / "p.txt",
        "--images",
        3,
        "--seed",
        9,
        "--out",
        tmp_path / "e.json",
    ]
    judges = "jpeg_incompressibility,jpeg_compressibility"
    assert d3po(monkeypatch, "evaluate", run, *options, "--judges", judges.replace(",", ", ")) == 0
    found = json.loads((tmp_path / "e.json").read_text())
    assert [judge["judge"] for judge in found["judges"]] == judges.split(",")
    assert (found["prompts"], found["images"], found["seed"]) == (1, 3, 9)


def test_export_writes_weights_and_card(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert d3po(monkeypatch, "export", run, "--out", tmp_path / "lora") == 0
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "README.md",
        "before_after.png",
        "pytorch_lora_weights.safetensors",
    ]
    assert "| jpeg_compressibility |" in (tmp_path / "lora" / "README.md").read_text()
    out = tmp_path / "merged"
    assert d3po(monkeypatch, "export", run, "--format", "merged", "--out", out) == 0
    assert (out / "model_index.json").is_file()


def test_export_takes_the_average_or_the_live_weights(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    assert d3po(monkeypatch, "export", run, "--out", tmp_path / "averaged") == 0
    assert d3po(monkeypatch, "export", run, "--live", "--to", "lora", "--out", tmp_path / "l") == 0
    name = "pytorch_lora_weights.safetensors"
    averaged, live, kept = (
        load_file(folder / name)
        for folder in (tmp_path / "averaged", tmp_path / "l", run / "weights")
    )
    assert all(torch.equal(averaged[key], kept[key]) for key in kept)
    checkpoint = load_file(run / "checkpoints" / "step-000002" / "policy.safetensors")
    own = sorted(
        float(v.double().sum())
        for k, v in checkpoint.items()
        if k.endswith("B.default.weight") and not k.startswith("ema.")
    )
    assert sorted(float(v.double().sum()) for k, v in live.items() if "lora_B" in k) == own
    assert sorted(float(v.double().sum()) for k, v in kept.items() if "lora_B" in k) != own


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["evaluate", "nowhere"], "nowhere is not a run folder"),
        (["export", "nowhere", "--out", "x"], "nowhere is not a run folder"),
        # what can be said before anything is loaded
        (["export", "nowhere", "--to", "kohia", "--out", "x"], "did you mean 'kohya'"),
        (["export", "nowhere", "--out", "."], ". is there already"),
        (["train"], "name a config"),
        (["sample", "nowhere/at/all/x", "--prompt", "a"], "nowhere/at/all/x"),
        (["sample", "nowhere"], "nothing to draw"),
        (["sample", "nowhere", "--prompts", "no.txt"], "cannot read prompts from no.txt"),
    ],
)
def test_bad_input_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert d3po(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert sentence in line
    assert list(tmp_path.iterdir()) == []
    assert torch.is_grad_enabled()


def test_every_key_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert d3po(monkeypatch, "train", "--keys") == 0
    assert "optim.learning_rate = 3e-05  (float)" in capsys.readouterr().out


@pytest.mark.parametrize(("there", "device"), [(True, "cuda"), (False, "cpu")])
def test_by_default_the_device_is_a_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, there: bool, device: str
) -> None:
    opened: list[str] = []

    def load_run(run: Path, device: str) -> None:
        opened.append(device)
        raise InputError("seen enough")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(recipe, "load_run", load_run)
    assert d3po(monkeypatch, "evaluate", "x") == 2
    assert d3po(monkeypatch, "evaluate", "x", "--device", "cuda:1") == 2
    assert opened == [device, "cuda:1"]

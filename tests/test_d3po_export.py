"""What others load: the LoRA, the merged pipeline, and the card beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from d3po.export import export, last_evaluation, model_card
from d3po.families import load_family
from d3po.policy import Policy, PolicyConfig
from d3po.run import RunFolder
from fifa.config import InputError

SETTINGS = {"model": "tiny", "method": "d3po", "objective.beta": 0.1, "run.seed": 3}


def trained(tiny_sd: Path, method: str) -> Policy:
    policy = Policy(load_family(tiny_sd), PolicyConfig(method=method, rank=3, alpha=6))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.trainable():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return policy


def prediction(policy: Policy) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    cond = policy.family.encode_text(["a red circle", "a star"])
    with torch.no_grad():
        return policy.family.predict(policy.bare, x, torch.tensor([500, 20]), cond)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_merged_pipeline_is_the_policy(tiny_sd: Path, tmp_path: Path, method: str) -> None:
    policy = trained(tiny_sd, method)
    out = tmp_path / "merged"
    export(policy, RunFolder(tmp_path / "run"), SETTINGS, "merged", out)
    merged = Policy(load_family(out), PolicyConfig())  # an untrained policy on what was written
    assert torch.allclose(prediction(merged), prediction(policy), atol=1e-5)
    with policy.reference():
        assert not torch.allclose(prediction(merged), prediction(policy), atol=1e-2)
    assert "from_pretrained('.')" in (out / "README.md").read_text()


def test_a_lora_is_loaded_by_diffusers(tiny_sd: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    policy = trained(tiny_sd, "lora")
    export(policy, RunFolder(tmp_path / "run"), SETTINGS, "lora", tmp_path / "lora")
    pipe = DiffusionPipeline.from_pretrained(tiny_sd)
    pipe.load_lora_weights(tmp_path / "lora")
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    cond = policy.family.encode_text(["a red circle", "a star"])
    with torch.no_grad():
        pred = pipe.unet(x, torch.tensor([500, 20]), cond.tensors["text"]).sample
    assert torch.allclose(pred, prediction(policy), atol=1e-5)


def test_what_is_there_is_not_overwritten_and_nothing_is_half_written(
    tiny_sd: Path, tmp_path: Path
) -> None:
    policy, run = trained(tiny_sd, "full"), RunFolder(tmp_path / "run")
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="is there already"):
        export(policy, run, SETTINGS, "merged", tmp_path / "there")
    with pytest.raises(InputError, match="unknown format 'zip', known are lora, merged"):
        export(policy, run, SETTINGS, "zip", tmp_path / "out")
    with pytest.raises(InputError, match="there is no LoRA; export it as merged"):
        export(policy, run, SETTINGS, "lora", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_card_tells_the_last_evaluation(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert last_evaluation(run) is None
    judge = {
        "policy": 2.0,
        "reference": 1.5,
        "difference": 0.5,
        "difference_interval": [0.25, 0.75],
        "win_rate": 0.625,
    }
    for row in (
        {"kind": "eval", "step": 0, "judges": {}},
        {"kind": "eval", "step": 9, "judges": {"oracle": judge}},
        {"kind": "update", "step": 10},
    ):
        run.append(run.metrics, row)
    card = model_card(SETTINGS, last_evaluation(run), "lora")
    assert "| oracle | 1.5 | 2 | +0.5 (+0.25 to +0.75) | 62.5% |" in card
    assert "At step 9" in card
    assert "| objective.beta | 0.1 |" in card
    assert card.startswith("---\nbase_model: tiny\nlibrary_name: diffusers\n")
    assert "not evaluated" in model_card(SETTINGS, None, "lora")
    assert json.dumps(SETTINGS)

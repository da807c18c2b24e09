"""Every command in the documents runs, as a person would type it, but for the sizes below.

Commands are the lines of fenced blocks marked `sh`. A block marked `sh no-run` needs what cannot
be here (weights of gigabytes, a server, a cluster) and is only checked for being marked so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fifa.rewards import load_reward, score_images

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "configs/README.md", "benchmarks/README.md"]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))

# What is written -> what is run: the same command on less.
SMALLER = {
    r"--rows \d+": "--rows 800",
    r"--prompts \d+": "--prompts 2",
    r"(benchmarks/reviewers\.py)": r"\1 optim.max_steps=1 optim.micro_batch=2 sampler.steps=3 "
    "--arms saw --images 2 --fit-steps 2",
    r"(benchmarks/tastes\.py)": r"\1 --people 6 --newcomers 2 --pixel-people 2",
    r"(benchmarks/rewardbench\.py pixels)": r"\1 --pairs 2 --prompts 2",
    r"(fifa reward bench-build \S+) --pairs 100": r"\1 --pairs 4",
    r"--others \d+": "--others 200",
    r" --proxies leaky debiased mini": "",
    r"(benchmarks/overoptimisation\.py)": r"\1 --steps 2 --every 2 --prompts 2 "
    "--proxies mini leaky",
    r"(benchmarks/trained_rank\.py)": r"\1 optim.micro_batch=1 optim.accumulation=1 "
    "online.groups=1 online.images=4 sampler.steps=5 online.step_count=1 --pairs 2 --bench-seeds 0 "
    "--images 1 --prompts 2 --rewards oracle mini",
    r"--steps 60": "--steps 1",
    r"--seeds 0 1( 2)?( 3)?": "--seeds 0",
    r"(benchmarks/inversion\.py) --pictures 64": r"\1 --pictures 2 --steps 2 --calls 1",
    r"(benchmarks/judging\.py) --turns 3": r"\1 --turns 1 --groups 2 --steps 2 --shares 1",
    r"(benchmarks/filter\.py)": r"\1 --small",
    r"(benchmarks/filters\.py)": r"\1 optim.max_steps=1 optim.micro_batch=2 sampler.steps=3 "
    "--prompts 2 --images 2",
    r"(methods\.py online \S+)": r"\1 --rates 1e-3 2e-3 --methods d3po",
    r"(methods\.py stored)": r"\1 optim.max_steps=1 optim.micro_batch=2 sampler.steps=3 "
    "--methods dpo kto --prompts 2 --images 2",
    r"--betas 0\.1 1 10": "--betas 0.1 1",
    r"(benchmarks/scoring\.py) --pairs \d+ --repeats \d+": r"\1 --pairs 2 --repeats 1 "
    "--model ViT-S-32-alt",
    r"(benchmarks/d3po_update\.py) --turns 2": r"\1 --turns 1 --steps 2 --images 3 --methods lora "
    "--steps-at-once 2 --timed-pairs 1 --check-steps 2",
    r"(benchmarks/dpo_step\.py) --turns 5": r"\1 --turns 1 --rows 12 --pairs 4 --methods lora",
    r"(benchmarks/gpu\.py) --tiny": r"\1 --tiny --models sdxl --group 2 --pairs 1 --turns 1",
    r"(configs/mini_d3po_\w+\.yaml)": r"\1 optim.max_steps=1 optim.micro_batch=1 "
    "optim.accumulation=1 online.groups=1 online.images=4 sampler.steps=5 online.step_count=1 "
    "online.prompt_count=20 eval.count=1 eval.images=2",
    r"(configs/mini_fifa_\w+\.yaml)": r"\1 optim.max_steps=1 optim.micro_batch=2 "
    "sampler.steps=3 eval.count=1 eval.images=2",
    r" optim\.max_steps=\d\d+\b": "",
}
LEFT_OUT = ("make ",)  # what runs these tests, and what they run


def blocks(text: str, mark: str) -> list[str]:
    """The fenced blocks whose opening line is ``` and `mark`."""
    return re.findall(rf"^```{re.escape(mark)}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of a document's `sh` blocks in order, continued lines joined, comments cut."""
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    bare = [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
    return [line for line in bare if line and not line.startswith(LEFT_OUT)]


def smaller(command: str) -> str:
    """The command at the sizes of a test."""
    for written, run in SMALLER.items():
        command = re.sub(written, run, command)
    return command


def test_commands_are_found_and_made_smaller() -> None:
    text = (
        "a\n```sh\nmake x\nfifa world --rows 20000 \\\n  --out o  # c\n```\n```sh no-run\ny\n```\n"
    )
    assert commands(text) == ["fifa world --rows 20000    --out o"]
    assert smaller("fifa world --rows 20000") == "fifa world --rows 800"
    assert len(commands((ROOT / "README.md").read_text(encoding="utf-8"))) >= 8


def test_blocks_are_marked_with_what_they_are() -> None:
    marks = {
        mark
        for name in DOCUMENTS
        for mark in re.findall(r"^```(\S.*)$", (ROOT / name).read_text("utf-8"), re.MULTILINE)
    }
    assert marks <= {"sh", "sh no-run", "text", "python", "yaml", "json", "html"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder in which the documents' relative paths mean what they mean in a checkout."""
    for name in ("train.py", "configs", "benchmarks"):
        source, target = ROOT / name, tmp_path / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    for name in ("good.png", "bad.png"):  # a reader's own pair
        Image.new("RGB", (64, 64), "red" if name == "good.png" else "blue").save(tmp_path / name)
    own = {"prompt": "a red picture", "chosen": "good.png", "rejected": "bad.png"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(own) + "\n")
    return tmp_path


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_runs(name: str, place: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for command in commands((ROOT / name).read_text(encoding="utf-8")):
        ended = subprocess.run(
            smaller(command),
            shell=True,
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, f"{command}\n{ended.stdout[-1500:]}\n{ended.stderr[-1500:]}"


def test_the_reward_of_the_docs_is_a_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = blocks((ROOT / "docs/rewards.md").read_text(encoding="utf-8"), "python")
    (tmp_path / "lab.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    pictures = torch.zeros(2, 3, 8, 8)
    pictures[0] = 1  # white
    pictures[1, 0] = 1  # red
    scores = score_images(load_reward("lab:Redness"), pictures, ["a", "b"])
    assert scores.tolist() == [0.0, 1.0]

"""What FiFA's reviewers asked: how many pairs, which term, which margin, which proxy, at what cost.

    python benchmarks/reviewers.py --seeds 0 1 2 --out FILE

Every arm keeps pairs of a mini-world data set in its own way, trains `configs/mini_fifa_dpo.yaml`
on them at equal optimizer steps, and paints the same held-out prompts from the same noise. A seed
is another data set, another order of the pairs and other noise, so intervals (see learning.py)
cover what other data would have given. Finished parts are kept in the work folder: the command may
be stopped and typed again.

The proxies: `mini`, the shipped one, learned from other people's labels on other prompts; `saw`,
the same trained further on the very labels that are filtered; `oracle`, the exact share of the
prompt's conditions that hold, blind to taste; `own`, what `fifa reward fit` makes of as many pairs
of another data set; `ensemble`, `mini` and `own` added up, each in spreads of its margin.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from filters import FULL, truth
from learning import ROOT, interval, summary, train

from d3po.evaluate import EvalConfig, PromptResult, measure
from d3po.recipe import evaluation_prompts, load, load_run
from fifa.config import atomic_path, write_atomic
from fifa.filtering import KEPT, SUMMARY, SelectConfig, select
from fifa.miniworld.dataset import write_dataset
from fifa.proxies import FitConfig
from fifa.proxies.fit import fit
from fifa.rewards import load_reward
from fifa.rewards.mini import WEIGHTS
from fifa.rewards.mini_train import Choices, prefer, save
from fifa.scoring import SCORES, ScoreConfig, score

CONFIG = ROOT / "configs" / "mini_fifa_dpo.yaml"
JUDGES = ("oracle", "oracle_strict", "mini", "neatness")


@dataclass(frozen=True)
class Arm:
    """One way to choose pairs."""

    keep: str = "0.5%"
    proxy: str = "mini"
    options: dict[str, Any] = field(default_factory=dict)  # of `fifa select`


ARMS: dict[str, Arm] = {
    "fifa": Arm(),
    "random": Arm(options={"method": "random"}),
    FULL: Arm(keep="100%"),
    "keep_0.1": Arm(keep="0.1%"),
    "keep_1": Arm(keep="1%"),
    "keep_5": Arm(keep="5%"),
    "keep_10": Arm(keep="10%"),
    "margin": Arm(options={"method": "margin"}),
    "quality": Arm(options={"method": "quality"}),
    "diversity": Arm(options={"method": "diversity"}),
    "margin_quality": Arm(options={"gamma": 0.0}),
    "margin_diversity": Arm(options={"alpha": 0.0}),
    "greedy": Arm(options={"method": "greedy"}),
    "absolute": Arm(options={"margin": "absolute"}),
    "capped": Arm(options={"margin": "capped"}),
    "saw": Arm(proxy="saw"),
    "oracle": Arm(proxy="oracle"),
    "own": Arm(proxy="own"),
    "ensemble": Arm(proxy="ensemble"),
}
OTHER_DATA = 1000  # seed of the pairs that `own` is fitted to


# ---- data, proxies, pairs ------------------------------------------------------------------------


def fitted(data: Path, out: Path, steps: int) -> Path:
    """The shipped mini reward, trained further on all labels of `data` (PickScore's objective)."""
    import open_clip
    from transformers import PreTrainedTokenizerFast

    if out.is_dir():
        return out
    model = open_clip.create_model(f"local-dir:{WEIGHTS}")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(WEIGHTS)
    choices = Choices(data, tokenizer)
    choices.train = np.arange(len(choices.label))  # it is to have seen every label
    prefer(
        model,
        choices,
        seed=0,
        steps=steps,
        batch=64,
        learning_rate=2e-4,
        log=lambda phase, step, loss: None,
    )
    with atomic_path(out) as temporary:
        save(model, tokenizer, temporary, {"further_steps": steps, "pairs": len(choices.label)})
    return out


def own(given: argparse.Namespace) -> str:
    """The reward that `fifa reward fit` makes of pairs that no arm is trained on."""
    pairs, out = given.work / "other" / "pairs", given.work / "other" / "own"
    write_dataset(pairs, given.rows, OTHER_DATA)
    if not out.is_dir():
        fit(FitConfig(pairs=pairs, out=out))
    return f"fitted:{out}"


def spread(scores: Path) -> float:
    """Standard deviation of the margin of scored pairs."""
    margin = pq.read_table(scores / SCORES, columns=["margin"])["margin"]
    return float(margin.drop_null().to_numpy().std())


def scored(proxy: str, work: Path, given: argparse.Namespace) -> Path:
    """The score folder of a data set by a proxy; made if it is not there yet."""
    name = proxy
    if proxy == "saw":
        name = f"mini:{fitted(work / 'pairs', work / 'saw', given.fit_steps)}"
    elif proxy == "own":
        name = own(given)
    elif proxy == "ensemble":
        spreads = [spread(scored(member, work, given)) for member in ("mini", "own")]
        name = f"{1 / spreads[0]:.3f}*mini+{1 / spreads[1]:.3f}*{own(given)}"
    score(ScoreConfig(data=work / "pairs", out=work / f"scores-{proxy}", reward=name))
    return work / f"scores-{proxy}"


def kept(name: str, seed: int, work: Path, given: argparse.Namespace) -> Path:
    """The pairs of an arm; `full` keeps the whole data set."""
    if name == FULL:
        return work / "pairs"
    arm, folder = ARMS[name], work / "kept" / name
    if not (folder / SUMMARY).is_file():
        scores = scored(arm.proxy, work, given)
        chosen = {"scores": scores, "out": folder, "k": arm.keep, "seed": seed, **arm.options}
        select(SelectConfig(**chosen))
    return folder / KEPT


def facts(data: Path) -> dict[str, float]:
    """What the hidden truth says of a set of pairs, which no filter sees."""
    table = pq.read_table(data, columns=["caption", "truth_prompt_kind"])
    kinds = table["truth_prompt_kind"].to_pylist()
    return {
        "pairs": len(kinds),
        "prompts": len(set(table["caption"].to_pylist())),
        "labels_that_are_right": truth(data),
        "harmful": kinds.count("harmful") / len(kinds),
        "meaningless": sum(kinds.count(k) for k in ("gibberish", "other_script", "url"))
        / len(kinds),
    }


# ---- training and painting -----------------------------------------------------------------------


def painted(folder: Path, given: argparse.Namespace, base: bool = False) -> dict[str, np.ndarray]:
    """Scores (P, K, R) and pixel distances (P,) of a run on the held-out prompts, kept beside it.

    `base` paints with the weights that the run started from.
    """
    file = folder / ("base.npz" if base else "painted.npz")
    if not file.is_file():
        asked = EvalConfig(prompts="miniworld:heldout", count=given.prompts, seed=99)
        texts = evaluation_prompts(load(CONFIG).model_copy(update={"eval": asked}))
        config, policy = load_run(folder)
        rewards = [load_reward(name) for name in JUDGES]
        with policy.reference() if base else policy.averaged():
            found: list[PromptResult] = measure(
                policy.family, policy.bare, config.sampler, rewards, texts, given.images, seed=4321
            )
        with atomic_path(file) as temporary, temporary.open("wb") as out:
            np.savez(
                out,
                scores=np.stack([result.scores for result in found]),
                distance=np.array([result.pixel_distance for result in found]),
            )
    return dict(np.load(file))


def trained(name: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One arm with one seed: its pairs, its training, its pictures."""
    work = given.work / f"data-{seed}"
    write_dataset(work / "pairs", given.rows, seed)
    data = kept(name, seed, work, given)
    folder = work / "runs" / name
    own = [f"offline.data={data}", f"offline.cache={work / 'cache'}", *given.overrides]
    minutes = train(CONFIG, folder, seed, own)
    result = {"facts": facts(data), "folder": folder, **painted(folder, given)}
    print(f"{name}, seed {seed}: {minutes:.1f} min", flush=True)
    return result


# ---- comparison ----------------------------------------------------------------------------------


def compared(runs: list[dict[str, Any]], fifa: list[dict[str, Any]], base: Any) -> dict[str, Any]:
    """One arm against the base and against `fifa`; runs in the order of the seeds."""
    ours = np.stack([run["scores"] for run in runs])
    theirs = np.stack([run["scores"] for run in fifa])
    nearer = np.stack([run["distance"] for run in runs]) - base["distance"]
    return {
        "kept": {
            key: float(np.mean([run["facts"][key] for run in runs])) for key in runs[0]["facts"]
        },
        "against_base": [
            summary(judge, ours[..., r], base["scores"][None, ..., r])
            for r, judge in enumerate(JUDGES)
        ],
        "against_fifa": [
            summary(judge, ours[..., r], theirs[..., r]) for r, judge in enumerate(JUDGES)
        ],
        "pixel_distance": {
            "base": float(base["distance"].mean()),
            "difference": float(nearer.mean()),
            "difference_interval": interval(nearer),
        },
    }


def line(name: str, result: dict[str, Any]) -> str:
    """An arm as a row of the table in the documents."""

    def shown(x: dict[str, Any], key: str = "difference") -> str:
        low, high = x["difference_interval"]
        return f"{x[key]:+.3f} [{low:+.3f}, {high:+.3f}]"

    known = result["kept"]
    return (
        f"| {name} | {known['pairs']:.0f} | {known['labels_that_are_right']:.0%} "
        f"| {known['harmful']:.1%} | {known['meaningless']:.1%} "
        f"| {shown(result['against_base'][0])} | {shown(result['against_fifa'][0])} "
        f"| {shown(result['pixel_distance'])} |"
    )


def main() -> None:
    """Make the data, and for every arm filter, train, paint; compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="key=value for train.py")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--fit-steps", type=int, default=1200, help="of the proxy that saw labels")
    parser.add_argument("--work", type=Path, default=Path("runs/reviewers"))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    arms = list(dict.fromkeys(["fifa", *given.arms]))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for seed in given.seeds:
        for name in arms:
            found[name].append(trained(name, seed, given))
    base = painted(found["fifa"][0]["folder"], given, base=True)
    result = {
        "seeds": given.seeds,
        "rows": given.rows,
        "prompts": given.prompts,
        "images_a_prompt": given.images,
        "overrides": given.overrides,
        "arms": {name: compared(runs, found["fifa"], base) for name, runs in found.items()},
    }
    write_atomic(given.out, json.dumps(result, indent=1) + "\n")
    for name in arms:
        print(line(name, result["arms"][name]))


if __name__ == "__main__":
    main()

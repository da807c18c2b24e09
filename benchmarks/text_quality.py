"""How a judge of text quality grades prompts: a text or JSON file, or a folder of them.

    python benchmarks/text_quality.py prompts.txt --judge heuristic --show 20

Prints the share of prompts in each band of the score, the reasons, the speed, and the best and the
worst prompts. Prompts with a word of the harm list are masked, whoever judged them.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fifa.judge import Quality, load_judge
from fifa.judge.heuristic import is_harmful
from fifa.pairs import BadRow
from fifa.sources.prompts import open_prompts


def read_prompts(path: Path) -> list[str]:
    """The distinct prompts that can be read."""
    table = open_prompts(path)
    found = [row for i in range(len(table.row_groups())) for row in table.prompts(i)]
    prompts = (row[1].strip() for row in found if not isinstance(row, BadRow))
    return list(dict.fromkeys(prompt for prompt in prompts if prompt))


def bands(qualities: Sequence[Quality]) -> list[str]:
    """Share of prompts by score: [0, 1), [1, 2) .. [9, 10), 10 and no answer."""
    scores = [quality.score for quality in qualities]
    counts = Counter("none" if score is None else str(int(score)) for score in scores)
    names = [*(str(n) for n in range(11)), "none"]
    return [f"{name:>5}  {counts[name] / len(scores):7.2%}  {counts[name]:,}" for name in names]


def reasons(qualities: Sequence[Quality]) -> list[str]:
    """How many prompts each reason applies to; numbers in a reason are left away."""
    parts = (part for quality in qualities for part in quality.reason.split(", "))
    counts = Counter(part.rsplit(" -", 1)[0] for part in parts)
    return [f"{count:>7,}  {reason}" for reason, count in counts.most_common(15)]


def shown(prompt: str, quality: Quality) -> str:
    """One line of the table, masked where the prompt is harmful."""
    masked = f"[masked, {len(prompt.split())} words]"
    text = masked if is_harmful(prompt) else prompt[:120]
    return f"{quality.score:6.2f}  {text}  ({quality.reason})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, help=".txt, .jsonl, .json, or a folder")
    parser.add_argument("--judge", default="heuristic", help="as of fifa score --judge")
    parser.add_argument("--show", type=int, default=20, help="best and worst prompts to show")
    parser.add_argument("--limit", type=int, help="judge only the first prompts")
    parser.add_argument("--seed", type=int, default=0, help="which of equally good ones are shown")
    args = parser.parse_args()

    prompts = read_prompts(args.prompts)[: args.limit]
    judge = load_judge(args.judge)
    judge.score(prompts[:1])  # tables and networks are loaded before the clock runs
    start = time.perf_counter()
    qualities = judge.score(prompts)
    seconds = time.perf_counter() - start
    speed = len(prompts) / seconds
    print(f"{judge.name}: {len(prompts):,} prompts in {seconds:.1f} s, {speed:,.0f} a second\n")
    print("score    share  prompts", *bands(qualities), sep="\n")
    print("\nreasons", *reasons(qualities), sep="\n")
    answered = [(q, p) for q, p in zip(qualities, prompts, strict=True) if q.score is not None]
    random.Random(args.seed).shuffle(answered)  # ties are shown in no order
    answered.sort(key=lambda pair: pair[0].score or 0.0)
    print("\nworst", *(shown(p, q) for q, p in answered[: args.show]), sep="\n")
    print("\nbest", *(shown(p, q) for q, p in answered[::-1][: args.show]), sep="\n")


if __name__ == "__main__":
    main()

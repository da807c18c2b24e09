"""How much of the network's speed a scoring pass keeps, and how it compares with one at a time.

    python benchmarks/scoring.py --pairs 64 --repeats 5 --out runs/scoring.json

A reward of the size of CLIP ViT-B/32 with random weights scores pairs of 512-pixel JPEGs, in turn:

    network     the forward passes alone, on pictures that are ready
    pipeline    `fifa score`: read, decode, prepare and score, from the Parquet file to the table
    in_turn     the same without overlap: each batch is decoded, prepared, and then scored
    one_by_one  as the code published with PickScore and ImageReward: for each picture open, prepare
                and tokenize it, and one forward pass of both towers

Medians of the repetitions; each compares all four in one breath, since other work on the machine
changes its speed. Processor time, of all threads together, is what a machine without a spare core
would take; with spare cores decoding costs the pipeline no wall time at all.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from fifa.images import decode, encode_jpeg
from fifa.judge import CachedJudge, load_judge
from fifa.pairs import PairTable
from fifa.rewards.clip import ClipScore
from fifa.scoring import ScoreConfig
from fifa.scoring.groups import GroupScorer

SIDE = 512  # pixels of the pictures
Pairs = list[tuple[str, bytes, bytes]]


def make_pairs(count: int) -> Pairs:
    """Captions and JPEGs of SIDE pixels with the detail, and so the bytes, of a photograph."""
    rng = np.random.default_rng(0)

    def picture() -> bytes:
        octaves = np.zeros((SIDE, SIDE, 3))
        for cells in (4, 16, 64, 256):
            small = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
            large = Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            octaves += np.asarray(large, dtype=float) * 2 / np.sqrt(cells)
        scaled = (octaves - octaves.min()) / (octaves.max() - octaves.min()) * 255
        return encode_jpeg(scaled.astype(np.uint8), 90)

    words = "a photograph of a red fox in the snow at dusk, soft light, number"
    return [(f"{words} {i}", picture(), picture()) for i in range(count)]


def write_table(pairs: Pairs, path: Path) -> PairTable:
    prompts, first, second = zip(*pairs, strict=True)
    labels = {"label_0": [1.0] * len(pairs), "label_1": [0.0] * len(pairs)}
    columns = {"caption": prompts, "jpg_0": first, "jpg_1": second, **labels}
    pq.write_table(pa.table(columns), path, row_group_size=32)
    return PairTable.open(path)


def clip_sized(folder: Path, model: str) -> ClipScore:
    """The reward `clip` with random weights of an open_clip architecture, from a file."""
    import open_clip

    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        torch.save(open_clip.create_model(model).state_dict(), folder / "random.pt")
    return ClipScore(f"{model}:{folder / 'random.pt'}")


class Runs:
    """The four ways to score the same pairs."""

    def __init__(self, pairs: Pairs, folder: Path, model: str, batch_size: int, device: str):
        self.pairs = pairs
        self.reward = clip_sized(folder, model).to(device)
        self.device = device
        path = folder / "pairs.parquet"
        table = write_table(pairs, path)
        config = ScoreConfig(data=path, out=folder / "out", batch_size=batch_size)
        judge = CachedJudge(load_judge("heuristic"), folder / "judge.sqlite")
        self.scorer = GroupScorer(config, table, self.reward, judge)
        self.flat = [(prompt, data) for prompt, *both in pairs for data in both]
        self.ready = [self.reward.prepare(decode(data, "")) for _, data in self.flat]
        self.batches = range(0, len(self.flat), batch_size)
        self.size = batch_size

    def network(self) -> Any:
        prompts = [prompt for prompt, _ in self.flat]
        parts = [
            self.reward.score_prepared(self.ready[i : i + self.size], prompts[i : i + self.size])
            for i in self.batches
        ]
        return torch.cat(parts).numpy()

    def pipeline(self) -> Any:
        shards = self.scorer.shards(self.scorer.groups(), lambda *_: None)
        table = pa.concat_tables([shard.scored for _, shard in shards])
        both = (table[name].to_numpy() for name in ("reward_0", "reward_1"))
        return np.stack(list(both), axis=1).ravel()

    def in_turn(self) -> Any:
        parts = []
        for i in self.batches:
            prompts, data = zip(*self.flat[i : i + self.size], strict=True)
            ready = [self.reward.prepare(decode(each, "")) for each in data]
            parts.append(self.reward.score_prepared(ready, prompts))
        return torch.cat(parts).numpy()

    def one_by_one(self) -> Any:
        """One picture a call, both towers, as calc_probs and score of the original repositories."""
        net, scores = self.reward.network, []
        for prompt, data in self.flat:
            with torch.no_grad():
                image = Image.open(io.BytesIO(data)).convert("RGB")
                pixels = self.reward.pixels.normalised(
                    torch.from_numpy(self.reward.pixels.square(np.asarray(image))[None])
                ).to(self.device)
                tokens = self.reward.tokenize([prompt]).to(self.device)
                a, b = net.encode_image(pixels), net.encode_text(tokens)
                a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
                scores.append(100 * (a * b).sum().item())
        return np.array(scores)


WAYS = ("network", "pipeline", "in_turn", "one_by_one")


def seconds(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall and processor time of all threads, and the result."""
    start, busy = time.perf_counter(), time.process_time()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - busy, result


def measure(runs: Runs, repeats: int) -> dict[str, Any]:
    """Seconds of each way, and ratios within each repetition; all ways must agree on the scores."""
    expected = runs.network()  # also what loads and warms everything
    wall: dict[str, list[float]] = {way: [] for way in WAYS}
    busy: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            spent, worked, scores = seconds(getattr(runs, way))
            np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-2)
            wall[way].append(spent)
            busy[way].append(worked)
    speed = {way: len(runs.flat) / statistics.median(wall[way]) for way in WAYS}
    return {
        "pictures": len(runs.flat),
        "pictures_a_second": {way: round(value, 2) for way, value in speed.items()},
        "pipeline_against, wall": ratios(wall),
        "pipeline_against, processor": ratios(busy),
    }


def ratios(times: dict[str, list[float]]) -> dict[str, Any]:
    """How many times as fast the pipeline is as each other way, median and all repetitions."""
    found = {}
    for way in WAYS:
        pairs = zip(times["pipeline"], times[way], strict=True)
        each = [round(other / pipeline, 3) for pipeline, other in pairs]
        found[way] = {"median": round(statistics.median(each), 3), "all": each}
    return {way: values for way, values in found.items() if way != "pipeline"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64, help="pictures scored at once")
    parser.add_argument("--model", default="ViT-B-32", help="architecture of open_clip")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    results: dict[str, Any] = {"model": args.model, "threads": torch.get_num_threads()}
    results |= {"cores": os.cpu_count(), "machine": platform.machine(), "side": SIDE}
    pairs = make_pairs(args.pairs)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    with tempfile.TemporaryDirectory() as folder:
        for device in devices:
            runs = Runs(pairs, Path(folder), args.model, args.batch_size, device)
            results[device] = measure(runs, args.repeats)
            print(device, json.dumps(results[device], indent=2))
    results.setdefault("cuda", "not measured")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""A preference data set of the mini world, of any size, in the columns of Pick-a-Pic v2.

Prompts of the wild (`wild`), images by painters of different quality (`painters`), labels by a
noisy crowd (`annotators`). Columns named `truth_*` say what really was the case; readers for
filters never load them:

truth_utility_0, _1       mean utility over the crowd's taste groups, logits
truth_user_utility_0, _1  utility to the taste group of the user who labelled the row, logits
truth_share_0, _1         share of the prompt's conditions that hold; null where it asks for nothing
truth_annotator           careful or careless
truth_group               the user's taste
truth_flipped             a careful user pressed the wrong button
truth_prompt_kind         one of `wild.PROMPT_SHARES`
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fifa.config import InputError, atomic_path, fingerprint
from fifa.images import to_uint8
from fifa.miniworld.annotators import (
    GROUPS,
    Annotators,
    Floats,
    Impression,
    Population,
    impression,
    utilities,
)
from fifa.miniworld.captions import sample_request
from fifa.miniworld.oracle import look
from fifa.miniworld.painters import PAINTER_SHARES, Picture, paint, picture
from fifa.miniworld.scenes import SIZE
from fifa.miniworld.wild import WildPrompt, draw_prompt

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PIPELINE = "pipeline"  # the name of the model whose images a diffusers folder samples
PIPELINE_SHARE = 0.05  # of all images, taken evenly from the painters
PIPELINE_BATCH = 50  # images
PIPELINE_STEPS = 20
PIPELINE_GUIDANCE = 3.0

START = np.datetime64("2023-01-01T00:00:00", "s")
SECONDS_A_ROW = 40
ROW_GROUP = 500  # rows

SCHEMA = pa.schema(
    {
        "are_different": pa.bool_(),
        "best_image_uid": pa.string(),  # "tie" for a tie
        "caption": pa.string(),
        "created_at": pa.timestamp("ns"),
        "has_label": pa.bool_(),
        "image_0_uid": pa.string(),
        "image_1_uid": pa.string(),
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
        "model_0": pa.string(),
        "model_1": pa.string(),
        "ranking_id": pa.int64(),
        "user_id": pa.int64(),
        "num_example_per_prompt": pa.int64(),  # rows of this very caption in the shard
        "truth_utility_0": pa.float64(),
        "truth_utility_1": pa.float64(),
        "truth_user_utility_0": pa.float64(),
        "truth_user_utility_1": pa.float64(),
        "truth_share_0": pa.float64(),
        "truth_share_1": pa.float64(),
        "truth_annotator": pa.string(),
        "truth_group": pa.string(),
        "truth_flipped": pa.bool_(),
        "truth_prompt_kind": pa.string(),
    }
)


@dataclass(frozen=True)
class Job:
    """One shard: everything that its rows depend on, and where it goes."""

    path: Path
    shard: int
    rows: int
    first_row: int  # of the whole data set
    seed: int
    population: Population
    pipeline: str | None
    recipe: str  # fingerprint of all settings but the number of rows


def write_dataset(
    out: str | Path,
    rows: int,
    seed: int = 0,
    workers: int = 2,
    rows_per_shard: int = 2000,
    pipeline: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    population: Population | None = None,
) -> list[Path]:
    """Write `rows` pairs into the folder `out` as shard-*.parquet; returns the shards in order.

    The rows of a shard depend on `seed`, its number and its length, not on `workers` (processes;
    with more than one, a script needs the usual `if __name__ == "__main__":`). A complete shard
    of the same settings is kept, so a killed write goes on where it stopped, and a data set can be
    extended, but not cut. `pipeline` is a local diffusers folder whose samples, of IMAGE_SIZE
    pixels, make PIPELINE_SHARE of the images. `progress` is called with the rows done and the rows
    in all.

    Raises:
        InputError: a setting makes no sense, the folder holds other files or more rows, or a write
            fails.
    """
    if rows < 1 or workers < 1 or rows_per_shard < 1 or seed < 0:
        raise InputError(
            f"a data set needs rows, workers, rows_per_shard >= 1 and seed >= 0, "
            f"got {rows}, {workers}, {rows_per_shard} and {seed}"
        )
    if pipeline is not None and not (Path(pipeline) / "model_index.json").is_file():
        raise InputError(f"{pipeline} is no diffusers folder, it has no model_index.json")
    crowd = population or Population()
    recipe = _recipe(seed, rows_per_shard, crowd, pipeline)
    jobs = [
        Job(
            path=Path(out) / f"shard-{shard:05d}.parquet",
            shard=shard,
            rows=min(rows_per_shard, rows - first),
            first_row=first,
            seed=seed,
            population=crowd,
            pipeline=pipeline,
            recipe=recipe,
        )
        for shard, first in enumerate(range(0, rows, rows_per_shard))
    ]
    todo = _missing(Path(out), jobs)
    done = rows - sum(job.rows for job in todo)
    if progress:
        progress(done, rows)
    for job in _written(todo, workers):
        done += job.rows
        if progress:
            progress(done, rows)
    return [job.path for job in jobs]


def _recipe(seed: int, rows_per_shard: int, population: Population, pipeline: str | None) -> str:
    """Changes with every setting and with the code of the mini world."""
    settings = json.dumps([seed, rows_per_shard, asdict(population)])
    code = sorted(Path(__file__).parent.glob("*.py"))
    return fingerprint(settings, *code, *([] if pipeline is None else [Path(pipeline)]))


# ---- shards on disk ------------------------------------------------------------------------------


def _missing(out: Path, jobs: Sequence[Job]) -> list[Job]:
    """The jobs that are not done yet; InputError if the folder belongs to somebody else."""
    known = {job.path.name: job for job in jobs}
    for leftover in out.glob(".tmp-*-shard-*.parquet"):  # of a killed write
        leftover.unlink()
    done = set()
    for file in sorted(out.glob("[!.]*.parquet")):
        job = known.get(file.name)
        state = _state(file)
        if job is None or state is None or state.get("recipe") != job.recipe:
            raise InputError(
                f"{file} is not part of this data set (other settings, code or fewer rows); "
                f"choose an empty folder or remove it"
            )
        rows = state.get("rows", 0)
        if rows > job.rows:
            raise InputError(
                f"{file} holds {rows:,} rows where {job.rows:,} are asked for; "
                f"choose an empty folder or remove it"
            )
        if rows == job.rows:
            done.add(job.shard)
    return [job for job in jobs if job.shard not in done]


def _state(file: Path) -> dict[str, Any] | None:
    """What a shard says about itself; None for a file that is no shard."""
    try:
        metadata = pq.read_schema(file).metadata or {}
        return json.loads(metadata[b"fifa.miniworld"])
    except (OSError, pa.ArrowException, KeyError, json.JSONDecodeError):
        return None


def _written(jobs: Sequence[Job], workers: int) -> Iterator[Job]:
    """Write all shards; yields each job when its shard is on disk."""
    if min(workers, len(jobs)) <= 1:
        for job in jobs:
            _write_shard(job)
            yield job
        return
    # Spawned, not forked: a fork of a process in which torch has threads may hang.
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn")) as pool:
        running = {pool.submit(_write_shard, job): job for job in jobs}
        try:
            for future in as_completed(running):
                future.result()
                yield running[future]
        except BrokenProcessPool:
            raise InputError(
                "a worker process was killed (out of memory?); run the same command again, "
                "perhaps with fewer workers, and it goes on where it stopped"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _write_shard(job: Job) -> None:
    state = {"recipe": job.recipe, "rows": job.rows, "seed": job.seed, "shard": job.shard}
    table = make_shard(job).replace_schema_metadata({"fifa.miniworld": json.dumps(state)})
    with atomic_path(job.path) as temporary:
        pq.write_table(table, temporary, row_group_size=ROW_GROUP)


# ---- the rows of a shard -------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One image of a row: its file, who made it, and what a person notices in it."""

    file: bytes
    model: str
    seen: Impression


def make_shard(job: Job) -> pa.Table:
    """The rows of one shard in memory."""
    rng = np.random.default_rng([job.seed, 0x70616972, job.shard])
    asked = [draw_prompt(rng, job.seed) for _ in range(job.rows)]
    models = _draw_models(2 * job.rows, job.pipeline is not None, rng)
    sampled = _sample_sides(job, asked, models, rng)
    sides = [
        sampled.get(i) or _painted_side(asked[i // 2], model, rng) for i, model in enumerate(models)
    ]
    annotators = Annotators(job.population, job.seed)
    users = annotators.draw(job.rows, rng)
    seen = utilities([side.seen for side in sides], job.population).reshape(job.rows, 2, -1)
    answers = annotators.answer(users, seen[:, 0], seen[:, 1], rng)
    columns = {
        **_visible(job, asked, sides, answers.outcome.tolist(), rng),
        "user_id": users,
        **_hidden(asked, sides, seen, annotators.group[users]),
        "truth_annotator": np.where(annotators.careless[users], "careless", "careful"),
        "truth_flipped": answers.flipped,
    }
    return pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)


def _visible(
    job: Job,
    asked: Sequence[WildPrompt],
    sides: Sequence[Side],
    outcomes: Sequence[int],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """What a reader of the data set may know of each row, the user aside."""
    first, second = sides[0::2], sides[1::2]
    names = [(_uid(rng), _uid(rng), "tie") for _ in asked]
    offsets = np.sort(rng.integers(job.rows * SECONDS_A_ROW, size=job.rows))
    captions = [prompt.text for prompt in asked]
    count = Counter(captions)
    label = (1.0, 0.0, 0.5)  # of the first image for the outcomes A, B, TIE
    return {
        "are_different": [a.file != b.file for a, b in zip(first, second, strict=True)],
        "best_image_uid": [row[outcome] for row, outcome in zip(names, outcomes, strict=True)],
        "caption": captions,
        "created_at": (START + job.first_row * SECONDS_A_ROW + offsets).astype("datetime64[ns]"),
        "has_label": [True] * job.rows,
        "image_0_uid": [row[0] for row in names],
        "image_1_uid": [row[1] for row in names],
        "jpg_0": [side.file for side in first],
        "jpg_1": [side.file for side in second],
        "label_0": [label[outcome] for outcome in outcomes],
        "label_1": [1 - label[outcome] for outcome in outcomes],
        "model_0": [side.model for side in first],
        "model_1": [side.model for side in second],
        "ranking_id": np.arange(job.rows) + job.first_row,
        "num_example_per_prompt": [count[caption] for caption in captions],
    }


def _hidden(
    asked: Sequence[WildPrompt], sides: Sequence[Side], seen: Floats, group: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """The truth columns; `seen` is (rows, 2, groups), `group` (rows,) that of the user."""
    own = seen[np.arange(len(asked)), :, group]
    shares = [None if np.isnan(side.seen.share) else side.seen.share for side in sides]
    return {
        "truth_utility_0": seen[:, 0].mean(axis=1),
        "truth_utility_1": seen[:, 1].mean(axis=1),
        "truth_user_utility_0": own[:, 0],
        "truth_user_utility_1": own[:, 1],
        "truth_share_0": shares[0::2],
        "truth_share_1": shares[1::2],
        "truth_group": [GROUPS[index] for index in group],
        "truth_prompt_kind": [prompt.kind for prompt in asked],
    }


def _uid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _draw_models(n: int, with_pipeline: bool, rng: np.random.Generator) -> list[str]:
    names = [*PAINTER_SHARES, PIPELINE]
    sampled = PIPELINE_SHARE if with_pipeline else 0.0
    chances = [*((1 - sampled) * share for share in PAINTER_SHARES.values()), sampled]
    return [names[index] for index in rng.choice(len(names), size=n, p=chances)]


def _painted_side(prompt: WildPrompt, painter: str, rng: np.random.Generator) -> Side:
    """One image; a prompt about nothing of the mini world gets a random scene."""
    request = prompt.request or sample_request(rng, "train")
    return _side(prompt, painter, paint(painter, request, rng))


def _side(prompt: WildPrompt, model: str, made: Picture) -> Side:
    return Side(made.file, model, impression(look(made.pixels), prompt.request, made.truth))


# ---- images of a real diffusion model ------------------------------------------------------------


def _sample_sides(
    job: Job, asked: Sequence[WildPrompt], models: Sequence[str], rng: np.random.Generator
) -> dict[int, Side]:
    """The images that the pipeline makes, by their place among all images of the shard."""
    places = [i for i, model in enumerate(models) if model == PIPELINE]
    seeds = rng.integers(2**31, size=len(places)).tolist()
    sides = {}
    for start in range(0, len(places), PIPELINE_BATCH):
        batch = slice(start, start + PIPELINE_BATCH)
        texts = [asked[place // 2].text for place in places[batch]]
        images = _sample(str(job.pipeline), texts, seeds[batch])
        for place, pixels in zip(places[batch], images, strict=True):
            sides[place] = _side(asked[place // 2], PIPELINE, picture(pixels))
    return sides


def _sample(folder: str, texts: Sequence[str], seeds: Sequence[int]) -> np.ndarray[Any, Any]:
    """One image a prompt, uint8 (N, 32, 32, 3), each from its own seed."""
    import torch

    pipeline = _load_pipeline(folder)
    made = pipeline(
        list(texts),
        num_inference_steps=PIPELINE_STEPS,
        guidance_scale=PIPELINE_GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    if tuple(made.shape[1:]) != (3, SIZE, SIZE):
        raise InputError(
            f"{folder} makes images of shape {tuple(made.shape[1:])}, "
            f"the mini world needs (3, {SIZE}, {SIZE})"
        )
    return to_uint8(made)


@lru_cache(maxsize=1)
def _load_pipeline(folder: str) -> DiffusionPipeline:
    """A diffusers pipeline from a local folder, on the CPU."""
    from diffusers import DiffusionPipeline

    try:
        pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"cannot load {folder}: {' '.join(str(error).split())}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

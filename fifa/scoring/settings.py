"""What a scoring pass is told: the settings class and the names of the files it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from fifa.config import Config
from fifa.knn import FLOOR, Index

Progress = Callable[[str, int, int], None]  # stage, rows done, rows in all

TEXT_ONLY = "none"  # the reward of a pass over prompts, without pictures


class ScoreConfig(Config):
    """What to score, and by what."""

    data: Path = Field(
        description="Parquet file, or folder of them, in Pick-a-Pic v2 columns. With reward none "
        "also .txt (a prompt a line), .jsonl or .json, or a folder of those."
    )
    out: Path = Field(description="Folder for the scores; an unfinished pass in it is continued.")
    reward: str = Field(
        "mini",
        description="Proxy reward: name, name:weights, package.module:factory, 0.5*a+0.5*b; "
        "none scores the text alone, pictures and labels are not read.",
    )
    reward_args: dict[str, Any] = Field({}, description="Arguments of the reward's factory.")
    judge: str = Field(
        "heuristic",
        description="Judge of text quality, 0 to 10: heuristic, local:<model>, "
        "openai:<model>@<base url>.",
    )
    judge_args: dict[str, Any] = Field({}, description="Arguments of the judge's factory.")
    embedder: str = Field(
        "tfidf",
        description="Prompts to vectors: tfidf, clip:<model>:<weights>, clip_hf:<model>, "
        "sentence:<model>.",
    )
    embedder_args: dict[str, Any] = Field({}, description="Arguments of the embedder's factory.")
    embedding_store: Path | None = Field(
        None,
        description="SQLite file that keeps the vectors of text networks prompt by prompt, for "
        "several passes; default: one in `out`.",
    )
    neighbours: int = Field(
        5, ge=1, description="k of the k-th nearest prompt whose log distance is recorded."
    )
    floor: float = Field(
        FLOOR, gt=0, description="Prompts closer than this (of at most 2) count as this far apart."
    )
    index: Index = Field(
        "auto",
        description="How neighbours are found; auto is exact up to 200,000 prompts, then ivf.",
    )
    recall: float = Field(
        0.98, gt=0, lt=1, description="Share of true neighbours that ivf and hnsw look for."
    )
    device: str = Field(
        "cpu",
        description="Where the networks of reward, local judge and embedder run, such as cuda.",
    )
    batch_size: int = Field(128, ge=2, description="Images decoded and scored at once.")
    limit: int | None = Field(None, ge=1, description="Score only the first rows, this many.")
    ray: str | None = Field(
        None, description="Score on a Ray cluster: local, auto, or the address of one."
    )
    ray_workers: int | None = Field(
        None, ge=1, description="Ray actors; default: one for each GPU, or CPU, of the cluster."
    )
    max_prompt: int = Field(10_000, ge=1, description="Most characters of a prompt.")
    max_pixels: int = Field(2**26, ge=1, description="Most pixels of a picture, by its header.")

    @property
    def text_only(self) -> bool:
        """Whether there are no pictures to score, or none that shall be."""
        return self.reward == TEXT_ONLY

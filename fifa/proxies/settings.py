"""What a fit may be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from fifa.config import Config


class HeadConfig(Config):
    """What any fit of small networks on frozen features may be told."""

    pairs: Path = Field(description="Pair table: Parquet file or folder, Pick-a-Pic v2 columns.")
    out: Path = Field(description="Folder for what is fitted; it must not exist yet.")
    encoder: str = Field(
        "mini", description="Frozen features: mini, clip:MODEL or transformers:FOLDER."
    )
    cache: Path | None = Field(
        None, description="SQLite file of features; null: features.sqlite beside the folder."
    )
    hidden: int = Field(
        64, ge=0, description="Width of the two hidden layers of a network; 0 makes it linear."
    )
    dropout: float = Field(0.3, ge=0, lt=1, description="Share of hidden units left out a step.")
    held_out: float = Field(
        0.1, gt=0, le=0.4, description="Share of the prompts kept for the test, and for validation."
    )
    epochs: int = Field(40, ge=1, description="Passes over the training pairs, at most.")
    patience: int = Field(5, ge=1, description="Epochs without a better validation loss.")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's learning rate.")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's weight decay.")
    batch_size: int = Field(256, ge=1, description="Pairs a step.")
    seed: int = Field(0, ge=0, description="Seed of the split, the weights and the order.")
    device: str = Field("cpu", description="Where the encoder runs, such as cuda.")


class LoraConfig(Config):
    """How the last blocks of an encoder are tuned."""

    blocks: int = Field(2, ge=1, description="Blocks at the end of either tower that take part.")
    rank: int = Field(16, ge=1, description="Rank of the LoRA in each of their layers.")
    epochs: int = Field(4, ge=1, description="Passes over the training pairs, at most.")
    patience: int = Field(1, ge=1, description="Epochs without a better validation loss.")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's learning rate.")
    batch_size: int = Field(64, ge=1, description="Pairs a step.")


class FitConfig(HeadConfig):
    """Settings of `fifa reward fit`."""

    kind: Literal["scalar", "pairwise", "objectives", "lora"] = Field(
        "scalar",
        description="A Bradley-Terry score, an antisymmetric comparison, named objectives with a "
        "gate on the prompt, or the encoder's own cosine after tuning its last blocks.",
    )
    lora: LoraConfig = Field(LoraConfig(), description="For kind=lora, which has no head.")
    ties: Literal["rao_kupper", "davidson", "half", "drop"] = Field(
        "rao_kupper",
        description="Ties: too small a difference to see, a third answer, half a win each, or "
        "no answer.",
    )
    smoothing: float = Field(
        0.0, ge=0, lt=1, description="Chance that a label is random, for label smoothing."
    )
    members: int = Field(
        3, ge=1, description="Heads from different seeds; their spread is the disagreement."
    )
    ratings: Path | None = Field(
        None, description="Rating table, for kind=objectives: .parquet, .csv or .jsonl."
    )
    objectives: tuple[str, ...] = Field(
        (), description="Columns of the rating table; empty: every numeric one but ids."
    )
    rank_correlation: float = Field(
        0.03,
        gt=0,
        le=1,
        description="Largest rank correlation of an objective with a nuisance after removal; "
        "1 removes nothing.",
    )


# What each kind of proxy reads beyond the data, the encoder and the seed.
_DESCENT = ("epochs", "patience", "learning_rate", "weight_decay", "batch_size")
_NETWORK = (*_DESCENT, "hidden", "dropout", "ties", "smoothing")
READS: dict[str, tuple[str, ...]] = {
    "scalar": (*_NETWORK, "members"),
    "pairwise": (*_NETWORK, "members"),
    "objectives": (*_NETWORK, "ratings", "objectives", "rank_correlation"),
    "lora": ("lora", "weight_decay", "ties", "smoothing"),
}


def unread_settings(config: FitConfig) -> list[str]:
    """Settings that are not at their default although the kind of proxy never looks at them."""
    fields = FitConfig.model_fields
    return [name for name in _unread(config.kind) if getattr(config, name) != fields[name].default]


def settings_read(config: FitConfig) -> dict[str, Any]:
    """The settings that a fit depended on, as JSON holds them."""
    return config.model_dump(mode="json", exclude=set(_unread(config.kind)))


def _unread(kind: str) -> list[str]:
    some = dict.fromkeys(name for names in READS.values() for name in names)
    return [name for name in some if name not in READS[kind]]


class TasteConfig(HeadConfig):
    """Settings of `fifa reward tastes`; a row that names nobody (`user_id`) is left out."""

    model: Literal["A", "B"] = Field(
        "A", description="A: ideals that know no prompt; B: ideals that depend on it."
    )
    tastes: tuple[int, ...] = Field(
        (1, 2, 3, 4), min_length=1, description="Numbers of prototypes that are tried."
    )
    restarts: int = Field(3, ge=1, description="Fits of each number from other first weights.")
    least: int = Field(
        5, ge=1, description="Training pairs of a person below which the average stands for them."
    )
    dim: int = Field(16, ge=2, description="Dimensions of the space in which ideals lie.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Share of hidden units left out a step.")
    epochs: int = Field(60, ge=1, description="Passes over the training pairs, at most.")
    patience: int = Field(8, ge=1, description="Epochs without a better validation loss.")
    learning_rate: float = Field(
        1e-2, gt=0, description="AdamW's learning rate at first; it falls to 0 over the epochs."
    )
    weight_decay: float = Field(0.1, ge=0, description="AdamW's weight decay.")

    @field_validator("tastes")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1:
            raise ValueError("there is at least one taste")
        return value

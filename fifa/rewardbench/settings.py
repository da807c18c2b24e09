"""What building, reading and running a bench may be told."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from fifa.config import Config


class BuildConfig(Config):
    """Settings of `fifa reward bench-build`."""

    out: Path = Field(description="Folder for the bench; it must not exist yet.")
    scenarios: tuple[str, ...] = Field((), description="Which scenarios; empty: all of them.")
    pairs: int = Field(100, ge=1, description="Pairs a scenario, before judges disagree.")
    judges: tuple[str, ...] = Field(
        ("careful", "glossy", "bright", "busy"),
        min_length=1,
        description="Simulated judges: careful, glossy, bright, busy, tired.",
    )
    agree: int | None = Field(
        None, ge=1, description="Judges who must give the label; null: all of them."
    )
    panel: tuple[str, ...] = Field(
        ("neatness", "saturation", "edges", "brightness", "mini"),
        description="Weak rewards; the share of them that errs is a pair's difficulty.",
    )
    seed: int = Field(0, ge=0, description="Another seed is another bench.")


class ReadConfig(Config):
    """Settings of `fifa reward bench-read`."""

    kind: str = Field(description="Layout of the files, see `fifa reward bench-kinds`.")
    path: Path = Field(description="File or folder to read.")
    out: Path = Field(description="Folder for the bench; it must not exist yet.")
    images: Path | None = Field(None, description="Folder with the pictures that rows name.")
    agree: int | None = Field(
        None,
        ge=1,
        description="Judges of a pair who must give the label; null: more than half of them.",
    )
    panel: tuple[str, ...] = Field(
        (), description="Weak rewards whose errors are a pair's difficulty; empty: none is known."
    )
    limit: int | None = Field(None, ge=1, description="Read only so many pairs.")


class BenchConfig(Config):
    """Settings of `fifa reward bench`."""

    bench: Path = Field(description="Folder of a bench.")
    out: Path | None = Field(None, description="Folder for the leaderboard; null: the bench's own.")
    rewards: tuple[str, ...] = Field(
        (), description="Rewards by name, see `fifa rewards`; beside those whose scores it holds."
    )
    keep: tuple[float, float] | None = Field(
        None, description="Difficulties of the pairs that count, such as [0.2, 0.8]; null: all."
    )
    saturation: float = Field(
        1.4, gt=0, description="Factor on the saturation of one picture, to see verdicts flip."
    )
    batch: int = Field(128, ge=1, description="Pictures that a reward scores at once.")
    device: str = Field("cpu", description="Where rewards with a network run, such as cuda.")

    @model_validator(mode="after")
    def _ordered(self) -> BenchConfig:
        if self.keep is not None and not 0 <= self.keep[0] <= self.keep[1] <= 1:
            raise ValueError(f"keep must be two shares in order, it is {self.keep}")
        return self

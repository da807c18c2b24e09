"""Offline: pairs from a table, encoded once, then re-noised and compared (Diffusion-DPO).

Or compared at points of an inverted path, in place of fresh noise: see inversion.

The data set is decoded and encoded before training, into memory-mapped arrays whose folder name is
a fingerprint of the rows, the encoders and the settings, so a second run finds them and no run
trains on stale ones. The loop itself needs neither VAE nor text encoder. A row that is no pair, or
whose pictures cannot be decoded, is set aside, counted and listed; it never ends the pass.

The time and the noise of a pair are functions of (seed, draw, pair), the same for winner and loser
and for policy and reference (Wallace et al. 2023, section S4: the pseudocode shares both). Every
epoch has a draw of its own, unless their number is limited.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from d3po.draws import derive_seed, shuffled
from d3po.families import Family, guided
from d3po.families.conditioning import Conditioning
from d3po.generate import encode_prompts
from d3po.inversion import InversionConfig, InvertedPaths
from d3po.likelihood import renoise_logp
from d3po.policy import Policy
from d3po.reference import ReferenceScores
from d3po.run import Run
from d3po.sampling import Reduce, image_noise
from d3po.speed import SpeedConfig, numerics
from d3po.trainer import OptimConfig, reference_logp
from d3po.updates import PAIRS, Chunk, Rated, Round, Update, Wants
from fifa.config import Config, InputError, atomic_path, fingerprint, take_lock
from fifa.images import Pixels, decode, to_batch
from fifa.pairs import BadRow, Pair, PairTable, held_out, normalise_prompt, pair_from


class OfflineConfig(Config):
    """Which pairs are learned from, and how they are prepared."""

    data: str = Field(
        description="Preference pairs: a Parquet file or a folder of them, in Pick-a-Pic columns."
    )
    held_out_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of the prompts that is kept out of training, by hash."
    )
    held_out_seed: int = Field(0, description="Seed of that split.")
    empty_prompts: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the pairs trained with the empty prompt, drawn anew each epoch "
        "(published: 0.2).",
    )
    noise: tuple[float, float] = Field(
        (0.0, 1.0),
        description="Part of the noise schedule that pairs are re-noised to: 0 clean, 1 pure "
        "noise (published: all of it). The noisy half is where layout is decided.",
    )
    path: Literal["renoise", "inverted"] = Field(
        "renoise",
        description="Where a picture's noisy latents come from. renoise: fresh noise "
        "(Diffusion-DPO); inverted: its path back to noise under the reference (InPO).",
    )
    inversion: InversionConfig = Field(
        InversionConfig(), description="How that path is made, for path inverted."
    )
    noise_draws: int | None = Field(
        None,
        ge=1,
        description="How many times and noises a pair is compared at; epochs go round among them, "
        "and the reference is asked once for each (8 bytes a pair). null: fresh ones each epoch.",
    )
    cache: str = Field(
        "runs/cache",
        description="Folder where encoded pairs are kept, for this run and later ones.",
    )
    cache_dtype: Literal["float32", "float16"] = Field(
        "float32",
        description="Numbers in the cache; an SD pair takes 128 KB as float32, each prompt 231 KB.",
    )
    encode_batch: int = Field(
        32, ge=1, description="Pairs encoded, or inverted, at once; changes the speed only."
    )

    @field_validator("noise")
    @classmethod
    def _part_of_the_schedule(cls, part: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= part[0] < part[1] <= 1:
            raise ValueError(f"must be two numbers 0 <= low < high <= 1, got {part}")
        return part

    @model_validator(mode="after")
    def _inversion_of_something(self) -> OfflineConfig:
        if self.path != "inverted" and self.inversion != InversionConfig():
            raise ValueError("inversion goes with path inverted, and only with it")
        return self


# ---- the cache ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PairCache:
    """Encoded pairs on disk, mapped into memory: Q pairs, U distinct prompts."""

    folder: Path
    win: NDArray[Any]  # (Q, C, h, w) latents
    lose: NDArray[Any]  # (Q, C, h, w)
    prompt: NDArray[np.int64]  # (Q,) row of `cond`
    cond: Mapping[str, NDArray[Any]]  # conditioning by name, U rows; row 0 is the empty prompt
    summary: Mapping[str, Any]  # what became of the table's rows

    @classmethod
    def open(cls, folder: Path) -> PairCache:
        """Map what `build_cache` wrote; raises InputError if it found no pair."""
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        if not summary["pairs"]:
            raise InputError(f"no pair is left to train on: {told(summary)} (see {folder})")
        arrays = {
            name: np.memmap(folder / f"{name}.bin", dtype, "r", shape=tuple(shape))
            for name, (dtype, shape) in summary["arrays"].items()
        }
        cond = {
            name.removeprefix("cond."): arrays.pop(name)
            for name in list(arrays)
            if name.startswith("cond.")
        }
        return cls(folder=folder, summary=summary, cond=cond, **arrays)

    def conditioning(self, rows: Sequence[int]) -> Conditioning:
        """Rows of `cond`, float32."""
        return Conditioning(
            {name: torch.from_numpy(array[rows]).float() for name, array in self.cond.items()}
        )

    def __len__(self) -> int:
        return len(self.prompt)


def cached_pairs(
    config: OfflineConfig, family: Family, run: Run, exclude: Sequence[str] = ()
) -> PairCache:
    """The encoded pairs of the table, built by the main process if they are not there yet.

    Pairs whose prompt is held out, or is one of `exclude` after normalisation, are left out.
    Raises InputError if the table cannot be read or no pair is left.
    """
    excluded = frozenset(normalise_prompt(prompt) for prompt in exclude)

    def ready() -> Path:
        table = PairTable.open(config.data)
        folder = Path(config.cache) / f"pairs-{_cache_key(config, table, family, excluded)}"
        with _only_builder(folder):  # another run may want the same pairs at the same time
            if not folder.exists():
                with (
                    atomic_path(folder) as temporary,
                    run.progress(table.num_rows, 0, "encoding pairs"),
                ):
                    temporary.mkdir()
                    build_cache(config, table, family, excluded, temporary, run.advance)
        return folder

    return PairCache.open(run.first(ready))


@contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """Build a cache folder alone; a process that comes second waits, and finds it made."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = take_lock(folder.with_name(f".lock-{folder.name}"), wait=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder.parent}: {error.strerror}") from None
    assert held is not None  # it was waited for
    with held:
        yield


def _cache_key(
    config: OfflineConfig, table: PairTable, family: Family, excluded: frozenset[str]
) -> str:
    empty = family.encode_text([""]).tensors
    choice = [
        config.held_out_fraction,
        config.held_out_seed,
        config.cache_dtype,
        family.image_size,
        # how many tokens, and whether the empty prompt is encoded, is not told by the weights
        [[name, *tensor.shape[1:], bool(tensor.any())] for name, tensor in empty.items()],
        sorted(excluded),
    ]
    return fingerprint(table.fingerprint(), *_encoder_bytes(family), json.dumps(choice))


def _encoder_bytes(family: Family) -> Iterator[bytes]:
    """The weights of every network of the family but the denoiser."""
    for name, part in sorted(vars(family).items()):
        if isinstance(part, nn.Module) and part is not family.denoiser:
            for key, value in sorted(part.state_dict().items()):
                yield f"{name}.{key} {value.dtype} {tuple(value.shape)}".encode()
                yield value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def build_cache(
    config: OfflineConfig,
    table: PairTable,
    family: Family,
    excluded: frozenset[str],
    folder: Path,
    advance: Callable[[int, str], None] = lambda row, text: None,
) -> None:
    """Encode every usable pair into `folder`: flat arrays, summary.json, skipped.jsonl."""
    writer = _CacheWriter(family, folder, config.cache_dtype)
    dropped: Counter[str] = Counter()
    waiting: list[_Decoded] = []
    with (folder / "skipped.jsonl").open("w", encoding="utf-8") as skipped:
        for done, item in enumerate(_decoded(config, table, family, excluded), 1):
            if isinstance(item, _Decoded):
                waiting.append(item)
            else:
                dropped[item.kind] += 1
                skipped.write(item.line())
            if len(waiting) == config.encode_batch or done == table.num_rows:
                for lost in writer.add(waiting):
                    dropped[lost.kind] += 1
                    skipped.write(lost.line())
                waiting = []
                advance(done, f"{writer.count} pairs")
    advance(table.num_rows, f"{writer.count} pairs")
    writer.finish({"rows": table.num_rows, "pairs": writer.count, "dropped": dict(dropped)})


@dataclass(frozen=True)
class _Decoded:
    row: int
    prompt: str
    win: Pixels
    lose: Pixels


@dataclass(frozen=True)
class _Dropped:
    kind: str  # what is counted
    row: int = -1
    reason: str = ""  # a sentence for the list; ties and held-out prompts are counted only

    def line(self) -> str:
        """A line of skipped.jsonl, or nothing."""
        row = {"row": self.row, "reason": self.reason}
        return json.dumps(row, ensure_ascii=False) + "\n" if self.reason else ""


def _decoded(
    config: OfflineConfig, table: PairTable, family: Family, excluded: frozenset[str]
) -> Iterator[_Decoded | _Dropped]:
    row = -1
    for group in range(len(table.row_groups())):
        for judgment in table.judgments(group):
            row += 1
            if isinstance(judgment, BadRow):
                yield _Dropped("bad row", judgment.row, judgment.reason)
                continue
            pair = pair_from(judgment)
            if pair is None:
                yield _Dropped("tie")
            elif _kept_out(config, pair.prompt, excluded):
                yield _Dropped("held-out prompt")
            else:
                yield _pictures(pair, row, family.image_size)


def _kept_out(config: OfflineConfig, prompt: str, excluded: frozenset[str]) -> bool:
    split = held_out(prompt, config.held_out_fraction, config.held_out_seed)
    return split or normalise_prompt(prompt) in excluded


def _pictures(pair: Pair, row: int, size: int) -> _Decoded | _Dropped:
    try:
        win, lose = (decode(data, pair.provenance) for data in (pair.win, pair.lose))
    except InputError as error:
        return _Dropped("undecodable picture", row, str(error))
    return _Decoded(row, pair.prompt, fitted(win, size), fitted(lose, size))


def fitted(hwc: Pixels, size: int) -> Pixels:
    """Centre square, resized to the model's side (published: fixed square, centre crop)."""
    height, width = hwc.shape[:2]
    if height == width == size:
        return hwc
    from PIL import Image

    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(hwc[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS), dtype=np.uint8)


class _CacheWriter:
    """Appends encoded pairs to flat files; their shapes, known at the end, go to the summary."""

    def __init__(self, family: Family, folder: Path, dtype: str) -> None:
        self.family, self.folder, self.dtype = family, folder, np.dtype(dtype)
        self.prompts: dict[str, int] = {"": 0}
        self.count = 0

    def add(self, pairs: Sequence[_Decoded]) -> list[_Dropped]:
        """Encode and append; the pairs whose latents are NaN or infinite are handed back."""
        if not pairs:
            return []
        images = to_batch([pair.win for pair in pairs] + [pair.lose for pair in pairs])
        win, lose = self.family.encode_images(images.to(self.family.device)).chunk(2)
        finite = torch.isfinite(torch.cat([win, lose], 1)).flatten(1).all(1).cpu()
        lost = [_not_finite(pair) for pair, good in zip(pairs, finite, strict=True) if not good]
        pairs = [pair for pair, good in zip(pairs, finite, strict=True) if good]
        win, lose = win[finite.to(win.device)], lose[finite.to(lose.device)]
        rows = [self.prompts.setdefault(pair.prompt, len(self.prompts)) for pair in pairs]
        self._append("win", _numbers(win, self.dtype))
        self._append("lose", _numbers(lose, self.dtype))
        self._append("prompt", np.array(rows, dtype=np.int64))
        self.count += len(pairs)
        return lost

    def finish(self, summary: Mapping[str, Any]) -> None:
        prompts = list(self.prompts)
        shapes: dict[str, tuple[int, ...]] = {}
        for start in range(0, len(prompts), 64):
            cond = encode_prompts(self.family, prompts[start : start + 64])
            for name, tensor in cond.tensors.items():
                shapes[f"cond.{name}"] = tuple(tensor.shape[1:])
                self._append(f"cond.{name}", _numbers(tensor, self.dtype))
        arrays = {
            "win": (self.dtype.name, (self.count, *self.family.latent_shape)),
            "lose": (self.dtype.name, (self.count, *self.family.latent_shape)),
            "prompt": ("int64", (self.count,)),
            **{name: (self.dtype.name, (len(prompts), *own)) for name, own in shapes.items()},
        }
        note = json.dumps({**summary, "arrays": arrays}, indent=1) + "\n"
        (self.folder / "summary.json").write_text(note, encoding="utf-8")

    def _append(self, name: str, values: NDArray[Any]) -> None:
        with (self.folder / f"{name}.bin").open("ab") as file:
            file.write(values.tobytes())


def _not_finite(pair: _Decoded) -> _Dropped:
    return _Dropped(
        "NaN latents", pair.row, "its latents are not finite: the VAE overflows in this precision"
    )


def _numbers(values: Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    return values.float().cpu().numpy().astype(dtype)


def skipped_rows(cache: PairCache) -> list[dict[str, Any]]:
    """The rows set aside while encoding: [{"row": 17, "reason": "..."}]."""
    text = (cache.folder / "skipped.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def told(summary: Mapping[str, Any]) -> str:
    """What became of the rows, in one line."""
    lost = "".join(f", {count} x {kind}" for kind, count in sorted(summary["dropped"].items()))
    return f"{summary['pairs']} pairs of {summary['rows']} rows{lost}"


def held_out_prompts(config: OfflineConfig) -> list[str]:
    """The distinct prompts of the table that its split keeps out of training, in table order."""
    table = PairTable.open(config.data)
    found: dict[str, None] = {}
    for group in range(len(table.row_groups())):
        for prompt in table.read_group(group, ["caption"])["caption"].to_pylist():
            if prompt and held_out(prompt, config.held_out_fraction, config.held_out_seed):
                found[prompt] = None
    return list(found)


# ---- updates ------------------------------------------------------------------------------------


class OfflineSource:
    """Updates of Diffusion-DPO: each holds the next pairs of an endless shuffled sequence.

    An update is a round of its own: nothing has to be sampled from the policy in between.
    """

    updates_per_round = 1

    def __init__(
        self,
        config: OfflineConfig,
        optim: OptimConfig,
        family: Family,
        policy: Policy,
        cache: PairCache,
        run: Run,
        reduce: Reduce = "mean",
        wants: Wants = PAIRS,
        speed: SpeedConfig | None = None,
    ) -> None:
        if wants.kind == "advantages":
            raise InputError(
                "this objective needs rewards and the log-probabilities that images were drawn "
                "with, and stored pairs have neither: use method d3po (rollouts), or an objective "
                "on pairs or labels"
            )
        self.wants = wants
        self.config, self.optim, self.family, self.policy = config, optim, family, policy
        self.cache, self.run, self.reduce = cache, run, reduce
        self.pairs_per_update = optim.micro_batch * optim.accumulation * run.processes
        self.numerics = run.first(  # one key for all, also where their devices differ
            lambda: self._numerics(speed or SpeedConfig())
        )
        self.paths = self._inverted() if config.path == "inverted" else None
        wanted = wants.reference and config.noise_draws is not None
        self.reference = self._reference() if wanted else None

    def round(self, index: int) -> Round:
        """The one update of round `index`."""
        size, micro = self.pairs_per_update, self.optim.micro_batch
        rows = range(len(self.cache)) if self.paths is None else self.paths.rows
        places = range(index * size, (index + 1) * size)
        order = shuffled(self.run.config.seed, len(rows), places.start, places.stop)
        draws = [self._draw(place // len(rows)) for place in places]
        if self.reference is not None:
            self.reference.ready(sorted(set(draws)))
        own = [(draws[i], rows[order[i]]) for i in self.run.share(size)]
        chunks = [self._chunk(own[i : i + micro]) for i in range(0, len(own), micro)]
        images = 1 if self.wants.kind == "pairs" else 2
        return Round({}, iter([Update(chunks, images * len(own))]))

    def _chunk(self, pairs: Sequence[tuple[int, int]]) -> Chunk | Rated:
        """A chunk of Q pairs, given as (draw, row of the cache): 2Q images, winners first.

        For an objective on labels winners are liked images and losers disliked ones.
        """
        count, device, logp = len(pairs), self.run.device, partial(self._logp, pairs)
        ref = None
        if self.reference is not None:
            ref = torch.from_numpy(self.reference(pairs).T.reshape(-1, 1)).to(device)
        if self.wants.kind == "labels":
            liked = torch.ones(count, device=device)
            return Rated(logp, "labels", torch.cat([liked, -liked]), steps=1, ref=ref)
        rows = torch.arange(count, device=device)
        return Chunk(logp, win=rows, lose=rows + count, steps=1, ref=ref)

    def _reference(self) -> ReferenceScores:
        config, run = self.config, self.run
        choice = [run.config.seed, config.noise, config.empty_prompts, config.encode_batch]
        path = None if self.paths is None else self.paths.key
        how = [self.reduce, path, self.numerics]
        key = fingerprint(self.policy.fingerprint(), json.dumps([choice, how]))

        def score(draw: int, rows: Sequence[int]) -> NDArray[np.float32]:
            logp = partial(self._logp, [(draw, row) for row in rows])
            scores = reference_logp(self.policy, logp).float().cpu().numpy()
            return scores.reshape(2, -1).T

        folder = self.cache.folder / f"reference-{key}"
        return ReferenceScores(folder, len(self.cache), config.encode_batch, score, run)

    def _inverted(self) -> InvertedPaths:
        config, run, batch = self.config, self.run, self.config.encode_batch
        return InvertedPaths(
            config.inversion,
            config.noise,
            batch,
            self.family,
            self.policy,
            self.cache,
            run,
            self.numerics,
        )

    def _numerics(self, speed: SpeedConfig) -> list[Any]:
        """What scores depend on besides weights, pairs and draws."""
        schedule, run = self.family.schedule, self.run
        places = [k << 60 for k in range(8)]
        times = [schedule.random_time(place, (0.0, 1.0)) for place in places]
        t = torch.tensor(times, dtype=schedule.time_dtype)
        one = torch.ones(len(times), 1, dtype=torch.float64)
        noise_levels = schedule.alpha_sigma(t)[1].tolist()
        targets = schedule.target(one, 2 * one, t).flatten().tolist()
        settings = [v for _, v in sorted(vars(self.family).items()) if isinstance(v, (int, float))]
        how = numerics(speed, run.device, run.accelerator.mixed_precision)
        return [times, noise_levels, targets, settings, how]

    def _draw(self, epoch: int) -> int:
        """Which of its times and noises a pair meets in this epoch."""
        return epoch if self.config.noise_draws is None else epoch % self.config.noise_draws

    def _logp(self, pairs: Sequence[tuple[int, int]], denoiser: nn.Module) -> Tensor:
        """Log-probabilities (2Q, 1); one forward over winners and losers."""
        device = self.run.device
        rows = np.array([row for _, row in pairs])
        x0 = torch.from_numpy(np.concatenate([self.cache.win[rows], self.cache.lose[rows]]))
        cond = self.cache.conditioning([self._prompt(*pair) for pair in pairs])
        noise, times = self._noise(pairs)
        predict = guided(self.family, denoiser, cond.repeat(2).to(device))
        return renoise_logp(
            predict,
            self.family.schedule,
            x0.float().to(device),
            noise[:, None].to(device),
            times.repeat(2)[:, None],
            self.reduce,
        )

    def _noise(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """The noise of winners and losers, (2Q, C, h, w), and the time of each pair, (Q,)."""
        if self.paths is not None:
            count = len(self.paths.points)
            points = [self._seed("point", *pair) % count for pair in pairs]
            return self.paths.noise([row for _, row in pairs], points), self.paths.times[points]
        fresh = image_noise([self._seed("noise", *p) for p in pairs], self.family.latent_shape, 0)
        times = [self._time(*pair) for pair in pairs]
        schedule = self.family.schedule
        return fresh.repeat(2, 1, 1, 1), torch.tensor(times, dtype=schedule.time_dtype)

    def _time(self, draw: int, row: int) -> float:
        """A time of the schedule, uniform over the part that is trained on."""
        uniform = self._seed("time", draw, row)
        return self.family.schedule.random_time(uniform, self.config.noise)

    def _prompt(self, draw: int, row: int) -> int:
        """Row of `cond`: the pair's prompt, or with probability empty_prompts 0, the empty one."""
        dropped = self._seed("empty", draw, row) < self.config.empty_prompts * 2**63
        return 0 if dropped else int(self.cache.prompt[row])

    def _seed(self, what: str, draw: int, row: int) -> int:
        return derive_seed(self.run.config.seed, what, draw, row)

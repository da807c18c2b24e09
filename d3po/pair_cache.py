"""Stored pairs, encoded once: pictures as latents and prompts as conditioning, on disk.

The data set is decoded and encoded before training, into memory-mapped arrays whose folder name is
a fingerprint of the rows, the encoders and the settings, so a second run finds them and no run
trains on stale ones. A row that is no pair, or whose pictures cannot be decoded, is set aside,
counted and listed; it never ends the pass. A pass that was killed goes on where its files were last
brought to the disk, from batch to batch, so that the numbers are those of one that was not.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from d3po.families import Family
from d3po.families.conditioning import Conditioning
from d3po.generate import encode_prompts
from d3po.run import Run
from fifa.config import Config, InputError, fingerprint, take_lock, write_atomic
from fifa.images import Pixels, decode, to_batch
from fifa.pairs import BadRow, Pair, PairTable, held_out, normalise_prompt, pair_from

KEPT_EVERY = 256
"""Rows, about, that are encoded again after a kill."""

TEXTS = 64
"""Prompts encoded at once."""


class PairsConfig(Config):
    """Which pairs are learned from, and how they are kept."""

    data: str = Field(
        description="Preference pairs: a Parquet file or a folder of them, in Pick-a-Pic columns."
    )
    held_out_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of the prompts that is kept out of training, by hash."
    )
    held_out_seed: int = Field(0, description="Seed of that split.")
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
    config: PairsConfig, family: Family, run: Run, exclude: Sequence[str] = ()
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
            making = folder.with_name(f".making-{folder.name}")
            if not folder.exists():
                done = _progress(making).get("rows", 0)
                with _written(making), run.progress(table.num_rows, done, "encoding pairs"):
                    build_cache(config, table, family, excluded, making, run.advance)
                    (making / FILES).replace(folder)
            for left_over in (making, *folder.parent.glob(f".tmp-*-{folder.name}")):
                shutil.rmtree(left_over, ignore_errors=True)
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


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Say in a sentence what keeps a folder from being written, such as a full disk."""
    try:
        yield
    except OSError as error:
        # An error on some other file, say an input that vanished, is not ours to explain.
        if error.filename is not None and folder not in Path(str(error.filename)).parents:
            raise
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error


def _cache_key(
    config: PairsConfig, table: PairTable, family: Family, excluded: frozenset[str]
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
    config: PairsConfig,
    table: PairTable,
    family: Family,
    excluded: frozenset[str],
    folder: Path,
    advance: Callable[[int, str], None] = lambda row, text: None,
) -> None:
    """Encode every usable pair into FILES of `folder`: flat arrays, summary.json, skipped.jsonl.

    Goes on with what a killed process left in `folder`.
    """
    writer = _CacheWriter(family, folder, config.cache_dtype)
    waiting: list[_Decoded] = []
    first = writer.rows
    for done, item in enumerate(_decoded(config, table, family, excluded, first), first + 1):
        if isinstance(item, _Decoded):
            waiting.append(item)
        else:
            writer.drop(item)
        if len(waiting) == config.encode_batch or done == table.num_rows:
            writer.add(waiting)
            waiting = []
            writer.reached(done)
            advance(done, f"{writer.count} pairs")
    advance(table.num_rows, f"{writer.count} pairs")
    writer.finish()


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
    config: PairsConfig, table: PairTable, family: Family, excluded: frozenset[str], first: int
) -> Iterator[_Decoded | _Dropped]:
    """The rows of the table from `first` on."""
    for index, group in enumerate(table.row_groups()):
        if group.start + group.rows <= first:
            continue
        for row, judgment in enumerate(table.judgments(index), group.start):
            if row < first:
                continue
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


def _kept_out(config: PairsConfig, prompt: str, excluded: frozenset[str]) -> bool:
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


FILES, PROGRESS, PROMPTS = "cache", "progress.json", "prompts.jsonl"
"""In the folder of a cache in the making: what it will be, how far it is, its prompts so far."""


class _CacheWriter:
    """Appends encoded pairs to flat files; their shapes, known at the end, go to the summary.

    Now and then the files are brought to the disk and their sizes noted. A writer of the same
    folder begins there: it cuts off what was written since.
    """

    def __init__(self, family: Family, folder: Path, dtype: str) -> None:
        self.family, self.dtype = family, np.dtype(dtype)
        self.folder, self.files = folder, folder / FILES
        self.skipped = self.files / "skipped.jsonl"
        self.rows, self.count, self.texts = 0, 0, 0  # rows read, pairs and prompts written
        self.dropped: Counter[str] = Counter()
        self.prompts: dict[str, int] = {"": 0}
        self._kept = 0  # rows
        if not self._go_on():
            shutil.rmtree(folder, ignore_errors=True)
            self.files.mkdir(parents=True)
            for empty in (self.skipped, self.folder / PROMPTS):
                empty.touch()

    def add(self, pairs: Sequence[_Decoded]) -> None:
        """Encode and append; the pairs whose latents are NaN or infinite are dropped."""
        if not pairs:
            return
        images = to_batch([pair.win for pair in pairs] + [pair.lose for pair in pairs])
        win, lose = self.family.encode_images(images.to(self.family.device)).chunk(2)
        finite = torch.isfinite(torch.cat([win, lose], 1)).flatten(1).all(1).cpu()
        lost = [_not_finite(pair) for pair, good in zip(pairs, finite, strict=True) if not good]
        pairs = [pair for pair, good in zip(pairs, finite, strict=True) if good]
        win, lose = win[finite.to(win.device)], lose[finite.to(lose.device)]
        self._append(self.files / "win.bin", _bytes(win, self.dtype))
        self._append(self.files / "lose.bin", _bytes(lose, self.dtype))
        rows = np.array([self._number(pair.prompt) for pair in pairs], dtype=np.int64)
        self._append(self.files / "prompt.bin", rows.tobytes())
        self.count += len(pairs)
        for dropped in lost:
            self.drop(dropped)

    def drop(self, dropped: _Dropped) -> None:
        """Count and list a row that is set aside."""
        self.dropped[dropped.kind] += 1
        self._append(self.skipped, dropped.line().encode("utf-8"))

    def reached(self, rows: int) -> None:
        """All that comes from the first `rows` rows is written."""
        self.rows = rows
        if rows - self._kept >= KEPT_EVERY:
            self._keep()

    def finish(self) -> None:
        """Encode and append the prompts, write the summary."""
        self._keep()
        prompts = list(self.prompts)
        while self.texts < len(prompts):
            some = prompts[self.texts : self.texts + TEXTS]
            for name, tensor in encode_prompts(self.family, some).tensors.items():
                self._append(self.files / f"cond.{name}.bin", _bytes(tensor, self.dtype))
            self.texts += len(some)
            self._keep()
        latents = (self.dtype.name, (self.count, *self.family.latent_shape))
        cond = self.family.encode_text([""]).tensors
        arrays = {
            "win": latents,
            "lose": latents,
            "prompt": ("int64", (self.count,)),
            **{
                f"cond.{name}": (self.dtype.name, (len(prompts), *tensor.shape[1:]))
                for name, tensor in cond.items()
            },
        }
        found = {"rows": self.rows, "pairs": self.count, "dropped": dict(self.dropped)}
        note = json.dumps({**found, "arrays": arrays}, indent=1) + "\n"
        write_atomic(self.files / "summary.json", note)

    # ---- files ----------------------------------------------------------------------------------

    def _number(self, prompt: str) -> int:
        if prompt not in self.prompts:
            self.prompts[prompt] = len(self.prompts)
            self._append(self.folder / PROMPTS, (json.dumps(prompt) + "\n").encode("ascii"))
        return self.prompts[prompt]

    @staticmethod
    def _append(file: Path, data: bytes) -> None:
        with file.open("ab") as opened:
            opened.write(data)

    def _all_files(self) -> list[Path]:
        return [*self.files.glob("*"), *self.folder.glob(PROMPTS)]

    def _keep(self) -> None:
        """Bring the files to the disk, then note their sizes."""
        sizes = {file.name: _synced(file) for file in self._all_files()}
        progress = {
            "rows": self.rows,
            "count": self.count,
            "texts": self.texts,
            "dropped": dict(self.dropped),
            "sizes": sizes,
        }
        write_atomic(self.folder / PROGRESS, json.dumps(progress) + "\n")
        self._kept = self.rows

    def _go_on(self) -> bool:
        """Back to where the files were last kept; False if there is no such place."""
        found = _progress(self.folder)
        if not found:
            return False
        sizes = dict(found["sizes"])
        for file in self._all_files():
            if file.name not in sizes:
                file.unlink()  # begun since
            elif file.stat().st_size < sizes[file.name]:
                return False
            else:
                os.truncate(file, sizes.pop(file.name))
        if sizes:
            return False  # a file is gone
        self.rows, self.count, self.texts = found["rows"], found["count"], found["texts"]
        self.dropped, self._kept = Counter(found["dropped"]), self.rows
        lines = (self.folder / PROMPTS).read_text(encoding="ascii").splitlines()
        self.prompts |= {json.loads(line): i for i, line in enumerate(lines, 1)}
        return True


def _progress(folder: Path) -> dict[str, Any]:
    """What a writer last noted in its folder; empty if there is nothing."""
    file = folder / PROGRESS
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _synced(file: Path) -> int:
    """How long a file is, once all of it is on the disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
    return file.stat().st_size


def _not_finite(pair: _Decoded) -> _Dropped:
    return _Dropped(
        "NaN latents", pair.row, "its latents are not finite: the VAE overflows in this precision"
    )


def _bytes(values: Tensor, dtype: np.dtype[Any]) -> bytes:
    return values.float().cpu().numpy().astype(dtype).tobytes()


def skipped_rows(cache: PairCache) -> list[dict[str, Any]]:
    """The rows set aside while encoding: [{"row": 17, "reason": "..."}]."""
    text = (cache.folder / "skipped.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def told(summary: Mapping[str, Any]) -> str:
    """What became of the rows, in one line."""
    lost = "".join(f", {count} x {kind}" for kind, count in sorted(summary["dropped"].items()))
    return f"{summary['pairs']} pairs of {summary['rows']} rows{lost}"


def held_out_prompts(config: PairsConfig) -> list[str]:
    """The distinct prompts of the table that its split keeps out of training, in table order."""
    table = PairTable.open(config.data)
    found: dict[str, None] = {}
    for group in range(len(table.row_groups())):
        for prompt in table.read_group(group, ["caption"])["caption"].to_pylist():
            if prompt and held_out(prompt, config.held_out_fraction, config.held_out_seed):
                found[prompt] = None
    return list(found)

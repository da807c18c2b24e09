"""The table that `convert` writes: whole or absent, the same every time, in bounded memory."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pair_files import png_that_claims
from PIL import Image
from typer.testing import CliRunner

from fifa.cli import app
from fifa.config import InputError
from fifa.pairs import BadRow, Judgment, PairTable
from fifa.sources import SOURCES, load_source
from fifa.sources.convert import MANIFEST, REJECTED, SCHEMA, ConvertConfig, Counts, convert
from fifa.sources.reading import Found, ReadOptions


def image(seed: int, kind: str = "PNG", side: int = 8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def pairs_file(tmp_path: Path, rows: int, bad_every: int = 0) -> Path:
    """A JSON lines source; every `bad_every`-th row has a wrong label."""
    records = [
        {
            "prompt": f"prompt {i}",
            "image_0": text_of(image(2 * i, "JPEG")),
            "image_1": text_of(image(2 * i + 1)),
            "label": 7 if bad_every and i % bad_every == 0 else (0, 1, 0.5)[i % 3],
        }
        for i in range(rows)
    ]
    return write_lines(tmp_path / "pairs.jsonl", records)


def run(out: Path, path: Path, source: str = "jsonl", **options: Any) -> Counts:
    return convert(ConvertConfig(source=source, path=str(path), out=out, **options))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def rejected(out: Path) -> list[dict[str, Any]]:
    lines = (out / REJECTED).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# --- the table ------------------------------------------------------------------------------------


def test_pictures_keep_their_bytes_in_shards_of_a_fixed_number_of_rows(tmp_path: Path) -> None:
    counts = run(tmp_path / "out", pairs_file(tmp_path, 25, bad_every=10), rows_per_shard=10)
    assert (counts.found, counts.written, counts.ties, counts.shards) == (25, 22, 7, 3)
    assert counts.gone == {"the label is missing or wrong": 3}
    assert sorted(contents(tmp_path / "out")) == [
        MANIFEST,
        REJECTED,
        *(f"shard-{i:05d}.parquet" for i in range(3)),
    ]
    table = PairTable.open(tmp_path / "out")
    assert [group.rows for group in table.row_groups()] == [10, 10, 2]
    assert table.schema.equals(SCHEMA)
    rows = table.read_rows(range(22)).to_pylist()
    kept = [i for i in range(25) if i % 10]
    assert [row["caption"] for row in rows] == [f"prompt {i}" for i in kept]
    assert [row["jpg_0"] for row in rows] == [image(2 * i, "JPEG") for i in kept]
    assert [row["jpg_1"] for row in rows] == [image(2 * i + 1) for i in kept]
    assert [row["label_0"] for row in rows] == [(1.0, 0.0, 0.5)[i % 3] for i in kept]
    assert [row["ranking_id"] for row in rows] == list(range(22))
    best = ("image_0_uid", "image_1_uid")
    for i, row in zip(kept, rows, strict=True):
        assert row["best_image_uid"] == ("tie" if i % 3 == 2 else row[best[i % 3]])
    assert rows[0]["source"] == "pairs.jsonl line 2"
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["counts"]["written"] == 22


def test_row_groups_end_after_so_many_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fifa.sources.convert._GROUP_BYTES", 4 * len(image(0)))
    run(tmp_path / "out", pairs_file(tmp_path, 12))
    groups = PairTable.open(tmp_path / "out").row_groups()
    assert sum(group.rows for group in groups) == 12
    assert {group.path.name for group in groups} == {"shard-00000.parquet"}
    assert max(group.rows for group in groups) <= 3


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    path = pairs_file(tmp_path, 12, bad_every=5)
    run(tmp_path / "a", path, rows_per_shard=4)
    run(tmp_path / "b", path, rows_per_shard=4)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_folder_that_holds_something_is_refused_and_kept(tmp_path: Path) -> None:
    path, out = pairs_file(tmp_path, 2), tmp_path / "out"
    out.mkdir()
    run(out, path)  # an empty folder may be there
    before = contents(out)
    with pytest.raises(InputError, match="exists already; choose another folder or delete it"):
        run(out, path)
    assert contents(out) == before


def test_a_source_without_one_usable_row_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    path = pairs_file(tmp_path, 3, bad_every=1)
    with pytest.raises(InputError, match=r"no usable row; pairs\.jsonl line 1: the label is"):
        run(tmp_path / "out", path)
    assert list(tmp_path.iterdir()) == [path]


# --- killed and continued -------------------------------------------------------------------------

KILLER = """
import os, signal, sys
from pathlib import Path
from fifa.sources.convert import ConvertConfig, convert
from fifa.sources.records import jsonl

def dies(path, options):
    for i, found in enumerate(jsonl(path, options)):
        if i == int(os.environ["DIES_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield found

if __name__ == "__main__":
    import fifa.sources
    fifa.sources.SOURCES["jsonl"] = "killer:dies"
    convert(ConvertConfig(source="jsonl", path=sys.argv[1], out=sys.argv[2], rows_per_shard=5))
"""


def killed(tmp_path: Path, path: Path, out: Path, at: int) -> None:
    """Convert in a process that is killed when the reader comes to row `at`."""
    (tmp_path / "killer.py").write_text(KILLER)
    places = [str(tmp_path), str(Path(__file__).resolve().parent.parent)]
    environment = {**os.environ, "DIES_AT": str(at), "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, str(tmp_path / "killer.py"), str(path), str(out)]
    ended = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def test_a_killed_conversion_leaves_no_table_and_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = pairs_file(tmp_path, 18, bad_every=4), tmp_path / "out"
    run(tmp_path / "whole", path, rows_per_shard=5)
    for at in (2, 9, 16):  # in the first shard, in the second, in the third
        killed(tmp_path, path, out, at)
        with pytest.raises(InputError, match="does not exist"):
            PairTable.open(out)
    from fifa.images import decode

    decoded = []

    def counted(data: bytes, where: str) -> Any:
        decoded.append(data)
        return decode(data, where)

    monkeypatch.setattr("fifa.sources.convert.decode", counted)
    run(out, path, rows_per_shard=5)
    # 13 good rows in shards of 5, 5 and 3: two shards were there
    assert len(decoded) == 2 * 3
    assert contents(out) == contents(tmp_path / "whole")
    assert not (tmp_path / ".out.partial").exists()


def test_an_unfinished_conversion_is_not_continued_with_other_data_or_settings(
    tmp_path: Path,
) -> None:
    path, out = pairs_file(tmp_path, 12), tmp_path / "out"
    killed(tmp_path, path, out, 8)
    part = tmp_path / ".out.partial"
    shard = (part / "shard-00000.parquet").read_bytes()
    state = (part / ".parts" / "state.json").read_bytes()
    with pytest.raises(InputError, match="unfinished conversion of other data or settings"):
        run(out, path, rows_per_shard=5, ties="drop")
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(InputError, match="unfinished conversion of other data or settings"):
        run(out, path, rows_per_shard=5)
    assert (part / "shard-00000.parquet").read_bytes() == shard
    assert (part / ".parts" / "state.json").read_bytes() == state
    (part / ".parts" / "state.json").write_text("{")
    with pytest.raises(InputError, match="is damaged; delete the folder"):
        run(out, path, rows_per_shard=5)


def interrupted(out: Path, path: Path, source: str) -> None:
    """Convert until 50 rows are read, which makes two shards of 20 and a piece of a third."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    config = ConvertConfig(source=source, path=str(path), out=out, rows_per_shard=20)
    with pytest.raises(KeyboardInterrupt):
        convert(config, interrupt)


def clone_of(root: Path) -> Path:
    """A data set as a clone from the Hub holds it, its first file still missing."""
    for n in (1, 2, 3):
        jpg = [image(100 * n + i) for i in range(40)]
        labels = {"label_0": [1.0] * 20, "label_1": [0.0] * 20}
        table = {"caption": ["p"] * 20, "jpg_0": jpg[:20], "jpg_1": jpg[20:], **labels}
        file = root / "data" / f"train-{n:05d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), file)
    return root


def named_pairs(root: Path) -> Path:
    """Two folders of 60 pictures with equal names."""
    for i in range(60):
        for side, seed in (("w", 2 * i), ("l", 2 * i + 1)):
            (root / side).mkdir(parents=True, exist_ok=True)
            (root / side / f"{i:02d}.png").write_bytes(image(seed))
            (root / side / f"{i:02d}.txt").write_text("p")
    return root


def test_files_that_arrive_in_folders_below_the_source_are_noticed(tmp_path: Path) -> None:
    clone, pairs = clone_of(tmp_path / "clone"), named_pairs(tmp_path / "pairs")
    interrupted(clone / "out", clone, "pickapic")  # the table grows inside the source
    interrupted(tmp_path / "out", pairs, "folders")
    last, late = (clone / "data" / f"train-{number}.parquet" for number in ("00003", "00009"))
    shutil.copy(last, late)
    with pytest.raises(InputError, match="unfinished conversion of other data or settings"):
        run(clone / "out", clone, "pickapic", rows_per_shard=20)  # what was read is as it was
    late.unlink()
    shutil.copy(last, clone / "data" / "train-00000.parquet")
    for side in ("w", "l"):
        shutil.copy(pairs / side / "00.png", pairs / side / "000.png")
    for source, path, out in (
        ("pickapic", clone, clone / "out"),
        ("folders", pairs, tmp_path / "out"),
    ):
        with pytest.raises(InputError, match="unfinished conversion of other data or settings"):
            run(out, path, source, rows_per_shard=20)
    (clone / "data" / "train-00000.parquet").unlink()
    assert run(clone / "out", clone, "pickapic", rows_per_shard=20).written == 60


@pytest.mark.parametrize("changed", [3, 55])
def test_pictures_named_by_a_file_may_change_only_where_nothing_was_read(
    tmp_path: Path, changed: int
) -> None:
    named_pairs(tmp_path / "set")
    names = [{"chosen": f"set/w/{i:02d}.png", "rejected": f"set/l/{i:02d}.png"} for i in range(60)]
    path = write_lines(tmp_path / "pairs.jsonl", [{"prompt": "p", **name} for name in names])
    interrupted(tmp_path / "out", path, "jsonl")
    (tmp_path / "set" / "w" / f"{changed:02d}.png").write_bytes(image(1000))
    if changed < 40:
        with pytest.raises(InputError, match="unfinished conversion of other data or settings"):
            run(tmp_path / "out", path, rows_per_shard=20)
        return
    run(tmp_path / "out", path, rows_per_shard=20)
    run(tmp_path / "whole", path, rows_per_shard=20)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_folder_that_one_is_in_is_refused_but_not_one_named_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pairs_file(tmp_path, 3)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="is the folder that you are in"):
        run(Path("."), path)
    with pytest.raises(InputError, match="exists already"):
        run(Path(".."), path)
    run(Path("../there/../out"), path)
    assert PairTable.open(tmp_path / "out").num_rows == 3


def test_a_conversion_killed_before_it_could_tidy_up_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pairs_file(tmp_path, 6)
    monkeypatch.setattr("fifa.sources.convert.shutil.rmtree", lambda *_, **__: None)
    run(tmp_path / "out", path)
    assert (tmp_path / "out" / ".parts").exists()
    assert PairTable.open(tmp_path / "out").num_rows == 6


def waits_for_another(path: str, options: ReadOptions) -> Iterator[Found]:
    """A reader during which another process tries to write to the same folder."""
    command = [sys.executable, "-m", "fifa.cli", "convert", "jsonl", path, "--out"]
    out = str(Path(path).parent / "out")
    other = subprocess.run([*command, out], capture_output=True, text=True, check=False)
    yield Judgment(other.stderr, image(1), image(2), "a", where="here")


def test_two_processes_do_not_write_one_table(tmp_path: Path) -> None:
    run(tmp_path / "out", pairs_file(tmp_path, 2), source=f"{__name__}:waits_for_another")
    (row,) = PairTable.open(tmp_path / "out").judgments(0)
    assert isinstance(row, Judgment)
    assert row.prompt.startswith("error: another process is converting into")


def test_a_full_disk_is_one_sentence_and_no_table(tmp_path: Path) -> None:
    path = pairs_file(tmp_path, 300)
    program = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from fifa.cli import main\n"
        "sys.argv = ['fifa', 'convert', 'jsonl', sys.argv[1], '--out', sys.argv[2]]\n"
        "main()\n"
    )
    out = tmp_path / "out"
    ended = subprocess.run(
        [sys.executable, "-c", program, str(path), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: cannot write")
    assert "File too large" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == [path]


# --- memory ---------------------------------------------------------------------------------------


def many(path: str, options: ReadOptions) -> Iterator[Found]:
    """As many judgments as the file says, each of two pictures of about 20 kB of its own."""
    for i in range(int(Path(path).read_text())):
        pair = [image(2 * i + side, side=82) for side in (0, 1)]
        yield Judgment(f"prompt {i}", *pair, outcome="a", where=f"row {i}")


def peak(work: Callable[[], object]) -> int:
    """Most bytes that Python held at once while `work` ran."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fifa.sources.convert._GROUP_BYTES", 400_000)
    peaks = {}
    for rows in (30, 60, 600):
        (tmp_path / f"{rows}.txt").write_text(str(rows))
        peaks[rows] = peak(
            lambda rows=rows: run(
                tmp_path / f"out-{rows}", tmp_path / f"{rows}.txt", f"{__name__}:many"
            )
        )
    written = sum(file.stat().st_size for file in (tmp_path / "out-600").iterdir())
    assert written > 20e6  # the table is far larger than what was held
    assert peaks[600] < 1.2 * peaks[60] < 4e6


MEASURE = """
import sys, tracemalloc
import pyarrow
from fifa.sources import convert
convert._GROUP_BYTES = 2**21
tracemalloc.start()
settings = dict(source="pickapic", path=sys.argv[1], out=sys.argv[2])
convert.convert(convert.ConvertConfig(**settings))
arrow = pyarrow.default_memory_pool().max_memory()
print(arrow + tracemalloc.get_traced_memory()[1])
"""


def test_nor_does_the_memory_of_arrow(tmp_path: Path) -> None:
    """Most bytes of Python and of Arrow, which tracemalloc does not see, in a fresh process."""
    most = []
    for rows in (20, 220):
        path = tmp_path / f"{rows}.parquet"
        with pq.ParquetWriter(path, pa.schema([SCHEMA.field(i) for i in range(5)])) as out:
            for start in range(0, rows, 10):
                jpg = [image(i, "BMP", side=256) for i in range(2 * start, 2 * start + 20)]
                row = {"caption": ["p"] * 10, "jpg_0": jpg[:10], "jpg_1": jpg[10:]}
                out.write_table(pa.table({**row, "label_0": [1.0] * 10, "label_1": [0.0] * 10}))
        command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / f"out-{rows}")]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        most.append(int(ended.stdout))
    assert path.stat().st_size > 85e6
    assert most[1] < 1.25 * most[0] + 5e6


@pytest.mark.parametrize("kind", ["jsonl", "pickapic", "kto"])
def test_readers_hold_one_record_at_a_time(tmp_path: Path, kind: str) -> None:
    peaks = []
    for rows in (150, 900):
        path = tmp_path / f"{rows}"
        if kind == "jsonl":
            record = {"prompt": "p", "chosen": text_of(image(1, side=82)), "rejected": "x" * 9000}
            write_lines(path, [record] * rows)
        elif kind == "kto":
            lines = [f"{'f' * 200}{i}.png,{'p' * 800}{i},1\n" for i in range(15 * rows)]
            path.write_text("image,prompt,label\n" + "".join(lines))
        else:
            jpg = [image(i, side=82) for i in range(rows)]
            labels = {"label_0": [1.0] * rows, "label_1": [0.0] * rows}
            table = {"caption": ["p"] * rows, "jpg_0": jpg, "jpg_1": jpg, **labels}
            pq.write_table(pa.table(table), path, row_group_size=64)
            del table, jpg
        reader = load_source(kind)
        peaks.append(peak(lambda p=path, r=reader: sum(1 for _ in r(str(p), ReadOptions()))))
        assert path.stat().st_size > 2e6 * rows / 150
    assert peaks[1] < 1.25 * peaks[0] + 200_000


# --- what must not pass ---------------------------------------------------------------------------


def real_bomb() -> bytes:
    """100 million pixels in a few kilobytes: below what Pillow itself refuses."""
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_a_zip_bomb_is_refused_by_its_header_before_anything_is_unpacked(tmp_path: Path) -> None:
    bombs = [png_that_claims(60_000, 60_000), png_that_claims(9_000, 9_000), real_bomb()]
    good = {"prompt": "good", "chosen": text_of(image(1)), "rejected": text_of(image(2))}
    records = [{**good, "chosen": text_of(bomb)} for bomb in bombs]
    path = write_lines(tmp_path / "bombs.jsonl", [good, *records])
    most = peak(lambda: run(tmp_path / "out", path))
    assert most < 5e6  # unpacked, the real one alone takes 300 MB
    assert [row["kind"] for row in rejected(tmp_path / "out")] == ["a picture is too large"] * 3
    small = run(tmp_path / "small", path, max_pixels=10**8)  # the claim is false: caught later
    assert small.gone == {"a picture is too large": 2, "a picture cannot be decoded": 1}


Fault = Callable[[random.Random, dict[str, Any]], object]
WORDS = ("🐈‍⬛🔥", "قطة حمراء", "חתול", "\u202eevil", "日本語", "a cat")


def cut_picture(draw: random.Random, row: dict[str, Any]) -> None:
    whole = image(draw.randrange(99), draw.choice(("JPEG", "PNG")), side=40)
    row[draw.choice(("chosen", "rejected"))] = text_of(whole[: draw.randrange(30, len(whole) - 12)])


def wrong_type(draw: random.Random, row: dict[str, Any]) -> None:
    value = draw.choice((None, 7, 1.5, True, [], {}, ["a"], {"bytes": 3}, [[[]]], {"path": None}))
    row[draw.choice(("chosen", "rejected", "prompt"))] = value


def nul_bytes(draw: random.Random, row: dict[str, Any]) -> None:
    row[draw.choice(("prompt", "chosen"))] = f"{draw.choice(WORDS)}\0{draw.choice(WORDS)}"


def long_prompt(draw: random.Random, row: dict[str, Any]) -> None:
    row["prompt"] = draw.choice(WORDS) * (50_000 // 2)


def long_path(draw: random.Random, row: dict[str, Any]) -> None:
    row["chosen"] = draw.choice(("a/", "é!", "..")) * 25_000


def missing_file(draw: random.Random, row: dict[str, Any]) -> None:
    row["rejected"] = draw.choice((f"{draw.choice(WORDS)}.png", "../../nothing", "/", ".", "~"))


def empty_prompt(draw: random.Random, row: dict[str, Any]) -> None:
    row["prompt"] = draw.choice(("", "  \n\t", "\u200b\u200f", "\u2028", "\ufeff", "\x00\x01"))


def half_a_letter(draw: random.Random, row: dict[str, Any]) -> None:
    row["prompt"] = f"half {chr(0xD800 + draw.randrange(2048))} letter"


def bomb(draw: random.Random, row: dict[str, Any]) -> None:
    row["chosen"] = text_of(png_that_claims(draw.randrange(8500, 70_000), 9_000))


def wrong_label(draw: random.Random, row: dict[str, Any]) -> None:
    images = {"image_0": row.pop("chosen"), "image_1": row.pop("rejected")}
    row |= {**images, "label": draw.choice((7, -1, "both", None, [0], "", 0.7, True, "🐈", 1e400))}


def not_a_picture(draw: random.Random, row: dict[str, Any]) -> None:
    row["chosen"] = text_of(draw.randbytes(draw.randrange(30, 300)))


def same_twice(draw: random.Random, row: dict[str, Any]) -> None:
    row["rejected"] = row["chosen"]


def damaged_avif(draw: random.Random, row: dict[str, Any]) -> None:
    """Its colours are gone, which Pillow tells as a RuntimeError."""
    data = image(draw.randrange(99), "AVIF", side=40)
    start = data.index(b"mdat") + 4
    row[draw.choice(("chosen", "rejected"))] = text_of(data[:start] + bytes(len(data) - start))


def no_record(draw: random.Random, row: dict[str, Any]) -> object:
    return draw.choice((None, 7, "text", [], [row], True))


FAULTS: tuple[Fault, ...] = (
    cut_picture,
    damaged_avif,
    wrong_type,
    nul_bytes,
    long_prompt,
    long_path,
    missing_file,
    empty_prompt,
    half_a_letter,
    bomb,
    wrong_label,
    not_a_picture,
    same_twice,
    no_record,
)


def good_row(draw: random.Random, i: int) -> dict[str, Any]:
    """Emoji and text from right to left are as good as any other."""
    pictures = {"chosen": text_of(image(2 * i)), "rejected": text_of(image(2 * i + 1, "JPEG"))}
    return {"prompt": f"{draw.choice(WORDS)} {i}", **pictures}


def test_hundreds_of_bad_lines_are_set_aside_and_no_good_one(tmp_path: Path) -> None:
    draw = random.Random(0)
    records: list[object] = []
    prompts = []
    for i in range(520):
        row = good_row(draw, i)
        if i % 5 == 0:
            prompts.append(row["prompt"])
            records.append(row)
        else:
            made = FAULTS[i % len(FAULTS)](draw, row)
            records.append(row if made is None and FAULTS[i % len(FAULTS)] != no_record else made)
    path = write_lines(tmp_path / "fuzz.jsonl", records)
    with path.open("ab") as file:
        for line in (b"\xff\xfe\xfa", b"{", b'{"prompt": 1e999999}', b"[" * 20_000, b"nul\0"):
            file.write(line + b"\n")
    counts = run(tmp_path / "out", path, rows_per_shard=40)
    bad = rejected(tmp_path / "out")
    assert len(bad) == 416 + 5
    assert counts.found == 525
    assert sum(counts.gone.values()) == len(bad)
    assert all(row["kind"] and row["kind"] in row["reason"] for row in bad)
    assert all(len(row["reason"]) < 500 and "\n" not in row["reason"] for row in bad)
    assert len({row["reason"].split(": ")[0] for row in bad}) == len(bad)  # each says where
    table = PairTable.open(tmp_path / "out")
    assert table.read_rows(range(104))["caption"].to_pylist() == prompts


def test_hundreds_of_bad_parquet_rows_are_set_aside(tmp_path: Path) -> None:
    draw = random.Random(1)
    whole = image(5, "JPEG", side=40)
    faults: list[dict[str, Any]] = [
        {"jpg_0": whole[:200]},
        {"jpg_1": None},
        {"jpg_0": b""},
        {"jpg_1": png_that_claims(50_000, 50_000)},
        {"caption": None},
        {"caption": "nul \0 byte"},
        {"caption": "🐈" * 50_000},
        {"caption": " \u200f "},
        {"label_0": 7.0},
        {"label_1": None},
        {"label_0": float("nan")},
        {"has_label": False},
    ]
    rows = []
    for i in range(360):
        base = {"caption": f"{draw.choice(WORDS)} {i}", "label_0": 1.0, "label_1": 0.0}
        base |= {"jpg_0": image(2 * i), "jpg_1": image(2 * i + 1), "has_label": True}
        rows.append(base if i % 4 == 0 else {**base, **faults[(i + i // 12) % len(faults)]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=50)
    counts = run(tmp_path / "out", tmp_path / "a.parquet", source="pickapic")
    assert (counts.written, len(rejected(tmp_path / "out"))) == (90, 270)
    assert len(counts.gone) >= 7


def mutated(draw: random.Random, data: bytes) -> bytes:
    """The data with some bytes changed, cut out, doubled, or the end missing."""
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 6)):
        start = draw.randrange(len(changed))
        stop = start + draw.randrange(1, 20)
        new = draw.choice((b"", b"\0", b"\xff", b'"', b"[", b"]", b"\n", b",", b"NaN", b"1e999"))
        changed[start:stop] = draw.choice((new, bytes(changed[start:stop]) * 2, draw.randbytes(3)))
    return bytes(changed[: draw.randrange(1, len(changed) + 1)] if draw.random() < 0.3 else changed)


PARTS = [
    {"prompt_id": n // 2, "prompt": "p", "image_path": f"{n}.png", "rank": n} for n in range(6)
]
RANKS = [{"prompt": "p", "image_path": ["0.png", "1.png", "2.png"], "rank": [1, 2, 2]}] * 4
MUTABLE = {
    "jsonl": b'{"prompt": "p", "image_0": "0.png", "image_1": "1.png", "label": 1}\n' * 6,
    "csv": b'prompt,chosen,rejected\n"a, b",0.png,1.png\n' + b"p,1.png,2.png\n" * 5,
    "kto": b"image,prompt,label\n" + b"0.png,p,1\n1.png,p,0\n2.png,p,up\n" * 3,
    "hpdv2": json.dumps(RANKS).encode(),
    "imagereward": json.dumps(PARTS).encode(),
    "d3po": json.dumps([[1, 0, 0, 0, 0, 0, 0]] * 4).encode(),
}


@pytest.mark.parametrize("kind", MUTABLE)
def test_damaged_files_give_rows_or_one_sentence(tmp_path: Path, kind: str) -> None:
    draw = random.Random(kind)
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(image(n))
    for n in range(28):
        (tmp_path / f"{n:05}.png").write_bytes(image(n))
    (tmp_path / "prompt.json").write_text(json.dumps(["p"] * 4))
    path = tmp_path / "damaged.json"
    options = ReadOptions(images=tmp_path)
    seen, sentences = set(), []
    for _ in range(150):
        path.write_bytes(mutated(draw, MUTABLE[kind]))
        try:
            found = list(load_source(kind)(str(tmp_path if kind == "d3po" else path), options))
        except InputError as error:
            sentences.append(str(error))
            continue
        seen |= {type(item) for item in found}
        assert all(item.reason and item.kind for item in found if isinstance(item, BadRow))
    assert not any("\n" in sentence for sentence in sentences)
    assert seen == {Judgment, BadRow}


def test_kinds_of_pictures_that_need_other_programs_are_not_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="EPS")
    record = {"prompt": "p", "chosen": text_of(buffer.getvalue()), "rejected": text_of(image(2))}
    with pytest.raises(InputError, match="of a kind that is not read"):
        run(tmp_path / "out", write_lines(tmp_path / "eps.jsonl", [record]))


def cannot_be_read(path: str, options: ReadOptions) -> Iterator[Found]:
    """A reader that meets a file it may not open."""
    yield from ()
    raise PermissionError(13, "Permission denied", "some/file")


def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path: Path) -> None:
    path = pairs_file(tmp_path, 1)
    with pytest.raises(InputError, match="cannot read some/file: Permission denied"):
        run(tmp_path / "out", path, source=f"{__name__}:cannot_be_read")
    assert list(tmp_path.iterdir()) == [path]


def test_the_header_alone_lets_a_cut_picture_pass(tmp_path: Path) -> None:
    cut = image(1, "JPEG", side=40)[:-300]
    record = {"prompt": "p", "chosen": text_of(cut), "rejected": text_of(image(2))}
    path = write_lines(tmp_path / "cut.jsonl", [record])
    assert run(tmp_path / "out", path, check="header").written == 1
    with pytest.raises(InputError, match=r"cannot be decoded \(jpg_0\)"):
        run(tmp_path / "none", path)


# --- the command ----------------------------------------------------------------------------------


def fifa(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fifa.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_convert_tells_what_came_and_went_and_score_reads_it(tmp_path: Path) -> None:
    path, out = pairs_file(tmp_path, 60, bad_every=20), tmp_path / "out"
    ended = fifa("convert", "jsonl", path, "--out", out, "--set", "rows_per_shard=30")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        f"57 pairs (19 ties) of 60 found, in 2 shards of {out}",
        "  set aside, 3: the label is missing or wrong",
        f"reasons in {out / REJECTED}",
    ]
    assert "converting: 60 of 60" in ended.stderr
    scores = tmp_path / "scores"
    result = CliRunner().invoke(
        app, ["score", str(out), "--out", str(scores), "--reward", "jpeg_incompressibility"]
    )
    assert result.exit_code == 0, result.exception
    assert "57 of 57 rows scored" in result.output


def test_sources_lists_every_kind_and_settings_every_option() -> None:
    lines = CliRunner().invoke(app, ["sources"]).output.splitlines()
    assert [line.split()[0] for line in lines] == list(SOURCES)
    told = CliRunner().invoke(app, ["settings"]).output
    assert "fifa convert\n" in told
    assert "ties = keep" in told


def test_bad_arguments_are_one_sentence(tmp_path: Path) -> None:
    for args, part in (
        (["jsnol", "x"], "did you mean 'jsonl'"),
        (["jsonl", "nowhere"], "nowhere does not exist (expected a file of JSON lines)"),
        (["jsonl", "x", "--ties", "maybe"], "should be 'keep' or 'drop'"),
        (["pickapic", "nowhere.parquet"], "or the name of a Hub data set"),
    ):
        result = CliRunner().invoke(app, ["convert", *args, "--out", str(tmp_path / "out")])
        assert part in str(result.exception)
        assert "\n" not in str(result.exception)
    assert list(tmp_path.iterdir()) == []

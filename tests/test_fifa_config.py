from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from fifa.config import (
    REQUIRED,
    Config,
    InputError,
    atomic_path,
    calm_libraries,
    describe,
    fingerprint,
    finite,
    load_config,
    nearest,
    only_writer,
    take_lock,
    to_yaml,
    write_atomic,
)


class Optim(Config):
    learning_rate: float = Field(1e-4, gt=0, description="Step size of AdamW.")
    steps: int = Field(100, description="Optimiser steps.")


class Run(Config):
    data: Path = Field(description="Parquet file to read.")
    name: str = Field("run", description="What the run is called.")
    k: int | None = Field(None, description="Pairs kept.")
    optim: Optim = Field(Optim(steps=7), description="The optimiser.")


def error_of(*args: object, **kwargs: object) -> str:
    with pytest.raises(InputError) as caught:
        load_config(Run, *args, **kwargs)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_values_come_from_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data: x.parquet\noptim:\n  steps: 3\nk: 5\n")
    run = load_config(Run, path, ["optim.learning_rate=1e-5", "k=null"])
    assert run.optim == Optim(learning_rate=1e-5, steps=3)
    assert run.k is None
    assert run.data == Path("x.parquet")
    assert run.name == "run"


def test_an_override_below_an_empty_part_works(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data: x\noptim:\n")
    assert load_config(Run, path, ["optim.steps=2"]).optim.steps == 2


@pytest.mark.parametrize("text", ["no", "on", "12:30", "0123", "2024-01-01", "1_000"])
def test_a_string_stays_the_string_that_was_written(text: str) -> None:
    assert load_config(Run, None, ["data=x", f"name={text}"]).name == text


@pytest.mark.parametrize("name", ["1e-5", "no", "null", "true", "3", "a: b", "", "ünï", "~"])
def test_yaml_reads_back_to_an_equal_config(tmp_path: Path, name: str) -> None:
    run = Run(data=Path("x y.parquet"), name=name, optim=Optim(learning_rate=3e-7))
    write_atomic(tmp_path / "c.yaml", to_yaml(run))
    assert load_config(Run, tmp_path / "c.yaml") == run


def test_an_unknown_key_names_the_key_the_file_and_the_nearest_key(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data: x\noptim:\n  learning_rat: 1\n")
    message = error_of(path)
    assert str(path) in message
    assert "'optim.learning_rat'" in message
    assert "'optim.learning_rate'" in message


def test_an_unknown_override_is_blamed_on_the_override_and_matches_by_its_end() -> None:
    message = error_of(None, ["data=x", "learning_rate=1"])
    assert "override 'learning_rate=1'" in message
    assert "'optim.learning_rate'" in message


def test_a_wrong_type_names_value_key_and_meaning(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data: x\n")
    message = error_of(path, ["optim.steps=many"])
    assert "override 'optim.steps=many'" in message
    assert "'many'" in message
    assert "valid integer" in message
    assert "Optimiser steps." in message


@pytest.mark.parametrize("value", [".nan", ".inf", "-1", "0"])
def test_a_value_out_of_range_is_refused(value: str) -> None:
    assert "optim.learning_rate" in error_of(None, ["data=x", f"optim.learning_rate={value}"])


def test_a_missing_value_says_what_it_is_for() -> None:
    assert "'data' is missing (Parquet file to read.)" in error_of(None)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1,\n", "line 2"),
        ("- 1\n- 2\n", "found a list"),
        ("name: a\nname: b\n", "twice"),
        ("data: x\nname: *nobody\n", "line 2"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    message = error_of(path)
    assert str(path) in message
    assert part in message


def test_a_missing_file_and_a_binary_file_are_one_sentence(tmp_path: Path) -> None:
    assert "does not exist" in error_of(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in error_of(tmp_path / "b.yaml")
    assert "cannot read" in error_of(tmp_path)


@pytest.mark.parametrize("override", ["steps", "=3", "data.x.y=1"])
def test_a_malformed_override_is_one_sentence(override: str) -> None:
    assert override in error_of(None, ["data=x", override])


def test_describe_lists_nested_settings_with_the_defaults_that_apply() -> None:
    table = {setting.key: setting for setting in describe(Run)}
    assert list(table) == ["data", "name", "k", "optim.learning_rate", "optim.steps"]
    assert table["data"].default is REQUIRED
    assert table["data"].type == "Path"
    assert table["k"].type == "int | null"
    assert table["optim.steps"].default == 7  # Run's own default, not that of Optim


def test_a_setting_without_a_sentence_cannot_be_defined() -> None:
    with pytest.raises(TypeError, match="steps"):

        class Silent(Config):
            steps: int = 3


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValueError):
        Optim().steps = 3  # type: ignore[misc]


def test_write_atomic_replaces_whole_files_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def stop_halfway() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stop_halfway()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "step-1") as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "w.bin").write_bytes(b"1")
        assert not (tmp_path / "step-1").exists()
    assert (tmp_path / "step-1" / "inner" / "w.bin").read_bytes() == b"1"


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    def write_to_a_full_disk() -> None:
        with atomic_path(tmp_path / "a.bin") as temporary:
            os.symlink("/dev/full", temporary)  # the kernel's own full disk
            temporary.write_bytes(b"x")

    with pytest.raises(InputError) as caught:
        write_to_a_full_disk()
    assert str(caught.value) == f"cannot write {tmp_path / 'a.bin'}: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_a_file_over_the_size_limit_leaves_the_old_one(tmp_path: Path) -> None:
    program = (
        "import resource, sys\n"
        "from fifa.config import write_atomic, InputError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    write_atomic(sys.argv[1], b'x' * 5000)\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    path = tmp_path / "a.bin"
    path.write_text("old")
    run = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == f"cannot write {path}: File too large"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    assert path.read_text() == "old"


def test_a_vanished_input_is_not_called_a_failed_write(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "out" / "a"):
        (tmp_path / "input.parquet").read_bytes()


def test_fingerprints_tell_parts_kinds_and_contents_apart(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(b"1")
    before = fingerprint(tmp_path / "d")
    assert fingerprint(tmp_path / "d") == before
    assert len(before) == 16
    (tmp_path / "d" / "f").write_bytes(b"2")
    different = [
        before,
        fingerprint(tmp_path / "d"),
        fingerprint("ab", "c"),
        fingerprint("a", "bc"),
        fingerprint(b"ab", "c"),
        fingerprint("abc"),
    ]
    assert len(set(different)) == len(different)
    with pytest.raises(InputError, match="nowhere"):
        fingerprint(tmp_path / "nowhere")


# ---- who writes ----------------------------------------------------------------------------------


def test_numbers_that_json_does_not_know_become_null() -> None:
    assert finite({"a": [math.nan, 1.0], "b": (math.inf,)}) == {"a": [None, 1.0], "b": [None]}


def test_initials_are_understood() -> None:
    known = ["optim.offload", "optim.learning_rate", "run.dir"]
    assert [nearest(word, known) for word in ("optim.lr", "lr", "optim.of")] == [
        "optim.learning_rate",
        "optim.learning_rate",
        "optim.offload",
    ]


def test_a_sign_that_the_output_lacks_ends_no_program() -> None:
    program = "from fifa.config import print_any_text as ready; ready(); print('0.1 \\u2013 0.2')"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONPATH": os.getcwd()}
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, env=environment
    )
    assert told.stdout.split() == [b"0.1", b"?", b"0.2"]


def test_one_process_writes_to_a_folder_and_sweeps_what_a_killed_one_left(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    theirs = [folder / ".tmp-1-being-made" / "file", folder / "other" / ".tmp-2"]
    ours = [folder / ".tmp-3", folder / "inner" / ".tmp-4", folder / "scores" / ".tmp-5"]
    for path in (*theirs, *ours):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    with only_writer(folder, "inner/lock", "writing to", parts=["scores"]):
        assert [path.exists() for path in (*theirs, *ours)] == [True, True, False, False, False]
        with (
            pytest.raises(InputError, match=f"^another process is writing to {folder}$"),
            only_writer(folder, "inner/lock", "writing to"),
        ):
            pass
    with only_writer(folder, "inner/lock", "writing to"):
        pass  # it was let go


def test_a_lock_is_let_go_when_its_process_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom fifa.config import take_lock\n"
        "held = take_lock(Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(60)\n"
    )
    lock = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(lock)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert take_lock(lock) is None
        process.kill()
        process.wait()
    held = take_lock(lock, wait=True)
    assert held is not None
    held.close()


@pytest.mark.parametrize(("watched", "off"), [(True, None), (False, "1")])
def test_bars_of_libraries_are_off_where_nobody_watches(
    watched: bool, off: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "")  # put back at the end
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched)
    calm_libraries()
    assert os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == off

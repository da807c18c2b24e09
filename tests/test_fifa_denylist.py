from __future__ import annotations

from pathlib import Path

import pytest

from fifa.config import InputError
from fifa.denylist import read_deny_list


def names(tmp_path: Path, lines: str, prompt: str) -> bool:
    (tmp_path / "deny.txt").write_text(lines, encoding="utf-8")
    return read_deny_list(tmp_path / "deny.txt").names(prompt)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a red fox", True),
        ("A  Red\tFOX, in snow", True),
        ("ａ ｒｅｄ ｆｏｘ", True),  # full width
        ("a red foxglove", False),
        ("a fox, red", False),
        ("", False),
    ],
)
def test_a_phrase_is_found_as_whole_words(tmp_path: Path, prompt: str, named: bool) -> None:
    assert names(tmp_path, "# animals\n\nred fox\n", prompt) is named


@pytest.mark.parametrize(
    ("prompt", "named"), [("GORE everywhere", True), ("category", False), ("blood-red", True)]
)
def test_an_expression_stands_between_slashes(tmp_path: Path, prompt: str, named: bool) -> None:
    assert names(tmp_path, r"/\bgore\b|blood/" + "\nnothing else\n", prompt) is named


def test_signs_in_a_phrase_mean_themselves(tmp_path: Path) -> None:
    assert names(tmp_path, "c++ (old)", "art of c++ (old) days")
    assert not names(tmp_path, "c++ (old)", "art of ccc old days")


def test_each_of_many_phrases_is_found(tmp_path: Path) -> None:
    lines = "red\nred fox\nfox hunting\n/^a z/\n"
    prompts = ["a fox hunting", "the red fox", "a reddish fox hunt", "a zoo", "red"]
    assert [names(tmp_path, lines, prompt) for prompt in prompts] == [True, True, False, True, True]


def test_a_byte_order_mark_belongs_to_no_entry(tmp_path: Path) -> None:
    assert names(tmp_path, "\ufeff/\\bgore\\b/\n", "gore")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("/(/\n", r"line 1: '/\(/' is no regular expression"),
        ("ok\n...\n", "line 2: '...' has no words"),
        ("# only a comment\n\n", "has no entry"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        names(tmp_path, content, "x")


def test_a_missing_or_binary_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the deny list"):
        read_deny_list(tmp_path / "absent.txt")
    (tmp_path / "deny.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_deny_list(tmp_path / "deny.txt")

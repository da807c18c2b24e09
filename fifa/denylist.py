"""Prompts that must not be kept, by a file of phrases and patterns.

One entry a line. A plain line is a phrase: it names every prompt that holds its words in that
order, as whole words, whatever their case, width and spacing. A line between slashes, such as
/\\bnaked\\b|nsfw/, is a regular expression, searched for without regard to case. Blank lines and
lines that begin with # are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fifa.config import InputError
from fifa.pairs import normalise_prompt


class DenyList:
    """Phrases (words with single spaces) and expressions, ready to be searched for."""

    def __init__(self, phrases: Sequence[str], expressions: Sequence[re.Pattern[str]]) -> None:
        # All phrases in one search: a list of thousands costs little more than one phrase.
        any_of = "|".join(map(re.escape, phrases))
        whole = [re.compile(rf"(?<!\w)(?:{any_of})(?!\w)", re.IGNORECASE)] if phrases else []
        self._patterns = (*whole, *expressions)

    def names(self, prompt: str) -> bool:
        """Whether an entry applies to the prompt, as it is written or normalised."""
        texts = (prompt, normalise_prompt(prompt))
        return any(pattern.search(text) for pattern in self._patterns for text in texts)


def read_deny_list(path: Path) -> DenyList:
    """The entries of a UTF-8 file.

    Raises InputError if it cannot be read, holds no entry, or an expression is not valid.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"cannot read the deny list {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"the deny list {path} is not UTF-8 text") from None
    entries = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    entries = [(number, text) for number, text in entries if text and not text.startswith("#")]
    if not entries:
        raise InputError(f"the deny list {path} has no entry; a line each, # begins a comment")
    parsed = [_entry(text, f"{path}, line {number}") for number, text in entries]
    phrases = [entry for entry in parsed if isinstance(entry, str)]
    return DenyList(phrases, [entry for entry in parsed if not isinstance(entry, str)])


def _entry(text: str, where: str) -> str | re.Pattern[str]:
    """A line's phrase, or its expression."""
    if len(text) > 2 and text.startswith("/") and text.endswith("/"):
        try:
            return re.compile(text[1:-1], re.IGNORECASE)
        except re.error as error:
            raise InputError(f"{where}: '{text}' is no regular expression: {error}") from None
    phrase = " ".join(normalise_prompt(text).split())
    if not phrase:
        raise InputError(f"{where}: '{text}' has no words to look for")
    return phrase

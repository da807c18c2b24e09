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
    """Entries of a file, ready to be searched for."""

    def __init__(self, patterns: Sequence[re.Pattern[str]]) -> None:
        self._patterns = tuple(patterns)

    def names(self, prompt: str) -> bool:
        """Whether an entry applies to the prompt, as it is written or normalised."""
        texts = (prompt, normalise_prompt(prompt))
        return any(pattern.search(text) for pattern in self._patterns for text in texts)


def read_deny_list(path: Path) -> DenyList:
    """The entries of a UTF-8 file.

    Raises InputError if it cannot be read, holds no entry, or an expression is not valid.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read the deny list {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"the deny list {path} is not UTF-8 text") from None
    entries = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    entries = [(number, text) for number, text in entries if text and not text.startswith("#")]
    if not entries:
        raise InputError(f"the deny list {path} has no entry; a line each, # begins a comment")
    return DenyList([_pattern(text, f"{path}, line {number}") for number, text in entries])


def _pattern(entry: str, where: str) -> re.Pattern[str]:
    if len(entry) > 2 and entry.startswith("/") and entry.endswith("/"):
        try:
            return re.compile(entry[1:-1], re.IGNORECASE)
        except re.error as error:
            raise InputError(f"{where}: '{entry}' is no regular expression: {error}") from None
    words = [re.escape(word) for word in normalise_prompt(entry).split()]
    if not words:
        raise InputError(f"{where}: '{entry}' has no words to look for")
    return re.compile(rf"(?<!\w){r' '.join(words)}(?!\w)", re.IGNORECASE)

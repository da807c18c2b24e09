"""How good is the text of a prompt: 0..10 for meaningful, well formed, specific and harmless.

FiFA asks a language model: `local:<folder or Hub id>` runs one here, `openai:<model>@<base url>`
asks a server. `heuristic` is the offline fallback, no LLM. All sit behind `QualityJudge`; a judge
that cannot answer returns None, never a middling number.
"""

from __future__ import annotations

import importlib
import inspect
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from fifa.config import InputError, import_from_here, unknown

if TYPE_CHECKING:
    from fifa.judge.heuristic import HeuristicJudge, surprise

__all__ = [
    "JUDGES",
    "CachedJudge",
    "HeuristicJudge",
    "Quality",
    "QualityJudge",
    "StreamingJudge",
    "load_judge",
    "surprise",
]


class Quality(NamedTuple):
    """A judge's answer: a score in [0, 10], or None where it has no answer, and a short reason."""

    score: float | None
    reason: str


class QualityJudge(Protocol):
    """Prompts -> Quality, one each. `name` carries a version and changes when answers would."""

    name: str

    def score(self, prompts: Sequence[str]) -> list[Quality]:
        """Judge each prompt by itself."""
        ...


@runtime_checkable
class StreamingJudge(Protocol):
    """A slow judge, whose answers are worth keeping and showing one by one."""

    name: str

    def score(self, prompts: Sequence[str]) -> list[Quality]:
        """Judge each prompt by itself."""
        ...

    def stream(self, prompts: Sequence[str]) -> Iterator[tuple[int, Quality]]:
        """The index of a prompt and its answer, each once, as they arrive, in any order."""
        ...


def collect(answers: Iterator[tuple[int, Quality]]) -> list[Quality]:
    """What `stream` yields, in the order of the prompts."""
    return [answer for _, answer in sorted(answers)]


# ---- the table -----------------------------------------------------------------------------------

JUDGES: dict[str, str] = {
    "heuristic": "fifa.judge.heuristic:HeuristicJudge",
    "local": "fifa.judge.local:LocalJudge",  # local:<folder or Hub id>
    "openai": "fifa.judge.endpoint:EndpointJudge",  # openai:<model>@<base url>
}


def load_judge(spec: str, **kwargs: Any) -> QualityJudge:
    """The judge that `spec` names.

    `spec` is `heuristic`, `local:<folder or Hub id>`, `openai:<model>@<base url>` or a
    `package.module:factory`; `kwargs` go to its factory. Raises InputError for an unknown name, a
    failing import, arguments the factory does not take, or a model that cannot be loaded.
    """
    family, colon, target = spec.partition(":")
    address = JUDGES.get(family, spec if colon else None)
    if address is None:
        raise unknown("judge", spec, JUDGES, "package.module:factory")
    arguments = (target,) if family in JUDGES and colon else ()
    factory = _imported(address, spec)
    try:
        inspect.signature(factory).bind(*arguments, **kwargs)
    except TypeError as error:
        raise InputError(f"judge '{spec}': {error}") from None
    return factory(*arguments, **kwargs)


def _imported(address: str, spec: str) -> Callable[..., QualityJudge]:
    module, _, name = address.partition(":")
    try:
        factory: Callable[..., QualityJudge] = getattr(import_from_here(module), name)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        raise InputError(f"judge '{spec}' cannot be loaded: {error}") from None
    return factory


def __getattr__(name: str) -> Any:
    """Load the offline fallback the first time its name is used (PEP 562)."""
    if name not in {"HeuristicJudge", "surprise"}:
        raise AttributeError(f"module 'fifa.judge' has no attribute '{name}'")
    return getattr(importlib.import_module("fifa.judge.heuristic"), name)


# ---- the cache -----------------------------------------------------------------------------------

Told = Callable[[int, int], None]  # prompts answered, prompts in all


class CachedJudge:
    """Another judge whose answers are kept in an SQLite file, by judge name and prompt.

    The answers of a `StreamingJudge` are kept one by one as they arrive, so a killed run asks only
    for the rest. Refusals (score None) are not kept, so they are asked again in the next run.
    """

    def __init__(self, judge: QualityJudge, path: str | Path) -> None:
        self.judge = judge
        self.name = judge.name
        self.path = Path(path)

    def score(self, prompts: Sequence[str], told: Told | None = None) -> list[Quality]:
        """Answers from the file where it has them, from the judge where it does not.

        `told` hears of every answer of a slow judge: distinct prompts answered, and in all.
        """
        distinct = list(dict.fromkeys(prompts))
        with closing(self._opened()) as db:
            answers = self._stored(db, distinct)
            new = [prompt for prompt in distinct if prompt not in answers]
            for fresh in self._asked(new):
                self._store(db, fresh)
                answers |= fresh
                if told is not None and isinstance(self.judge, StreamingJudge):
                    told(len(answers), len(distinct))
        return [answers[prompt] for prompt in prompts]

    def _asked(self, prompts: list[str]) -> Iterator[dict[str, Quality]]:
        """The judge's answers to new prompts, in portions as they arrive."""
        if not prompts:
            return
        if not isinstance(self.judge, StreamingJudge):
            yield dict(zip(prompts, self.judge.score(prompts), strict=True))
            return
        with closing(_closable(self.judge.stream(prompts))) as answers:
            for index, answer in answers:
                yield {prompts[index]: answer}

    def _stored(self, db: sqlite3.Connection, prompts: Sequence[str]) -> dict[str, Quality]:
        query = "SELECT score, reason FROM answers WHERE judge = ? AND prompt = ?"
        found = {}
        with self._explained():
            for prompt in prompts:
                row = db.execute(query, (self.name, _storable(prompt))).fetchone()
                if row is not None:
                    found[prompt] = Quality(*row)
        return found

    def _store(self, db: sqlite3.Connection, answers: Mapping[str, Quality]) -> None:
        rows = [
            (self.name, _storable(prompt), answer.score, answer.reason)
            for prompt, answer in answers.items()
            if answer.score is not None
        ]
        with self._explained(), db:  # one transaction
            db.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", rows)

    def _opened(self) -> sqlite3.Connection:
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(self.path, timeout=60)
            db.execute(
                "CREATE TABLE IF NOT EXISTS answers (judge TEXT, prompt TEXT, score REAL,"
                " reason TEXT, PRIMARY KEY (judge, prompt))"
            )
            return db

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What is wrong with the file is one sentence; the judge's own errors are not caught."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise InputError(f"cannot use the judge's cache {self.path}: {error}") from None


def _closable(answers: Iterator[tuple[int, Quality]]) -> Any:
    """A generator, whatever the iterator is: closing it ends the requests under way."""
    return answers if hasattr(answers, "close") else (pair for pair in answers)


def _storable(prompt: str) -> str:
    return prompt.encode("utf-8", "backslashreplace").decode("utf-8")  # lone surrogates

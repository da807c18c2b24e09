"""The progress display of a run: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


class Display:
    """Progress on a terminal (a rich bar) or in a pipe (plain lines)."""

    def __init__(self, log_every: int) -> None:
        self.log_every = log_every
        self.bar: Progress | None = None
        self.task: Any = None
        self.name, self.total, self.first, self.began = "", 0, 0, 0.0

    @contextmanager
    def shown(self, total: int, done: int, name: str) -> Iterator[None]:
        """Show the way from `done` to `total` inside the block."""
        self.name, self.total, self.first, self.began = name, total, done, time.monotonic()
        if not sys.stdout.isatty():
            yield
            return
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[text]}"),
        )
        with progress.Progress(*columns) as self.bar:
            self.task = self.bar.add_task(name, total=total, completed=done, text="", rate="")
            yield
        self.bar = None

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def status(self, text: str) -> None:
        """What is going on right now, beside the bar; a pipe does not show it."""
        if self.bar is not None:
            self.bar.update(self.task, description=text)

    def advance(self, step: int, text: str) -> None:
        """Move to `step`, with `text` beside it; a pipe gets every `log_every`-th and the last."""
        pace = (time.monotonic() - self.began) / max(step - self.first, 1)
        rate = f"{1 / pace:.1f}/s" if pace < 1 else f"{pace:.1f} s each"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text, rate=rate)
        elif step % self.log_every == 0 or step == self.total:
            left = timedelta(seconds=round(pace * (self.total - step)))
            print(f"{self.name} {step}/{self.total}  {text}  {rate}, {left} left", flush=True)

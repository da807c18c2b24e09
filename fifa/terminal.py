"""How commands talk: settings from options, tables, progress; on a terminal and in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from fifa.config import Config, InputError, calm_libraries, load_config, print_any_text

if TYPE_CHECKING:
    from fifa.bench import Share

C = TypeVar("C", bound=Config)
Progress = Callable[[str, int, int], None]

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, see `fifa settings`."),
]
File = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")]


INTERRUPTED = 130  # the exit code that typer makes of Ctrl-C


def run_app(app: typer.Typer) -> None:
    """Run a console script: bad input is one line on stderr and exit code 2, Ctrl-C a line too."""
    calm_libraries()
    print_any_text()
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("interrupted; type the same command again", file=sys.stderr)
        raise
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def config_of(
    cls: type[C], file: Path | None, given: Mapping[str, Any], more: list[str] | None
) -> C:
    """Settings from the file, then `--set`, then the options that were given."""
    named = {key: value for key, value in given.items() if value is not None}
    return load_config(cls, file, more or [], named)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with lines on a terminal, tab-separated columns under a title in a pipe."""
    if not sys.stdout.isatty():
        print(f"# {title}")
        for row in (header, *rows):
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


@contextmanager
def progress_shown() -> Iterator[Progress]:
    """A bar with rate and time left on a terminal, a line every few seconds in a pipe."""
    if not sys.stderr.isatty():
        yield plain_lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total or None, rate="")
            speed = bar.tasks[tasks[stage]].speed
            rate = f"{speed:,.0f} a second" if speed else ""
            bar.update(tasks[stage], completed=done, total=total or None, rate=rate)

        yield show


def plain_lines(every: float = 5.0) -> Progress:
    """Plain lines on stderr: when a stage begins, ends, and every few seconds between.

    A total of 0 stands for one that is not known yet.
    """
    begun: dict[str, tuple[float, int]] = {}
    told = 0.0

    def show(stage: str, done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        first = stage not in begun
        start, before = begun.setdefault(stage, (now, done))
        if not first and (done < total or not total) and now - told < every:
            return
        told = now
        rate = (done - before) / (now - start) if now > start else 0.0
        speed = f", {rate:,.0f} a second" if rate else ""
        left = f", {(total - done) / rate:,.0f} s left" if rate and total else ""
        of = f" of {total:,}" if total else ""
        print(f"{stage}: {done:,}{of}{speed}{left}", file=sys.stderr, flush=True)

    return show


def share_text(part: Share) -> str:
    """A share with its interval, "-" where there are no pairs."""
    return f"{part.value:.3f} [{part.low:.3f}, {part.high:.3f}]" if part.pairs else "-"

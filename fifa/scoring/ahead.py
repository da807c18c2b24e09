"""Work that is begun before its turn, so that it is done when its turn comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(begin: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
    """`begin(item)` of every item in order; called for `depth` items beyond the one handed out.

    With a `begin` that gives work to threads, `depth` bounds what lies finished and waiting.
    """
    begun: deque[R] = deque()
    for item in items:
        begun.append(begin(item))
        if len(begun) > depth:
            yield begun.popleft()
    yield from begun


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads. However the block ends, what has not begun is dropped."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)

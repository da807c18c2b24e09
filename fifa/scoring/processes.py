"""Several processes of one pass, as `accelerate launch` starts them: each takes its row groups.

    accelerate launch -m fifa.cli score runs/pairs --out runs/scores --set device=cuda

All need to see the same folders. The first writes the table; the others leave their shards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple


def _nothing() -> None:
    """There is nobody to wait for."""


class Team(NamedTuple):
    """The processes of one pass, as one of them sees them."""

    rank: int  # of this process; the first, 0, writes the table
    size: int
    wait: Callable[[], None]  # until all have come to this point


ALONE = Team(0, 1, _nothing)


@contextmanager
def launched_team() -> Iterator[Team]:
    """The team that a launcher started this process in; alone without one.

    "cuda" then means the GPU of this process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    import torch
    from accelerate import PartialState

    # Without a GPU the processes join only when they are told that they use CPUs.
    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        yield Team(state.process_index, state.num_processes, state.wait_for_everyone)
    finally:
        state.destroy_process_group()

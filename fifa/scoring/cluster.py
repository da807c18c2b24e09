"""A pass on a Ray cluster: actors hold the reward and the judge, Ray Data hands them row groups.

Actors read the data set by its path, which every machine must see, and send shards back; this
process writes them, so killed and continued it does what it does alone. Each machine keeps its
judge's answers under the path of the output folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from fifa.config import InputError
from fifa.pairs import BadRow
from fifa.scoring.groups import Shard
from fifa.scoring.settings import ScoreConfig

LOCAL = "local"  # in place of an address: a cluster of this machine alone, gone after the pass


def shards_by_ray(config: ScoreConfig, groups: Sequence[int]) -> Iterator[tuple[int, Shard]]:
    """The row groups in the order in which actors finish them, each with what it came to.

    Raises InputError if Ray is not installed, the cluster cannot be reached, or an actor met one.
    """
    if not groups:
        return
    with _connected(config) as ray:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        on_gpu = config.device.startswith("cuda")
        resource = "GPU" if on_gpu else "CPU"
        workers = config.ray_workers or int(ray.cluster_resources().get(resource, 0))
        if workers < 1:
            raise InputError(f"the Ray cluster '{config.ray}' has no {resource}")
        shards = ray.data.from_items(list(groups), override_num_blocks=len(groups)).map_batches(
            _Actor,
            fn_constructor_args=(config,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(groups))),
            num_gpus=1 if on_gpu else None,
            num_cpus=None if on_gpu else 1,
        )
        for row in shards.iter_rows():
            if row["error"]:
                raise InputError(row["error"])
            yield row["group"], _unpacked(row)


class _Actor:
    """One worker of the pool. It loads its scorers when it is first asked.

    What is wrong travels back as a sentence: Ray would wrap an exception into its own and retry.
    """

    def __init__(self, config: ScoreConfig) -> None:
        self.config = config
        self.scorer: Any = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (group,) = (int(item) for item in batch["item"])
        try:
            return {"group": [group], **self._scored(group), "error": [""]}
        except InputError as error:
            return {"group": [group], "scored": [b""], "bad": [""], "error": [str(error)]}

    def _scored(self, group: int) -> dict[str, list[Any]]:
        if self.scorer is None:
            from fifa.scoring import load_scorer

            self.scorer = load_scorer(self.config, self.config.device)
        ((_, shard),) = self.scorer.shards([group], lambda *_: None)
        return _packed(shard)


def _packed(shard: Shard) -> dict[str, list[Any]]:
    """A shard as the columns of one row."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, shard.scored.schema) as stream:
        stream.write_table(shard.scored)
    return {
        "scored": [sink.getvalue().to_pybytes()],
        "bad": [json.dumps([asdict(row) for row in shard.bad])],
    }


def _unpacked(row: dict[str, Any]) -> Shard:
    table = pa.ipc.open_stream(row["scored"]).read_all()
    return Shard(table, [BadRow(**bad) for bad in json.loads(row["bad"])])


@contextmanager
def _connected(config: ScoreConfig) -> Iterator[Any]:
    """The module ray, connected: to what this process is connected to, or to `config.ray`."""
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise InputError(
            f"a pass on Ray needs '{error.name}': pip install 'd3po-fifa[ray]'"
        ) from None
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if config.ray == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        options |= {"include_dashboard": False, "num_cpus": config.ray_workers}
    try:
        ray.init(address=config.ray, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot reach the Ray cluster '{config.ray}': {reason}") from None
    try:
        yield ray
    finally:
        ray.shutdown()

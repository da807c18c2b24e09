"""Play a network through on tensors that have shapes and no data: what it would need and cost.

On torch's meta device every operation runs, the backward pass included, and nothing is computed.
`Playing` watches them go by: which storages are alive at once (the peak of memory, short of what an
allocator wastes), how many floating point operations each needs, how many bytes it touches.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from d3po.preflight.rates import Rates


@dataclass(frozen=True)
class Played:
    """What a piece of work takes."""

    bytes: int  # most that is alive at one time, beyond what was there before
    flops: float
    seconds: float  # by `Rates`: each operation by what holds it up

    def times(self, count: float) -> Played:
        """The same work `count` times in a row: no more memory."""
        return Played(self.bytes, self.flops * count, self.seconds * count)

    def then(self, other: Played) -> Played:
        """This work and then the other."""
        return Played(
            max(self.bytes, other.bytes), self.flops + other.flops, self.seconds + other.seconds
        )


NOTHING = Played(0, 0.0, 0.0)


def play(work: Callable[[], object], rates: Rates, fused_attention: bool = True) -> Played:
    """Run `work` on meta tensors and watch; it must use no others.

    With `fused_attention`, attention keeps its inputs, its output and a number a row, as flash
    kernels do; else the matrix of weights too.
    """
    playing = Playing(rates)
    with playing, _fused_attention(playing) if fused_attention else nullcontext():
        work()
    return Played(playing.peak, playing.flops, playing.seconds)


class Playing(TorchDispatchMode):
    """Counts while operations go by; results of an operation are alive until Python forgets them.

    The storage of a tensor outlives it where autograd keeps it for the way back.
    """

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.rates = rates
        self.peak, self.flops, self.seconds = 0, 0.0, 0.0
        self._now = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation."""
        kwargs = dict(kwargs or {})
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {id(t.untyped_storage()) for t in inputs}
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        new = [t for t in outputs if id(t.untyped_storage()) not in known]
        formula = flop_registry.get(func.overloadpacket)
        flops = float(formula(*args, **kwargs, out_val=result)) if formula else 0.0
        if new or flops:  # a view costs nothing
            self.cost(flops, sum(t.nbytes for t in (*inputs, *outputs)))
        for tensor in new:
            self._keep(tensor.untyped_storage())
        return result

    def cost(self, flops: float, touched: int) -> None:
        """Add one operation."""
        self.flops += flops
        self.seconds += self.rates.seconds(flops, touched)

    def _keep(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._alive.pop(key)


@contextmanager
def _fused_attention(playing: Playing) -> Iterator[None]:
    """Puts an attention in place that keeps what a flash kernel keeps.

    Not a TorchFunctionMode: those are off where checkpointing recomputes on the way back.
    """
    own = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return _Flash.apply(playing, query, key, value)

    setattr(F, own.__name__, attention)
    try:
        yield
    finally:
        setattr(F, own.__name__, own)


class _Flash(torch.autograd.Function):
    """Two products forward; on the way back those of the forward again and four more (less one).

    FLOPs as in FlashAttention (Dao et al. 2022): forward 4 N L S E a head, backward 2.5 times that.
    """

    @staticmethod
    def forward(ctx: Any, playing: Playing, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        rows = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, rows)
        ctx.playing, ctx.flops = playing, _products(q, k, v)
        playing.cost(ctx.flops, q.nbytes + k.nbytes + v.nbytes + out.nbytes)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, _ = ctx.saved_tensors
        ctx.playing.cost(2.5 * ctx.flops, 2 * (q.nbytes + k.nbytes + v.nbytes + out.nbytes))
        return None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _products(q: Tensor, k: Tensor, v: Tensor) -> float:
    """Both matrix products of attention: (..., L, E) x (..., S, E), and with (..., S, V)."""
    pairs = q.shape[:-1].numel() * k.shape[-2]
    return 2.0 * pairs * (q.shape[-1] + v.shape[-1])

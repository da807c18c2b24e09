"""What a denoiser is told about its prompts: a few named tensors that are always taken together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Named tensors with one row a prompt; which names there are is the family's business.

    "text" (N, L, D) holds a vector a token, "pooled" (N, E) one a prompt. Guidance, rollouts and
    caches cut and join rows, and know no name.
    """

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if len({len(tensor) for tensor in self.tensors.values()}) != 1:
            shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
            raise ValueError(f"conditioning needs tensors of equally many rows, got {shapes}")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: slice | Tensor | NDArray[Any] | Sequence[int]) -> Conditioning:
        """Some rows, in the order asked for; an index keeps N rows, so a number is not allowed."""
        return self._each(lambda tensor: tensor[rows])

    def expand(self, count: int) -> Conditioning:
        """`count` rows: the one row that there is, repeated without a copy, or all of them."""
        return self._each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def repeat(self, times: int) -> Conditioning:
        """The rows, `times` over."""
        return self._each(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)))

    def to(self, place: torch.device | torch.dtype | str) -> Conditioning:
        """On another device, or in another precision."""
        return self._each(lambda tensor: tensor.to(place))

    @classmethod
    def cat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts, one after the other; all must have the same names."""
        return cls(
            {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning({name: change(tensor) for name, tensor in self.tensors.items()})

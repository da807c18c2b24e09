"""What an optimizer step is made of, and where it comes from.

A `Source` hands out rounds, a round holds updates, an update chunks: images that go through the
network together, with what somebody said about them. A `Chunk` knows pairs, a `Rated` chunk a
number for each image. Both can say how likely a denoiser finds their images, and nothing else is
known of them where the loss is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from d3po.likelihood import PathScore, gaussian_kl
from d3po.sampling import Reduce

Kind = Literal["pairs", "labels", "advantages"]
"""What an objective is told about images: pairs of them; liked or not; how good each is."""

Facts = dict[str, Tensor]
"""What is known of a chunk, (Q, S) or (B, S) each, under the names of an objective's arguments."""


class Wants(NamedTuple):
    """What a source has to provide for an objective."""

    kind: Kind = "pairs"
    reference: bool = True  # log-probabilities under the reference


PAIRS = Wants()


@dataclass(frozen=True, eq=False)
class Chunk:
    """Images that go through the network together, and the pairs among them.

    B images, Q pairs, S steps (or noise levels) trained on.
    """

    logp: Callable[[nn.Module], Tensor]  # denoiser -> (B, S), with gradient
    win: Tensor  # (Q,) long: row of each pair's winner
    lose: Tensor  # (Q,) long
    steps: int  # S
    ref: Tensor | None = None  # (B, S) under the reference; None: not asked yet

    @property
    def terms(self) -> int:
        """Pairs times steps."""
        return len(self.win) * self.steps

    def lacks(self, asked: Collection[str]) -> bool:
        """Whether the reference has to say something first."""
        return "ref_win" in asked and self.ref is None

    def with_reference(self, reference: nn.Module, asked: Collection[str]) -> Chunk:
        """The chunk with what the reference says of it."""
        return replace(self, ref=self.logp(reference)) if self.lacks(asked) else self

    def facts(self, denoiser: nn.Module, asked: Collection[str]) -> Facts:
        """What is `asked` for, with the gradient of `denoiser`; nothing may be lacking."""
        found: Facts = {}
        if "ref_win" in asked:
            assert self.ref is not None
            found = {"ref_win": self.ref[self.win], "ref_lose": self.ref[self.lose]}
        logp = self.logp(denoiser)
        return {**found, "win": logp[self.win], "lose": logp[self.lose]}


@dataclass(frozen=True, eq=False)
class Rated:
    """Images that go through the network together, each with a number: a label or an advantage.

    B images, S steps (or noise levels) trained on.
    """

    logp: Callable[[nn.Module], Tensor]  # denoiser -> (B, S), with gradient
    kind: Kind
    value: Tensor  # (B,) float: +1 liked, -1 disliked; or the advantage
    steps: int  # S
    ref: Tensor | None = None  # (B, S) under the reference; None: not asked yet
    old: Tensor | None = None  # (B, S) under the policy that drew the images, for advantages
    path: Callable[[nn.Module], PathScore] | None = None  # along a stored path, for a KL
    reduce: Reduce = "mean"
    ref_mean: Tensor | None = None  # (B, S, C, h, w) means of its steps, for a KL; None: not asked

    @property
    def terms(self) -> int:
        """Images times steps."""
        return len(self.value) * self.steps

    def lacks(self, asked: Collection[str]) -> bool:
        """Whether the reference has to say something first."""
        return ("ref" in asked and self.ref is None) or ("kl" in asked and self.ref_mean is None)

    def with_reference(self, reference: nn.Module, asked: Collection[str]) -> Rated:
        """The chunk with what the reference says of it."""
        ref, mean = self.ref, self.ref_mean
        if "ref" in asked and ref is None:
            ref = self.logp(reference)
        if "kl" in asked and mean is None:
            assert self.path is not None  # advantages come from rollouts, which have one
            mean = self.path(reference).mean
        return replace(self, ref=ref, ref_mean=mean)

    def facts(self, denoiser: nn.Module, asked: Collection[str]) -> Facts:
        """What is `asked` for, with the gradient of `denoiser`; nothing may be lacking."""
        value = self.value[:, None].expand(-1, self.steps)
        found: Facts = {"desirable" if self.kind == "labels" else "advantage": value}
        if self.old is not None:
            found["old"] = self.old
        if "ref" in asked:
            assert self.ref is not None
            found["ref"] = self.ref
        if "kl" in asked:
            assert self.path is not None
            assert self.ref_mean is not None
            ours = self.path(denoiser)
            kl = gaussian_kl(ours.mean, self.ref_mean, self.reduce)
            return {**found, "logp": ours.logp, "kl": kl}
        return {**found, "logp": self.logp(denoiser)}


@dataclass(frozen=True, eq=False)
class Update:
    """This process's share of one optimizer step.

    All processes have equally many chunks, of equally many network calls: gradients (DDP) and
    weights in pieces (FSDP) meet on the way through a network, so every process has to walk.
    """

    chunks: Sequence[Chunk | Rated]
    pairs: int  # or rated images, on this process; each may be in several chunks, at other steps

    @property
    def terms(self) -> int:
        """Pairs, or rated images, times steps on this process."""
        return sum(chunk.terms for chunk in self.chunks)


@dataclass(frozen=True, eq=False)
class Round:
    """Updates that can be made before the source has to look at the policy again."""

    metrics: Mapping[str, Any]  # about the round as a whole; empty if there is nothing to say
    updates: Iterator[Update]


class Source(Protocol):
    """Where updates come from; round `index` depends on nothing but the index and the policy."""

    updates_per_round: int

    def round(self, index: int) -> Round:
        """The updates of round `index`; consumed in order, each after the step before it."""
        ...

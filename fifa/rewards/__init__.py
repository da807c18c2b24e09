"""What scores a picture: one contract, one table, one file for each family of scorers.

A new scorer is one class with `name`, `differentiable` and `__call__`, and one line in REWARDS;
`fifa rewards` tells what it `needs` and its `source`. `pickscore:FOLDER` names other weights,
outside code plugs in as `package.module:factory` or `package.module:factory:PATH`, and
`0.7*mini+0.3*neatness` adds them up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

from fifa.config import InputError, import_from_here, unknown
from fifa.images import Pixels, to_batch

if TYPE_CHECKING:
    import torch


class BrokenRewardError(InputError):
    """A reward returned something that no reward may return, whatever it was asked."""


@runtime_checkable
class Reward(Protocol):
    """Images (N, 3, H, W) float in [0, 1] and N prompts -> float32 (N,), higher is better.

    The score of an image does not depend on its neighbours in the batch. A reward that cannot score
    raises; it never returns 0 or NaN instead. `differentiable` says whether gradients reach the
    images.
    """

    name: str
    differentiable: bool

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score N images under N prompts."""
        ...


@runtime_checkable
class PreparingReward(Reward, Protocol):
    """A reward whose pictures can be made ready in other threads while it scores.

    `score_prepared` of prepared pictures gives what a call on the pictures themselves does.
    """

    def prepare(self, hwc: Pixels) -> Pixels:
        """A picture of any size as this reward wants it; all results have one shape."""
        ...

    def score_prepared(self, pictures: Sequence[Pixels], prompts: Sequence[str]) -> torch.Tensor:
        """Score N prepared pictures under N prompts, float32 (N,)."""
        ...


@runtime_checkable
class ComparingReward(Reward, Protocol):
    """A reward that looks at two pictures at once, so that which one comes first may matter."""

    def compare(
        self, first: torch.Tensor, second: torch.Tensor, prompts: Sequence[str]
    ) -> torch.Tensor:
        """Logits float32 (N,) that people prefer the first picture of each pair."""
        ...


REWARDS: dict[str, str] = {
    "pickscore": "fifa.rewards.pickscore:PickScore",
    "hpsv2": "fifa.rewards.hps:HPSv2",
    "hpsv2.1": "fifa.rewards.hps:HPSv21",
    "imagereward": "fifa.rewards.blip:ImageReward",
    "clip": "fifa.rewards.clip:ClipScore",
    "aesthetic": "fifa.rewards.aesthetic:Aesthetic",
    "mini": "fifa.rewards.mini:MiniReward",
    "fitted": "fifa.rewards.fitted:FittedReward",
    "tastes": "fifa.rewards.tastes:TasteReward",
    "oracle": "fifa.rewards.miniworld:OracleReward",
    "oracle_strict": "fifa.rewards.miniworld:StrictOracleReward",
    "neatness": "fifa.rewards.miniworld:NeatnessReward",
    "jpeg_compressibility": "fifa.rewards.jpeg:Compressibility",
    "jpeg_incompressibility": "fifa.rewards.jpeg:Incompressibility",
    "saturation": "fifa.rewards.nuisance:Saturation",
    "brightness": "fifa.rewards.nuisance:Brightness",
    "contrast": "fifa.rewards.nuisance:Contrast",
    "edges": "fifa.rewards.nuisance:Edges",
}


class Described(NamedTuple):
    """One line of `fifa rewards`."""

    scores: str  # what it measures, a sentence
    needs: str
    differentiable: bool
    source: str


def describe_rewards() -> list[Described]:
    """What each reward of REWARDS measures, needs and comes from; loads no weights."""
    found = []
    for name, address in REWARDS.items():
        scorer: Any = _imported(address, name)
        found.append(
            Described(
                scores=(scorer.__doc__ or "").strip().splitlines()[0],
                needs=getattr(scorer, "needs", "nothing"),
                differentiable=scorer.differentiable,
                source=getattr(scorer, "source", "this project"),
            )
        )
    return found


def load_reward(spec: str, **kwargs: Any) -> Reward:
    """The reward that `spec` names.

    `spec` is a name of REWARDS, `name:path` with the weights it shall use (a local path or a Hub
    id), a `package.module:factory` whose factory takes `kwargs` and returns a Reward (what follows
    a second colon is its `path`), or a weighted sum of those such as `0.5*mini+0.5*oracle`, which
    takes no `kwargs`. What begins with a name of
    REWARDS and a colon is one path to its end; a sum that begins so needs a weight: `1*clip:...`.
    Raises InputError for an unknown name, a failing import, missing weights, or arguments that the
    factory does not take.
    """
    name, colon, path = spec.partition(":")
    if colon and name in REWARDS:
        return _made(REWARDS[name], spec, {"path": path, **kwargs})
    if "*" in spec or "+" in spec:
        from fifa.rewards.ensemble import WeightedSum, parse_sum

        if kwargs:
            raise InputError(f"the sum of rewards '{spec}' takes no arguments, got {list(kwargs)}")
        terms = parse_sum(spec)
        return WeightedSum([load_reward(name) for _, name in terms], [w for w, _ in terms])
    address = spec if colon else REWARDS.get(spec)
    if address is None:
        raise unknown("reward", spec, REWARDS, "package.module:factory")
    factory, more, outside = path.partition(":")
    if more:
        return _made(f"{name}:{factory}", spec, {"path": outside, **kwargs})
    return _made(address, spec, kwargs)


def _made(address: str, spec: str, kwargs: dict[str, Any]) -> Reward:
    """The reward that the factory at `address` makes of `kwargs`."""
    factory = _imported(address, spec)
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        raise InputError(f"reward '{spec}': {error}") from None
    reward = factory(**kwargs)
    if not isinstance(reward, Reward):
        raise InputError(
            f"'{spec}' must return a reward (name, differentiable, __call__(images, prompts)), "
            f"it returned {type(reward).__name__}"
        )
    return reward


def _imported(address: str, spec: str) -> Callable[..., object]:
    module_name, _, name = address.partition(":")
    try:
        module = import_from_here(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"reward '{spec}' needs '{error.name}', which is not installed") from None
    except (ValueError, TypeError):
        raise InputError(f"reward '{spec}': '{module_name}' is no module name") from None
    factory = getattr(module, name, None)
    if not callable(factory):
        raise InputError(f"reward '{spec}': {module_name} has no callable '{name}'")
    return cast("Callable[..., object]", factory)


T = TypeVar("T")


def on_device(scorer: T, device: str, kind: str, name: str) -> T:
    """A reward, encoder, judge or embedder with its network, if it has one, on the device.

    Raises InputError, which says what `kind` of thing of which `name`, if the device is not there.
    """
    if hasattr(scorer, "to"):
        try:
            scorer.to(device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{kind} '{name}' cannot run on '{device}': {reason}") from None
    return scorer


def score_images(reward: Reward, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Call a reward and hold it to its contract: images (N, 3, H, W), N prompts -> float32 (N,).

    Raises InputError when the inputs do not fit together or a score is not finite, and its
    BrokenRewardError when the reward returns another shape or type.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
        raise InputError(
            f"a reward needs images (N, 3, H, W) and N prompts, "
            f"got {tuple(images.shape)} and {len(prompts)} prompts"
        )
    return _checked(reward, reward(images, prompts), prompts)


def score_pictures(
    reward: Reward, pictures: Sequence[Pixels], prompts: Sequence[str]
) -> torch.Tensor:
    """`score_images` of uint8 pictures (H, W, 3) of one size, prepared ones if it prepares."""
    if isinstance(reward, PreparingReward):
        return _checked(reward, reward.score_prepared(pictures, prompts), prompts)
    return score_images(reward, to_batch(pictures), prompts)


def _checked(reward: Reward, scores: object, prompts: Sequence[str]) -> torch.Tensor:
    import torch

    if not isinstance(scores, torch.Tensor):
        raise BrokenRewardError(
            f"reward '{reward.name}' returned a {type(scores).__name__}, it must be a tensor, "
            f"float32 ({len(prompts)},)"
        )
    if scores.shape != (len(prompts),) or scores.dtype != torch.float32:
        raise BrokenRewardError(
            f"reward '{reward.name}' returned {scores.dtype} {tuple(scores.shape)}, "
            f"it must be float32 ({len(prompts)},)"
        )
    if not bool(torch.isfinite(scores).all()):
        bad = int((~torch.isfinite(scores)).nonzero()[0])
        raise InputError(
            f"reward '{reward.name}' is {float(scores[bad])} for the prompt {prompts[bad][:80]!r}"
        )
    return scores

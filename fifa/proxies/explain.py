"""Why a proxy of named objectives scores as it does, and rewards made of its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fifa.config import InputError, atomic_path, unknown
from fifa.images import decode, to_batch
from fifa.proxies.card import PAGE
from fifa.rewards.fitted import FittedReward, ObjectivesProxy, load_proxy, save_proxy
from fifa.rewards.heads import Gate


@dataclass(frozen=True)
class Explanation:
    """The parts of the scores of N pictures under one prompt; total = sum of the products."""

    names: tuple[str, ...]  # (N,) of the pictures
    objectives: tuple[str, ...]  # (K,)
    coefficients: NDArray[np.float64]  # (K,) what the prompt makes of them
    rewards: NDArray[np.float64]  # (N, K) debiased, in standard deviations of the ratings
    totals: NDArray[np.float64]  # (N,) as the reward gives them, in logits

    @property
    def parts(self) -> NDArray[np.float64]:
        """What each objective adds to each score, (N, K)."""
        return self.rewards * self.coefficients

    def lines(self) -> list[tuple[str, ...]]:
        """A row an objective, largest coefficient first, and the total."""
        order = np.argsort(-self.coefficients, kind="stable")
        rows = [
            (
                self.objectives[k],
                f"{self.coefficients[k]:.3f}",
                *(f"{self.rewards[n, k]:+.3f} -> {self.parts[n, k]:+.3f}" for n in self._all),
            )
            for k in order
        ]
        return [
            *rows,
            ("total", f"{self.coefficients.sum():.3f}", *map("{:+.3f}".format, self.totals)),
        ]

    @property
    def _all(self) -> range:
        return range(len(self.names))


def explain(folder: Path, prompt: str, pictures: Sequence[Path]) -> Explanation:
    """Take the scores of picture files under a prompt apart.

    Raises InputError for a proxy without objectives and for a file that is no picture.
    """
    reward = FittedReward(str(folder))
    rewards, coefficients, totals = [], [], []
    for path in pictures:  # one by one: they may have different sizes
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        image = to_batch([decode(data, str(path))])
        found, weights = reward.explain(image, [prompt])
        rewards.append(found[0].double().numpy())
        coefficients.append(weights[0].double().numpy())
        totals.append(float(reward(image, [prompt])))
    assert isinstance(reward.proxy, ObjectivesProxy)
    return Explanation(
        tuple(path.name for path in pictures),
        reward.proxy.objectives,
        coefficients[0],
        np.stack(rewards),
        np.array(totals),
    )


def draw(found: Explanation, path: Path) -> None:
    """Bars of what each objective adds to each picture's score, as PNG, SVG or PDF."""
    from matplotlib.figure import Figure

    order = np.argsort(found.coefficients, kind="stable")
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(order)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(found.names)
    for n, name in enumerate(found.names):
        place = np.arange(len(order)) + (len(found.names) / 2 - n - 0.5) * height
        axes.barh(place, found.parts[n, order], height, label=f"{name}: {found.totals[n]:+.2f}")
    axes.set_yticks(
        np.arange(len(order)),
        [f"{found.objectives[k]} (x {found.coefficients[k]:.2f})" for k in order],
    )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("part of the score, logits")
    axes.legend(fontsize="small")
    kind = path.suffix.lstrip(".").lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise InputError(f"cannot draw {path}: its name must end in .png, .svg or .pdf")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind)


def parse_weights(text: str) -> dict[str, float]:
    """`fidelity=1,detail=0.5` as a mapping; InputError for anything else."""
    weights = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            weights[name.strip()] = float(number)
        except ValueError:
            raise InputError(f"expected NAME=NUMBER, found '{part.strip()}'") from None
    return weights


def export(folder: Path, weights: Mapping[str, float], out: Path) -> None:
    """Write a reward that weighs the objectives of a proxy alike for every prompt.

    Raises InputError for a proxy without objectives, an unknown objective, weights that are not
    positive, or a folder that exists.
    """
    proxy, _, encoder = load_proxy(folder)
    if not isinstance(proxy, ObjectivesProxy):
        raise InputError(f"the proxy {folder} has no objectives to export")
    for name in weights:
        if name not in proxy.objectives:
            raise unknown("objective", name, proxy.objectives)
    if not all(np.isfinite(w) and w > 0 for w in weights.values()):
        raise InputError(f"weights must be positive numbers, got {dict(weights)}")
    if out.exists():
        raise InputError(f"{out} exists; choose another folder or delete it")
    width = proxy.gate.input.mean.shape[0]
    fixed = ObjectivesProxy(width, proxy.objectives, hidden=0)
    fixed.load_state_dict({**proxy.state_dict(), **_constant_gate(proxy, weights)}, strict=False)
    told = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
    with atomic_path(out) as temporary:
        temporary.mkdir()
        save_proxy(fixed, encoder, temporary)
        (temporary / PAGE).write_text(
            f"# Proxy reward (fixed weights)\n\nObjectives of a fitted proxy at the weights {told} "
            f"for every prompt; see that proxy's card.\n",
            encoding="utf-8",
        )


def _constant_gate(proxy: ObjectivesProxy, weights: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Tensors of a linear gate that ignores its input."""
    gate = Gate(proxy.gate.input.mean.shape[0], len(proxy.objectives), hidden=0)
    values = torch.tensor([weights.get(name, 0.0) for name in proxy.objectives])
    state = {name: torch.zeros_like(value) for name, value in gate.state_dict().items()}
    state["net.bias"] = (values / values.sum()).log()  # a weight of 0 is -inf, softmax takes it
    state["log_scale"] = values.sum().log()
    return {f"gate.{name}": value for name, value in state.items()}

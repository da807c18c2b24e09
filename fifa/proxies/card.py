"""The model card of a proxy: what it was fitted on, how far it can be trusted, what it favours.

`card.json` for programs and `card.md` for people, in the folder of the proxy.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fifa.bench import Share, share
from fifa.config import InputError
from fifa.features import PairFeatures
from fifa.pairs import BadRow
from fifa.proxies.calibration import agreement, calibration_error
from fifa.proxies.settings import FitConfig, settings_read
from fifa.proxies.splits import Split
from fifa.rewards.fitted import HeadProxy, Proxy
from fifa.rewards.nuisance import NUISANCES

CARD, PAGE = "card.json", "card.md"


@dataclass(frozen=True)
class Card:
    """What is known of a proxy; shares and correlations are of the held-out test prompts."""

    kind: str
    encoder: str
    encoder_version: str
    data: str  # fingerprint of the pair table
    rows: dict[str, int]  # train, validation, test
    dropped: dict[str, int]  # reason -> rows
    rejected: dict[str, int]  # kind -> rows that are no judgment or have no picture
    users: int  # distinct and known
    anonymous: int  # rows without a user
    accuracy: Share  # strict pairs ordered as people did
    calibration: float  # expected calibration error of the margin
    temperature: float
    disagreement: float  # mean standard deviation of the margin over the members, logits
    biases: dict[str, float]  # nuisance -> rank correlation of its difference with the margin
    labels: dict[str, float]  # the same with who won: what people favour
    objectives: dict[str, Any] = field(default_factory=dict)
    rejected_ratings: dict[str, int] = field(default_factory=dict)  # kind -> rows of that table
    settings: dict[str, Any] = field(default_factory=dict)  # that this kind of proxy reads

    def set_aside(self) -> list[str]:
        """What was not used, a line a reason: `12 rows: tie`."""
        pairs = [
            f"{count:,} rows: {why}" for why, count in {**self.dropped, **self.rejected}.items()
        ]
        rated = [f"{count:,} ratings: {why}" for why, count in self.rejected_ratings.items()]
        return pairs + rated


def card_of(
    config: FitConfig,
    proxy: Proxy,
    pairs: PairFeatures,
    split: Split,
    objectives: Mapping[str, Any],
    rejected_ratings: Sequence[BadRow] = (),
) -> Card:
    """Measure a proxy on the test part of the pairs that it was fitted on."""
    rows = split.test[pairs.label[split.test] != 0.5]
    margins = margins_of(proxy, pairs, rows)
    margin, won = margins.mean(0), pairs.label[rows] == 1
    difference = pairs.nuisances[pairs.first[rows]] - pairs.nuisances[pairs.second[rows]]
    known = [user for user in pairs.users if user]
    return Card(
        kind=config.kind,
        encoder=config.encoder,
        encoder_version=pairs.encoder,
        data=pairs.data,
        rows={name: len(getattr(split, name)) for name in ("train", "validation", "test")},
        dropped=split.dropped,
        rejected=_counted(pairs.rejected),
        users=len(set(known)),
        anonymous=len(pairs) - len(known),
        accuracy=share(agreement(margin, won), len(rows)),
        calibration=calibration_error(margin, won),
        temperature=float(proxy.temperature) if isinstance(proxy, HeadProxy) else 1.0,
        disagreement=float(margins.std(0).mean()),
        biases=_correlations(margin, difference),
        labels=_correlations(won - 0.5, difference),
        objectives=dict(objectives),
        rejected_ratings=_counted(rejected_ratings),
        settings=settings_read(config),
    )


def _counted(rejected: Sequence[BadRow]) -> dict[str, int]:
    """Rows by what is wrong with them."""
    return dict(sorted(Counter(row.kind for row in rejected).items()))


def margins_of(
    proxy: Proxy, pairs: PairFeatures, rows: NDArray[np.int64], batch: int = 256
) -> NDArray[np.float64]:
    """Score of the first picture minus that of the second, (members, N), as a reward gives it."""
    parts = []
    for some in np.array_split(rows, max(1, len(rows) // batch)):
        text = torch.tensor(pairs.texts[pairs.prompt[some]])
        with torch.no_grad():
            first, second = (
                proxy.scores(
                    torch.tensor(pairs.pictures[side[some]]),
                    torch.tensor(pairs.nuisances[side[some]]),
                    text,
                )
                for side in (pairs.first, pairs.second)
            )
        parts.append((first - second).double().numpy())
    return np.concatenate(parts, axis=1)


def rank_correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Spearman's; 0 where one of the two is constant, so that nothing can vary with it."""
    from scipy.stats import spearmanr

    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a, b).statistic)


def _correlations(margin: NDArray[Any], difference: NDArray[Any]) -> dict[str, float]:
    """By nuisance; each pair counts in both orders, so it does not matter which side came first."""
    both = np.r_[margin, -margin]
    return {
        name: rank_correlation(both, np.r_[difference[:, j], -difference[:, j]])
        for j, name in enumerate(NUISANCES)
    }


# ---- files ---------------------------------------------------------------------------------------


def write_card(card: Card, folder: Path) -> None:
    """Write `card.json` and `card.md` into an existing folder."""
    text = json.dumps(asdict(card), indent=2, ensure_ascii=False)
    (folder / CARD).write_text(text + "\n", encoding="utf-8")
    (folder / PAGE).write_text(page(card), encoding="utf-8")


def read_card(folder: Path) -> Card:
    """The card of a folder; InputError if there is none or it is damaged."""
    file = folder / CARD
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return Card(**{**found, "accuracy": Share(**found["accuracy"])})
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{folder} holds no readable model card ({CARD})") from None


def page(card: Card) -> str:
    """The card as Markdown."""
    a = card.accuracy
    rows = ", ".join(f"{count:,} {part}" for part, count in card.rows.items())
    lost = "; ".join(card.set_aside()) or "none"
    lines = [
        f"# Proxy reward ({card.kind})",
        "",
        f"Fitted on pair table `{card.data}`, features of `{card.encoder}` "
        f"(`{card.encoder_version}`).",
        "",
        f"* Rows: {rows}; no prompt is in two parts. Set aside: {lost}.",
        f"* Users: {card.users:,} known; {card.anonymous:,} rows name none.",
        f"* Held-out accuracy: {a.value:.3f} [{a.low:.3f}, {a.high:.3f}] on {a.pairs:,} strict "
        f"pairs (95% Wilson interval).",
        f"* Calibration error: {card.calibration:.3f} at temperature {card.temperature:.3f}.",
        f"* Disagreement of the members: {card.disagreement:.3f} logits on average.",
        "",
        "What it favours, whatever was asked for: rank correlation of the margin with the "
        "difference in",
        "",
        "| nuisance | proxy | people |",
        "|---|---|---|",
        *(f"| {n} | {card.biases[n]:+.3f} | {card.labels[n]:+.3f} |" for n in card.biases),
        *_objective_lines(card.objectives),
        "",
        "Use it as the reward `fitted:FOLDER`, with the path of this folder.",
    ]
    return "\n".join(lines) + "\n"


def _objective_lines(objectives: Mapping[str, Any]) -> list[str]:
    if not objectives:
        return []
    lines = [
        "",
        "| objective | ratings | held-out R² | largest rank correlation before | after |",
        "|---|---|---|---|---|",
    ]
    for name, found in objectives.items():
        lines.append(
            f"| {name} | {found['ratings']:,} | {_shown(found['r2'])} | {found['before']:.3f} | "
            f"{found['after']:.3f} |"
        )
    return lines


def _shown(r2: float | None) -> str:
    return "-" if r2 is None else f"{r2:.3f}"

"""What can be wrong with a run: the name of each check, and the sentences that it may say."""

from __future__ import annotations

from dataclasses import dataclass

CHECKS: dict[str, str] = {
    # name -> what it looks at
    "nan": "gradients and latents that are not finite",
    "gradient": "the gradient norm against the start's",
    "order": "trained pairs that are ordered against their labels",
    "sinking": "winners that become unlikely together with the losers",
    "runaway": "log-ratios of winners and losers that both grow without end",
    "by heart": "pairs whose loss is gone",
    "clipped": "log-ratios that give no gradient",
    "ties": "groups without a winner",
    "labels": "labels against other judges",
    "held out": "pairs that were kept out of training",
    "worse": "the judge that was trained on",
    "exploited": "other judges while that one rises",
    "shortcut": "a judge that sees brightness or saturation alone",
    "tone": "brightness and saturation of the pictures",
    "diversity": "distance between pictures of one prompt",
}


@dataclass(frozen=True)
class Complaint:
    """What a check says: the likely cause and the remedy in one sentence."""

    check: str
    words: str

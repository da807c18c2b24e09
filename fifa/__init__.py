"""Where preferences come from: many noisy judgments in, a small clean set of pairs out.

    fifa.pairs        what a person said about two pictures, and the table it is kept in
    fifa.sources      public preference data sets, each read into that table
    fifa.rewards      what scores a picture                    -> margin: reward(win) - reward(lose)
    fifa.judge        what scores the text of a prompt         -> quality: 0..10
    fifa.embed, knn   how far a prompt is from all others      -> diversity: log distance, entropy
    fifa.selection    the three terms together                 -> which pairs are kept
    fifa.scoring      the pass that scores a data set of any size, resumable
    fifa.filtering    the choice, written as the same columns with fewer rows
    fifa.sweep        what other sizes and weights would have kept
    fifa.report       what was kept, what was dropped, and why, as one HTML page

After FiFA (arXiv 2410.10166). Importing this package loads no model and no heavy library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fifa.config import InputError
    from fifa.filtering import SelectConfig, select
    from fifa.pairs import Judgment, Pair, PairTable, load_pairs, to_pairs
    from fifa.report import write_report
    from fifa.rewards import REWARDS, Reward, load_reward
    from fifa.scoring import ScoreConfig, score
    from fifa.sources import SOURCES
    from fifa.sources.convert import ConvertConfig, convert

_HOMES = {
    "InputError": "fifa.config",
    "Judgment": "fifa.pairs",
    "Pair": "fifa.pairs",
    "PairTable": "fifa.pairs",
    "load_pairs": "fifa.pairs",
    "to_pairs": "fifa.pairs",
    "REWARDS": "fifa.rewards",
    "Reward": "fifa.rewards",
    "load_reward": "fifa.rewards",
    "SOURCES": "fifa.sources",
    "ConvertConfig": "fifa.sources.convert",
    "convert": "fifa.sources.convert",
    "ScoreConfig": "fifa.scoring",
    "SelectConfig": "fifa.filtering",
    "score": "fifa.scoring",
    "select": "fifa.filtering",
    "write_report": "fifa.report",
}

__all__ = [
    "REWARDS",
    "SOURCES",
    "ConvertConfig",
    "InputError",
    "Judgment",
    "Pair",
    "PairTable",
    "Reward",
    "ScoreConfig",
    "SelectConfig",
    "convert",
    "load_pairs",
    "load_reward",
    "score",
    "select",
    "to_pairs",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its room the first time it is used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fifa' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)

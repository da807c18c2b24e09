"""How far can a reward be trusted, and where? Measured by scenario before anything stands on it.

`build` makes a bench of the mini world, whose truth is known; `reading` makes one of real files;
`standing` measures rewards on it; `leaderboard` shows them side by side.

The counterpart of RAG-RewardBench (Jin et al. 2024, arXiv 2412.13746): scenarios in which a general
preference score fails, labels on which several judges agree, accuracy by scenario.
"""

from __future__ import annotations

from fifa.rewardbench.settings import BenchConfig, BuildConfig, ReadConfig

__all__ = ["BenchConfig", "BuildConfig", "ReadConfig"]

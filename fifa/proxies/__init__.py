"""Reward models from your own pairs or ratings, fitted in minutes on frozen features.

`fit` learns a score, a comparison or named objectives (`fifa reward fit`) and writes a folder that
is a reward: `fitted:FOLDER`. `explain` says why an objectives proxy scored as it did. What a folder
holds, and how far to trust it, is in its model card.
"""

from __future__ import annotations

from fifa.proxies.settings import FitConfig, TasteConfig

__all__ = ["FitConfig", "TasteConfig"]

"""d3po: how a diffusion model learns from preferences.

A denoising path is a chain of Gaussian steps, so a policy says how likely each step was
(`schedule`, `sampling`), and an image can be scored along its own path or by re-noising it
(`likelihood`). A preference objective turns four such numbers, winner and loser under the policy
and under the reference, into a loss (`objectives`). What a network, a tokenizer and an image
decoder are is told in `families`; what is trained, and what it is compared with, in `policy`.
`trainer` takes one step, `online` goes from rollout to judgment to step, `run_folder` keeps what
came of it, `evaluate` compares policy and reference at equal seeds, and `recipe` wires it all from
a config.

Nothing heavy is imported until a name below is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "NoiseSchedule": "schedule",
    "TimeGrid": "schedule",
    "ddim_grid": "schedule",
    "Trajectory": "sampling",
    "image_noise": "sampling",
    "rollout": "sampling",
    "path_logp": "likelihood",
    "renoise_logp": "likelihood",
    "OBJECTIVES": "objectives",
    "pair_metrics": "objectives",
    "Family": "families",
    "guided": "families",
    "load_family": "families",
    "Policy": "policy",
    "PolicyConfig": "policy",
    "TrainConfig": "recipe",
    "load_run": "recipe",
    "train": "recipe",
    "run_demo": "demo",
    "write_report": "report",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import the room of a public name when the name is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'd3po' has no attribute '{name}'")
    return getattr(importlib.import_module(f"d3po.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__

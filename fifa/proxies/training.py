"""Fit a small network on frozen features: AdamW, held-out prompts say when to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fifa.proxies.settings import HeadConfig

Rows = NDArray[np.int64]
M = TypeVar("M", bound=nn.Module)
Loss = Callable[[Tensor], Tensor]  # row numbers (B,) -> one loss


@dataclass(frozen=True)
class Recipe:
    """How to descend."""

    epochs: int = 30  # at most
    patience: int = 4  # epochs without a better loss on the held-out prompts
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch: int = 512  # rows a step
    anneal: bool = False  # the rate falls to 0 along half a cosine, epoch by epoch


def recipe_of(config: HeadConfig) -> Recipe:
    """The settings of the descent."""
    return Recipe(
        config.epochs,
        config.patience,
        config.learning_rate,
        config.weight_decay,
        config.batch_size,
    )


@dataclass(frozen=True)
class Fitted:
    """What became of one fit."""

    epoch: int  # whose weights were kept; 0: no epoch was better than none
    losses: tuple[float, ...]  # on the held-out prompts, before and after each epoch


def descend(
    module: nn.Module,
    loss: Loss,
    train: Rows,
    validation: Rows,
    recipe: Recipe,
    seed: int,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Fitted:
    """Train `module` in place; it ends in evaluation mode with the weights of its best epoch.

    The order of rows and the dropouts follow from `seed`; torch's own generator is put back.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    best, kept = _held_out(module, loss, validation, recipe.batch), _copy(module)
    losses, epoch = [best], 0
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        for number in range(1, recipe.epochs + 1):
            _epoch(module, loss, train, optimizer, recipe.batch)
            if recipe.anneal:
                schedule.step()
            losses.append(_held_out(module, loss, validation, recipe.batch))
            if losses[-1] < best:
                best, kept, epoch = losses[-1], _copy(module), number
            told(number, recipe.epochs)
            if number - epoch >= recipe.patience:
                break
    module.load_state_dict(kept)
    module.eval()
    told(recipe.epochs, recipe.epochs)
    return Fitted(epoch, tuple(losses))


def _epoch(
    module: nn.Module, loss: Loss, train: Rows, optimizer: torch.optim.Optimizer, batch: int
) -> None:
    module.train()
    for rows in torch.from_numpy(train)[torch.randperm(len(train))].split(batch):
        optimizer.zero_grad()
        loss(rows).backward()
        optimizer.step()


@torch.no_grad()
def _held_out(module: nn.Module, loss: Loss, rows: Rows, batch: int) -> float:
    module.eval()
    parts = torch.from_numpy(rows).split(batch)
    return sum(float(loss(part)) * len(part) for part in parts) / len(rows)


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def fresh(build: Callable[[], M], seed: int) -> M:
    """A module whose first weights follow from `seed`; torch's own generator is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        return build()

"""Fit many tastes to pairs whose people are known, take in a new person, see where tastes differ.

PAL (Chen et al. 2024, arXiv 2406.08469): prototypes and everybody's mixture of them are learned
together from who preferred what (`fifa.rewards.tastes` has the model). How many there are is
decided by held-out likelihood; a new person costs a few answers, because all but the K numbers of
their mixture stay as they are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fifa.bench import Share, share
from fifa.config import InputError, atomic_path
from fifa.features import CACHE, PairFeatures, pair_features
from fifa.proxies.settings import TasteConfig
from fifa.proxies.splits import Rows, split_pairs
from fifa.proxies.training import descend, fresh, recipe_of
from fifa.rewards import on_device
from fifa.rewards.encoders import load_encoder
from fifa.rewards.heads import joint
from fifa.rewards.tastes import GAIN, TasteModel, TasteShape, load_tastes, save_tastes

CARD = "card.json"

Progress = Callable[[str, int, int], None]


def _silent(stage: str, done: int, total: int) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class TasteCard:
    """What is known of fitted tastes; accuracies are of held-out test prompts, strict pairs."""

    model: str
    tastes: int
    chosen_from: dict[int, float]  # K -> validation loss of its best restart, nats a pair
    users: int
    anonymous: int  # rows that name nobody; they are left out
    few: int  # people with too few pairs, who are given the average
    rows: dict[str, int]  # train, validation, test
    own: Share  # accuracy with each person's own mixture
    average: Share  # with the average mixture for everybody
    shares: list[float]  # the average mixture
    agreement: list[list[float]]  # (K, K) how often two prototypes prefer the same picture
    note: str  # what had to be given up, "" if nothing
    data: str
    encoder: str


class Votes(NamedTuple):
    """A PairFeatures as tensors, with people by number; -1 is nobody known."""

    pictures: Tensor
    texts: Tensor
    first: Tensor
    second: Tensor
    prompt: Tensor
    user: Tensor
    label: Tensor
    names: tuple[str, ...]

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of the first picture, the second and the prompt of these rows, (B, D) each."""
        first, second = self.pictures[self.first[rows]], self.pictures[self.second[rows]]
        return first, second, self.texts[self.prompt[rows]]


def votes_of(pairs: PairFeatures, names: Sequence[str] | None = None) -> Votes:
    """Pairs as tensors; people are numbered in the order of `names`, or of their names."""
    found = tuple(sorted({user for user in pairs.users if user}) if names is None else names)
    number = {name: i for i, name in enumerate(found)}
    return Votes(
        torch.tensor(pairs.pictures),
        torch.tensor(pairs.texts),
        torch.from_numpy(pairs.first),
        torch.from_numpy(pairs.second),
        torch.from_numpy(pairs.prompt),
        torch.tensor([number.get(user, -1) for user in pairs.users]),
        torch.tensor(pairs.label),
        found,
    )


# ---- one fit -------------------------------------------------------------------------------------


class _Trainee(nn.Module):
    """A model of tastes and the votes that it learns from."""

    def __init__(self, model: TasteModel, votes: Votes) -> None:
        super().__init__()
        self.model, self.votes = model, votes

    def loss(self, rows: Tensor) -> Tensor:
        """Mean cross-entropy of who was preferred; a tie is half a win each."""
        weights = self.model.weights(self.votes.user[rows])
        logits = self.model.compare(*self.votes.rows(rows), weights)
        return F.binary_cross_entropy_with_logits(logits, self.votes.label[rows])


def fit_tastes(
    votes: Votes, tastes: int, train: Rows, validation: Rows, config: TasteConfig, restart: int
) -> tuple[TasteModel, float]:
    """One fit of K = `tastes` prototypes: the model and its validation loss, nats a pair."""
    width = votes.pictures.shape[1]
    shape = TasteShape(
        config.model, width, tastes, len(votes.names), config.dim, config.hidden, config.dropout
    )
    seed = int(np.random.SeedSequence([config.seed, tastes, restart]).generate_state(1)[0])
    model = fresh(lambda: TasteModel(shape), seed)
    first, second, text = votes.rows(torch.from_numpy(train))
    model.input.learn(torch.cat([joint(first, text), joint(second, text)]))
    if config.model == "B":
        model.text.learn(text)
    trainee = _Trainee(model, votes)
    # Mixtures settle late, and only at a small rate: 1% more of them is right than at a fixed one.
    recipe = replace(recipe_of(config), anneal=True)
    found = descend(trainee, trainee.loss, train, validation, recipe, seed)
    model.take_average()
    return model.requires_grad_(False), found.losses[found.epoch]


class Choice(NamedTuple):
    """The fit that was chosen, and what it was chosen from."""

    model: TasteModel
    losses: dict[int, float]  # K -> validation loss


def choose_tastes(
    votes: Votes, train: Rows, validation: Rows, config: TasteConfig, progress: Progress = _silent
) -> Choice:
    """Fit each K with restarts; what counts is the loss on held-out pairs.

    The smallest K whose best loss lies within one standard error of the best of all is taken: more
    tastes than people have cost their answers and say nothing. (The published code keeps the
    restart of the best training loss, which with few pairs is the one that overfits.)
    """
    best: dict[int, TasteModel] = {}
    losses: dict[int, float] = {}
    total = len(config.tastes) * config.restarts
    for i, tastes in enumerate(config.tastes):
        fits = []
        for restart in range(config.restarts):
            fits.append(fit_tastes(votes, tastes, train, validation, config, restart))
            progress("fitting tastes", i * config.restarts + restart + 1, total)
        model, losses[tastes] = min(fits, key=lambda fit: fit[1])
        best[tastes] = model
    progress("fitting tastes", total, total)
    rows = torch.from_numpy(validation)
    each = {tastes: _losses(model, votes, rows) for tastes, model in best.items()}
    winner = min(losses, key=lambda tastes: losses[tastes])
    for tastes in sorted(best):
        worse = each[tastes] - each[winner]
        if float(worse.mean()) <= float(worse.std()) / len(worse) ** 0.5:
            return Choice(best[tastes], losses)
    return Choice(best[winner], losses)


@torch.no_grad()
def _losses(model: TasteModel, votes: Votes, rows: Tensor) -> Tensor:
    logits = model.compare(*votes.rows(rows), model.weights(votes.user[rows]))
    return F.binary_cross_entropy_with_logits(logits, votes.label[rows], reduction="none")


@torch.no_grad()
def right(model: TasteModel, votes: Votes, rows: Rows, own: bool = True) -> NDArray[np.bool_]:
    """Whether each strict pair is ordered as its person did, by their mixture or the average."""
    some = torch.from_numpy(rows)
    weights = model.weights(votes.user[some])
    if not own:
        weights = model.average.expand(len(some), -1)
    logits = model.compare(*votes.rows(some), weights)
    return ((logits > 0) == (votes.label[some] > 0.5)).numpy()


# ---- the whole -----------------------------------------------------------------------------------


def tastes(config: TasteConfig, progress: Progress = _silent) -> TasteCard:
    """Fit tastes to a pair table and write their folder with a card, which is returned.

    Rows that name no person are left out; where none does, one taste is fitted and the card says
    so. Raises InputError if the folder exists or the data says too little.
    """
    if config.out.exists():
        raise InputError(f"{config.out} exists; choose another folder or delete it")
    encoder = on_device(load_encoder(config.encoder), config.device, "encoder", config.encoder)
    cache = config.cache or config.out.parent / CACHE
    pairs = pair_features(config.pairs, encoder, cache, progress)
    pairs, config, note = _with_people(pairs, config)
    split = split_pairs(pairs, config.held_out, config.seed, drop_ties=False)
    votes = votes_of(pairs)
    train, validation, test = (
        rows[votes.user.numpy()[rows] >= 0] for rows in (split.train, split.validation, split.test)
    )
    for part, rows in (("training", train), ("validation", validation), ("test", test)):
        if not len(rows):
            raise InputError(f"the {part} part holds no pair whose person is known; give more")
    choice = choose_tastes(votes, train, validation, config, progress)
    few = average_the_few(choice.model, votes, train, config.least)
    strict = test[votes.label.numpy()[test] != 0.5]
    card = TasteCard(
        model=config.model,
        tastes=choice.model.shape.tastes,
        chosen_from=choice.losses,
        users=len(votes.names),
        anonymous=int((votes.user < 0).sum()),
        few=few,
        rows={"train": len(train), "validation": len(validation), "test": len(test)},
        own=_share(right(choice.model, votes, strict)),
        average=_share(right(choice.model, votes, strict, own=False)),
        shares=choice.model.average.tolist(),
        agreement=agreement(choice.model, votes, torch.from_numpy(test)).tolist(),
        note=note,
        data=pairs.data,
        encoder=config.encoder,
    )
    with atomic_path(config.out) as folder:
        folder.mkdir()
        save_tastes(choice.model, votes.names, encoder, folder)
        text = json.dumps(asdict(card), indent=2, ensure_ascii=False)
        (folder / CARD).write_text(text + "\n", encoding="utf-8")
    return card


def _with_people(pairs: PairFeatures, config: TasteConfig) -> tuple[PairFeatures, TasteConfig, str]:
    """Pairs with at least one known person; everybody is one person where nobody is known."""
    if any(pairs.users):
        return pairs, config, ""
    together = replace(pairs, users=("everybody",) * len(pairs))
    note = "no row names its person, so one taste was fitted to all"
    return together, config.model_copy(update={"tastes": (1,)}), note


def average_the_few(model: TasteModel, votes: Votes, train: Rows, least: int) -> int:
    """Give people with fewer than `least` training pairs the average mixture; how many they are.

    The average is that of the others; of all people where nobody has enough pairs.
    """
    counts = Counter(votes.user.numpy()[train].tolist())
    few = [i for i in range(len(votes.names)) if counts[i] < least]
    others = [i for i in range(len(votes.names)) if counts[i] >= least]
    if few and others:
        model.take_average(torch.tensor(others))
        model.users.data[few] = model.average_logits() / GAIN
    return len(few)


def _share(found: NDArray[np.bool_]) -> Share:
    if not len(found):
        raise InputError("the test part holds no strict pair; give more prompts or another split")
    return share(float(found.sum()), len(found))


# ---- a new person --------------------------------------------------------------------------------


def adapt(model: TasteModel, votes: Votes, rows: Tensor, strength: float = 0.1) -> Tensor:
    """Logits (K,) of a new person's mixture, from their votes; everything else stays as it is.

    Minimises sum(cross-entropy) + strength/2 |logits - those of the average mixture|^2: without a
    vote it is the average person.
    """
    prior = model.average_logits().double()
    logits = prior.clone().requires_grad_()
    exact = _double(model)
    first, second, text = (part.double() for part in votes.rows(rows))
    label = votes.label[rows].double()
    optimizer = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        weights = logits.softmax(-1).expand(len(label), -1)
        margins = exact.compare(first, second, text, weights)
        loss = F.binary_cross_entropy_with_logits(margins, label, reduction="sum")
        loss = loss + strength / 2 * (logits - prior).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().float()


def _double(model: TasteModel) -> TasteModel:
    exact = TasteModel(model.shape).double()
    exact.load_state_dict(model.state_dict())
    return exact.eval().requires_grad_(False)


def with_user(model: TasteModel, logits: Tensor) -> TasteModel:
    """The same model with one more person at the end."""
    shape = TasteShape(**{**vars(model.shape), "users": model.shape.users + 1})
    grown = TasteModel(shape)
    grown.load_state_dict(
        {**model.state_dict(), "users": torch.cat([model.users, logits[None] / GAIN])}
    )
    return grown.eval().requires_grad_(False)


def adapt_folder(
    folder: Path,
    pairs: Path,
    out: Path,
    user: str,
    limit: int | None = None,
    progress: Progress = _silent,
) -> list[float]:
    """Write `folder` again as `out`, with `user` taken in from a pair table; their mixture.

    Only that user's rows count, the first `limit` of them; a table that names nobody is theirs as
    a whole. Raises InputError if the user is known already or has no usable row.
    """
    if out.exists():
        raise InputError(f"{out} exists; choose another folder or delete it")
    model, facts, encoder = load_tastes(folder)
    if user in facts["users"]:
        raise InputError(f"{folder} knows the user '{user}' already")
    found = pair_features(pairs, encoder, out.parent / CACHE, progress)
    theirs = [
        i for i, name in enumerate(found.users) if name in ((user,) if any(found.users) else ("",))
    ]
    if not theirs:
        raise InputError(f"{pairs} holds no usable row of the user '{user}'")
    rows = torch.tensor(theirs[:limit])
    logits = adapt(model, votes_of(found, ()), rows)
    with atomic_path(out) as temporary:
        temporary.mkdir()
        save_tastes(with_user(model, logits), [*facts["users"], user], encoder, temporary)
    return logits.softmax(-1).tolist()


# ---- where tastes differ -------------------------------------------------------------------------


@torch.no_grad()
def margins_by_taste(model: TasteModel, votes: Votes, rows: Tensor) -> Tensor:
    """Logit (B, K) with which each prototype prefers the first picture."""
    first, second, text = votes.rows(rows)
    return model.by_taste(first, text) - model.by_taste(second, text)


def agreement(model: TasteModel, votes: Votes, rows: Tensor) -> Tensor:
    """How often two prototypes prefer the same picture of a pair, (K, K)."""
    signs = margins_by_taste(model, votes, rows).sign().double()
    return (signs.T @ signs / len(rows) + 1) / 2


class Dispute(NamedTuple):
    """A pair on which tastes differ."""

    row: int  # in the data set
    prompt: str
    preference: list[float]  # chance that each prototype prefers the first picture


def disputes(model: TasteModel, pairs: PairFeatures, most: int = 20) -> list[Dispute]:
    """The pairs that divide the prototypes most: worth showing to people."""
    votes = votes_of(pairs, ())
    chances = margins_by_taste(model, votes, torch.arange(len(pairs))).sigmoid()
    order = (-chances.double().std(1, correction=0)).argsort(stable=True)[:most].tolist()
    return [
        Dispute(int(pairs.row[i]), pairs.prompts[int(pairs.prompt[i])], chances[i].tolist())
        for i in order
    ]


def disputes_of(
    folder: Path, pairs: Path, most: int = 20, progress: Progress = _silent
) -> list[Dispute]:
    """`disputes` of a folder's tastes about a pair table."""
    model, _, encoder = load_tastes(folder)
    return disputes(model, pair_features(pairs, encoder, None, progress), most)

"""Does the model of many tastes find them? PAL's claims on worlds whose tastes are known.

    python benchmarks/tastes.py --seeds 0 1 2 --out FILE

120 people of three tastes answer 60 pairs each, once with ideals that know no prompt (model A) and
once with ideals that depend on it (model B); 30 people more are not fitted. Measured on 40 fresh
pairs a person, accuracy against the labels: for each number of prototypes, the best possible guess
(Bayes: the true utilities), a separate ridge head a person, newcomers after 0 to 20 answers, and a
population of one taste. `pixels` is Pick-a-Filter on rendered scenes: half of the people like blue,
half like red, and a share beta of the pairs is tinted accordingly.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fifa.config import write_atomic
from fifa.images import to_batch
from fifa.miniworld import compose, phrase, render, sample_request
from fifa.proxies import TasteConfig
from fifa.proxies.tastes import Votes, adapt, choose_tastes, right, with_user
from fifa.rewards.encoders import load_encoder
from fifa.rewards.tastes import TasteModel

WIDTH, ANSWERS, FRESH, VALIDATION, GROUPS = 12, 60, 40, 8, 3
NEWCOMER = (0, 2, 5, 10, 20)  # answers


@dataclass(frozen=True)
class World:
    """People, what they answered, and what they should have; the last people are newcomers."""

    votes: Votes
    group: np.ndarray  # (people + newcomers,)
    bayes: np.ndarray  # (N,) whether the truly better picture won
    turn: np.ndarray  # (N,) the how manyeth answer of its person
    people: int

    def rows(self, first: int, last: int) -> np.ndarray:
        """Answers first..last - 1 of the people who are not newcomers."""
        mine = self.votes.user.numpy() < self.people
        return np.flatnonzero(mine & (self.turn >= first) & (self.turn < last))


def asked(people: int, newcomers: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(person of each answer, its turn, group of each person)."""
    everybody, answers = people + newcomers, ANSWERS + FRESH
    user = np.repeat(np.arange(everybody), answers)
    return user, np.arange(len(user)) % answers, np.arange(everybody) % groups


def votes(pictures: Any, texts: Any, user: np.ndarray, won: np.ndarray, people: int) -> Votes:
    """Pair i compares pictures i and N + i under prompt i."""
    total = torch.arange(len(user))
    return Votes(
        torch.as_tensor(pictures).float(),
        torch.as_tensor(texts).float(),
        total,
        total + len(user),
        total,
        torch.from_numpy(user),
        torch.from_numpy(won).float(),
        tuple(f"person {i}" for i in range(people)),
    )


def vectors(
    model: str, seed: int, people: int, newcomers: int, groups: int, logits: float
) -> World:
    """People of `groups` tastes about random vectors; their answers have Bradley-Terry noise.

    A utility is -distance (model A) or the cosine (model B) to the ideal, times `logits`.
    """
    rng = np.random.default_rng([seed, ord(model), groups])
    user, turn, group = asked(people, newcomers, groups)
    total, of = len(user), group[user]
    pictures, texts = rng.normal(size=(2 * total, WIDTH)), rng.normal(size=(total, WIDTH))
    if model == "A":
        ideals = 3 * np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0][:groups]
        utility = -logits * np.linalg.norm(pictures - np.tile(ideals[of], (2, 1)), axis=1)
    else:
        maps = rng.normal(size=(groups, WIDTH, WIDTH))
        ideal = np.tile(np.einsum("nij,nj->ni", maps[of], texts), (2, 1))
        lengths = np.linalg.norm(pictures, axis=1) * np.linalg.norm(ideal, axis=1)
        utility = logits * (pictures * ideal).sum(1) / lengths
    difference = utility[:total] - utility[total:]
    won = rng.random(total) < 1 / (1 + np.exp(-difference))
    made = votes(pictures, texts, user, won, people)
    return World(made, group, (difference > 0) == won, turn, people)


def pixels(seed: int, people: int, beta: float) -> World:
    """Scenes of which one fits its prompt (it wins in 80%), tinted in a share `beta` of the pairs.

    In half of those the winner wears the tint that its person's group likes, in half the loser the
    one that it dislikes: who knows the group knows the answer.
    """
    rng = np.random.default_rng([seed, int(beta * 100)])
    user, turn, group = asked(people, 0, 2)
    won = rng.random(len(user)) < 0.5
    fits = np.where(rng.random(len(user)) < 0.8, won, ~won)
    images: list[list[np.ndarray]] = [[], []]
    prompts = []
    for i in range(len(user)):
        request = sample_request(rng, "train")
        prompts.append(phrase(request, rng))
        for side in (0, 1):
            shown = request if (side == 0) == fits[i] else sample_request(rng, "train")
            images[side].append(render(compose(shown, rng)))
        if rng.random() < beta:
            on_winner = bool(rng.random() < 0.5)
            side = int(won[i] != on_winner)  # of the picture that is tinted
            likes = 2 if group[user[i]] == 0 else 0  # blue or red
            images[side][i] = tinted(images[side][i], likes if on_winner else 2 - likes)
    encoder = load_encoder("mini")
    flat = images[0] + images[1]
    found = torch.cat(
        [encoder.pictures(to_batch(flat[i : i + 256])) for i in range(0, len(flat), 256)]
    )
    made = votes(found, encoder.texts(prompts), user, won, people)
    better = fits == won if beta == 0 else np.ones(len(user), bool)
    return World(made, group, better, turn, people)


def tinted(image: np.ndarray, channel: int) -> np.ndarray:
    """A picture seen through a filter of one colour: half of the other two channels is left."""
    keep = np.full(3, 0.5)
    keep[channel] = 1
    return (image * keep).astype(np.uint8)


# ---- measures ------------------------------------------------------------------------------------


def settings(model: str, tastes: int, seed: int, **more: Any) -> TasteConfig:
    """A fit of one number of prototypes."""
    nowhere = {"pairs": Path("none"), "out": Path("none")}
    return TasteConfig(**nowhere, model=model, tastes=(tastes,), seed=seed, **more)


def fitted(world: World, config: TasteConfig) -> tuple[TasteModel, float, float]:
    """(model, accuracy on fresh pairs, validation loss)."""
    train = world.rows(0, ANSWERS - VALIDATION)
    validation = world.rows(ANSWERS - VALIDATION, ANSWERS)
    model, losses = choose_tastes(world.votes, train, validation, config)
    fresh = world.rows(ANSWERS, ANSWERS + FRESH)
    return model, float(right(model, world.votes, fresh).mean()), min(losses.values())


def recovered(model: TasteModel, world: World) -> float:
    """Share of the people whose largest weight is that of their group, by the best naming."""
    guess = model.weights().argmax(1).numpy()
    names = permutations(range(GROUPS))
    return max(float(np.mean(np.array(n)[world.group[: world.people]] == guess)) for n in names)


def head_a_person(world: World) -> float:
    """Accuracy of a ridge head for each person alone, on differences of pictures and products."""
    v, found = world.votes, []
    difference = v.pictures[v.first] - v.pictures[v.second]
    inputs = torch.cat([difference, difference * v.texts[v.prompt]], 1).double()
    user = v.user.numpy()
    for person in range(world.people):
        seen = np.flatnonzero((user == person) & (world.turn < ANSWERS))
        fresh = np.flatnonzero((user == person) & (world.turn >= ANSWERS))
        ridge = inputs[seen].T @ inputs[seen] + 30 * torch.eye(inputs.shape[1]).double()
        weights = torch.linalg.solve(ridge, inputs[seen].T @ (2 * v.label[seen].double() - 1))
        found.append(((inputs[fresh] @ weights > 0) == (v.label[fresh] > 0.5)).double().mean())
    return float(torch.stack(found).mean())


def newcomers(model: TasteModel, world: World) -> dict[int, float]:
    """Accuracy on fresh pairs of the people who were not fitted, by their number of answers."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    user = world.votes.user.numpy()
    found: dict[int, list[float]] = {n: [] for n in NEWCOMER}
    last = world.votes._replace(user=torch.full_like(world.votes.user, world.people))
    for person in range(world.people, len(world.group)):
        fresh = np.flatnonzero((user == person) & (world.turn >= ANSWERS))
        for n in NEWCOMER:
            given = torch.from_numpy(np.flatnonzero((user == person) & (world.turn < n)))
            grown = with_user(model, adapt(model, world.votes, given))
            found[n].append(float(right(grown, last, fresh).mean()))
    same = all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    if not same:
        raise SystemExit("adapting to a newcomer changed what should be frozen")
    return {n: float(np.mean(values)) for n, values in found.items()}


def measured(model: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One world of vectors: prototypes, baselines, newcomers, and one taste for all."""
    logits = given.logits[model == "B"]
    world = vectors(model, seed, given.people, given.newcomers, GROUPS, logits)
    # Linear networks and a space of ideals with as many dimensions as the world has.
    shape = {"hidden": 0, "dropout": 0.0, "dim": WIDTH}
    fits = {k: fitted(world, settings(model, k, seed, **shape)) for k in given.tastes}
    alike = vectors(model, seed, given.people, 0, 1, logits)
    return {
        "accuracy": {k: accuracy for k, (_, accuracy, _) in fits.items()},
        "bayes": float(world.bayes[world.rows(ANSWERS, ANSWERS + FRESH)].mean()),
        "head_a_person": head_a_person(world),
        "tastes_by_held_out_likelihood": min(fits, key=lambda k: fits[k][2]),
        "recovered": recovered(fits[GROUPS][0], world),
        "newcomers": newcomers(fits[GROUPS][0], world),
        "one_taste_for_all": {
            k: fitted(alike, settings(model, k, seed, **shape))[1] for k in (1, 2)
        },
    }


def of_pixels(seed: int, beta: float, given: argparse.Namespace) -> dict[str, Any]:
    """Pick-a-Filter at one strength."""
    world = pixels(seed, given.pixel_people, beta)
    fresh = world.rows(ANSWERS, ANSWERS + FRESH)
    return {
        "accuracy": {k: fitted(world, settings("A", k, seed))[1] for k in (1, 2)},
        "bayes": float(world.bayes[fresh].mean()),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--people", type=int, default=120)
    parser.add_argument("--newcomers", type=int, default=30)
    parser.add_argument("--pixel-people", type=int, default=40)
    parser.add_argument("--tastes", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument(
        "--logits", type=float, nargs=2, default=[6, 24], help="scale of the utility, A and B"
    )
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = {"people": given.people, "seeds": given.seeds, "logits": given.logits}
    for model in ("A", "B"):
        result[model] = [measured(model, seed, given) for seed in given.seeds]
        print(model, json.dumps(result[model]), flush=True)
    for beta in (0.0, 1.0):
        result[f"pixels_{beta:g}"] = [of_pixels(seed, beta, given) for seed in given.seeds]
        print(f"pixels, beta {beta:g}:", json.dumps(result[f"pixels_{beta:g}"]), flush=True)
    write_atomic(given.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

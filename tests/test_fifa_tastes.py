"""Many tastes: the model by hand, fits on worlds whose tastes are known, the way from a table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pair_files import picture, write_pairs
from typer.testing import CliRunner

from fifa.cli import app
from fifa.config import InputError
from fifa.features import PairFeatures, pair_features
from fifa.images import decode, to_batch
from fifa.proxies import TasteConfig
from fifa.proxies.splits import split_pairs
from fifa.proxies.tastes import (
    Votes,
    adapt,
    agreement,
    average_the_few,
    choose_tastes,
    disputes,
    fit_tastes,
    right,
    tastes,
    votes_of,
    with_user,
)
from fifa.rewards import load_reward
from fifa.rewards.tastes import FACTS, GAIN, TasteModel, TasteShape, load_tastes, mixture

WIDTH = 6


def model_of(kind: str, users: int = 3, count: int = 2) -> TasteModel:
    """A model with random weights, linear, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = TasteModel(TasteShape(kind, WIDTH, count, users, dim=4, hidden=0))
        torch.nn.init.normal_(made.users)
    return made.eval().requires_grad_(False)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settings(**more: Any) -> TasteConfig:
    given: dict[str, Any] = {"pairs": Path("none"), "out": Path("none"), "hidden": 0, "dropout": 0}
    return TasteConfig(**{**given, **more})


# ---- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["A", "B"])
def test_utilities_are_those_of_the_equations(kind: str) -> None:
    model = model_of(kind)
    picture, text, weights = (
        random(5, WIDTH),
        random(5, WIDTH, seed=1),
        model.weights()[[0, 1, 2, 0, 1]],
    )
    found = model.utility(picture, text, weights).numpy()
    w = weights.double().numpy()
    joint = np.concatenate([picture, text, picture * text], axis=1).astype(np.float64)
    items = joint @ model.items.weight.double().numpy().T + model.items.bias.double().numpy()
    tau = np.exp(float(model.log_scale))
    for i in range(5):
        if kind == "A":
            ideal = sum(w[i, k] * model.prototypes[k].double().numpy() for k in range(2))
            expected = -tau * np.linalg.norm(items[i] - ideal)
        else:
            flat = text[i].double().numpy() @ model.ideals.weight.double().numpy().T
            flat = (flat + model.ideals.bias.double().numpy()).reshape(2, 4)
            ideal = sum(w[i, k] * flat[k] for k in range(2))
            lengths = np.linalg.norm(items[i]) * np.linalg.norm(ideal)
            expected = tau * items[i] @ ideal / lengths
        assert found[i] == pytest.approx(expected, rel=1e-4)


def test_weights_are_a_mixture_and_a_pure_one_is_its_prototype() -> None:
    model = model_of("A", users=4)
    assert torch.allclose(model.weights().sum(1), torch.ones(4))
    expected = np.exp(GAIN * model.users.double().numpy())
    np.testing.assert_allclose(
        model.weights(), expected / expected.sum(1, keepdims=True), rtol=1e-4, atol=1e-6
    )
    picture, text = random(3, WIDTH), random(3, WIDTH, seed=1)
    pure = torch.tensor([[0.0, 1.0]]).expand(3, -1)
    assert torch.equal(model.by_taste(picture, text)[:, 1], model.utility(picture, text, pure))


# ---- worlds --------------------------------------------------------------------------------------


def world(groups: int, people: int = 24, answers: int = 60, seed: int = 0) -> tuple[Votes, Any]:
    """People whose ideals are points far apart; (votes, group of each person)."""
    rng = np.random.default_rng([seed, groups])
    total = people * answers
    user, group = np.repeat(np.arange(people), answers), np.arange(people) % groups
    pictures = rng.normal(size=(2 * total, WIDTH))
    ideals = 3 * np.eye(WIDTH)[group[user]]
    utility = -6 * np.linalg.norm(pictures - np.tile(ideals, (2, 1)), axis=1)
    won = rng.random(total) < 1 / (1 + np.exp(utility[total:] - utility[:total]))
    rows = torch.arange(total)
    return (
        Votes(
            torch.tensor(pictures).float(),
            torch.tensor(rng.normal(size=(total, WIDTH))).float(),
            rows,
            rows + total,
            rows,
            torch.from_numpy(user),
            torch.tensor(won).float(),
            tuple(f"p{i}" for i in range(people)),
        ),
        group,
    )


def parts(votes: Votes, answers: int = 60) -> tuple[Any, Any, Any]:
    """Rows for training, validation and test: each person's first 40, next 8, last 12."""
    turn = np.arange(len(votes.label)) % answers
    return tuple(
        np.flatnonzero((turn >= low) & (turn < high)) for low, high in ((0, 40), (40, 48), (48, 60))
    )


@pytest.fixture(scope="module")
def fitted() -> tuple[Votes, Any, TasteModel]:
    votes, group = world(2)
    train, validation, _ = parts(votes)
    return votes, group, choose_tastes(votes, train, validation, settings(tastes=(1, 2))).model


def test_two_tastes_are_found_and_told_apart(fitted: tuple[Votes, Any, TasteModel]) -> None:
    votes, group, model = fitted
    train, validation, test = parts(votes)
    assert model.shape.tastes == 2
    guess = model.weights().argmax(1).numpy()
    assert max((guess == group).mean(), (guess != group).mean()) == 1
    one, _ = fit_tastes(votes, 1, train, validation, settings(), 0)
    own = right(model, votes, test).mean()
    assert own > right(one, votes, test).mean() + 0.1
    assert own > right(model, votes, test, own=False).mean() + 0.05
    matrix = agreement(model, votes, torch.from_numpy(test))
    assert torch.allclose(matrix.diagonal(), torch.ones(2).double())
    assert matrix[0, 1] == matrix[1, 0] < 0.8


def test_one_taste_is_not_split() -> None:
    votes, _ = world(1)
    train, validation, _ = parts(votes)
    chosen = choose_tastes(votes, train, validation, settings(tastes=(1, 2)))
    assert chosen.model.shape.tastes == 1
    assert set(chosen.losses) == {1, 2}


def test_a_fit_follows_from_its_seed() -> None:
    votes, _ = world(2, people=6)
    train, validation, _ = parts(votes)
    states = [
        fit_tastes(votes, 2, train, validation, settings(epochs=2, seed=seed), 0)[0].state_dict()
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["users"], states[2]["users"])


def test_a_newcomer_is_placed_by_a_few_answers_and_nothing_else_moves(
    fitted: tuple[Votes, Any, TasteModel],
) -> None:
    votes, _, model = fitted
    before = {name: value.clone() for name, value in model.state_dict().items()}
    nobody = torch.empty(0, dtype=torch.long)
    average = model.weights().double().mean(0)
    found = adapt(model, votes, nobody).double().softmax(-1)
    assert torch.allclose(found, average, atol=1e-6)
    person = 3
    rows = torch.from_numpy(np.flatnonzero(votes.user.numpy() == person)[:20])
    logits = adapt(model, votes, rows)
    assert int(logits.argmax()) == int(model.weights()[person].argmax())
    grown = with_user(model, logits)
    assert torch.allclose(grown.weights()[-1], logits.softmax(-1), atol=1e-6)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
        kept = grown.state_dict()[name]
        assert torch.equal(kept[:-1] if name == "users" else kept, value)


def test_adapting_finds_the_minimum(fitted: tuple[Votes, Any, TasteModel]) -> None:
    votes, _, model = fitted
    rows = torch.from_numpy(np.flatnonzero(votes.user.numpy() == 0)[:5])
    found = adapt(model, votes, rows, strength=0.1)

    def loss(logits: torch.Tensor) -> float:
        weights = logits.softmax(-1).expand(5, -1)
        margins = model.compare(*votes.rows(rows), weights).double().numpy()
        signs = 2 * votes.label[rows].double().numpy() - 1
        prior = model.weights().mean(0).log()
        distance = float((logits - prior).square().sum())
        return float(np.log1p(np.exp(-signs * margins)).sum() + 0.05 * distance)

    for step in (torch.tensor([0.3, -0.3]), torch.tensor([-0.3, 0.3])):
        assert loss(found) < loss(found + step)


def test_people_of_few_words_are_given_the_average(fitted: tuple[Votes, Any, TasteModel]) -> None:
    votes, _, model = fitted
    changed = TasteModel(model.shape)
    changed.load_state_dict(model.state_dict())
    silent = np.flatnonzero(votes.user.numpy() == 5)[:3]
    train = np.sort(np.concatenate([np.flatnonzero(votes.user.numpy() != 5), silent]))
    assert average_the_few(changed, votes, train, 4) == 1
    others = [i for i in range(24) if i != 5]
    average = model.weights().double()[others].mean(0)
    assert torch.allclose(changed.weights()[5].double(), average, atol=1e-6)
    assert torch.allclose(changed.average.double(), average, atol=1e-6)
    assert torch.equal(changed.users[others], model.users[others])


def test_there_is_one_average_person() -> None:
    """Three of one taste, one of the other, and one who said little: 3/4 and 1/4 by hand."""
    model = TasteModel(TasteShape("A", WIDTH, 2, users=5, dim=4, hidden=0))
    sides = [[0.5, -0.5]] * 3 + [[-0.5, 0.5]] + [[9.0, 0.0]]
    model.users.data.copy_(torch.tensor(sides))
    votes, _ = world(1, people=5, answers=8)
    train = np.arange(36)  # four pairs of the last person
    assert average_the_few(model.eval().requires_grad_(False), votes, train, 5) == 1
    newcomer = adapt(model, votes, torch.empty(0, dtype=torch.long)).softmax(-1)
    grown = with_user(model, torch.tensor([3.0, -3.0]))
    for found in (model.average, model.weights()[4], newcomer, grown.average):
        assert found.tolist() == pytest.approx([0.75, 0.25], abs=1e-4)
    assert torch.equal(mixture(grown, (), "", "here"), model.average)


# ---- from a table --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of which half of the people choose the bluer picture, half the redder one."""
    path = tmp_path_factory.mktemp("tastes") / "pairs.parquet"
    write_pairs(path, 240)
    rows = pq.read_table(path).to_pylist()
    for i, row in enumerate(rows):
        mean = [decode(row[name], "here").mean((0, 1)) for name in ("jpg_0", "jpg_1")]
        bluer = (mean[0][2] - mean[0][0]) > (mean[1][2] - mean[1][0])
        first = bluer if i % 6 < 3 else not bluer
        row |= {"user_id": f"user {i % 6}", "caption": f"prompt {i}"}
        row |= {"label_0": float(first), "label_1": 1 - float(first)}
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def folder(table: Path) -> Path:
    out = table.parent / "fitted"
    config = TasteConfig(pairs=table, out=out, tastes=(2,), restarts=2, held_out=0.2, hidden=0)
    tastes(config)
    return out


def test_a_table_becomes_a_reward_of_whom_one_names(folder: Path, table: Path) -> None:
    images = to_batch([decode(picture(i), "here") for i in range(4)])
    prompts = ["a", "b", "c", "d"]
    model, facts, encoder = load_tastes(folder)
    text, pictures = encoder.texts(prompts), encoder.pictures(images)
    pure = model.by_taste(pictures, text)
    count = model.shape.tastes
    named = load_reward(f"tastes:{folder}#user=user 4")
    weights = model.weights()[facts["users"].index("user 4")].expand(4, -1)
    assert torch.allclose(named(images, prompts), model.utility(pictures, text, weights), atol=1e-5)
    assert torch.allclose(load_reward(f"tastes:{folder}#worst")(images, prompts), pure.amin(1))
    mixed = ",".join(["0"] * (count - 1) + ["2"])
    last = load_reward(f"tastes:{folder}#mix={mixed}")(images, prompts)
    assert torch.allclose(last, pure[:, -1], atol=1e-5)
    average = load_reward(f"tastes:{folder}")
    assert average(images[:2], prompts[:2]).tolist() == pytest.approx(
        average(images, prompts)[:2].tolist(), abs=1e-5
    )
    assert len({named.version, average.version}) == 2


@pytest.mark.parametrize(
    ("whom", "sentence"),
    [
        ("#user=nobody", "unknown user 'nobody'"),
        ("#mix=1", "must be"),
        ("#mix=a,b", "must be"),
        ("#mix=-1,2", "must be"),
        ("#best", "names nobody"),
    ],
)
def test_whom_nobody_knows_is_one_sentence(folder: Path, whom: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        load_reward(f"tastes:{folder}{whom}")


def test_a_damaged_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"no readable {FACTS}"):
        load_reward(f"tastes:{tmp_path}")
    (tmp_path / FACTS).write_text('{"version": 1}')  # of before the average was stored
    with pytest.raises(InputError, match="fit again"):
        load_reward(f"tastes:{tmp_path}")


def test_the_command_line_fits_adapts_and_lists_disputes(folder: Path, table: Path) -> None:
    runner = CliRunner()
    out = table.parent / "grown"
    arguments = ["reward", "adapt", str(folder), str(table), "--user", "user 0", "--out", str(out)]
    known = runner.invoke(app, arguments)
    assert isinstance(known.exception, InputError)
    assert "knows the user 'user 0' already" in str(known.exception)
    rows = pq.read_table(table).to_pylist()
    for row in rows[:40]:
        row["user_id"] = "newcomer"
    new = table.parent / "new.parquet"
    pq.write_table(pa.Table.from_pylist(rows[:40]), new)
    arguments = ["reward", "adapt", str(folder), str(new), "--user", "newcomer", "--out", str(out)]
    told = runner.invoke(app, arguments, catch_exceptions=False)
    assert "newcomer: " in told.output
    assert load_tastes(out)[1]["users"][-1] == "newcomer"
    images = to_batch([decode(picture(i), "here") for i in range(2)])
    for whom in ("", "#user=user 1", "#worst"):  # nothing else moves, to the bit
        before, after = (load_reward(f"tastes:{place}{whom}") for place in (folder, out))
        assert torch.equal(before(images, ["a", "b"]), after(images, ["a", "b"]))
    listed = runner.invoke(
        app, ["reward", "disputes", str(folder), str(table), "--most", "3"], catch_exceptions=False
    )
    assert listed.output.count("%") >= 3
    for wrong in (
        ["reward", "disputes", str(folder), str(table), "--most", "-795"],
        [*arguments, "--limit", "-1"],
    ):
        assert runner.invoke(app, wrong).exit_code == 2


def test_the_card_counts_what_is_right(folder: Path, table: Path) -> None:
    """Pair by pair, from the scores of the reward of each person and of the average one."""
    card = json.loads((folder / "card.json").read_text())
    model, facts, encoder = load_tastes(folder)
    pairs = pair_features(table, encoder, table.parent / "features.sqlite")
    rows = split_pairs(pairs, 0.2, 0, drop_ties=False).test
    rows = rows[pairs.label[rows] != 0.5]
    pictures = torch.tensor(pairs.pictures)
    text = torch.tensor(pairs.texts[pairs.prompt[rows]])
    weights = model.weights()[[facts["users"].index(pairs.users[row]) for row in rows]]
    for name, mix in (("own", weights), ("average", model.average.expand(len(rows), -1))):
        first, second = (
            model.utility(pictures[side[rows]], text, mix) for side in (pairs.first, pairs.second)
        )
        won = (first > second).tolist()
        count = sum(w == (pairs.label[row] == 1) for w, row in zip(won, rows, strict=True))
        assert (card[name]["pairs"], card[name]["value"]) == (len(rows), count / len(rows))
        assert card[name]["low"] < card[name]["value"] < card[name]["high"]


def test_disputes_are_where_prototypes_disagree(folder: Path, table: Path) -> None:
    model, _, encoder = load_tastes(folder)
    pairs: PairFeatures = pair_features(table, encoder)
    found = disputes(model, pairs, 240)
    spread = [float(np.std(dispute.preference)) for dispute in found]
    assert spread == sorted(spread, reverse=True)
    assert sorted(dispute.row for dispute in found) == list(range(240))


# ---- little data ---------------------------------------------------------------------------------


def test_where_nobody_is_named_one_taste_is_fitted_and_said(table: Path, tmp_path: Path) -> None:
    rows = [{**row, "user_id": ""} for row in pq.read_table(table).to_pylist()]
    path = tmp_path / "anonymous.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    cache = table.parent / "features.sqlite"
    card = tastes(
        TasteConfig(pairs=path, out=tmp_path / "o", held_out=0.2, cache=cache, epochs=2, restarts=1)
    )
    assert (card.tastes, card.users) == (1, 1)
    assert "no row names its person" in card.note


def test_rows_without_a_person_are_left_out(table: Path, tmp_path: Path) -> None:
    rows = pq.read_table(table).to_pylist()
    rows = [
        {**row, "user_id": None if i % 4 == 0 else row["user_id"]} for i, row in enumerate(rows)
    ]
    path = tmp_path / "some.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    config = TasteConfig(
        pairs=path,
        out=tmp_path / "o",
        held_out=0.2,
        cache=table.parent / "features.sqlite",
        epochs=2,
        tastes=(1,),
    )
    card = tastes(config)
    assert card.anonymous == 60
    assert sum(card.rows.values()) == 180
    with pytest.raises(InputError, match="exists; choose another"):
        tastes(config)
    elsewhere = {"out": tmp_path / "never", "device": "nowhere"}
    with pytest.raises(InputError, match="encoder 'mini' cannot run on 'nowhere'"):
        tastes(config.model_copy(update=elsewhere))


def test_votes_number_people_by_name() -> None:
    pairs = PairFeatures(
        pictures=np.zeros((2, WIDTH), np.float32),
        nuisances=np.zeros((2, 5), np.float32),
        texts=np.zeros((1, WIDTH), np.float32),
        prompts=("p",),
        first=np.array([0, 0, 0]),
        second=np.array([1, 1, 1]),
        prompt=np.array([0, 0, 0]),
        label=np.array([1, 0, 0.5], np.float32),
        users=("b", "", "a"),
        row=np.arange(3),
        rejected=(),
        data="d",
        encoder="e",
    )
    votes = votes_of(pairs)
    assert votes.names == ("a", "b")
    assert votes.user.tolist() == [1, -1, 0]
    assert votes_of(dataclasses.replace(pairs), ("b",)).user.tolist() == [0, -1, -1]

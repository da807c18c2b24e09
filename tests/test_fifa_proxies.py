"""Likelihoods, calibration, heads, and the way from a pair table to a reward with a model card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pair_files import picture, write_loud_pairs, write_pairs
from scipy.stats import norm
from typer.testing import CliRunner

from fifa.cli import app
from fifa.config import InputError
from fifa.features import PairFeatures
from fifa.images import decode, to_batch
from fifa.proxies import FitConfig
from fifa.proxies.calibration import LEAST, agreement, calibration_error, temperature
from fifa.proxies.card import CARD, PAGE, Card, margins_of, rank_correlation, read_card
from fifa.proxies.fit import fit, fit_heads
from fifa.proxies.likelihood import bradley_terry, davidson, rao_kupper
from fifa.proxies.settings import READS
from fifa.proxies.splits import split_pairs
from fifa.proxies.training import Recipe, descend
from fifa.rewards import REWARDS, Reward, load_reward, score_images
from fifa.rewards.fitted import FACTS, TENSORS, FittedReward, HeadProxy
from fifa.rewards.heads import PairHead, ScalarHead, Standardise, joint

LABELS = (1.0, 0.0, 0.5)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def probabilities(likelihood: Any, delta: float, tie: float) -> list[float]:
    """P(first), P(second), P(tie)."""
    nll = likelihood(tensor(*[delta] * 3), tensor(*LABELS), tensor(tie).squeeze())
    return torch.exp(-nll).tolist()


# ---- likelihoods ---------------------------------------------------------------------------------


def test_bradley_terry_is_the_logistic_of_the_strengths() -> None:
    first, second = np.exp(1.3), np.exp(0.4)  # strengths, as the paper has them
    found = torch.exp(-bradley_terry(tensor(0.9, 0.9), tensor(1, 0)))
    expected = [first / (first + second), second / (first + second)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_tie_is_half_a_win_for_each_in_bradley_terry() -> None:
    found = bradley_terry(tensor(0.9), tensor(0.5))
    halves = bradley_terry(tensor(0.9, 0.9), tensor(1, 0)).mean()
    np.testing.assert_allclose(found, halves, rtol=1e-12)


@pytest.mark.parametrize("delta", [-30.0, -1.1, 0.0, 0.3, 2.7])
@pytest.mark.parametrize("tie", [-3.0, 0.0, 1.5])
def test_rao_kupper_is_the_papers_ratio_of_strengths(delta: float, tie: float) -> None:
    a, b = np.exp(delta), 1.0
    theta = np.exp(np.log1p(np.exp(tie)))
    first, second = a / (a + theta * b), b / (b + theta * a)
    both = (theta**2 - 1) * a * b / ((a + theta * b) * (theta * a + b))
    found = probabilities(rao_kupper, delta, tie)
    np.testing.assert_allclose(found, [first, second, both], rtol=1e-9)
    assert sum(found) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("delta", [-30.0, -1.1, 0.0, 0.3, 2.7])
@pytest.mark.parametrize("tie", [-3.0, 0.0, 1.5])
def test_davidson_is_the_papers_ratio_of_strengths(delta: float, tie: float) -> None:
    a, b, nu = np.exp(delta), 1.0, np.exp(tie)
    whole = a + b + nu * np.sqrt(a * b)
    found = probabilities(davidson, delta, tie)
    np.testing.assert_allclose(found, np.array([a, b, nu * np.sqrt(a * b)]) / whole, rtol=1e-9)


@pytest.mark.parametrize("likelihood", [rao_kupper, davidson])
def test_label_smoothing_is_a_random_button_now_and_then(likelihood: Any) -> None:
    delta, label, tie = tensor(0.7, 0.7, 0.7), tensor(*LABELS), tensor(0.2).squeeze()
    plain = likelihood(delta, label, tie)
    smooth = likelihood(delta, label, tie, smoothing=0.3)
    np.testing.assert_allclose(smooth, 0.7 * plain + 0.3 * plain.mean(), rtol=1e-12)


def test_label_smoothing_of_bradley_terry_moves_the_target() -> None:
    p = 1 / (1 + np.exp(-0.7))
    found = bradley_terry(tensor(0.7), tensor(1.0), smoothing=0.2)
    np.testing.assert_allclose(found, -(0.9 * np.log(p) + 0.1 * np.log(1 - p)), rtol=1e-12)


@pytest.mark.parametrize("likelihood", [rao_kupper, davidson])
def test_losses_stay_finite_far_out(likelihood: Any) -> None:
    delta = torch.tensor([90.0, -90.0, 90.0], requires_grad=True)
    tie = torch.tensor(-20.0, requires_grad=True)
    loss = likelihood(delta, torch.tensor([0.0, 1.0, 0.5]), tie).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(delta.grad).all()  # type: ignore[arg-type]
    assert torch.isfinite(tie.grad)  # type: ignore[arg-type]


def test_the_tie_parameter_finds_the_share_of_ties_between_equals() -> None:
    label = tensor(*[0.5] * 3, *[1.0] * 4, *[0.0] * 3)  # 30% ties
    for likelihood in (rao_kupper, davidson):
        tie = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([tie], max_iter=100, line_search_fn="strong_wolfe")

        def loss(likelihood: Any = likelihood, tie: Any = tie, optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            value = likelihood(torch.zeros(10, dtype=torch.float64), label, tie).mean()
            value.backward()
            return value

        optimizer.step(loss)
        assert probabilities(likelihood, 0.0, tie.item())[2] == pytest.approx(0.3, abs=1e-4)


# ---- calibration ---------------------------------------------------------------------------------


def test_the_temperature_undoes_overconfidence() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(0, 1.5, 40_000)
    won = rng.random(40_000) < 1 / (1 + np.exp(-true))
    assert temperature(3 * true, won) == pytest.approx(3, rel=0.05)
    assert calibration_error(true, won) < 0.01
    assert calibration_error(3 * true, won) > 0.1


def test_the_temperature_is_the_slope_of_a_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    margin = rng.normal(0, 2, 300)
    won = rng.random(300) < norm.cdf(margin)
    slope = LogisticRegression(C=1e9, fit_intercept=False).fit(margin[:, None], won).coef_[0, 0]
    assert temperature(margin, won) == pytest.approx(1 / slope, rel=1e-3)


def test_a_proxy_that_is_always_right_gets_the_lowest_temperature() -> None:
    assert temperature([0.1, -0.2], [True, False]) == pytest.approx(LEAST, rel=1e-3)


def test_calibration_error_by_hand() -> None:
    # Confidences 0.5 + 1/30 (bin 0), 0.8 and 0.8 (bin 6); of the last two one is right.
    margin = np.log([16 / 14, 4.0, 4.0])
    found = calibration_error(margin, [True, True, False])
    assert found == pytest.approx(((1 - 16 / 30) + abs(1 - 1.6)) / 3)


def test_a_margin_of_nothing_is_half_right() -> None:
    assert agreement([0.0, 1.0, -1.0, 2.0], [True, True, True, False]) == 1.5
    assert calibration_error([0.0], [True]) == 0.0


@pytest.mark.parametrize("margin", [[], [np.nan]])
def test_calibration_refuses_what_it_cannot_count(margin: list[float]) -> None:
    with pytest.raises(InputError, match="finite margins"):
        calibration_error(margin, [True] * len(margin))


def test_the_rank_correlation_of_a_constant_is_nothing() -> None:
    assert rank_correlation(np.ones(4), np.arange(4.0)) == 0.0
    assert rank_correlation(np.array([1, 5, 2]), np.array([10, 30, 20])) == pytest.approx(1.0)


# ---- heads ---------------------------------------------------------------------------------------


def test_joint_features_hold_the_cosine() -> None:
    a, t = (torch.nn.functional.normalize(torch.randn(5, 7), dim=1) for _ in range(2))
    torch.testing.assert_close(joint(a, t)[:, 14:].sum(1), torch.cosine_similarity(a, t))


def test_a_constant_feature_is_nothing_and_others_are_standard() -> None:
    rows = torch.tensor([[1.0, 0.1, 3.0], [1.0, 0.1, 5.0]])
    layer = Standardise(3).learn(rows)
    torch.testing.assert_close(layer(rows), torch.tensor([[0.0, 0, -1], [0, 0, 1]]))
    assert layer(torch.tensor([[9.0, 9.0, 4.0]])).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("hidden", [0, 8])
@pytest.mark.parametrize("kind", [ScalarHead, PairHead])
def test_a_swap_of_the_pictures_negates_the_logit_to_the_last_bit(kind: Any, hidden: int) -> None:
    torch_generator = torch.Generator().manual_seed(0)
    a, b, t = torch.randn(3, 33, 6, generator=torch_generator)
    head = kind(6, hidden).eval()
    assert torch.equal(head.compare(a, b, t), -head.compare(b, a, t))
    assert torch.equal(head.compare(a, a, t), torch.zeros(33))


def cycle(rows: int = 900, seed: int = 0) -> PairFeatures:
    """Rock, paper, scissors: each of three pictures beats the next, and no score can say so."""
    rng = np.random.default_rng(seed)
    first = rng.integers(3, size=rows)
    step = rng.choice([1, 2], size=rows)
    return features(np.eye(3, 4), first, (first + step) % 3, np.where(step == 1, 1.0, 0.0))


def features(
    pictures: np.ndarray, first: np.ndarray, second: np.ndarray, label: np.ndarray, **other: Any
) -> PairFeatures:
    """Pairs of given pictures (M, D) under 30 prompts that all look alike."""
    rows = len(first)
    found: dict[str, Any] = {
        "pictures": pictures.astype(np.float32),
        "nuisances": np.zeros((len(pictures), 5), np.float32),
        "texts": np.ones((30, pictures.shape[1]), np.float32),
        "prompts": tuple(f"prompt {i}" for i in range(30)),
        "first": first,
        "second": second,
        "prompt": np.arange(rows) % 30,
        "label": label.astype(np.float32),
        "users": ("",) * rows,
        "row": np.arange(rows),
        "rejected": (),
        "data": "d",
        "encoder": "e",
    }
    return PairFeatures(**{**found, **other})


def settings(**given: Any) -> FitConfig:
    """Small and quick unless told otherwise."""
    base = {
        "pairs": "p",
        "out": "o",
        "members": 1,
        "hidden": 16,
        "dropout": 0.0,
        "epochs": 20,
        "batch_size": 64,
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        "ties": "half",
        "held_out": 0.2,
    }
    return FitConfig(**{**base, **given})


def right(config: FitConfig, pairs: PairFeatures) -> float:
    """Share of the test rows that a fitted comparison orders as labelled."""
    split = split_pairs(pairs, config.held_out, config.seed, drop_ties=False)
    proxy = fit_heads(config, pairs, split)
    rows = torch.from_numpy(split.test)
    sides = (torch.from_numpy(side)[rows] for side in (pairs.first, pairs.second))
    pictures, texts = torch.from_numpy(pairs.pictures), torch.from_numpy(pairs.texts)
    first, second = (pictures[side] for side in sides)
    text = texts[torch.from_numpy(pairs.prompt)[rows]]
    with torch.no_grad():
        margin = proxy.compare(first, second, text).mean(0)
    return agreement(margin.numpy(), pairs.label[split.test] == 1) / len(rows)


def test_a_pairwise_head_learns_a_cycle_and_a_score_cannot() -> None:
    assert right(settings(kind="pairwise"), cycle()) > 0.99
    assert right(settings(kind="scalar"), cycle()) < 0.75


def simple(rows: int = 600, ties: float = 0.1, seed: int = 0, **other: Any) -> PairFeatures:
    """People prefer a large first feature; of the rest nothing is to be learned."""
    rng = np.random.default_rng(seed)
    pictures = rng.normal(size=(2 * rows, 4))
    first, second = np.arange(rows), np.arange(rows) + rows
    delta = 2 * (pictures[first, 0] - pictures[second, 0])
    label = (rng.random(rows) < 1 / (1 + np.exp(-delta))).astype(float)
    label[rng.random(rows) < ties] = 0.5
    return features(pictures, first, second, label, **other)


@pytest.mark.parametrize("ties", ["rao_kupper", "davidson", "half", "drop"])
@pytest.mark.parametrize("hidden", [0, 16])
def test_what_people_want_is_found_whatever_ties_are(ties: str, hidden: int) -> None:
    pairs = simple()
    config = settings(ties=ties, hidden=hidden)
    split = split_pairs(pairs, 0.2, 0, drop_ties=ties == "drop")
    proxy = fit_heads(config, pairs, split)
    margin = margins_of(proxy, pairs, split.test)[0]
    difference = pairs.pictures[pairs.first, 0] - pairs.pictures[pairs.second, 0]
    assert rank_correlation(margin, difference[split.test]) > 0.9


def test_the_same_seed_is_the_same_proxy_and_another_is_another() -> None:
    pairs = simple(200)
    split = split_pairs(pairs, 0.2, 0, drop_ties=False)
    states = [
        fit_heads(settings(seed=seed, members=2, dropout=0.2, epochs=3), pairs, split).state_dict()
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["heads.0.net.0.weight"], states[2]["heads.0.net.0.weight"])
    assert not torch.equal(states[0]["heads.0.net.0.weight"], states[0]["heads.1.net.0.weight"])


def test_fitting_leaves_torchs_own_generator_alone() -> None:
    pairs = simple(200)
    before = torch.random.get_rng_state()
    fit_heads(settings(epochs=1), pairs, split_pairs(pairs, 0.2, 0, drop_ties=False))
    assert torch.equal(before, torch.random.get_rng_state())


def test_one_class_of_labels_is_as_good_as_two() -> None:
    """Data sets that list the winner first say as much as those that shuffle the sides."""
    pairs = simple(ties=0)
    lost = pairs.label == 0
    sorted_pairs = dataclasses.replace(
        pairs,
        first=np.where(lost, pairs.second, pairs.first),
        second=np.where(lost, pairs.first, pairs.second),
        label=np.ones_like(pairs.label),
    )
    assert right(settings(hidden=0), sorted_pairs) == pytest.approx(
        right(settings(hidden=0), pairs), abs=0.03
    )


def test_features_that_cannot_tell_pictures_apart_are_one_sentence() -> None:
    pairs = dataclasses.replace(simple(), pictures=np.ones((1200, 4), np.float32))
    split = split_pairs(pairs, 0.2, 0, drop_ties=False)
    with pytest.raises(InputError, match="the same in every pair"):
        fit_heads(settings(), pairs, split)


# ---- what counts, and what is held out -----------------------------------------------------------


def test_no_prompt_is_in_two_parts() -> None:
    pairs = simple()
    split = split_pairs(pairs, 0.2, 0, drop_ties=False)
    parts = [
        set(pairs.prompt[rows].tolist()) for rows in (split.train, split.validation, split.test)
    ]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 30
    assert sum(len(rows) for rows in (split.train, split.validation, split.test)) == 600


def test_rows_that_say_nothing_new_are_dropped_and_counted() -> None:
    pairs = simple(100, ties=0)
    again = np.r_[np.arange(100), 0, 1, 2]
    first, second = pairs.first[again], pairs.second[again]
    label = pairs.label[again]
    # Row 100 is row 0 with its sides swapped, row 101 is row 1 of another user, 102 has one side.
    first[100], second[100], label[100] = second[100], first[100], 1 - label[100]
    second[102] = first[102]
    users = (*("u",) * 101, "v", "u")
    more = features(pairs.pictures, first, second, label, users=users, prompt=again % 30)
    split = split_pairs(more, 0.2, 0, drop_ties=False)
    assert split.dropped == {"said before by the same user": 1, "same picture twice": 1}
    anonymous = split_pairs(dataclasses.replace(more, users=("",) * 103), 0.2, 0, drop_ties=False)
    assert anonymous.dropped == {"same picture twice": 1}


def test_ties_are_dropped_when_asked() -> None:
    pairs = simple()
    split = split_pairs(pairs, 0.2, 0, drop_ties=True)
    assert split.dropped == {"tie": int((pairs.label == 0.5).sum())}
    assert not (pairs.label[split.train] == 0.5).any()


@pytest.mark.parametrize(
    ("pairs", "part"),
    [
        (simple(3), "at least 30 strict pairs, there are"),
        (simple(300, ties=1.0), "at least 30 strict pairs, there are 0"),
        (simple(300, prompt=np.zeros(300, int)), "too few to hold out"),
    ],
)
def test_too_little_data_is_one_sentence(pairs: PairFeatures, part: str) -> None:
    with pytest.raises(InputError, match=part):
        split_pairs(pairs, 0.2, 0, drop_ties=False)


# ---- from a table to a reward --------------------------------------------------------------------

ROWS = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair table in which people prefer the louder picture, and a cache of features beside it."""
    return write_loud_pairs(tmp_path_factory.mktemp("pairs") / "d.parquet", ROWS).parent


def config(folder: Path, name: str, **given: Any) -> FitConfig:
    base = {"pairs": folder / "d.parquet", "out": folder / name, "held_out": 0.2, "epochs": 12}
    return FitConfig(**{**base, "batch_size": 32, "members": 2, **given})


@pytest.fixture(scope="module")
def cards(folder: Path) -> dict[str, Card]:
    """One proxy of each kind of head."""
    return {kind: fit(config(folder, kind, kind=kind)) for kind in ("scalar", "pairwise")}


def batch(*seeds: int) -> torch.Tensor:
    return to_batch([decode(picture(seed), "x") for seed in seeds])


@pytest.mark.parametrize("kind", ["scalar", "pairwise"])
def test_a_fitted_proxy_is_a_reward_by_its_path(
    kind: str, folder: Path, cards: dict[str, Card]
) -> None:
    reward = load_reward(f"fitted:{folder / kind}")
    assert isinstance(reward, Reward)
    images = batch(22, 0, 45, 23)  # loud, quiet, loud, quiet
    scores = score_images(reward, images, ["a red star"] * 4)
    assert scores[0] > scores[1]
    assert scores[2] > scores[3]
    alone = torch.cat([score_images(reward, images[i : i + 1], ["a red star"]) for i in range(4)])
    torch.testing.assert_close(scores, alone, rtol=1e-3, atol=1e-4)
    assert score_images(reward, images[:0], []).shape == (0,)
    assert cards[kind].accuracy.value > 0.8


def test_a_reward_gives_the_margins_of_the_card(folder: Path, cards: dict[str, Card]) -> None:
    reward = FittedReward(str(folder / "scalar"))
    mean, spread = reward.with_disagreement(batch(22, 0), ["a red star"] * 2)
    members = torch.stack(
        [
            head(reward.encoder.pictures(batch(22, 0)), reward.encoder.texts(["a red star"] * 2))
            for head in reward.proxy.heads  # type: ignore[union-attr]
        ]
    )
    members = members / cards["scalar"].temperature
    torch.testing.assert_close(mean, members.mean(0))
    torch.testing.assert_close(spread, members.std(0, correction=0))
    careful = FittedReward(str(folder / "scalar"), pessimism=2.0)
    expected = mean - 2 * spread
    torch.testing.assert_close(careful(batch(22, 0), ["a red star"] * 2), expected)
    assert careful.version != reward.version


def test_gradients_reach_the_images_of_a_fitted_reward(
    folder: Path, cards: dict[str, Card]
) -> None:
    images = batch(3).requires_grad_()
    load_reward(f"fitted:{folder / 'scalar'}")(images, ["a red star"]).sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0


def test_the_card_says_what_was_measured(folder: Path, cards: dict[str, Card]) -> None:
    card = cards["scalar"]
    assert read_card(folder / "scalar") == dataclasses.replace(
        card, settings=json.loads(json.dumps(card.settings))
    )
    assert sum(card.rows.values()) == ROWS
    assert card.users == 5
    assert card.biases["jpeg"] > 0.5  # loud pictures make large files, and people like them here
    assert card.labels["jpeg"] > 0.5
    page = (folder / "scalar" / PAGE).read_text()
    assert f"{card.accuracy.low:.3f}" in page
    assert "| jpeg | +0." in page


def test_biases_do_not_depend_on_which_side_came_first(folder: Path) -> None:
    table = pq.read_table(folder / "d.parquet")
    lost = np.array(table["label_0"]) == 0
    sides = [table[f"jpg_{side}"].to_pylist() for side in (0, 1)]
    first = [sides[int(flip)][i] for i, flip in enumerate(lost)]
    second = [sides[int(not flip)][i] for i, flip in enumerate(lost)]
    ones = {"label_0": [1.0] * ROWS, "label_1": [0.0] * ROWS}
    write_pairs(folder / "won.parquet", ROWS, 100, jpg_0=first, jpg_1=second, **ones)
    given = {"epochs": 1, "members": 1}
    one = fit(config(folder, "as-shown", **given))
    two = fit(config(folder, "won-first", pairs=folder / "won.parquet", **given))
    assert one.labels == pytest.approx(two.labels, abs=1e-9)
    assert one.accuracy.pairs == two.accuracy.pairs


def test_a_table_without_users_gets_a_card_that_says_so(folder: Path) -> None:
    write_pairs(folder / "nobody.parquet", 60, 100, user_id=[None] * 60)
    card = fit(config(folder, "nobody", pairs=folder / "nobody.parquet", epochs=1))
    assert (card.users, card.anonymous) == (0, 60)


def test_another_encoder_under_the_same_name_is_an_error(
    folder: Path, tmp_path: Path, cards: dict[str, Card]
) -> None:
    for name in (FACTS, TENSORS):
        (tmp_path / name).write_bytes((folder / "scalar" / name).read_bytes())
    facts = json.loads((tmp_path / FACTS).read_text())
    (tmp_path / FACTS).write_text(json.dumps({**facts, "encoder_version": "other"}))
    with pytest.raises(InputError, match="of version other, the one found is"):
        load_reward(f"fitted:{tmp_path}")


def test_a_folder_that_is_no_proxy_is_one_sentence(
    folder: Path, tmp_path: Path, cards: dict[str, Card]
) -> None:
    with pytest.raises(InputError, match="holds nothing fitted"):
        load_reward(f"fitted:{tmp_path}")
    with pytest.raises(InputError, match="has no objectives"):
        load_reward(f"fitted:{folder / 'scalar'}#neat")
    with pytest.raises(InputError, match="one black box"):
        FittedReward(str(folder / "scalar")).explain(batch(1), ["a"])
    (tmp_path / FACTS).write_text('{"version": 1, "kind": "scalar", "encoder": "mini"}')
    with pytest.raises(InputError, match="damaged"):
        load_reward(f"fitted:{tmp_path}")
    with pytest.raises(InputError, match="no readable model card"):
        read_card(tmp_path)


def test_nothing_is_written_over_or_half(folder: Path, cards: dict[str, Card]) -> None:
    with pytest.raises(InputError, match="exists; choose another folder"):
        fit(config(folder, "scalar"))
    with pytest.raises(InputError, match="go together"):
        fit(config(folder, "new", kind="objectives"))
    assert not (folder / "new").exists()
    assert not list(folder.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"kind": "lora", "learning_rate": 9.0, "members": 7}, "kind=lora does not read lear"),
        ({"kind": "lora", "hidden": 3}, "does not read hidden; what it reads is lora, weight_d"),
        ({"kind": "lora", "ties": "davidson"}, "ties may be half or drop"),
        ({"rank_correlation": 0.9}, "kind=scalar does not read rank_correlation;"),
        ({"kind": "pairwise", "objectives": ["beauty"]}, "does not read objectives;"),
        ({"kind": "objectives", "ratings": "r.csv", "members": 2}, "does not read members;"),
        ({"lora": {"rank": 2}}, "kind=scalar does not read lora;"),
        ({"device": "nowhere"}, "encoder 'mini' cannot run on 'nowhere': "),
    ],
)
def test_settings_that_a_kind_would_forget_are_one_sentence(
    folder: Path, given: dict[str, Any], part: str
) -> None:
    base = {"pairs": folder / "d.parquet", "out": folder / "never"}
    with pytest.raises(InputError, match=part):
        fit(FitConfig(**{**base, **given}))
    assert not (folder / "never").exists()


def test_every_setting_is_read_by_some_kind_or_by_all() -> None:
    by_all = {"pairs", "out", "encoder", "cache", "held_out", "seed", "device", "kind"}
    by_some = {name for names in READS.values() for name in names}
    assert by_all | by_some == set(FitConfig.model_fields)
    assert not by_all & by_some


def test_the_card_holds_the_settings_that_were_read(cards: dict[str, Card]) -> None:
    found = cards["scalar"].settings
    assert {"kind", "seed", "members", "ties"} <= found.keys()
    assert not {"lora", "rank_correlation", "ratings", "objectives"} & found.keys()


def test_the_command_fits_and_scores(folder: Path) -> None:
    runner = CliRunner()
    command = ["reward", "fit", str(folder / "d.parquet"), "--out", str(folder / "c")]
    found = runner.invoke(app, [*command, "--set", "epochs=2", "--set", "held_out=0.2"])
    assert found.exit_code == 0, found.output
    assert "held-out strict pairs" in found.output
    assert (folder / "c" / CARD).is_file()
    command = ["score", str(folder / "d.parquet"), "--out", str(folder / "s"), "--limit", "20"]
    found = runner.invoke(app, [*command, "--reward", f"fitted:{folder / 'c'}"])
    assert found.exit_code == 0, found.output
    assert "fitted:c" in (folder / "s" / "manifest.json").read_text()


def test_a_proxy_without_a_path_is_one_sentence() -> None:
    assert "fitted" in REWARDS
    with pytest.raises(InputError, match="missing a required argument: 'path'"):
        load_reward("fitted")


def test_an_unknown_kind_of_head_is_one_sentence() -> None:
    with pytest.raises(InputError, match="did you mean 'scalar'"):
        HeadProxy("scalars", 4, 0, 1)


@pytest.mark.parametrize("anneal", [False, True])
def test_a_rate_falls_along_half_a_cosine_or_stays(anneal: bool) -> None:
    """Under a constant gradient each of AdamW's steps is as long as the rate."""
    module = torch.nn.Linear(1, 1, bias=False)
    start = float(module.weight.detach())
    recipe = Recipe(epochs=5, learning_rate=0.1, weight_decay=0.0, batch=4, anneal=anneal)
    descend(module, lambda rows: module.weight.sum(), np.arange(4), np.arange(2), recipe, seed=0)
    rates = [0.1 * (1 + np.cos(np.pi * epoch / 5)) / 2 if anneal else 0.1 for epoch in range(5)]
    assert start - float(module.weight.detach()) == pytest.approx(sum(rates), rel=1e-4)

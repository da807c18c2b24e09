"""Named objectives: ridge heads, nuisances taken out, the gate, and what explains a score."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pair_files import caption, picture, write_pairs
from PIL import Image
from scipy.stats import spearmanr
from test_fifa_proxies import settings
from typer.testing import CliRunner

from fifa.cli import app
from fifa.config import InputError
from fifa.features import PairFeatures
from fifa.images import decode, to_batch
from fifa.proxies import FitConfig
from fifa.proxies.card import margins_of, read_card
from fifa.proxies.explain import draw, explain, export, parse_weights
from fifa.proxies.fit import fit
from fifa.proxies.objectives import assemble, find_removal, fit_ridge, worst_correlation
from fifa.proxies.ratings import Ratings, rating_features
from fifa.proxies.splits import split_pairs
from fifa.rewards import load_reward, score_images
from fifa.rewards.encoders import Encoder, load_encoder
from fifa.rewards.fitted import FittedReward, ObjectivesProxy
from fifa.rewards.nuisance import NUISANCES

# ---- ridge heads ---------------------------------------------------------------------------------


def rated(rows: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, two noisy linear ratings of which a third is missing, and the parts of rows."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 4))
    y = (
        x @ np.array([[2.0, 0, 0, 1], [0, -3, 0.5, 0]]).T
        + [5, 100]
        + 0.3 * rng.normal(size=(rows, 2))
    )
    y[rng.random(y.shape) < 1 / 3] = np.nan
    return x, y, np.arange(rows) % 3


def test_ridge_heads_solve_the_normal_equations_of_the_rows_that_have_the_rating() -> None:
    x, y, part = rated()
    heads = fit_ridge(x, y, part, ("a", "b"))
    for k in range(2):
        seen = np.isfinite(y[:, k]) & (part < 2)
        target = (y[seen, k] - y[seen, k].mean()) / y[seen, k].std()
        centred = x[seen] - x[seen].mean(0)
        gram = centred.T @ centred + heads.alpha[k] * np.eye(4)
        weight = np.linalg.solve(gram, centred.T @ target)
        np.testing.assert_allclose(heads.weight[k], weight, rtol=1e-6)
        np.testing.assert_allclose(heads.bias[k], -x[seen].mean(0) @ weight, atol=1e-9)
        assert heads.r2[k] > 0.95
        assert heads.ratings[k] == np.isfinite(y[:, k]).sum()


def test_noise_asks_for_a_stronger_ridge() -> None:
    x, y, part = rated()
    noise = np.random.default_rng(1).normal(size=y.shape)
    weak, strong = fit_ridge(x, y, part, ("a", "b")), fit_ridge(x, noise, part, ("a", "b"))
    assert (strong.alpha > weak.alpha).all()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda y: y * np.nan, "'b' has 0 ratings outside the test part"),
        (lambda y: np.where(np.arange(300) < 3, y, np.nan), "it needs 20"),
        (lambda y: y * 0 + 3, "'b' is 3 in every row"),
        (lambda y: np.where(np.arange(300) % 3 == 0, y, np.nan), "0 of them for validation"),
    ],
)
def test_ratings_that_teach_nothing_are_one_sentence(change: Any, part: str) -> None:
    x, y, parts = rated()
    y[:, 1] = change(np.nan_to_num(y[:, 1]))
    with pytest.raises(InputError, match=part):
        fit_ridge(x, y, parts, ("a", "b"))


# ---- nuisances -----------------------------------------------------------------------------------


def test_several_nuisances_are_taken_out_at_once() -> None:
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(2000, 3)) @ np.array([[1, 0.6, 0], [0, 1, 0.3], [0, 0, 1]])
    nuisances = np.column_stack([mixed[:, 0], np.exp(mixed[:, 1]), mixed[:, 2], np.zeros(2000)])
    own = rng.normal(size=2000)
    rewards = np.column_stack([own + mixed[:, 0] - 2 * nuisances[:, 1] ** 0.5, own])
    removal = find_removal(rewards, nuisances, 0.03)
    left = rewards - nuisances @ removal.T
    for k in range(2):
        for j in range(3):
            assert abs(spearmanr(left[:, k], nuisances[:, j]).statistic) <= 0.03
        assert worst_correlation(left[:, k], nuisances) == pytest.approx(
            max(abs(spearmanr(left[:, k], nuisances[:, j]).statistic) for j in range(3))
        )
    assert spearmanr(left[:, 0], own).statistic > 0.8


def test_a_clean_reward_is_left_alone() -> None:
    nuisance = np.array([-1.0, 1, -1, 1])[:, None]
    reward = np.array([1.0, 1, 2, 2])[:, None]
    assert find_removal(reward, nuisance, 0.03).tolist() == [[0.0]]


# ---- the whole of it on a small world ------------------------------------------------------------

CARES = np.array([[3.0, 0.0], [0.0, 3.0]])  # of two kinds of prompts for two objectives


def world(rows: int = 800, seed: int = 0) -> tuple[PairFeatures, Ratings, np.ndarray]:
    """Pairs, ratings into which a nuisance leaks, and which objective each prompt cares for."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(16, 5)))[0].T
    kind = np.arange(120) % 2
    texts = 3 * basis[3:][kind] + 0.1 * rng.normal(size=(120, 16))
    seen = rng.normal(size=(2 * rows, 3))
    nuisances = np.zeros((2 * rows, len(NUISANCES)), np.float32)
    nuisances[:, 2] = 7 + 2 * seen[:, 2]
    first, second, prompt = np.arange(rows), np.arange(rows) + rows, np.arange(rows) % 120
    delta = (CARES[kind[prompt]] * (seen[first, :2] - seen[second, :2])).sum(1)
    pairs = PairFeatures(
        pictures=(seen @ basis[:3]).astype(np.float32),
        nuisances=nuisances,
        texts=texts.astype(np.float32),
        prompts=tuple(f"prompt {i}" for i in range(120)),
        first=first,
        second=second,
        prompt=prompt,
        label=(rng.random(rows) < 1 / (1 + np.exp(-delta))).astype(np.float32),
        users=("",) * rows,
        row=np.arange(rows),
        rejected=(),
        data="d",
        encoder="e",
    )
    values = seen[first, :2] + 0.8 * seen[first, 2:]
    values[rng.random(values.shape) < 0.5] = np.nan
    names = tuple(pairs.prompts[i] for i in prompt)
    ratings = Ratings(
        ("fit", "neat"), values, names, pairs.pictures[first], pairs.texts[prompt], ()
    )
    return pairs, ratings, kind


def assembled(
    correlation: float = 0.03,
) -> tuple[ObjectivesProxy, dict[str, Any], PairFeatures, Any]:
    pairs, ratings, kind = world()
    config = settings(kind="objectives", ratings="r", rank_correlation=correlation)
    split = split_pairs(pairs, 0.2, 0, drop_ties=False)
    proxy, facts = assemble(config, pairs, split, ratings)
    return proxy, facts, pairs, (split, kind)


def test_the_gate_finds_what_each_prompt_cares_for_on_debiased_rewards() -> None:
    proxy, facts, pairs, (split, kind) = assembled()
    raw, _, _, _ = assembled(correlation=1.0)
    test = split.test
    top = proxy.gate(torch.tensor(pairs.texts)).argmax(1).numpy()
    assert (top == kind).mean() > 0.95
    right = {}
    for name, fitted in (("clean", proxy), ("raw", raw)):
        margin = margins_of(fitted, pairs, test)[0]
        right[name] = ((margin > 0) == (pairs.label[test] > 0.5)).mean()
    assert right["clean"] > right["raw"] + 0.05
    assert not raw.removal.any()
    for fact in facts.values():
        assert fact["before"] > 0.4
        assert fact["after"] < 0.2  # on 160 pictures that the removal did not see
        assert fact["r2"] > 0.95


def test_the_total_is_the_sum_of_the_parts() -> None:
    proxy, _, pairs, _ = assembled()
    rows = (
        torch.tensor(pairs.pictures[pairs.first]),
        torch.tensor(pairs.nuisances[pairs.first]),
        torch.tensor(pairs.texts[pairs.prompt]),
    )
    parts = proxy.rewards(*rows).double() * proxy.gate(rows[2]).double()
    total = proxy.scores(*rows)[0].double()
    assert float((total - parts.sum(1)).abs().max()) < 1e-5
    assert float(((total - parts.sum(1)) / total.abs().clamp(min=1)).abs().max()) < 1e-6


# ---- rating tables -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini() -> Encoder:
    return load_encoder("mini")


def write_ratings(path: Path, rows: int = 60, **changed: Any) -> Path:
    """Ratings of noise pictures by how loud they are, and of nothing at all."""
    rng = np.random.default_rng(0)
    loud = [float(i % 23) for i in range(rows)]
    found = {
        "caption": [caption(i) for i in range(rows)],
        "jpg": [picture(i) for i in range(rows)],
        "loud": loud,
        "odd": rng.normal(size=rows).tolist(),
        "truth_secret": loud,
    }
    pq.write_table(pa.table({**found, **changed}), path)
    return path


def test_ratings_with_holes_are_read(tmp_path: Path, mini: Encoder) -> None:
    loud = [1.0, None, float("nan"), float("inf"), 5.0, 6.0]
    path = write_ratings(
        tmp_path / "r.parquet",
        6,
        loud=loud,
        odd=[None, None, 3.0, 3.0, 3.0, 3.0],
        jpg=[*(picture(i) for i in range(4)), b"broken", None],
    )
    found = rating_features(path, (), mini, None)
    assert found.objectives == ("loud", "odd")
    np.testing.assert_array_equal(found.values, [[1, np.nan], [np.nan, 3], [np.nan, 3]])
    assert [(row.row, row.kind) for row in found.rejected] == [
        (1, "there is no rating"),
        (4, "the picture cannot be decoded"),
        (5, "there is no picture"),
    ]


def test_a_number_that_names_something_is_no_rating(tmp_path: Path, mini: Encoder) -> None:
    ids = {"rater_id": range(4), "ID": range(4), "imageId": range(4), "ids.of.pairs": range(4)}
    more = {name: list(values) for name, values in ids.items()}
    path = write_ratings(tmp_path / "r.parquet", 4, **more, grid=[1.0, 2.0, 3.0, 4.0])
    assert rating_features(path, (), mini, None).objectives == ("loud", "odd", "grid")
    assert rating_features(path, ("rater_id",), mini, None).objectives == ("rater_id",)


def test_ratings_come_from_csv_and_jsonl_beside_their_pictures(
    tmp_path: Path, mini: Encoder
) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    lines = [{"prompt": f"p {i}", "image": f"{i}.png", "score": float(i)} for i in range(2)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "r.csv").write_text(
        "prompt,image,score\np 0,0.png,0.0\np 1,1.png,1.0\np 2,no.png,2\n"
    )
    one, two = (
        rating_features(tmp_path / f"r.{kind}", (), mini, None) for kind in ("jsonl", "csv")
    )
    np.testing.assert_array_equal(one.values, [[0], [1]])
    np.testing.assert_array_equal(one.values, two.values)
    np.testing.assert_array_equal(one.pictures, two.pictures)
    assert [row.row for row in two.rejected] == [2]
    expected = mini.pictures(to_batch([decode(picture(1), "x")]))[0]
    np.testing.assert_allclose(one.pictures[1], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "wanted", "part"),
    [
        ({}, ("lout",), "did you mean 'loud'"),
        ({}, ("truth_secret",), "unknown objective"),
        ({"loud": ["a"] * 4, "odd": ["b"] * 4}, (), "no numeric column"),
        ({"loud": [None] * 4, "odd": [float("nan")] * 4}, ("odd",), "not one row"),
    ],
)
def test_a_rating_table_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, mini: Encoder, changed: dict[str, Any], wanted: tuple[str, ...], part: str
) -> None:
    path = write_ratings(tmp_path / "r.parquet", 4, **changed)
    with pytest.raises(InputError, match=part):
        rating_features(path, wanted, mini, None)


def test_a_file_of_another_kind_is_one_sentence(tmp_path: Path, mini: Encoder) -> None:
    (tmp_path / "r.parquet").write_bytes(b"x")
    for name, part in (("r.txt", "must be a .parquet"), ("r.parquet", "cannot read")):
        with pytest.raises(InputError, match=part):
            rating_features(tmp_path / name, (), mini, None)
    (tmp_path / "r.csv").write_text("prompt,score\na,1\n")
    with pytest.raises(InputError, match="no column 'jpg' or 'image'"):
        rating_features(tmp_path / "r.csv", (), mini, None)


# ---- from tables to a reward that explains itself ------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in which people prefer loud pictures, ratings of loudness, and the proxy `armo`."""
    place = tmp_path_factory.mktemp("armo")
    rows = 120
    first = [float(7 * i % 23 >= (7 * i + 11) % 23) for i in range(rows)]
    write_pairs(
        place / "d.parquet",
        rows,
        100,
        jpg_0=[picture(7 * i) for i in range(rows)],
        jpg_1=[picture(7 * i + 11) for i in range(rows)],
        label_0=first,
        label_1=[1 - label for label in first],
    )
    write_ratings(place / "r.parquet", 160)
    fit(
        FitConfig(
            pairs=place / "d.parquet",
            out=place / "armo",
            kind="objectives",
            ratings=place / "r.parquet",
            held_out=0.2,
            epochs=3,
            batch_size=32,
            rank_correlation=1.0,  # here the nuisance is the very thing that is rated
        )
    )
    for i in (22, 1):
        (place / f"{i}.png").write_bytes(picture(i))
    return place


def batch(*seeds: int) -> torch.Tensor:
    return to_batch([decode(picture(seed), "x") for seed in seeds])


def test_an_explanation_adds_up_to_the_reward(folder: Path) -> None:
    found = explain(folder / "armo", caption(3), [folder / "22.png", folder / "1.png"])
    reward = load_reward(f"fitted:{folder / 'armo'}")
    scores = score_images(reward, batch(22, 1), [caption(3)] * 2)
    np.testing.assert_allclose(found.totals, scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.parts.sum(1), found.totals, atol=1e-6)
    assert found.objectives == ("loud", "odd")
    lines = found.lines()
    assert [line[0] for line in lines] == [
        *(found.objectives[k] for k in np.argsort(-found.coefficients)),
        "total",
    ]
    assert lines[-1][2] == f"{found.totals[0]:+.3f}"
    assert not reward.differentiable


def test_an_objective_alone_is_a_reward(folder: Path) -> None:
    by_path = load_reward(f"fitted:{folder / 'armo'}#loud")
    by_name = FittedReward(str(folder / "armo"), objective="loud")
    scores = score_images(by_path, batch(22, 1), ["a", "b"])
    assert torch.equal(scores, by_name(batch(22, 1), ["a", "b"]))
    assert scores[0] > scores[1]
    assert by_path.name.endswith("#loud")
    rewards, _ = by_name.explain(batch(22, 1), ["a", "b"])
    torch.testing.assert_close(scores, rewards[:, 0])
    with pytest.raises(InputError, match="did you mean 'loud'"):
        load_reward(f"fitted:{folder / 'armo'}#lout")


def test_an_export_weighs_the_objectives_alike_for_every_prompt(folder: Path) -> None:
    export(folder / "armo", {"loud": 2.0, "odd": 0.5}, folder / "both")
    export(folder / "armo", {"odd": 1.0}, folder / "odd")
    prompts = ["a red star", "two blue squares"]
    rewards, _ = FittedReward(str(folder / "armo")).explain(batch(22, 1), prompts)
    both = load_reward(f"fitted:{folder / 'both'}")(batch(22, 1), prompts)
    torch.testing.assert_close(both, 2 * rewards[:, 0] + 0.5 * rewards[:, 1])
    odd = load_reward(f"fitted:{folder / 'odd'}")(batch(22, 1), prompts)
    torch.testing.assert_close(odd, rewards[:, 1])


@pytest.mark.parametrize(
    ("weights", "part"),
    [
        ({"lout": 1.0}, "did you mean 'loud'"),
        ({"loud": 0.0}, "must be positive"),
        ({"loud": float("nan")}, "must be positive"),
    ],
)
def test_weights_that_make_no_reward_are_one_sentence(
    folder: Path, weights: dict[str, float], part: str
) -> None:
    with pytest.raises(InputError, match=part):
        export(folder / "armo", weights, folder / "never")
    assert not (folder / "never").exists()


def test_weights_are_parsed() -> None:
    assert parse_weights("a=1, b=.5") == {"a": 1.0, "b": 0.5}
    with pytest.raises(InputError, match="found 'b'"):
        parse_weights("a=1,b")


def test_the_card_tells_of_each_objective(folder: Path) -> None:
    card = read_card(folder / "armo")
    assert card.objectives["loud"]["ratings"] == 160
    assert card.objectives["loud"]["r2"] > 0.5 > card.objectives["odd"]["r2"]
    assert "| loud | 160 |" in (folder / "armo" / "card.md").read_text()


def test_ratings_that_cannot_be_used_are_on_the_card_and_the_terminal(folder: Path) -> None:
    half = [picture(i) if i % 2 else None for i in range(160)]
    write_ratings(folder / "half.parquet", 160, jpg=half, rater_id=list(range(160)))
    out = folder / "half"
    command = ["reward", "fit", str(folder / "d.parquet"), "--out", str(out)]
    command += ["--kind", "objectives", "--ratings", str(folder / "half.parquet")]
    told = CliRunner().invoke(app, [*command, "--set", "epochs=1", "--set", "held_out=0.2"])
    assert told.exit_code == 0, told.output
    assert "objectives: loud, odd\n" in told.output
    assert "  set aside, 80 ratings: there is no picture\n" in told.output
    assert read_card(out).rejected_ratings == {"there is no picture": 80}
    assert "80 ratings: there is no picture" in (out / "card.md").read_text()


def test_the_commands_explain_draw_and_export(folder: Path) -> None:
    runner = CliRunner()
    pictures = [str(folder / "22.png"), str(folder / "1.png")]
    plot = folder / "why.png"
    command = ["reward", "explain", str(folder / "armo"), caption(3), *pictures]
    found = runner.invoke(app, [*command, "--plot", str(plot)])
    assert found.exit_code == 0, found.output
    assert "total" in found.output
    assert Image.open(io.BytesIO(plot.read_bytes())).size[0] > 300
    command = ["reward", "export", str(folder / "armo"), "loud=1", "--out", str(folder / "l")]
    found = runner.invoke(app, command)
    assert found.exit_code == 0, found.output
    with pytest.raises(InputError, match=r"must end in \.png"):
        draw(explain(folder / "armo", "a", [folder / "1.png"]), folder / "why.txt")
    with pytest.raises(InputError, match="cannot read"):
        explain(folder / "armo", "a", [folder / "no.png"])


def test_a_scalar_proxy_has_nothing_to_export(folder: Path) -> None:
    fit(
        FitConfig(
            pairs=folder / "d.parquet", out=folder / "scalar", held_out=0.2, epochs=1, members=1
        )
    )
    with pytest.raises(InputError, match="no objectives to export"):
        export(folder / "scalar", {"loud": 1.0}, folder / "never")


def test_ratings_of_test_prompts_stay_out_of_the_fit() -> None:
    pairs, ratings, _ = world()
    config = settings(kind="objectives", ratings="r", epochs=1)
    split = split_pairs(pairs, 0.2, 0, drop_ties=False)
    held = set(pairs.prompt[split.test].tolist())
    test = np.array([pairs.prompts.index(name) in held for name in ratings.prompts])
    wild = dataclasses.replace(ratings, values=np.where(test[:, None], 1e6, ratings.values))
    same, _ = assemble(config, pairs, split, ratings)
    other, facts = assemble(config, pairs, split, wild)
    assert torch.equal(same.ridge.weight, other.ridge.weight)
    assert facts["fit"]["r2"] < 0.5  # against values that only the test saw

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fifa.config import InputError
from fifa.images import decode, to_batch
from fifa.miniworld import vocabulary as words
from fifa.miniworld.annotators import (
    GROUPS,
    TIE,
    Annotators,
    Impression,
    Population,
    impression,
    mean_utility,
    meaning,
    scene_view,
    utilities,
)
from fifa.miniworld.captions import (
    Group,
    Request,
    UnparsedPrompt,
    parse,
    phrase,
    prompts,
    sample_request,
)
from fifa.miniworld.dataset import PIPELINE, SCHEMA, write_dataset
from fifa.miniworld.oracle import check, judge, look, neatness, view_neatness
from fifa.miniworld.painters import PAINTER_SHARES, paint
from fifa.miniworld.scenes import INSIDE, SIZE, Scene, compose, render, sample_scene, shape_mask
from fifa.miniworld.wild import PROMPT_SHARES, WildPrompt, draw_prompt
from fifa.pairs import BadRow, PairTable
from fifa.rewards.miniworld import NeatnessReward, OracleReward, StrictOracleReward


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def scenes(n: int, seed: int = 0) -> list[tuple[Scene, Request]]:
    rng = generator(seed)
    return [sample_scene(rng) for _ in range(n)]


# ---- captions ------------------------------------------------------------------------------------


def test_what_is_put_into_words_is_read_back() -> None:
    rng = generator()
    for _ in range(1500):
        request = sample_request(rng)
        text = phrase(request, rng)
        assert parse(text).key == request.key, text


@pytest.mark.parametrize(
    ("prompt", "request_"),
    [
        ("a red circle", Request((Group("circle", "red"),))),
        ("An  AZURE ball!!", Request((Group("circle", "blue"),))),
        ("3 tiny crosses", Request((Group("cross", None, "small", 3),))),
        ("a pair of pluses", Request((Group("cross", None, None, 2),))),
        (
            "a photo of a big golden star under one square on a cream canvas, 8k",
            Request((Group("star", "yellow", "large"), Group("square")), "below", "beige"),
        ),
        (
            "a green box and two pink triangles",
            Request((Group("square", "green"), Group("triangle", "pink", None, 2))),
        ),
    ],
)
def test_a_prompt_means_what_a_person_would_say(prompt: str, request_: Request) -> None:
    assert parse(prompt) == request_


@pytest.mark.parametrize("prompt", ["", "a cat on a mat", "красный круг", "circleville", "8k hdr"])
def test_a_prompt_about_nothing_is_refused_in_one_sentence(prompt: str) -> None:
    with pytest.raises(UnparsedPrompt, match=r"names nothing of the mini world; .*circle"):
        parse(prompt)


def test_splits_are_disjoint_by_meaning() -> None:
    train = {parse(prompt).key for prompt in prompts("train", 1500)}
    heldout = {parse(prompt).key for prompt in prompts("heldout", 300)}
    assert len(train) == 1500
    assert len(heldout) == 300
    assert not train & heldout


def test_every_wording_of_a_meaning_is_in_one_split() -> None:
    rng = generator(1)
    for _ in range(100):
        request = sample_request(rng, "heldout")
        assert {parse(phrase(request, rng)).split for _ in range(10)} == {"heldout"}


def test_about_a_tenth_of_all_requests_is_held_out() -> None:
    rng = generator(2)
    share = np.mean([sample_request(rng).split == "heldout" for _ in range(3000)])
    assert 0.06 < share < 0.14


def test_a_longer_list_of_prompts_begins_with_the_shorter() -> None:
    assert prompts("heldout", 40, seed=3)[:15] == prompts("heldout", 15, seed=3)
    assert prompts("heldout", 15, seed=4) != prompts("heldout", 15, seed=3)


# ---- scenes --------------------------------------------------------------------------------------


def test_scenes_are_deterministic_by_seed() -> None:
    first, again, other = scenes(20, 5), scenes(20, 5), scenes(20, 6)
    assert first == again
    assert first != other
    assert all(
        np.array_equal(render(a[0]), render(b[0])) for a, b in zip(first, again, strict=True)
    )


def test_a_scene_holds_what_was_asked_and_nothing_else() -> None:
    for scene, request in scenes(300, 7):
        assert len(scene.things) == sum(group.count for group in request.groups)
        assert request.background in (None, scene.background)
        for group in request.groups:
            fitting = [t for t in scene.things if _fits(t, group)]
            assert len(fitting) == group.count


def test_a_picture_shows_each_thing_in_its_colour_on_its_backdrop() -> None:
    for scene, _ in scenes(100, 8):
        image = render(scene).astype(float)
        assert image.shape == (SIZE, SIZE, 3)
        limit = scene.texture_strength + 1
        assert np.abs(image[0, 0] - scene.background_rgb).max() <= limit
        for thing in scene.things:
            centre = image[int(thing.y), int(thing.x)]
            np.testing.assert_allclose(centre, thing.rgb, atol=1)


def test_things_keep_apart_and_inside() -> None:
    for scene, _ in scenes(200, 9):
        for i, a in enumerate(scene.things):
            assert a.radius < min(a.x, a.y, SIZE - a.x, SIZE - a.y)
            for b in scene.things[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", math.pi),
        ("square", (2 * 0.92) ** 2),
        ("triangle", 1.85 * 1.85 / 2),  # height times base over two
        ("cross", 2 * (2 * 0.66) - 0.66**2),
    ],
)
def test_a_mask_covers_the_area_of_its_shape(shape: str, area: float) -> None:
    mask = shape_mask(shape, 10.0, 12.3, 11.9)
    assert mask.min() >= 0
    assert mask.max() == 1
    assert float(mask.sum()) == pytest.approx(area * 100, rel=0.01)


def test_a_star_has_five_points() -> None:
    angles = np.linspace(0, 2 * np.pi, 360, endpoint=False)
    ring = INSIDE["star"](0.8 * np.cos(angles), 0.8 * np.sin(angles) - 0.05)
    assert int((ring & ~np.roll(ring, 1)).sum()) == 5


# ---- the oracle ----------------------------------------------------------------------------------


def _fits(thing: object, group: Group) -> bool:
    return all(
        wanted in (None, getattr(thing, name))
        for name, wanted in (("shape", group.shape), ("colour", group.colour), ("size", group.size))
    )


BEFORE: dict[str, Callable[[float, float, float, float], float]] = {
    "left of": lambda ax, ay, bx, by: bx - ax,
    "right of": lambda ax, ay, bx, by: ax - bx,
    "above": lambda ax, ay, bx, by: by - ay,
    "below": lambda ax, ay, bx, by: ay - by,
}


def truth(scene: Scene, request: Request) -> list[bool]:
    """Which conditions hold, from the scene itself and in other words than the oracle's."""
    holds = []
    for group in request.groups:
        ladder = [Group(group.shape)]
        if group.colour:
            ladder.append(replace(ladder[-1], colour=group.colour))
        if group.size:
            ladder.append(replace(ladder[-1], size=group.size))
        holds += [any(_fits(t, step) for t in scene.things) for step in ladder]
        holds.append(sum(_fits(t, group) for t in scene.things) == group.count)
    if request.relation:
        first, second = request.groups
        gaps = [
            BEFORE[request.relation](a.x, a.y, b.x, b.y)
            for a in scene.things
            for b in scene.things
            if a is not b and _fits(a, first) and _fits(b, second)
        ]
        # between touching (certainly not) and clearly apart nothing is promised
        holds.append(max(gaps, default=-1.0) >= 4)
    if request.background:
        holds.append(scene.background == request.background)
    return holds


def _verdict(image: np.ndarray, request: Request) -> list[bool]:
    return [condition.holds for condition in judge(look(image), request).conditions]


def test_the_oracle_is_right_on_clean_renders() -> None:
    right = 0
    for scene, request in scenes(1000, 10):
        seen = look(render(scene))
        things = sorted((str(t.shape), t.colour, t.size) for t in seen.things)
        wanted = sorted((t.shape, t.colour, t.size) for t in scene.things)
        right += things == wanted and seen.background == scene.background
        assert all(truth(scene, request))
    assert right >= 0.99 * 1000


def test_the_oracle_is_right_on_prompts_that_the_picture_does_not_answer() -> None:
    rng = generator(11)
    drawn = scenes(800, 12)
    right, fulfilled = 0, 0
    for scene, request in drawn:
        wrong = drawn[int(rng.integers(len(drawn)))][1]
        image = render(scene)
        for asked in (request, wrong):
            holds = _verdict(image, asked)
            right += holds == truth(scene, asked)
            fulfilled += all(holds)
    assert right >= 0.99 * 1600
    assert 800 <= fulfilled < 1000  # mismatched prompts rarely hold


def test_the_oracle_notices_a_single_wrong_attribute() -> None:
    rng = generator(13)
    verdicts = []
    for _ in range(300):
        request = sample_request(rng)
        made = paint("sloppy", request, rng)
        assert made.truth is not None
        assert not judge(made.truth, request).all_hold
        verdicts.append(judge(look(made.pixels), request).all_hold)
    assert sum(verdicts) <= 3


def test_the_oracle_sees_through_a_little_noise() -> None:
    rng = generator(14)
    right = []
    for scene, request in scenes(300, 15):
        noisy = render(scene) + rng.normal(0, 8, (SIZE, SIZE, 3))
        right.append(all(_verdict(np.clip(noisy, 0, 255).astype(np.uint8), request)))
    assert np.mean(right) >= 0.97


def test_a_verdict_by_hand() -> None:
    request = parse("a red circle left of a blue square")
    image = render(compose(request, generator(16)))
    assert check(image, "a red circle left of a blue square").all_hold
    verdict = check(image, "two red circles right of a small green square")
    kinds = [condition.kind for condition in verdict.conditions]
    assert kinds == ["object", "colour", "count", "object", "colour", "size", "count", "relation"]
    holds = [condition.holds for condition in verdict.conditions]
    assert holds == [True, True, False, True, False, False, False, False]
    assert verdict.share == pytest.approx(3 / 8)


def test_the_oracle_bears_any_picture() -> None:
    rng = generator(17)
    noise = rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    half = np.zeros((SIZE, SIZE, 3), np.uint8)
    half[:, : SIZE // 2] = (222, 38, 38)  # a piece that touches three sides of the frame
    for image in (noise, half, np.zeros_like(noise), np.full_like(noise, 255)):
        assert 0 <= neatness(image) <= 1
        assert check(image, "four stars").share in (0.0, 0.5, 1.0)


def test_the_oracle_reads_one_format_only() -> None:
    for image in (np.zeros((8, 8, 3), np.uint8), np.zeros((SIZE, SIZE, 3), np.float32)):
        with pytest.raises(ValueError, match="the oracle reads uint8 images of shape"):
            look(image)  # type: ignore[arg-type]
    with pytest.raises(UnparsedPrompt):
        check(np.zeros((SIZE, SIZE, 3), np.uint8), "a cat")


def test_dirt_is_not_neat() -> None:
    rng = generator(18)
    by_painter = {
        painter: np.mean(
            [neatness(paint(painter, sample_request(rng), rng).pixels) for _ in range(60)]
        )
        for painter in ("faithful", "blurry", "cluttered", "jpeg", "noisy")
    }
    assert max(by_painter, key=lambda p: by_painter[p]) == "faithful"
    assert by_painter["noisy"] < by_painter["jpeg"] < by_painter["faithful"] - 0.1


# ---- annotators ----------------------------------------------------------------------------------


def crowd(**changes: float) -> Annotators:
    settings = {"careless": 0.0, "flip": 0.0, **changes}
    return Annotators(Population(**settings), seed=0)  # type: ignore[arg-type]


def outcomes(
    people: Annotators, margin: float, n: int = 60_000
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Shares of (first wins, second wins, tie) where every user prefers the first by `margin`."""
    rng = generator(19)
    users = people.draw(n, rng)
    better = np.full((n, len(GROUPS)), margin)
    answers = people.answer(users, better, np.zeros_like(better), rng)
    return np.bincount(answers.outcome, minlength=3) / n


@pytest.mark.parametrize("margin", [-1.5, 0.0, 0.4, 3.0])
def test_choices_follow_rao_and_kupper(margin: float) -> None:
    shares = outcomes(crowd(temperature=2.0, tie_half_width=0.5), margin)
    # as they wrote it: worths pi, threshold theta; one half-width in logits is log theta
    first, second, theta = math.exp(margin / 2), 1.0, math.exp(0.5)
    expected = [
        first / (first + theta * second),
        second / (second + theta * first),
        (theta**2 - 1) * first * second / ((first + theta * second) * (second + theta * first)),
    ]
    np.testing.assert_allclose(shares, expected, atol=0.008)


def test_without_a_half_width_nobody_calls_a_tie() -> None:
    assert outcomes(crowd(tie_half_width=0.0), 0.0)[TIE] == 0


def test_a_flip_reverses_a_strict_answer() -> None:
    people = crowd(tie_half_width=0.0, flip=0.25)
    assert outcomes(people, 100.0)[0] == pytest.approx(0.75, abs=0.01)
    rng = generator(20)
    users = people.draw(500, rng)
    sure = np.full((500, len(GROUPS)), 100.0)
    answers = people.answer(users, sure, 0 * sure, rng)
    assert np.array_equal(answers.outcome == 1, answers.flipped)


def test_careless_users_do_not_look() -> None:
    shares = outcomes(crowd(careless=1.0, careless_ties=0.2), 100.0)
    np.testing.assert_allclose(shares, [0.4, 0.4, 0.2], atol=0.01)


def test_a_user_follows_the_taste_of_the_own_group() -> None:
    people = crowd(tie_half_width=0.0)
    rng = generator(21)
    users = people.draw(2000, rng)
    likes = np.tile([100.0, -100.0, 100.0, -100.0], (2000, 1))
    answers = people.answer(users, likes, 0 * likes, rng)
    assert np.array_equal(answers.outcome, people.group[users] % 2)
    assert set(people.group.tolist()) == {0, 1, 2, 3}


def test_some_users_judge_much_more_than_others() -> None:
    users = crowd().draw(20_000, generator(22))
    counts = np.sort(np.bincount(users, minlength=400))[::-1]
    assert counts[0] > 5 * counts[200]
    assert counts[0] < 0.1 * 20_000


def test_utility_by_hand() -> None:
    people = Population(alignment=3, complete=1, neat=2, taste=0.5)
    seen = [
        Impression(1.0, 0.5, (1, 0, 0, 1)),
        Impression(0.5, 1.0, (0, 0.5, 0, 0)),
        Impression(float("nan"), 0.25, (0, 0, 1, 0)),
    ]
    expected = [[5.5, 5, 5, 5.5], [3.5, 3.75, 3.5, 3.5], [0.5, 0.5, 1.0, 0.5]]
    np.testing.assert_allclose(utilities(seen, people), expected)


def test_what_each_group_likes() -> None:
    def features(prompt: str, texture: float = 0.0) -> dict[str, float]:
        scene = replace(
            compose(parse(prompt), generator(23)), texture="checks", texture_strength=texture
        )
        seen = impression(look(render(scene)), None).features
        return dict(zip(GROUPS, seen, strict=True))

    dark = features("a large red square on a black background")
    light = features("two small blue squares on a white background")
    assert dark["warm"] == 1
    assert light["warm"] == 0
    assert dark["dark"] > 0.8 > 0.2 > light["dark"]
    assert dark["large"] == 1
    assert light["large"] == 0
    assert features("a star", 0.0)["plain"] > features("a star", 10.0)["plain"] + 0.3


def test_mean_utility_looks_at_pixels_and_prompt_only() -> None:
    scene = replace(compose(parse("a red circle"), generator(24)), texture_strength=0.0)
    image = render(scene)
    values = mean_utility([image] * 3, ["a red circle", "a blue circle", "a cat"])
    population = Population()
    one_of_three = population.alignment * (1 - 1 / 3) + population.complete
    assert values[0] - values[1] == pytest.approx(one_of_three)
    assert values[0] - values[2] == pytest.approx(population.alignment + population.complete)


@pytest.mark.parametrize(
    "setting", [{"careless": 1.5}, {"flip": -0.1}, {"users": 0}, {"temperature": 0.0}]
)
def test_an_impossible_crowd_is_refused(setting: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"Population.*{next(iter(setting))}"):
        Population(**setting)  # type: ignore[arg-type]


# ---- prompts of the wild -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def typed() -> list[WildPrompt]:
    rng = generator(25)
    return [draw_prompt(rng, seed=0) for _ in range(4000)]


def test_no_dirt_ever_means_something_held_out(typed: list[WildPrompt]) -> None:
    for prompt in typed:
        read = meaning(prompt.text)
        assert read is None or read.split == "train", prompt
        assert prompt.request is None or prompt.request.split == "train", prompt
        assert prompt.request is not None or read is None, prompt


def test_kinds_of_prompts_come_in_their_shares(typed: list[WildPrompt]) -> None:
    kinds = Counter(prompt.kind for prompt in typed)
    assert sum(PROMPT_SHARES.values()) == pytest.approx(1)
    for kind, share in PROMPT_SHARES.items():
        assert kinds[kind] / len(typed) == pytest.approx(share, abs=0.02)
        assert kinds[kind] > 0


def test_clean_kinds_mean_what_they_say(typed: list[WildPrompt]) -> None:
    for prompt in typed:
        if prompt.kind in ("fresh", "popular"):
            assert prompt.request is not None
            assert parse(prompt.text).key == prompt.request.key


def test_popular_prompts_repeat_and_near_duplicates_differ_a_little(
    typed: list[WildPrompt],
) -> None:
    popular = Counter(prompt.text for prompt in typed if prompt.kind == "popular")
    counts = [count for _, count in popular.most_common()]
    assert counts[0] > 20
    assert counts[-1] == 1
    known = set(prompts("train", 2000, seed=0))
    near = [prompt for prompt in typed if prompt.kind == "near_duplicate"]
    assert sum(prompt.text in known for prompt in near) < 0.05 * len(near)
    assert len({prompt.text for prompt in near}) > 0.8 * len(near)


def test_the_other_kinds_look_like_what_they_are(typed: list[WildPrompt]) -> None:
    texts = {kind: [p.text for p in typed if p.kind == kind] for kind in PROMPT_SHARES}
    assert all("https://" in text for text in texts["url"])
    letters = "".join(texts["other_script"])
    for low, high in (("\u4e00", "\u9fff"), ("а", "я"), ("\u0621", "\u064a")):
        assert any(low <= letter <= high for letter in letters)
    assert all(text.strip() for text in texts["gibberish"])


# ---- the data set --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    write_dataset(out, 600, seed=1, workers=1, rows_per_shard=300)
    return out


def rows(folder: Path) -> list[dict[str, object]]:
    return pa.concat_tables(
        pq.read_table(file) for file in sorted(folder.glob("*.parquet"))
    ).to_pylist()


def test_the_pair_table_reads_it_without_the_truth(data: Path) -> None:
    table = PairTable.open(data)
    assert table.num_rows == 600
    assert table.schema.equals(SCHEMA)
    groups = range(len(table.row_groups()))
    judgments = [judgment for group in groups for judgment in table.judgments(group)]
    assert len(judgments) == 600
    assert not any(isinstance(judgment, BadRow) for judgment in judgments)
    assert not any(name.startswith("truth_") for name in table.read_group(0).schema.names)


def test_rows_are_consistent(data: Path) -> None:
    for shard in sorted(data.glob("*.parquet")):
        content = pq.read_table(shard).to_pylist()
        captions = Counter(row["caption"] for row in content)
        for row in content:
            assert row["num_example_per_prompt"] == captions[row["caption"]]
    everything = rows(data)
    assert [row["ranking_id"] for row in everything] == list(range(600))
    assert len({row["image_0_uid"] for row in everything}) == 600
    best = {1.0: "image_0_uid", 0.0: "image_1_uid"}
    for row in everything:
        assert row["label_0"] + row["label_1"] == 1  # type: ignore[operator]
        winner = row[best[row["label_0"]]] if row["label_0"] != 0.5 else "tie"  # type: ignore[index]
        assert row["best_image_uid"] == winner
        assert row["are_different"] == (row["jpg_0"] != row["jpg_1"])
    times = [row["created_at"] for row in everything]
    assert times == sorted(times)  # type: ignore[type-var]


def test_the_hidden_truth_is_true(data: Path) -> None:
    checked, right = 0, 0
    for row in rows(data):
        for side in "01":
            if row[f"model_{side}"] in ("faithful", "sloppy", "off-topic"):
                if row["truth_prompt_kind"] not in ("fresh", "popular"):
                    continue
                image = decode(row[f"jpg_{side}"], "row")  # type: ignore[arg-type]
                utility = mean_utility([image], [str(row["caption"])])[0]
                checked += 1
                right += utility == pytest.approx(row[f"truth_utility_{side}"])
    assert checked > 300
    assert right >= 0.99 * checked


def test_prompts_about_nothing_have_no_share(data: Path) -> None:
    for row in rows(data):
        kind, share = row["truth_prompt_kind"], row["truth_share_0"]
        assert (share is None) == (row["truth_share_1"] is None)
        if kind in ("gibberish", "other_script", "harmful"):
            assert share is None
        elif kind != "url":
            assert share is not None


def test_ties_and_agreement_are_as_documented(data: Path) -> None:
    everything = rows(data)
    strict = [row for row in everything if row["label_0"] != 0.5]
    agree = [
        (row["truth_utility_0"] > row["truth_utility_1"]) == (row["label_0"] == 1)  # type: ignore[operator]
        for row in strict
    ]
    # three standard errors of 600 rows about 12% and 73%
    assert 1 - len(strict) / len(everything) == pytest.approx(0.12, abs=0.04)
    assert np.mean(agree) == pytest.approx(0.73, abs=0.06)


def test_every_painter_and_kind_takes_part(data: Path) -> None:
    everything = rows(data)
    assert {row["model_0"] for row in everything} == set(PAINTER_SHARES)
    assert {row["truth_prompt_kind"] for row in everything} == set(PROMPT_SHARES)
    assert {row["truth_annotator"] for row in everything} == {"careful", "careless"}
    flips = [row["truth_flipped"] for row in everything]
    assert 0 < sum(map(bool, flips)) < 60


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    alone = write_dataset(tmp_path / "1", 50, seed=3, workers=1, rows_per_shard=20)
    seen: list[tuple[int, int]] = []
    write_dataset(
        tmp_path / "2",
        50,
        seed=3,
        workers=2,
        rows_per_shard=20,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [path.name for path in alone] == [f"shard-0000{i}.parquet" for i in range(3)]
    assert rows(tmp_path / "1") == rows(tmp_path / "2")
    assert seen[0] == (0, 50)
    assert seen[-1] == (50, 50)
    assert len(seen) == 4


def test_a_killed_write_goes_on_and_a_data_set_can_grow(tmp_path: Path) -> None:
    def write(n: int) -> list[Path]:
        return write_dataset(tmp_path, n, seed=4, workers=1, rows_per_shard=10)

    first, second, _ = write(25)
    before, kept = rows(tmp_path), first.stat().st_mtime_ns
    second.rename(tmp_path / ".tmp-abcdef01-shard-00001.parquet")
    write(25)
    assert rows(tmp_path) == before
    assert first.stat().st_mtime_ns == kept
    assert not list(tmp_path.glob(".tmp-*"))
    write(30)
    assert first.stat().st_mtime_ns == kept
    assert rows(tmp_path)[:20] == before[:20]
    assert len(rows(tmp_path)) == 30
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for fewer in (25, 5):  # a piece of a shard less, and whole ones
        with pytest.raises(InputError, match="choose an empty folder or remove it"):
            write(fewer)
    with pytest.raises(InputError, match=r"00000\.parquet holds 10 rows where 5 are asked for"):
        write(5)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    write_dataset(tmp_path, 4, seed=5, workers=1, rows_per_shard=2)
    for settings in ({"seed": 6}, {"rows": 2}, {"population": Population(flip=0.5)}):
        with pytest.raises(InputError, match="is not part of this data set"):
            write_dataset(
                tmp_path,
                **{"rows": 4, "seed": 5, **settings},  # type: ignore[arg-type]
                workers=1,
                rows_per_shard=2,
            )
    (tmp_path / "mine.parquet").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"mine\.parquet is not part of this data set"):
        write_dataset(tmp_path, 4, seed=5, workers=1, rows_per_shard=2)
    assert (tmp_path / "mine.parquet").read_bytes() == b"precious"


def test_bad_settings_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows, workers, rows_per_shard >= 1"):
        write_dataset(tmp_path, 0)
    with pytest.raises(InputError, match="is no diffusers folder"):
        write_dataset(tmp_path, 1, pipeline=str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_dataset(tmp_path / "file" / "out", 1, workers=1)


def tiny_pipeline(folder: Path, size: int) -> None:
    """An untrained Stable Diffusion of a few thousand weights whose images have `size` pixels."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    from fifa.miniworld.tokenizer import CONTEXT, build_tokenizer

    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        StableDiffusionPipeline(
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(8, 8),
                norm_num_groups=4,
                layers_per_block=1,
            ),
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(
                sample_size=size // 2,
                block_out_channels=(8, 8),
                norm_num_groups=4,
                layers_per_block=1,
                cross_attention_dim=16,
                attention_head_dim=4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            ),
            scheduler=DDIMScheduler(clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)


def test_a_diffusers_folder_is_one_more_model(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path / "model", SIZE)
    for name in ("a", "b"):
        write_dataset(tmp_path / name, 60, workers=1, pipeline=str(tmp_path / "model"))
    written = rows(tmp_path / "a")
    assert written == rows(tmp_path / "b")
    sampled = [row["jpg_0"] for row in written if row["model_0"] == PIPELINE]
    sampled += [row["jpg_1"] for row in written if row["model_1"] == PIPELINE]
    assert 0 < len(sampled) == len(set(sampled)) < 20
    assert decode(sampled[0], "image").shape == (SIZE, SIZE, 3)  # type: ignore[arg-type]


def test_a_pipeline_of_another_size_is_refused(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path / "model", SIZE // 2)
    with pytest.raises(InputError, match="the mini world needs"):
        write_dataset(tmp_path / "out", 60, workers=1, pipeline=str(tmp_path / "model"))
    assert not list((tmp_path / "out").glob("*"))


# ---- rewards -------------------------------------------------------------------------------------


def test_rewards_say_what_the_oracle_says() -> None:
    drawn = scenes(12, 26)
    images = [render(scene) for scene, _ in drawn]
    asked = [phrase(drawn[i // 2 * 2][1], generator(i)) for i in range(12)]
    batch = to_batch(images)
    verdicts = [check(image, prompt) for image, prompt in zip(images, asked, strict=True)]
    share, strict, neat = (
        reward(batch, asked) for reward in (OracleReward(), StrictOracleReward(), NeatnessReward())
    )
    for scores in (share, strict, neat):
        assert scores.dtype == torch.float32
        assert scores.shape == (12,)
    assert share.tolist() == pytest.approx([verdict.share for verdict in verdicts])
    assert strict.tolist() == [float(verdict.all_hold) for verdict in verdicts]
    assert neat.tolist() == pytest.approx([neatness(image) for image in images])
    assert 0 < float(strict.mean()) < 1
    assert torch.equal(share[3:5], OracleReward()(batch[3:5], asked[3:5]))


def test_a_prompt_about_nothing_is_never_scored() -> None:
    batch = torch.zeros(2, 3, SIZE, SIZE)
    for reward in (OracleReward(), StrictOracleReward()):
        with pytest.raises(UnparsedPrompt, match="'a cat' names nothing"):
            reward(batch, ["a red circle", "a cat"])
    assert NeatnessReward()(batch, ["a cat", ""]).shape == (2,)


def test_rewards_refuse_what_they_cannot_read() -> None:
    for reward in (OracleReward(), StrictOracleReward(), NeatnessReward()):
        with pytest.raises(InputError, match=f"'{reward.name}' reads images"):
            reward(torch.zeros(1, 3, SIZE, SIZE + 8), ["a red circle"])
        with pytest.raises(InputError, match="NaN"):
            reward(torch.full((1, 3, SIZE, SIZE), torch.nan), ["a red circle"])
    with pytest.raises(InputError, match="1 images but 2 prompts"):
        OracleReward()(torch.zeros(1, 3, SIZE, SIZE), ["a star", "a star"])


def test_a_scene_seen_perfectly_is_what_the_oracle_sees() -> None:
    for scene, request in scenes(50, 27):
        perfect, seen = scene_view(scene), look(render(scene))
        assert judge(perfect, request) == judge(seen, request)
        assert view_neatness(perfect) == 1
        assert words.BACKGROUNDS.keys() >= {seen.background}

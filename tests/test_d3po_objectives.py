from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from d3po import objectives
from d3po.objectives import (
    OBJECTIVES,
    POLICY_GRADIENT,
    REFERENCE_FREE,
    UNPAIRED,
    ddpo,
    dpok,
    free_metrics,
    gradient_metrics,
    kto,
    mapo,
    orpo,
    pair_metrics,
    reward_weighted,
    simpo,
    unpaired_metrics,
)

BETA = 0.1
LN2 = math.log(2)


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def loss(name: str, won: float, lost: float, beta: float, **options: float) -> float:
    """The objective at given log-ratios of winner and loser; the reference sits off zero."""
    out = OBJECTIVES[name](one(won - 2), one(lost - 3), one(-2), one(-3), beta=beta, **options)
    return out.item()


# ---- worked examples ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "beta", "options", "want"),
    [
        # winner +2, loser -1: h = 2 - (-1) = 3
        # dpo, beta 1/3: beta h = 1;  ln(1 + e^-1) = 0.3132616875182228
        ("dpo", 1 / 3, {}, 0.3132616875182228),
        ("d3po", 1 / 3, {}, 0.3132616875182228),
        # d3po_clipped, beta 1, clip 1/2: ln 3/2 and ln 1/2, difference ln 3;
        # -ln(1 / (1 + 1/3)) = ln(4/3)
        ("d3po_clipped", 1.0, {"clip": 0.5}, math.log(4 / 3)),
        # ipo, beta 1/4: (3 - 1 / (2 * 1/4))^2 = (3 - 2)^2
        ("ipo", 0.25, {}, 1.0),
        # hinge, beta 1/4: 1 - 3/4;   beta 1: 1 - 3 < 0
        ("hinge", 0.25, {}, 0.25),
        ("hinge", 1.0, {}, 0.0),
        # robust, beta 1/3, e = 1/4: (3/4 * 0.31326 - 1/4 * 1.31326) / (1/2)
        #   since -ln rho(-1) = 1 + 0.31326;  = (1/2 * 0.31326 - 1/4) / (1/2) = 0.31326 - 1/2
        ("robust", 1 / 3, {"label_smoothing": 0.25}, 0.3132616875182228 - 0.5),
        # conservative, same: 3/4 * 0.31326 + 1/4 * 1.31326 = 0.31326 + 1/4
        ("conservative", 1 / 3, {"label_smoothing": 0.25}, 0.3132616875182228 + 0.25),
        # sppo, beta 1/2: targets 1 and -1; (2 - 1)^2 + (-1 + 1)^2
        ("sppo", 0.5, {}, 1.0),
    ],
)
def test_worked_example(name: str, beta: float, options: dict[str, float], want: float) -> None:
    assert loss(name, 2.0, -1.0, beta, **options) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_where_the_policy_is_the_reference(name: str) -> None:
    # h = 0: ln 2 for everything logistic, 1 for the hinge, (1 / (2 beta))^2 = 25 for ipo and, for
    # each of the two images, for sppo
    want = {"ipo": 25.0, "hinge": 1.0, "sppo": 50.0}.get(name, LN2)
    assert loss(name, 0.0, 0.0, BETA) == pytest.approx(want, abs=1e-12)


def test_clipped_equals_the_published_expression_inside_and_outside_the_band() -> None:
    # transcribed: ratio = clamp(exp(lp - ref), 1 - eps, 1 + eps); loss = -log sigmoid of
    # beta * log(ratio_w) * (+1) + beta * log(ratio_l) * (-1); values and gradients
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 1000, dtype=torch.float64, generator=generator) * 0.1
    ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()

    win, lose, ref_win, ref_lose = theirs
    r_w = torch.clamp(torch.exp(win - ref_win), 1 - 0.1, 1 + 0.1)
    r_l = torch.clamp(torch.exp(lose - ref_lose), 1 - 0.1, 1 + 0.1)
    want = -torch.log(torch.sigmoid(BETA * torch.log(r_w) + -1 * BETA * torch.log(r_l)))
    want.sum().backward()

    got = objectives.d3po_clipped(*ours, beta=BETA, clip=0.1)
    got.sum().backward()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-14)
    assert 0.2 < float((ours.grad[0] == 0).double().mean()) < 0.8  # both regions were met


def test_the_published_clipped_loss_lies_in_its_narrow_band() -> None:
    # margin at most 0.1 * (ln 1.1 - ln 0.9) = 0.0200671
    extremes = [loss("d3po_clipped", won, lost, BETA, clip=0.1) for won, lost in [(9, -9), (-9, 9)]]
    assert extremes == pytest.approx([0.6832, 0.7032], abs=5e-5)
    values = [loss("d3po_clipped", w / 7, v / 7, BETA) for w in range(-9, 9) for v in range(-9, 9)]
    assert 0.6832 - 5e-5 <= min(values) <= max(values) <= 0.7032 + 5e-5
    huge = loss("d3po_clipped", 1000.0, -1000.0, BETA)  # exp would overflow
    assert huge == pytest.approx(extremes[0], abs=1e-12)


# ---- gradients ----------------------------------------------------------------------------------

GRID = [-3.0, -1.0, -0.2, -0.05, 0.0, 0.05, 0.2, 1.0, 3.0]


def gradients(name: str, won: float, lost: float, beta: float) -> list[float]:
    rows = [one(won - 2), one(lost - 3), one(-2), one(-3)]
    for row in rows[:2]:
        row.requires_grad_()
    OBJECTIVES[name](*rows, beta=beta).backward()
    return [row.grad.item() for row in rows[:2]]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_signs_over_a_grid_of_log_ratios(name: str) -> None:
    # Descent must raise the winner and lower the loser, wherever the objective says it acts:
    #   d3po_clipped   on each image while its ratio is inside [0.9, 1.1]
    #   ipo            below its target h < 1 / (2 beta) = 2; above, it pulls back
    #   hinge          below its margin h < 1 / beta = 4; above, it rests
    #   conservative   below beta h = ln((1 - e) / e), h < 8.79: everywhere on this grid
    #   sppo           on each image towards its own target, +2 and -2, from either side
    beta = 0.25
    band = (math.log(0.9), math.log(1.1))
    for won in GRID:
        for lost in GRID:
            h = won - lost
            push = {"ipo": float(h < 2) - float(h > 2), "hinge": float(h < 4)}.get(name, 1.0)
            want = [-push, push]
            if name == "d3po_clipped":
                inside = [band[0] <= x <= band[1] for x in (won, lost)]
                want = [-1.0 * inside[0], 1.0 * inside[1]]
            if name == "sppo":
                want = [1.0 if won > 2 else -1.0, 1.0 if lost > -2 else -1.0]
            if name == "hinge" and h == 4:
                continue
            got = gradients(name, won, lost, beta)
            assert [(g > 0) - (g < 0) for g in got] == want, (won, lost)


def test_the_worst_pairs_get_no_gradient_from_the_published_clamp() -> None:
    # the winner has become unlikely, the loser likely: the pair that needs correction most
    assert gradients("d3po_clipped", -1.0, 1.0, BETA) == [0.0, 0.0]
    assert gradients("dpo", -1.0, 1.0, BETA) == pytest.approx([-0.05498, 0.05498], abs=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_elementwise_and_unreduced(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 3, 5, dtype=torch.float64, generator=generator)
    whole = OBJECTIVES[name](*rows, beta=BETA)
    assert whole.shape == (3, 5)
    for b in range(3):
        for s in range(5):
            assert OBJECTIVES[name](*rows[:, b, s], beta=BETA) == whole[b, s]


@pytest.mark.parametrize("name", ["dpo", "robust", "conservative", "hinge", "d3po_clipped"])
def test_losses_stay_finite_far_away(name: str) -> None:
    for won, lost in [(1e4, -1e4), (-1e4, 1e4)]:
        assert math.isfinite(loss(name, won, lost, 1.0))
        assert all(math.isfinite(g) for g in gradients(name, won, lost, 1.0))


def test_robust_is_unbiased_under_label_flips() -> None:
    # with a flip rate e, (1 - e) * robust(h) + e * robust(-h) = dpo(h)
    for h in GRID:
        kept = loss("robust", h, 0.0, 1.0, label_smoothing=0.3)
        flipped = loss("robust", 0.0, h, 1.0, label_smoothing=0.3)
        assert 0.7 * kept + 0.3 * flipped == pytest.approx(loss("dpo", h, 0.0, 1.0), abs=1e-12)


def test_conservative_is_lowest_at_the_smoothed_preference() -> None:
    # rho(h) = 1 - e at h = ln(0.8 / 0.2) = ln 4
    at = [
        loss("conservative", math.log(4) + d, 0, 1.0, label_smoothing=0.2) for d in (-0.1, 0, 0.1)
    ]
    assert at[1] < min(at[0], at[2])


# ---- without a reference ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "want"),
    [
        # ln(1 + e^-1); with a margin of 1 asked for, exactly met, ln 2
        (lambda: simpo(one(-1), one(-2), beta=1.0), 0.3132616875182228),
        (lambda: simpo(one(-1), one(-2), beta=1.0, gamma=1.0), LN2),
        # p = 1/2 and 1/3, odds 1 and 1/2, log-odds apart by ln 2: ln 2 + 2 * ln(1 + 1/2)
        (lambda: orpo(one(-LN2), one(-math.log(3)), beta=2.0), LN2 + 2 * math.log(1.5)),
        # mse 2 ln 2 and 4 ln 2; phi(ln 2) = ln 2 / (2 - 1), phi(2 ln 2) = 2 ln 2 / (4 - 1);
        # 3 * (ln 2 - 2/3 ln 2) = ln 2
        (
            lambda: mapo(one(-LN2), one(-2 * LN2), beta=2.0, scale=3.0),
            2 * LN2 + 2 * math.log(1.5),
        ),
    ],
)
def test_worked_example_without_a_reference(got: Callable[[], Tensor], want: float) -> None:
    assert got().item() == pytest.approx(want, abs=1e-12)


def test_mapo_equals_its_authors_expression() -> None:
    # phi as they write it, x / (exp(x) - 1), T = 1000 times, in numpy; errors from tiny to large
    rng = np.random.default_rng(0)
    mse_w, mse_l = np.exp(rng.uniform(-4, 2, (2, 500)))

    def phi(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return x / (np.exp(x) - 1)

    margin = 1000 * (phi(0.5 * mse_w) - phi(0.5 * mse_l))
    want = mse_w + 0.1 * np.logaddexp(0, -margin)
    win, lose = (torch.from_numpy(-mse / 2) for mse in (mse_w, mse_l))
    assert mapo(win, lose, beta=0.1).numpy() == pytest.approx(want, rel=1e-10)


def test_orpo_equals_the_odds_of_probabilities() -> None:
    p_w, p_l = np.random.default_rng(0).uniform(0.001, 0.999, (2, 500))
    odds = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    want = -np.log(p_w) - 0.2 * np.log(1 / (1 + 1 / odds))
    win, lose = (torch.from_numpy(np.log(p)) for p in (p_w, p_l))
    assert orpo(win, lose, beta=0.2).numpy() == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("name", REFERENCE_FREE)
@pytest.mark.parametrize("far", [-1e-6, -1e-3, -0.5, -40.0, -5000.0])
def test_losses_without_a_reference_keep_their_slope_everywhere(name: str, far: float) -> None:
    # in float32, from a perfect fit to one that exp() cannot hold; the winner is to rise
    win = torch.tensor([far], requires_grad=True)
    lose = torch.tensor([1.5 * far], requires_grad=True)
    loss = REFERENCE_FREE[name](win, lose, beta=0.1)
    loss.backward()
    assert torch.isfinite(torch.stack([loss, win.grad, lose.grad])).all()
    assert win.grad < 0 or (name == "simpo" and far == -5000)  # its margin is met by far
    assert lose.grad >= 0


# ---- one image at a time ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "want"),
    [
        # 2 above the reference, 1 above the baseline: 1 - rho(1), and 3 * (1 - rho(-1))
        (lambda: kto(one(2), one(0), one(1), one(1), beta=1.0), 0.2689414213699951),
        (
            lambda: kto(one(2), one(0), one(-1), one(1), beta=1.0, undesirable_weight=3.0),
            3 * 0.7310585786300049,
        ),
        # r = 3/2 beyond 1.2: -2 * 1.2 where it is welcome, 2 * 3/2 where it is not
        (lambda: ddpo(one(math.log(1.5)), one(0), one(2), clip=0.2), -2.4),
        (lambda: ddpo(one(math.log(1.5)), one(0), one(-2), clip=0.2), 3.0),
        (lambda: dpok(one(math.log(1.5)), one(0), one(-2), one(0.5), beta=0.2, clip=0.2), 3.1),
        # exp(ln 3) * 1/2, and at temperature 1/2 9 * 1/2
        (lambda: reward_weighted(one(-0.5), one(math.log(3)), beta=1.0), 1.5),
        (lambda: reward_weighted(one(-0.5), one(math.log(3)), beta=0.5), 4.5),
    ],
)
def test_worked_example_of_single_images(got: Callable[[], Tensor], want: float) -> None:
    assert got().item() == pytest.approx(want, abs=1e-12)


def test_ddpo_pulls_back_where_the_published_d3po_clamp_does_not() -> None:
    # gradient on logp over ratios below, inside and above the band, for good and bad images
    for moved, advantage, want in [
        (-1.0, 1.0, -math.exp(-1)),  # a good image that sank: full gradient, upwards
        (-1.0, -1.0, 0.0),  # a bad one that sank enough: none
        (0.0, 1.0, -1.0),
        (0.0, -1.0, 1.0),
        (1.0, 1.0, 0.0),
        (1.0, -1.0, math.exp(1)),
    ]:
        logp = one(moved).requires_grad_()
        # an eps inside the band: at exactly its middle both branches are equal
        ddpo(logp, one(0), one(advantage), clip=0.2).backward()
        assert logp.grad.item() == pytest.approx(want, abs=1e-12), (moved, advantage)


def test_kto_moves_liked_images_up_and_disliked_ones_down() -> None:
    for ratio in GRID:
        for liked in (1.0, -1.0):
            logp, baseline = one(ratio).requires_grad_(), one(0.3).requires_grad_()
            kto(logp, one(0), one(liked), baseline, beta=2.0).backward()
            assert logp.grad.item() * liked < 0
            assert baseline.grad is None  # it is a point of reference, nothing to learn


@pytest.mark.parametrize("name", [*OBJECTIVES, *REFERENCE_FREE, *UNPAIRED, *POLICY_GRADIENT])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    function = {**OBJECTIVES, **REFERENCE_FREE, **UNPAIRED, **POLICY_GRADIENT}[name]
    parameters = inspect.signature(function).parameters.values()
    facts = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    given = {"beta": 0.7, "clip": 0.2, "scale": 2.0}
    numbers = {p.name: given[p.name] for p in parameters if p.name in given}
    rows = -torch.rand(len(facts), 6, dtype=torch.float64, generator=seeded(3)) - 0.05
    learned = [i for i, fact in enumerate(facts) if fact in ("win", "lose", "logp", "kl")]
    for i in learned:
        rows[i].requires_grad_()

    def loss(*live: Tensor) -> Tensor:
        by_place = dict(zip(learned, live, strict=True))
        return function(*(by_place.get(i, rows[i]) for i in range(len(facts))), **numbers)

    assert torch.autograd.gradcheck(loss, [rows[i].detach().requires_grad_() for i in learned])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- what to watch ------------------------------------------------------------------------------


def test_pair_metrics_worked_example() -> None:
    # log-ratios (winner, loser): (0.2, -0.05), (0, 0), (-0.2, 0.05), (0.2, 0.3)
    # band of clip 0.1: ln 0.9 = -0.105, ln 1.1 = 0.095
    won = torch.tensor([0.2, 0.0, -0.2, 0.2], dtype=torch.float64)
    lost = torch.tensor([-0.05, 0.0, 0.05, 0.3], dtype=torch.float64)
    got = pair_metrics(won - 1, lost - 2, one(-1).expand(4), one(-2).expand(4), BETA, 0.1)
    assert got["implicit_accuracy"].tolist() == [1.0, 0.5, 0.0, 0.0]
    assert got["implicit_margin"].tolist() == pytest.approx([0.025, 0.0, -0.025, -0.01], abs=1e-12)
    assert got["win_ratio"].tolist() == pytest.approx(won.tolist(), abs=1e-12)
    assert got["lose_ratio"].tolist() == pytest.approx(lost.tolist(), abs=1e-12)
    assert got["clipped_share"].tolist() == [0.5, 0.0, 0.5, 1.0]


def test_pair_metrics_carry_no_gradient_and_clip_nothing_without_clip() -> None:
    rows = torch.randn(4, 2, 3, requires_grad=True)
    got = pair_metrics(*rows, BETA)
    assert all(value.shape == (2, 3) and not value.requires_grad for value in got.values())
    assert got["clipped_share"].tolist() == [[0.0] * 3] * 2


def test_metrics_of_the_other_tables() -> None:
    won, lost = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -1.0])
    free = free_metrics(won, lost, 0.5)
    assert free["implicit_accuracy"].tolist() == [1.0, 0.5, 0.0]
    assert free["implicit_margin"].tolist() == [0.5, 0.0, -1.0]
    assert (free["win_logp"].tolist(), free["lose_logp"].tolist()) == (won.tolist(), lost.tolist())

    liked = torch.tensor([1.0, -1.0, 1.0])
    unpaired = unpaired_metrics(won, lost, liked, torch.tensor(0.25), 2.0)
    # ratios 1, 0, -2, less 0.25; the disliked one is below the baseline
    assert unpaired["implicit_accuracy"].tolist() == [1.0, 1.0, 0.0]
    assert unpaired["implicit_margin"].tolist() == [1.5, 0.5, -4.5]
    assert unpaired["ref_ratio"].tolist() == [1.0, 0.0, -2.0]

    moved = gradient_metrics(won, lost, 0.5)
    assert moved["approx_kl"].tolist() == [0.5, 0.0, 2.0]
    assert moved["clipped_share"].tolist() == [1.0, 0.0, 1.0]  # e and e^-2 are outside [1/2, 3/2]
    assert gradient_metrics(won, lost)["clipped_share"].tolist() == [0.0] * 3


# ---- the tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*REFERENCE_FREE, *UNPAIRED, *POLICY_GRADIENT])
def test_an_objective_is_in_the_table_of_what_it_asks_for(name: str) -> None:
    function = {**REFERENCE_FREE, **UNPAIRED, **POLICY_GRADIENT}[name]
    parameters = inspect.signature(function).parameters.values()
    facts = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert (facts == ["win", "lose"]) == (name in REFERENCE_FREE)
    assert ("desirable" in facts) == (name in UNPAIRED)
    assert ("advantage" in facts) == (name in POLICY_GRADIENT)
    assert function.__doc__
    assert "20" in function.__doc__  # a source with a year


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_the_one_signature_and_says_its_equation(name: str) -> None:
    function = OBJECTIVES[name]
    parameters = inspect.signature(function).parameters
    assert list(parameters)[:4] == ["win", "lose", "ref_win", "ref_lose"]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[4:])
    assert parameters["beta"].default is inspect.Parameter.empty
    assert function.__doc__
    assert "20" in function.__doc__ or "paper" in function.__doc__  # a source with a year


def test_objectives_import_torch_and_nothing_else() -> None:
    tree = ast.parse(Path(inspect.getfile(objectives)).read_text(encoding="utf-8"))
    roots = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    roots |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    third_party = {r.split(".")[0] for r in roots} - {"__future__", "math", "collections"}
    assert third_party == {"torch"}

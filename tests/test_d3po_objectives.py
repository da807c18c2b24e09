from __future__ import annotations

import ast
import inspect
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from d3po import objectives
from d3po.objectives import OBJECTIVES, pair_metrics

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
    ],
)
def test_worked_example(name: str, beta: float, options: dict[str, float], want: float) -> None:
    assert loss(name, 2.0, -1.0, beta, **options) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_where_the_policy_is_the_reference(name: str) -> None:
    # h = 0: ln 2 for everything logistic, 1 for the hinge, (1 / (2 beta))^2 = 25 for ipo
    want = {"ipo": 25.0, "hinge": 1.0}.get(name, LN2)
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


# ---- the table ----------------------------------------------------------------------------------


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

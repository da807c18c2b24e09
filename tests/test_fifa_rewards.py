from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fifa.config import InputError
from fifa.miniworld import IMAGE_SIZE
from fifa.rewards import REWARDS, Reward, load_reward, score_images
from fifa.rewards.ensemble import RankAverage, WeightedSum, parse_sum
from fifa.rewards.jpeg import kilobytes


class Brightness:
    """Mean value times `gain`; a reward of which everything is known."""

    differentiable = True

    def __init__(self, gain: float = 1.0) -> None:
        self.name = f"brightness{gain:g}"
        self.gain = gain

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3)) * self.gain


def images(n: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


PROMPTS = ["a", "b", "c", "d"]
PUBLISHED = {"pickscore", "hpsv2", "hpsv2.1", "imagereward", "clip", "aesthetic"}
FITTED = {"fitted", "tastes"}  # from a folder of one's own


# Those of published weights are in test_fifa_reward_networks.py, the fitted ones in
# test_fifa_proxies.py and test_fifa_tastes.py.
WITH_US = {name for name in REWARDS if name not in PUBLISHED | FITTED}


@pytest.mark.parametrize("name", sorted(WITH_US))
def test_every_reward_of_the_table_keeps_the_contract(name: str) -> None:
    reward = load_reward(name)
    assert isinstance(reward, Reward)
    prompts = ["a red circle", "two blue squares", "a green star", "a red circle"]
    batch = torch.rand(4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    together = score_images(reward, batch, prompts)
    alone = torch.cat(
        [score_images(reward, batch[i : i + 1], prompts[i : i + 1]) for i in range(4)]
    )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_jpeg_size_is_that_of_pillow_in_thousand_bytes() -> None:
    batch = images(2)
    buffer = io.BytesIO()
    pixels = np.rint(batch[1].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    assert float(kilobytes(batch)[1]) == pytest.approx(len(buffer.getvalue()) / 1000)


def test_jpeg_rewards_are_opposite_and_order_flat_before_noisy() -> None:
    batch = torch.cat([torch.full((1, 3, 16, 16), 0.5), images(1)])
    small = load_reward("jpeg_compressibility")(batch, ["", ""])
    large = load_reward("jpeg_incompressibility")(batch, ["", ""])
    assert small[0] > small[1]
    assert torch.equal(small, -large)


def test_a_sum_is_parsed() -> None:
    assert parse_sum("0.5*mini + oracle+-2e+1*x.y:Z") == [
        (0.5, "mini"),
        (1.0, "oracle"),
        (-20.0, "x.y:Z"),
    ]


@pytest.mark.parametrize("spec", ["0.5*", "*mini", "a++b", "mini*0.5", "+", "a+b c$"])
def test_a_broken_sum_is_one_sentence(spec: str) -> None:
    with pytest.raises(InputError, match="expected terms like"):
        load_reward(spec)


def test_a_weighted_sum_adds_what_it_says() -> None:
    reward = load_reward("2*jpeg_incompressibility+0.5*jpeg_compressibility")
    assert reward.name == "2*jpeg_incompressibility+0.5*jpeg_compressibility"
    assert not reward.differentiable
    torch.testing.assert_close(reward(images(), PROMPTS), 1.5 * kilobytes(images()))


def test_gradients_pass_through_a_sum_of_differentiable_rewards() -> None:
    reward = WeightedSum([Brightness(), Brightness(3)], [1.0, 2.0])
    batch = images().requires_grad_()
    reward(batch, PROMPTS).sum().backward()
    assert reward.differentiable
    assert batch.grad is not None
    torch.testing.assert_close(batch.grad, torch.full_like(batch, 7 / (3 * 16 * 16)))


def test_a_sum_moves_the_members_that_have_a_network() -> None:
    class Network(Brightness):
        device = "cpu"

        def to(self, device: str) -> None:
            self.device = device

    members = [Network(), Brightness()]
    WeightedSum(members, [1.0, 1.0]).to("meta")
    assert members[0].device == "meta"  # type: ignore[attr-defined]


def test_rank_average_by_hand() -> None:
    reference = torch.tensor([[1.0, 0.25, 0.0, 0.25], [0.0, 3.0, 1.0, 2.0]])
    reward = RankAverage([Brightness(), Brightness(10)], [3.0, 1.0], reference)
    flat = torch.tensor([0.25, 0.875]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4)
    # Member one: 0.25 has 1 below and 3 not above, so (1 + 3) / 8; 0.875 has 3 of 4 below.
    # Member two gives 2.5 and 8.75: 3 of 4 below, 4 of 4 below.
    expected = torch.tensor([(3 * 4 / 8 + 3 / 4) / 4, (3 * 3 / 4 + 1) / 4])
    torch.testing.assert_close(reward(flat, ["", ""]), expected)


def test_rank_average_does_not_depend_on_the_batch() -> None:
    reward = RankAverage.fitted([Brightness()], [1.0], images(50, seed=1), [""] * 50)
    batch = images()
    assert torch.equal(reward(batch, PROMPTS)[2:3], reward(batch[2:3], ["c"]))


@pytest.mark.parametrize(("returned", "kind"), [([0.5, 0.5], "list"), (3, "int"), (None, "None")])
def test_what_is_no_tensor_is_one_sentence(returned: object, kind: str) -> None:
    class Broken(Brightness):
        def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> Any:
            return returned

    with pytest.raises(InputError, match=f"returned a {kind}.*, it must be a tensor, float32"):
        score_images(Broken(), images(2), ["a", "b"])


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("jpeg_compresibility", "did you mean 'jpeg_compressibility'"),
        ("no.such.module:Thing", "needs 'no', which is not installed"),
        ("fifa.rewards.jpeg:Nothing", "has no callable 'Nothing'"),
        (":x", "is no module name"),
        ("fifa.config:fingerprint", "must return a reward"),
    ],
)
def test_what_is_no_reward_is_one_sentence(spec: str, part: str) -> None:
    with pytest.raises(InputError) as caught:
        load_reward(spec)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_outside_code_of_the_working_directory_plugs_in_with_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_scorer.py").write_text(
        "class Flat:\n"
        "    name, differentiable = 'flat', False\n"
        "    def __init__(self, value=1.0): self.value = value\n"
        "    def __call__(self, images, prompts):\n"
        "        return images.new_full((len(images),), self.value)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    assert load_reward("my_scorer:Flat", value=3.0)(images(), PROMPTS).tolist() == [3.0] * 4
    with pytest.raises(InputError, match="unexpected keyword argument 'colour'"):
        load_reward("my_scorer:Flat", colour="red")


class Broken:
    """Returns what it was made with."""

    name, differentiable = "broken", False

    def __init__(self, answer: torch.Tensor) -> None:
        self.answer = answer

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (torch.zeros(4, 1), r"must be float32 \(4,\)"),
        (torch.zeros(4, dtype=torch.float64), "float64"),
        (torch.tensor([0.0, 0.0, float("nan"), 0.0]), "is nan for the prompt 'c'"),
    ],
)
def test_a_reward_that_breaks_its_contract_is_named(answer: torch.Tensor, part: str) -> None:
    with pytest.raises(InputError, match=f"'broken'.*{part}"):
        score_images(Broken(answer), images(), PROMPTS)


def test_images_and_prompts_must_fit_together() -> None:
    with pytest.raises(InputError, match="3 prompts"):
        score_images(Brightness(), images(), PROMPTS[:3])


def test_an_ensemble_needs_weights_that_mean_something() -> None:
    with pytest.raises(InputError, match="not all 0"):
        WeightedSum([Brightness(), Brightness()], [0.0, 0.0])
    with pytest.raises(InputError, match="sum of its weights"):
        RankAverage([Brightness(), Brightness()], [1.0, -1.0], torch.zeros(2, 3))


def test_a_sum_may_be_a_difference() -> None:
    found = load_reward("1*brightness+-1*contrast")(images(), PROMPTS)
    expected = load_reward("brightness")(images(), PROMPTS) - load_reward("contrast")(
        images(), PROMPTS
    )
    torch.testing.assert_close(found, expected)


def test_the_table_of_the_docs_holds_every_reward() -> None:
    page = Path(__file__).parents[1] / "docs" / "rewards.md"
    table = page.read_text().partition("## Use")[0].splitlines()
    first = [line.split("|")[1] for line in table if line.startswith("| `")]
    named = [name.partition(":")[0] for cell in first for name in re.findall("`(.+?)`", cell)]
    assert sorted(named) == sorted(REWARDS)

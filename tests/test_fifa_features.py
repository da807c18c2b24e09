from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch
from pair_files import caption, picture, write_pairs
from tiny_encoders import transformers_folder

from fifa.config import InputError
from fifa.features import VectorStore, pair_features, picture_key
from fifa.images import decode, encode_png, to_batch
from fifa.rewards import load_reward
from fifa.rewards.encoders import Encoder, load_encoder
from fifa.rewards.mini import WEIGHTS
from fifa.rewards.nuisance import NUISANCES, measure


@pytest.fixture(scope="module")
def mini() -> Encoder:
    return load_encoder("mini")


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return transformers_folder(tmp_path_factory.mktemp("clip"))


# ---- encoders ------------------------------------------------------------------------------------


def test_the_mini_encoder_holds_what_the_mini_reward_multiplies(mini: Encoder) -> None:
    images = to_batch([decode(picture(seed, 32), "x") for seed in (1, 40)])
    prompts = ["a red circle", "two blue squares"]
    reward = load_reward("mini")
    cosine = (mini.pictures(images) * mini.texts(prompts)).sum(1)
    expected = reward(images, prompts) / reward.model.logit_scale.exp()  # type: ignore[attr-defined]
    # The encoder resizes through 8 bits, the reward in floating point.
    torch.testing.assert_close(cosine, expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("kind", ["mini", "clip", "transformers"])
def test_every_kind_of_encoder_gives_unit_vectors_of_its_width(kind: str, tiny_clip: Path) -> None:
    spec = {"mini": "mini", "clip": f"clip:{WEIGHTS}", "transformers": f"transformers:{tiny_clip}"}
    encoder = load_encoder(spec[kind])
    images = to_batch([decode(picture(seed, 40), "x") for seed in range(3)])
    pictures, texts = encoder.pictures(images), encoder.texts(["a star", "word " * 300])
    assert pictures.shape == (3, encoder.width)
    assert texts.shape == (2, encoder.width)
    torch.testing.assert_close(pictures.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(encoder.pictures(images[1:2])[0], pictures[1], rtol=1e-4, atol=1e-5)


def test_transformers_features_are_those_of_the_model_itself(tiny_clip: Path) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    hwc = decode(picture(3, 32), "x")  # of the network's size: resizing has tests of its own
    encoder = load_encoder(f"transformers:{tiny_clip}")
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    pixels = CLIPImageProcessor.from_pretrained(tiny_clip)(hwc, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(tiny_clip)(["a red circle"], return_tensors="pt")
    with torch.no_grad():
        whole = model(**pixels, **tokens)
    expected = torch.nn.functional.normalize(whole.image_embeds, dim=1)
    torch.testing.assert_close(encoder.pictures(to_batch([hwc])), expected, rtol=1e-4, atol=1e-5)
    expected = torch.nn.functional.normalize(whole.text_embeds, dim=1)
    torch.testing.assert_close(encoder.texts(["a red circle"]), expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_images_of_an_encoder(mini: Encoder) -> None:
    images = to_batch([decode(picture(1, 32), "x")]).requires_grad_()
    mini.pictures(images).sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("minni", "did you mean 'mini'"),
        ("clip", "must name its weights"),
        ("transformers:nowhere", "no folder with config.json"),
        ("clip:nowhere", "is no open_clip model"),
    ],
)
def test_a_wrong_encoder_is_one_sentence(spec: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        load_encoder(spec)


# ---- nuisances -----------------------------------------------------------------------------------


def test_nuisances_by_hand() -> None:
    image = torch.zeros(1, 3, 2, 2)
    image[0, 0] = torch.tensor([[1.0, 0.0], [0.0, 0.0]])  # one red pixel, three black ones
    found = dict(zip(NUISANCES, measure(image)[0].tolist(), strict=True))
    luma = 0.299
    assert found["saturation"] == pytest.approx(1 / 4)
    assert found["brightness"] == pytest.approx(luma / 4)
    assert found["contrast"] == pytest.approx(luma * np.sqrt(1 / 4 - 1 / 16))
    assert found["edges"] == pytest.approx(luma * np.sqrt(1 / 2 + 1 / 2))
    size = load_reward("jpeg_incompressibility")(image, [""])
    assert found["jpeg"] == pytest.approx(float(size) * 1000 * 8 / 4)


def test_luma_and_saturation_agree_with_pillow() -> None:
    from PIL import Image

    hwc = decode(picture(20, 24), "x")
    found = measure(to_batch([hwc]))[0]
    grey = np.asarray(Image.fromarray(hwc).convert("L"), dtype=float) / 255
    assert float(found[1]) == pytest.approx(grey.mean(), abs=2e-3)
    assert float(found[2]) == pytest.approx(grey.std(), abs=2e-3)


def test_nuisances_need_pictures() -> None:
    with pytest.raises(InputError, match="at least 2 x 2"):
        measure(torch.zeros(1, 3, 1, 5))


# ---- the cache -----------------------------------------------------------------------------------


def test_the_store_keeps_what_it_was_given_and_nothing_of_a_failed_put(tmp_path: Path) -> None:
    store = VectorStore(tmp_path / "deep" / "f.sqlite")
    one, two = np.arange(3, dtype=np.float32), np.ones(2, dtype=np.float32)
    store.put("m", {b"a": one})
    with pytest.raises(AttributeError):
        store.put("m", {b"b": two, b"c": None})  # type: ignore[dict-item]
    store.put("n", {b"a": two})
    store.close()
    again = VectorStore(tmp_path / "deep" / "f.sqlite")
    found = again.get("m", [b"a", b"b", b"c"])
    assert found.keys() == {b"a"}
    np.testing.assert_array_equal(found[b"a"], one)


def test_a_file_that_is_no_cache_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "f.sqlite").write_bytes(b"no database at all, " * 99)
    with pytest.raises(InputError, match="cannot use the feature cache"):
        VectorStore(tmp_path / "f.sqlite")


def test_features_of_a_table_are_those_of_its_pictures(tmp_path: Path, mini: Encoder) -> None:
    data = write_pairs(tmp_path / "d.parquet", 12)
    found = pair_features(data, mini)
    assert len(found) == 12
    assert found.label.tolist() == [1, 0, 1, 0.5] * 3
    assert found.users == tuple(str(i % 5) for i in range(12))
    for row in (0, 11):
        image = to_batch([decode(picture(2 * row + 1), "x")])
        expected = mini.pictures(image)[0].numpy()
        np.testing.assert_allclose(found.pictures[found.second[row]], expected, atol=1e-5)
        expected = measure(image)[0].numpy()
        np.testing.assert_allclose(found.nuisances[found.second[row]], expected, rtol=1e-5)
        expected = mini.texts([caption(row)])[0].numpy()
        np.testing.assert_allclose(found.texts[found.prompt[row]], expected, atol=1e-5)


def test_prompts_that_differ_in_case_only_are_one(tmp_path: Path, mini: Encoder) -> None:
    data = write_pairs(tmp_path / "d.parquet", 10)  # the last repeats the first in capitals
    found = pair_features(data, mini)
    assert len(found.prompts) == 9
    assert found.prompt[9] == found.prompt[0]


def test_a_second_pass_encodes_nothing_and_gives_the_same(
    tmp_path: Path, mini: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cache = write_pairs(tmp_path / "d.parquet", 12), tmp_path / "f.sqlite"
    first = pair_features(data, mini, cache)
    monkeypatch.setattr(mini, "pictures", None)
    monkeypatch.setattr(mini, "texts", None)
    second = pair_features(data, mini, cache)
    np.testing.assert_array_equal(first.pictures, second.pictures)
    np.testing.assert_array_equal(first.texts, second.texts)


def test_a_killed_pass_goes_on_where_it_stopped(
    tmp_path: Path, mini: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cache = write_pairs(tmp_path / "d.parquet", 16), tmp_path / "f.sqlite"
    real, seen = mini.pictures, []

    def killed(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(images)

    monkeypatch.setattr(mini, "pictures", killed)
    with pytest.raises(KeyboardInterrupt):
        pair_features(data, mini, cache)  # the second of two row groups
    pair_features(data, mini, cache)
    assert seen == [16, 16, 16]  # the group that was done is not done again
    with sqlite3.connect(cache) as db:
        assert db.execute("SELECT COUNT(*) FROM vectors").fetchone() == (32 * 2 + 15,)


def test_pictures_of_several_sizes_and_broken_ones(tmp_path: Path, mini: Encoder) -> None:
    small = encode_png(np.zeros((1, 9, 3), dtype=np.uint8))
    jpgs = [picture(i, 16 + 8 * (i % 2)) for i in range(8)]
    data = write_pairs(tmp_path / "d.parquet", 8, jpg_0=[*jpgs[:5], b"broken", small, jpgs[7]])
    found = pair_features(data, mini)
    assert found.row.tolist() == [0, 1, 2, 3, 4, 7]
    assert [row.row for row in found.rejected] == [5, 6]
    assert "cannot decode" in found.rejected[0].reason
    assert picture_key(small) != picture_key(b"broken")


def test_missing_users_are_empty(tmp_path: Path, mini: Encoder) -> None:
    data = write_pairs(tmp_path / "d.parquet", 4, user_id=[None] * 4)
    assert pair_features(data, mini).users == ("",) * 4


def test_a_table_without_a_usable_row_is_one_sentence(tmp_path: Path, mini: Encoder) -> None:
    data = write_pairs(tmp_path / "d.parquet", 2, jpg_0=[b"x", b"y"])
    with pytest.raises(InputError, match="cannot decode"):
        pair_features(data, mini)

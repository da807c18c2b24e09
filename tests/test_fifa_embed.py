from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fifa.config import InputError
from fifa.embed import ClipEmbedder, TfidfEmbedder, embed, load_embedder

PROMPTS = [
    "a red circle above a blue square",
    "a red circle over a blue square",
    "two green triangles on a grey background",
    "three yellow stars",
    "кошка сидит на окне",
    "!!!",
]


def distance(x: np.ndarray, i: int, j: int) -> float:
    return float(np.linalg.norm(x[i] - x[j]))


def test_rewordings_are_closer_than_other_subjects() -> None:
    x = embed(PROMPTS, TfidfEmbedder())
    assert x.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)
    assert distance(x, 0, 1) < 0.8 * min(distance(x, 0, j) for j in (2, 3, 4, 5))


def test_vectors_are_the_same_every_time() -> None:
    prompts = [f"{colour} {shape} {i}" for i in range(60) for colour, shape in [("red", "star")]]
    assert np.array_equal(embed(prompts, TfidfEmbedder(16)), embed(prompts, TfidfEmbedder(16)))


@pytest.mark.parametrize("prompts", [["a"], ["?!"], ["a", "b"], ["", "a cat"]])
def test_few_and_odd_prompts_still_have_length_one(prompts: list[str]) -> None:
    x = embed(prompts, TfidfEmbedder())
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)


def test_a_prompt_that_shares_nothing_is_far_from_everything() -> None:
    prompts = [f"a red circle above {n} blue squares" for n in range(200)] + ["жёлтая звезда"]
    x = embed(prompts, TfidfEmbedder(64))
    distances = np.linalg.norm(x[:-1] - x[-1], axis=1)
    assert distances.min() > 1.0


def test_svd_keeps_the_geometry_of_tfidf() -> None:
    """With as many dimensions as prompts nothing is lost: inner products are those of TF-IDF."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = PROMPTS[:4]
    words = TfidfVectorizer(token_pattern=r"\w+", ngram_range=(1, 2), sublinear_tf=True)
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), sublinear_tf=True)
    full = [m.fit_transform(texts).toarray() for m in (words, letters)]
    expected = sum(m @ m.T for m in full) / 2  # each part has rows of length one
    x = embed(texts, TfidfEmbedder())
    np.testing.assert_allclose(x @ x.T, expected, atol=1e-5)


class Counting:
    """Two-dimensional directions; counts how often it had to work."""

    name = "counting"
    calls = 0

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        self.calls += 1
        angles = np.arange(len(prompts))
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_the_cache_answers_for_the_same_prompts_in_the_same_company(tmp_path: Path) -> None:
    embedder = Counting()
    first = embed(["a", "b"], embedder, tmp_path)
    assert np.array_equal(embed(["a", "b"], embedder, tmp_path), first)
    assert embedder.calls == 1
    embed(["a", "b", "c"], embedder, tmp_path)
    embedder.name = "another"
    embed(["a", "b"], embedder, tmp_path)
    assert embedder.calls == 3


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    embed(["a"], Counting(), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"junk")
    with pytest.raises(InputError, match=r"embeddings-\w+\.npy is damaged"):
        embed(["a"], Counting(), tmp_path)


def test_an_embedder_must_return_unit_vectors() -> None:
    class Long(Counting):
        def __call__(self, prompts: Sequence[str]) -> np.ndarray:
            return 2 * super().__call__(prompts)

    with pytest.raises(InputError, match="unit vectors"):
        embed(["a", "b"], Long())


@pytest.mark.parametrize(
    ("spec", "part"),
    [("tfid", "did you mean 'tfidf'"), ("tfidf:many", "integer"), ("clip:ViT-B-32", "weights")],
)
def test_an_unknown_embedder_is_one_sentence(spec: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        load_embedder(spec)


def test_clip_embeds_with_stored_weights(tmp_path: Path) -> None:
    import open_clip
    import torch

    sizes = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    (tmp_path / "tiny-embed-test.json").write_text(json.dumps(sizes))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-embed-test").eval()
    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    embedder = load_embedder(f"clip:tiny-embed-test:{tmp_path / 'tiny.pt'}")
    assert isinstance(embedder, ClipEmbedder)
    embedder.batch_size = 2
    with torch.inference_mode():
        tokens = open_clip.get_tokenizer("tiny-embed-test")(PROMPTS[:3])
        expected = model.encode_text(tokens, normalize=True).numpy()
    np.testing.assert_allclose(embed(PROMPTS[:3], embedder), expected, atol=1e-5)
    with pytest.raises(InputError, match="cannot load the text model"):
        embed(["a"], load_embedder("clip:tiny-embed-test:no-such-tag"))

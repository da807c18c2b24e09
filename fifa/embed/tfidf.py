"""The offline default: TF-IDF of words and letter groups, reduced by a truncated SVD (LSA)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fifa.config import InputError, fingerprint
from fifa.embed import Vectors
from fifa.pairs import normalise_prompt


class TfidfEmbedder:
    """TF-IDF of words, word pairs and groups of 3-4 letters, reduced to `dim` by truncated SVD.

    Letter groups keep spelling variants close and work in any script. Deterministic.
    """

    def __init__(self, dim: int | str = 128) -> None:
        try:
            self.dim = int(dim)
        except ValueError:
            raise InputError(f"embedder 'tfidf:{dim}': the dimension must be an integer") from None
        if self.dim < 1:
            raise InputError(f"embedder 'tfidf:{dim}': the dimension must be at least 1")
        self.name = f"tfidf:{self.dim}:v1"

    def __call__(self, prompts: Sequence[str]) -> Vectors:
        """Fit on these prompts and return their vectors (N, D), D <= dim."""
        from scipy.sparse import hstack
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.utils.extmath import randomized_svd

        texts = [normalise_prompt(prompt) or prompt for prompt in prompts]
        options = {"sublinear_tf": True, "dtype": np.float32}
        words = TfidfVectorizer(
            token_pattern=r"\w+", ngram_range=(1, 2), max_features=20_000, **options
        )
        letters = TfidfVectorizer(
            analyzer="char_wb", ngram_range=(3, 4), max_features=30_000, **options
        )
        parts = [letters.fit_transform(texts)]
        if any(letter.isalnum() for text in texts for letter in text):
            parts.append(words.fit_transform(texts))
        counts = hstack(parts).tocsr()
        left, strength, _ = randomized_svd(
            counts, min(self.dim, *counts.shape), n_iter=3, random_state=0
        )
        return _unit_rows(np.asarray(left * strength, dtype=np.float32), texts)


def _unit_rows(x: Vectors, texts: Sequence[str]) -> Vectors:
    """Rows scaled to length 1; a row without length gets a direction drawn from its own text.

    No length means that the prompt shares nothing with the others. In the full TF-IDF space it is
    at a right angle to them all, which is what a random direction is too, up to 1 / sqrt(D).
    """
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    for i in np.flatnonzero(lengths[:, 0] < 1e-6).tolist():
        rng = np.random.default_rng(int(fingerprint(texts[i]), 16))
        x[i] = rng.normal(size=x.shape[1])
        lengths[i] = np.linalg.norm(x[i])
    return x / lengths

"""Prompts to unit vectors, so that the distance of two prompts means something.

An embedder sees all distinct prompts of a data set at once, as some must be fitted to them. The
default needs no weights: TF-IDF over words and letter groups, reduced by an SVD. `clip:...` is the
text tower of an open_clip model. Adding one is a class and a line in EMBEDDERS.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fifa.config import InputError, atomic_path, fingerprint, unknown
from fifa.pairs import normalise_prompt

Vectors = NDArray[np.float32]  # (N, D), rows of length 1


class Embedder(Protocol):
    """Prompts -> unit vectors; `name` changes whenever the vectors would."""

    name: str

    def __call__(self, prompts: Sequence[str]) -> Vectors:
        """Unit vectors (N, D) float32 of N distinct prompts."""
        ...


EMBEDDERS: dict[str, str] = {
    "tfidf": "fifa.embed:TfidfEmbedder",
    "clip": "fifa.embed:ClipEmbedder",  # clip:<open_clip model>:<pretrained tag or path>
}


def load_embedder(spec: str) -> Embedder:
    """The embedder that `spec` names: `tfidf`, `tfidf:<dim>` or `clip:<model>:<weights>`."""
    name, _, argument = spec.partition(":")
    if name not in EMBEDDERS:
        raise unknown("embedder", spec, EMBEDDERS)
    module, _, attribute = EMBEDDERS[name].partition(":")
    factory = getattr(importlib.import_module(module), attribute)
    return factory(argument) if argument else factory()


def embed(prompts: Sequence[str], embedder: Embedder, cache: str | Path | None = None) -> Vectors:
    """Vectors (N, D) of distinct prompts, read from the folder `cache` if it holds them.

    The cache key covers the embedder's name and all prompts in order: a fitted embedder gives a
    prompt another vector in other company.
    """
    if not prompts:
        raise InputError("there is no prompt to embed")
    if cache is None:
        return _checked(embedder, prompts)
    path = cache_path(prompts, embedder, cache)
    if path.is_file():
        try:
            return np.load(path)
        except (ValueError, EOFError, OSError) as error:
            raise InputError(f"the cache file {path} is damaged ({error}); delete it") from None
    vectors = _checked(embedder, prompts)
    with atomic_path(path) as temporary:
        np.save(temporary, vectors)
    return vectors


def cache_path(prompts: Sequence[str], embedder: Embedder, cache: str | Path) -> Path:
    """Where `embed` keeps the vectors of these prompts."""
    return Path(cache) / f"embeddings-{fingerprint(embedder.name, *prompts)}.npy"


def _checked(embedder: Embedder, prompts: Sequence[str]) -> Vectors:
    vectors = np.ascontiguousarray(embedder(prompts), dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=-1)
    if vectors.ndim != 2 or len(vectors) != len(prompts) or not np.allclose(lengths, 1, atol=1e-4):
        raise InputError(
            f"embedder '{embedder.name}' must return unit vectors ({len(prompts)}, D), "
            f"it returned {vectors.shape}"
        )
    return vectors


class TfidfEmbedder:
    """TF-IDF of words, word pairs and groups of 3-4 letters, reduced to `dim` by truncated SVD.

    Letter groups keep spelling variants close and work in any script. Deterministic.
    """

    def __init__(self, dim: int | str = 128) -> None:
        try:
            self.dim = int(dim)
        except ValueError:
            raise InputError(f"embedder 'tfidf:{dim}': the dimension must be an integer") from None
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


class ClipEmbedder:
    """Text tower of an open_clip model: `ViT-B-32:laion2b_s34b_b79k`, or `ViT-B-32:<file>`."""

    def __init__(self, spec: str = "ViT-B-32:laion2b_s34b_b79k", batch_size: int = 256) -> None:
        self.model, _, self.weights = spec.partition(":")
        if not self.weights:
            raise InputError(f"embedder 'clip:{spec}' must be clip:<open_clip model>:<weights>")
        self.batch_size = batch_size
        file = Path(self.weights)
        self.name = f"clip:{self.model}:{fingerprint(file) if file.exists() else self.weights}"

    def __call__(self, prompts: Sequence[str]) -> Vectors:
        """Normalised text features (N, D)."""
        import open_clip
        import torch

        try:
            model = open_clip.create_model(self.model, pretrained=self.weights)
            tokenize = open_clip.get_tokenizer(self.model)
        except (RuntimeError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"cannot load the text model '{self.name}': {reason}") from None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = model.eval().to(device)
        parts = []
        with torch.inference_mode():
            for start in range(0, len(prompts), self.batch_size):
                tokens = tokenize(list(prompts[start : start + self.batch_size])).to(device)
                parts.append(model.encode_text(tokens, normalize=True).float().cpu().numpy())
        return np.concatenate(parts)

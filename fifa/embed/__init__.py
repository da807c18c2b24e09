"""Prompts to unit vectors, so that the distance of two prompts means something.

The default needs no weights: `tfidf`, TF-IDF over words and letter groups, reduced by an SVD. It is
fitted to all distinct prompts of a data set at once, so a prompt's vector depends on the others.
The vectors of text networks do not; they are kept prompt by prompt in an SQLite file, and a data
set that has grown pays for its new prompts only. Adding one is a class and a line in EMBEDDERS.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fifa.config import InputError, atomic_path, fingerprint, import_from_here, unknown

Vectors = NDArray[np.float32]  # (N, D), rows of length 1
Told = Callable[[int, int], None]  # prompts done, prompts in all

STORE = "embeddings.sqlite"  # where vectors are kept prompt by prompt, inside a cache folder


class Embedder(Protocol):
    """Prompts -> unit vectors; `name` changes whenever the vectors would."""

    name: str

    def __call__(self, prompts: Sequence[str]) -> Vectors:
        """Unit vectors (N, D) float32 of N distinct prompts."""
        ...


@runtime_checkable
class PromptEmbedder(Protocol):
    """A slow embedder whose vector of a prompt is the same in any company: worth keeping."""

    name: str

    def __call__(self, prompts: Sequence[str]) -> Vectors:
        """Unit vectors (N, D) float32 of N distinct prompts."""
        ...

    def stream(self, prompts: Sequence[str]) -> Iterator[tuple[list[int], Vectors]]:
        """Batch by batch, in any order: which prompts, and their vectors."""
        ...

    def count_cut(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than the network reads; what is too long is cut off."""
        ...


# ---- the table -----------------------------------------------------------------------------------

EMBEDDERS: dict[str, str] = {
    "tfidf": "fifa.embed.tfidf:TfidfEmbedder",  # tfidf:<dimension>
    "clip": "fifa.embed.clip:OpenClipEmbedder",  # clip:<open_clip model>:<tag or file>
    "clip_hf": "fifa.embed.clip:ClipTextEmbedder",  # clip_hf:<folder or Hub id>
    "sentence": "fifa.embed.sentence:SentenceEmbedder",  # sentence:<folder or Hub id>
}


def load_embedder(spec: str, **kwargs: Any) -> Embedder:
    """The embedder that `spec` names.

    `spec` is a name of EMBEDDERS, `name:<which model>`, or a `package.module:factory`; `kwargs` go
    to its factory. A network is found here, but read when it is first called. Raises InputError for
    an unknown name, a failing import, arguments the factory does not take, or a missing model.
    """
    family, colon, target = spec.partition(":")
    address = EMBEDDERS.get(family, spec if colon else None)
    if address is None:
        raise unknown("embedder", spec, EMBEDDERS, "package.module:factory")
    arguments = (target,) if family in EMBEDDERS and target else ()
    factory = _imported(address, spec)
    try:
        inspect.signature(factory).bind(*arguments, **kwargs)
    except TypeError as error:
        raise InputError(f"embedder '{spec}': {error}") from None
    return factory(*arguments, **kwargs)


def _imported(address: str, spec: str) -> Callable[..., Embedder]:
    module, _, name = address.partition(":")
    try:
        factory: Callable[..., Embedder] = getattr(import_from_here(module), name)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        raise InputError(f"embedder '{spec}' cannot be loaded: {error}") from None
    return factory


# ---- vectors and where they are kept -------------------------------------------------------------


def embed(
    prompts: Sequence[str],
    embedder: Embedder,
    cache: str | Path | None = None,
    store: str | Path | None = None,
    told: Told | None = None,
) -> Vectors:
    """Vectors (N, D) of distinct prompts, read from the folder `cache` if it holds them.

    The cache's file is named by the embedder and all prompts in order. Vectors of a PromptEmbedder
    are also kept one by one in the SQLite file `store`, by default one in the cache: other prompts
    beside them, another order or a killed process cost nothing twice. `told` hears how far a
    network is.
    """
    if not prompts:
        raise InputError("there is no prompt to embed")
    if cache is None and store is None:
        return _checked(embedder(prompts), len(prompts), embedder.name)
    if cache is None:
        return _made(prompts, embedder, store, told)
    path = cache_path(prompts, embedder, cache)
    if path.is_file():
        try:
            return np.load(path)
        except (ValueError, EOFError, OSError) as error:
            raise InputError(f"the cache file {path} is damaged ({error}); delete it") from None
    vectors = _made(prompts, embedder, store or Path(cache) / STORE, told)
    with atomic_path(path) as temporary:
        np.save(temporary, vectors)
    return vectors


def cache_path(prompts: Sequence[str], embedder: Embedder, cache: str | Path) -> Path:
    """Where `embed` keeps the vectors of these prompts."""
    return Path(cache) / f"embeddings-{fingerprint(embedder.name, *prompts)}.npy"


def count_cut(prompts: Sequence[str], embedder: Embedder) -> int:
    """How many prompts the embedder does not read to their end."""
    return embedder.count_cut(prompts) if isinstance(embedder, PromptEmbedder) else 0


def _made(
    prompts: Sequence[str], embedder: Embedder, store: str | Path | None, told: Told | None
) -> Vectors:
    if store is None or not isinstance(embedder, PromptEmbedder):
        return _checked(embedder(prompts), len(prompts), embedder.name)
    from fifa.embed.store import VectorStore

    with VectorStore(store) as kept:
        return _checked(kept.vectors(prompts, embedder, told), len(prompts), embedder.name)


def _checked(found: Vectors, count: int, name: str) -> Vectors:
    vectors = np.ascontiguousarray(found, dtype=np.float32)
    if (
        vectors.ndim != 2
        or len(vectors) != count
        or not np.allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-4)
    ):
        raise InputError(
            f"embedder '{name}' must return unit vectors ({count}, D), it returned {vectors.shape}"
        )
    return vectors

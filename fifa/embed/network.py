"""What all text networks share: where they are, batches, precision, device, unit length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from fifa.config import InputError, fingerprint
from fifa.embed import Vectors
from fifa.rewards.network import PRECISIONS, is_hub_id

if TYPE_CHECKING:
    import torch

E = TypeVar("E", bound="NetworkEmbedder")


class NetworkEmbedder(ABC):
    """A text network, read when it is first needed; a prompt's vector is the same in any company.

    The same up to float32 rounding, which depends on the shape of a batch. Prompts are taken by
    length, longest first: batches are alike, and too large ones fail at once. The order does not
    depend on how prompts were given.
    """

    name: str
    batch: int
    device: str = "cpu"

    def _set(self, name: str, dtype: str, batch: int) -> None:
        """Check what all embedders take; `name` tells the model and its version."""
        if dtype not in PRECISIONS:
            raise InputError(f"embedder '{name}': dtype is '{dtype}', allowed are fp32 and bf16")
        if batch < 1:
            raise InputError(f"embedder '{name}': batch is {batch}, it must be at least 1")
        self.name = f"{name}:{dtype}"
        self.batch = batch
        self._dtype = PRECISIONS[dtype]
        self._loaded: Any = None

    def to(self: E, device: str) -> E:
        """Run on this device; RuntimeError or AssertionError where torch has no such one."""
        import torch

        torch.empty(0, device=device)
        self.device = device
        return self

    @abstractmethod
    def _load(self) -> torch.nn.Module:
        """Read the network and the tokenizer; InputError if something is missing."""

    @abstractmethod
    def _encode(self, prompts: list[str]) -> torch.Tensor:
        """Features (N, D) of a batch, of any length and precision."""

    @abstractmethod
    def count_cut(self, prompts: Sequence[str]) -> int:
        """How many prompts have more tokens than the network reads."""

    def network(self) -> Any:
        """The network in evaluation mode, on its device and in its precision."""
        import torch

        if self._loaded is None:
            self._loaded = self._load().eval().requires_grad_(False)
        return self._loaded.to(self.device, getattr(torch, self._dtype))

    def __call__(self, prompts: Sequence[str]) -> Vectors:
        """Unit vectors (N, D) of N prompts."""
        parts = list(self.stream(prompts))
        order = np.concatenate([rows for rows, _ in parts])
        vectors = np.concatenate([vectors for _, vectors in parts])
        return vectors[np.argsort(order)]

    def stream(self, prompts: Sequence[str]) -> Iterator[tuple[list[int], Vectors]]:
        """Batch by batch: which prompts, and their unit vectors."""
        import torch

        self.network()
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            try:
                with torch.inference_mode():
                    features = self._encode([prompts[row] for row in rows]).float()
            except torch.OutOfMemoryError:
                raise InputError(
                    f"embedder '{self.name}' ran out of memory with a batch of {self.batch}; "
                    f"choose a smaller one"
                ) from None
            yield rows, torch.nn.functional.normalize(features, dim=1).cpu().numpy()


# ---- where a model is ----------------------------------------------------------------------------


class Place(NamedTuple):
    """A folder, or a Hub repository at a commit, and a name that changes with its content."""

    path: str
    commit: str | None
    identity: str


def find_model(path: str, marker: str, embedder: str) -> Place:
    """The model at `path`, a folder that holds the file `marker` or the Hub id of such a one.

    Raises InputError that says what is missing and how to get it.
    """
    folder = Path(path).expanduser()
    if (folder / marker).is_file():
        return Place(str(folder), None, f"{folder.resolve().name}@{fingerprint(folder)}")
    if folder.exists() or not is_hub_id(path):
        raise InputError(
            f"embedder '{embedder}:{path}': there is no folder with {marker} and no Hub id"
        )
    from huggingface_hub import hf_hub_download

    try:
        commit = Path(hf_hub_download(path, marker)).parent.name  # .../snapshots/<commit>/<marker>
    except OSError as error:  # of the Hub and of the network alike
        raise not_here(f"{embedder}:{path}", path, error) from None
    return Place(path, commit, f"{path}@{commit[:12]}")


def not_here(spec: str, repository: str, error: Exception) -> InputError:
    """The one sentence for a model that is neither here nor to be had from the Hub."""
    lines = str(error).strip().splitlines()
    reason = (lines[0] if lines else type(error).__name__).split(". ")[0].rstrip(".")
    return InputError(
        f"embedder '{spec}' is not in the Hub cache and could not be downloaded ({reason}); get it "
        f"once by `hf download {repository}`, or name a local folder"
    )


def read_model(read: Callable[[], Any], place: Place, spec: str) -> Any:
    """What `read` reads of a model in its place; what goes wrong becomes one sentence."""
    from safetensors import SafetensorError

    try:
        return read()
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        if place.commit is not None and isinstance(error, OSError):
            raise not_here(spec, place.path, error) from None
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"embedder '{spec}' cannot be loaded: {reason}") from None

"""What all scorers with a network share: batches, precision, device, weights and their version."""

from __future__ import annotations

import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fifa.config import InputError, fingerprint
from fifa.images import Pixels

if TYPE_CHECKING:
    import torch

    from fifa.rewards.pixels import Preprocess

R = TypeVar("R", bound="NetworkReward")

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


class NetworkReward(ABC):
    """A frozen network that scores images in batches, however they are cut.

    Unless the images ask for gradients nothing is recorded for a backward pass.
    """

    name: str
    version: str  # changes with the weights, the precision and the preprocessing
    differentiable = True
    network: torch.nn.Module
    pixels: Preprocess
    batch: int

    def _set(self, network: torch.nn.Module, pixels: Preprocess, batch: int) -> None:
        """Freeze the network, whose first parameter has the precision of the pixels it wants."""
        if batch < 1:
            raise InputError(f"reward '{self.name}': batch is {batch}, it must be at least 1")
        self.network = network.eval().requires_grad_(False)
        self.pixels = pixels
        self.batch = batch
        self.version = fingerprint(weights_version(network), repr(pixels))

    @abstractmethod
    def _score(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (N,) of normalised pixels (N, 3, size, size) in the network's precision."""

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (N,) float32 of images (N, 3, H, W) in [0, 1]; gradients reach the images."""
        import torch

        if len(images) != len(prompts):
            raise InputError(
                f"reward '{self.name}' got {len(images)} images but {len(prompts)} prompts"
            )
        weight = next(self.network.parameters())
        wanted = torch.is_grad_enabled() and images.requires_grad
        parts = [torch.empty(0, device=images.device)]
        with torch.set_grad_enabled(wanted):
            for start in range(0, len(images), self.batch):
                stop = start + self.batch
                pixels = self.pixels(images[start:stop]).to(weight.device, weight.dtype)
                scores = self._score(pixels, list(prompts[start:stop]))
                parts.append(scores.float().to(images.device))
        return torch.cat(parts)

    def prepare(self, hwc: Pixels) -> Pixels:
        """A picture (H, W, 3) resized and cut to the square (size, size, 3) that the network sees.

        What is left for `score_prepared` is arithmetic. Any thread may call it.
        """
        return self.pixels.square(hwc)

    def score_prepared(self, pictures: Sequence[Pixels], prompts: Sequence[str]) -> torch.Tensor:
        """Scores (N,) float32 of N pictures that `prepare` returned, to the bit those of a call."""
        import torch

        weight = next(self.network.parameters())
        parts = [torch.empty(0)]
        with torch.no_grad():
            for start in range(0, len(pictures), self.batch):
                stop = start + self.batch
                batch = torch.from_numpy(np.stack(pictures[start:stop])).to(weight.device)
                pixels = self.pixels.normalised(batch).to(weight.dtype)
                parts.append(self._score(pixels, list(prompts[start:stop])).float().cpu())
        return torch.cat(parts)

    def to(self: R, device: str) -> R:
        """Move the network; images given later are moved to it."""
        self.network.to(device)
        return self


def precision(dtype: str, reward: str) -> torch.dtype:
    """`fp32` or `bf16` as torch's own; InputError for another name."""
    import torch

    if dtype not in PRECISIONS:
        raise InputError(f"reward '{reward}': dtype is '{dtype}', allowed are fp32 and bf16")
    found: torch.dtype = getattr(torch, PRECISIONS[dtype])
    return found


def linear_head(width: int) -> torch.nn.Module:
    """The head of the LAION aesthetic predictor and of ImageReward: width-1024-128-64-16-1.

    Linear layers with dropouts and nothing between them; the places of the dropouts are kept, so
    the names `layers.0`, `2`, `4`, `6` and `7` are those of the published files.
    """
    from torch import nn

    layers = nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    return nn.ModuleDict({"layers": layers})


# ---- weights -------------------------------------------------------------------------------------


def find_weights(path: str, names: Sequence[str], reward: str) -> Path:
    """A file of weights: `path` itself, one of `names` in the folder or Hub repository `path`.

    Raises InputError that says what is missing and how to get it.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return local
    if local.is_dir():
        found = next((local / name for name in names if (local / name).is_file()), None)
        if found is None:
            raise InputError(f"reward '{reward}': {path} holds none of {', '.join(names)}")
        return found
    if not is_hub_id(path):
        raise InputError(f"reward '{reward}': there are no weights at {path}")
    return hub_file(path, names[0], reward)


def is_hub_id(path: str) -> bool:
    """Whether the text can be a Hugging Face Hub id, `owner/name`, and is no local path."""
    return _HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def hub_file(repository: str, name: str, reward: str, whole: bool = False) -> Path:
    """A file of a Hub repository, from the cache or the network.

    If it cannot be had, the sentence tells how to get it, or the `whole` repository.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name))
    except OSError as error:  # of the Hub and of the network alike
        download = repository if whole else f"{repository} {name}"
        raise missing(reward, f"{name} of {repository}", download, error) from None


def missing(reward: str, what: str, download: str, error: Exception) -> InputError:
    """The one sentence for weights that are neither here nor to be had from the Hub."""
    lines = str(error).strip().splitlines()
    reason = (lines[0] if lines else type(error).__name__).split(". ")[0].rstrip(".")
    return InputError(
        f"reward '{reward}' needs {what}, which is not in the Hub cache and could not be "
        f"downloaded ({reason}); get it once by `hf download {download}`, or name a local copy as "
        f"{reward}:PATH"
    )


def read_weights(file: Path, reward: str) -> dict[str, torch.Tensor]:
    """Tensors by name of a .safetensors file or a torch checkpoint, in memory.

    A checkpoint is unpickled as weights only; it may keep them under `state_dict`.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"reward '{reward}': cannot read the weights {file} ({reason})") from None
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(torch.is_tensor(v) for v in found.values()):
        raise InputError(f"reward '{reward}': {file} holds no tensors by name")
    return dict(found)


def fill(
    module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], file: Path, reward: str
) -> None:
    """Load tensors into a module; every name and shape must fit, or it is an InputError."""
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if wrong:
        first = wrong[0]
        raise InputError(
            f"reward '{reward}': {file} does not fit the network: {first} is "
            f"{given.get(first, 'absent')}, expected {own.get(first, 'no such name')} "
            f"({len(wrong)} names in all)"
        )
    module.load_state_dict(tensors)


def weights_version(module: torch.nn.Module) -> str:
    """A fingerprint of all tensors by name, the same from whichever file they came."""
    import torch

    def data(tensor: Any) -> bytes:
        flat = tensor.detach().cpu().contiguous().flatten()
        return flat.view(torch.uint8).numpy().tobytes()

    state = sorted(module.state_dict().items())
    return fingerprint(*(f"{name} {fingerprint(data(value))}" for name, value in state))

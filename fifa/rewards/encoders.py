"""Frozen dual encoders: pictures and prompts to the unit vectors that fitted proxies read.

`mini` is the one in the package, `clip:MODEL` any open_clip model, `transformers:FOLDER` any
transformers CLIPModel, `tuned:FOLDER` one of these after `fifa reward fit --kind lora`. Loading and
preprocessing are those of the rewards of the same network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fifa.config import InputError, fingerprint, unknown
from fifa.rewards.clip import load_open_clip
from fifa.rewards.mini import WEIGHTS
from fifa.rewards.network import weights_version
from fifa.rewards.pickscore import load_clip_model, load_processor
from fifa.rewards.pixels import Preprocess

if TYPE_CHECKING:
    import torch

DEFAULT = "mini"
_LOADER = "encoder"  # whom the sentences of a failed load speak of


class Encoder(ABC):
    """Pictures (N, 3, H, W) in [0, 1] and prompts to unit vectors (N, width), float32.

    `spec` is what `load_encoder` was given; `version` changes whenever the vectors would.
    """

    spec: str
    version: str
    width: int
    network: Any
    pixels: Preprocess

    def _set(self, spec: str, network: Any, pixels: Preprocess) -> None:
        self.spec, self.pixels = spec, pixels
        self.network = network.eval().requires_grad_(False)
        self.version = fingerprint(weights_version(network), repr(pixels))
        self.width = self.texts(["width"]).shape[1]

    @abstractmethod
    def _pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features (N, width) of normalised pixels."""

    @abstractmethod
    def _words(self, prompts: list[str]) -> torch.Tensor:
        """Features (N, width) of prompts, cut to the network's context."""

    def pictures(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors of images (N, 3, H, W) in [0, 1]; gradients reach the images."""
        import torch

        wanted = torch.is_grad_enabled() and images.requires_grad
        with torch.set_grad_enabled(wanted):
            return _unit(self._pictures(self.pixels(images).to(self.device)))

    def texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Unit vectors of N prompts."""
        import torch

        with torch.no_grad():
            return _unit(self._words(list(prompts)))

    def prepared(
        self, squares: torch.Tensor, prompts: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors of N pictures and of M prompts; gradients reach the network if it asks.

        The pictures are uint8 (N, size, size, 3), as `pixels.square` cuts them.
        """
        pixels = self.pixels.normalised(squares).to(self.device)
        return _unit(self._pictures(pixels)), _unit(self._words(list(prompts)))

    def renewed(self, spec: str) -> Encoder:
        """Take the network as it is now, frozen, under another name and version."""
        self._set(spec, self.network, self.pixels)
        return self

    @property
    def device(self) -> torch.device:
        """Where the network is; vectors come back from there."""
        device: torch.device = next(self.network.parameters()).device
        return device

    def to(self, device: str) -> Encoder:
        """Move the network."""
        self.network.to(device)
        return self


class OpenClipEncoder(Encoder):
    """An open_clip model: `model:tag`, `model:file`, a folder or a Hub id."""

    tokenize: Callable[[Sequence[str]], torch.Tensor]

    def __init__(self, path: str, spec: str) -> None:
        network, self.tokenize, pixels = load_open_clip(path, _LOADER)
        self._set(spec, network, pixels)

    def _pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network.encode_image(pixels)

    def _words(self, prompts: list[str]) -> torch.Tensor:
        return self.network.encode_text(self.tokenize(prompts).to(self.device))


class TransformersEncoder(Encoder):
    """A transformers CLIPModel with its tokenizer and preprocessing: a folder or a Hub id."""

    def __init__(self, path: str, spec: str) -> None:
        network = load_clip_model(path, _LOADER)
        self.tokenizer, pixels = load_processor(path, _LOADER)
        self.length = network.config.text_config.max_position_embeddings
        self._set(spec, network, pixels)

    def _pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        net = self.network
        return net.visual_projection(net.vision_model(pixel_values=pixels).pooler_output)

    def _words(self, prompts: list[str]) -> torch.Tensor:
        net = self.network
        tokens = self.tokenizer(
            prompts, padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.device)
        return net.text_projection(net.text_model(**tokens).pooler_output)


def _tuned(path: str, spec: str) -> Encoder:
    from fifa.rewards.tuned import load_tuned  # which loads another encoder first

    return load_tuned(path, spec)


ENCODERS: dict[str, Callable[[str, str], Encoder]] = {
    "mini": lambda path, spec: OpenClipEncoder(path or str(WEIGHTS), spec),
    "clip": OpenClipEncoder,
    "transformers": TransformersEncoder,
    "tuned": _tuned,
}


def load_encoder(spec: str = DEFAULT) -> Encoder:
    """The encoder that `spec` names: `mini`, `clip:MODEL`, `transformers:` or `tuned:FOLDER`.

    Raises InputError for an unknown name and for weights that cannot be loaded.
    """
    name, _, path = spec.partition(":")
    if name not in ENCODERS:
        raise unknown("encoder", spec, ENCODERS)
    if name != DEFAULT and not path:
        raise InputError(f"encoder '{spec}' must name its weights, such as {name}:FOLDER")
    return ENCODERS[name](path, spec)


def _unit(features: torch.Tensor) -> torch.Tensor:
    from torch.nn import functional as F

    return F.normalize(features.float(), dim=1)

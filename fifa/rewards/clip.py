"""CLIP score by any open_clip model: how well an image fits its prompt.

    score(image, prompt) = 100 * cos(image features, text features)

As in the tables of papers (Hessel et al. 2021, arXiv 2104.08718, weigh the cosine by 2.5 and cut it
at 0, which changes no order between positive scores and stops gradients below).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fifa.config import InputError, quiet_libraries
from fifa.rewards.network import NetworkReward, is_hub_id, missing, precision
from fifa.rewards.pixels import Preprocess, of_open_clip

if TYPE_CHECKING:
    import torch


class DualEncoder(NetworkReward):
    """An open_clip model whose score is the cosine between image and text, times `scale`."""

    scale: float
    network: Any  # an open_clip model
    tokenize: Callable[[Sequence[str]], torch.Tensor]

    def _score(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        distinct, places = once_each(prompts)
        tokens = self.tokenize(distinct).to(pixels.device)  # cut to the context, end token kept
        image = self.network.encode_image(pixels).float()
        text = self.network.encode_text(tokens).float()[places]
        return self.scale * cosine(image, text)


class ClipScore(DualEncoder):
    """Fit of image and prompt: 100 times the cosine of CLIP's features.

    Args:
        path: an open_clip `model:tag` or `model:file`, a folder with open_clip_config.json, or the
            Hub id of one.
        dtype: fp32 or bf16.
        batch: images a forward pass.
    """

    name = "clip"
    needs = "any open_clip model; default ViT-L-14-quickgelu:openai"
    source = "CLIP, arXiv 2103.00020; CLIPScore, arXiv 2104.08718"
    scale = 100.0

    def __init__(
        self, path: str = "ViT-L-14-quickgelu:openai", dtype: str = "fp32", batch: int = 64
    ) -> None:
        model, self.tokenize, pixels = load_open_clip(str(path), self.name)
        self._set(model.to(precision(dtype, self.name)), pixels, batch)


def once_each(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The distinct prompts, and which of them each is: the pictures of a pair share one."""
    distinct = list(dict.fromkeys(prompts))
    place = {prompt: i for i, prompt in enumerate(distinct)}
    return distinct, [place[prompt] for prompt in prompts]


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine of each row of a with that of b, (N,)."""
    from torch.nn import functional as F

    return (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1)


def load_open_clip(spec: str, reward: str) -> tuple[Any, Callable[..., Any], Preprocess]:
    """Model, tokenizer and preprocessing of `model:tag`, `model:file`, a folder or a Hub id.

    Raises InputError that says what is missing and how to get it.
    """
    import open_clip

    name, weights = _address(spec, reward)
    try:
        with quiet_libraries():
            model = open_clip.create_model(name, pretrained=weights, require_pretrained=True)
            tokenize = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        if name.startswith("local-dir:") or (weights and Path(weights).is_file()):
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"reward '{reward}': cannot load {spec} ({reason})") from None
        raise missing(reward, f"the open_clip model {spec}", _repository(spec), error) from None
    return model, tokenize, of_open_clip(model.visual.preprocess_cfg, f"reward '{reward}'")


def _address(spec: str, reward: str) -> tuple[str, str | None]:
    """What open_clip calls the model, and where its weights come from."""
    import open_clip

    folder = Path(spec).expanduser()
    if (folder / "open_clip_config.json").is_file():
        return f"local-dir:{folder}", None
    if is_hub_id(spec):
        return f"hf-hub:{spec}", None
    name, _, weights = spec.partition(":")
    if name not in open_clip.list_models() or not weights:
        raise InputError(
            f"reward '{reward}': '{spec}' is no open_clip model; allowed are model:tag such as "
            f"ViT-B-32:laion2b_s34b_b79k, model:file, a folder with open_clip_config.json, "
            f"or its Hub id"
        )
    file = Path(weights).expanduser()
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights not in tags and not file.is_file():
        raise InputError(
            f"reward '{reward}': '{weights}' is neither a file nor published weights of {name}; "
            f"known are {', '.join(tags) or 'none'}"
        )
    return name, weights if weights in tags else str(file)


def _repository(spec: str) -> str:
    """The Hub repository behind a spec, for the sentence that says what to download."""
    import open_clip

    name, _, tag = spec.partition(":")
    known = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    return str(known.get("hf_hub") or spec).rstrip("/")

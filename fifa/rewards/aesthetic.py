"""LAION's aesthetic predictor: a linear head on CLIP's image features; the prompt is ignored.

    score(image) = head(image features / |image features|), about 1 to 10

(github.com/christophschuhmann/improved-aesthetic-predictor; the aesthetic task of DDPO and D3PO.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fifa.config import InputError
from fifa.rewards.clip import load_open_clip
from fifa.rewards.network import (
    NetworkReward,
    fill,
    find_weights,
    linear_head,
    precision,
    read_weights,
)

if TYPE_CHECKING:
    import torch

HEADS = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth", "model.safetensors")


class Aesthetic(NetworkReward):
    """How beautiful people find an image, 1 to 10; ignores prompts.

    Args:
        path: the head: a file such as sac+logos+ava1-l14-linearMSE.pth, a folder that holds one, or
            a Hub id.
        clip: the image tower, in any form that the reward `clip` takes.
        dtype: fp32 or bf16, of the tower; the head runs in float32.
        batch: images a forward pass.
    """

    name = "aesthetic"
    needs = "trl-lib/ddpo-aesthetic-predictor, and CLIP ViT-L-14 of OpenAI"
    source = "LAION-Aesthetics predictor V2, arXiv 2210.08402"
    network: Any  # clip: the open_clip model, head: the linear layers

    def __init__(
        self,
        path: str = "trl-lib/ddpo-aesthetic-predictor",
        clip: str = "ViT-L-14-quickgelu:openai",
        dtype: str = "fp32",
        batch: int = 64,
    ) -> None:
        from torch import nn

        file = find_weights(str(path), HEADS, self.name)
        tensors = read_weights(file, self.name)
        if "layers.0.weight" not in tensors:
            raise InputError(f"reward '{self.name}': {file} holds no aesthetic head (layers.0...)")
        model, _, pixels = load_open_clip(str(clip), self.name)
        width = tensors["layers.0.weight"].shape[1]
        if width != model.visual.output_dim:
            raise InputError(
                f"reward '{self.name}': the head {file} reads {width} features, the image tower "
                f"{clip} has {model.visual.output_dim}"
            )
        head = linear_head(width)
        fill(head, tensors, file, self.name)
        model = model.to(precision(dtype, self.name))
        self._set(nn.ModuleDict({"clip": model, "head": head}), pixels, batch)

    def _score(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        from torch.nn import functional as F

        features = F.normalize(self.network["clip"].encode_image(pixels).float(), dim=1)
        scores: torch.Tensor = self.network["head"]["layers"](features)
        return scores.squeeze(1)

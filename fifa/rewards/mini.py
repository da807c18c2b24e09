"""The mini reward: PickScore's recipe on the mini world, a shipped open_clip dual encoder.

    score(image, prompt) = exp(logit_scale) * cos(image features, text features)

(Kirstain et al. 2023, arXiv 2305.01569, eq. 1.) A folder written by open_clip
(`open_clip_config.json`, weights, tokenizer files), so any other open_clip folder of the same
layout loads as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fifa.config import InputError, fingerprint

if TYPE_CHECKING:
    import torch

WEIGHTS = Path(__file__).parent / "weights" / "mini"


class MiniReward:
    """Agreement of an image with a prompt as noisy people of the mini world would see it.

    Args:
        path: an open_clip model folder; default: the one in the package.
        batch: images a forward pass; the scores do not depend on it.
    """

    name = "mini"
    needs = "nothing (its weights are in the package)"
    differentiable = True

    def __init__(self, path: str | Path = WEIGHTS, batch: int = 256) -> None:
        import open_clip

        if not (Path(path) / "open_clip_config.json").is_file():
            raise InputError(
                f"no open_clip model at {path}: open_clip_config.json is missing there"
            )
        self.batch = batch
        self.version = fingerprint(Path(path))  # scores of other weights are not continued
        self.model = open_clip.create_model(f"local-dir:{path}").eval().requires_grad_(False)
        self.tokenize = open_clip.get_tokenizer(f"local-dir:{path}")

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (N,) float32 of images (N, 3, H, W) in [0, 1]; gradients reach the images."""
        import torch

        if len(images) != len(prompts):
            raise InputError(
                f"a reward needs one prompt an image, got {len(images)} and {len(prompts)}"
            )
        device = self.model.logit_scale.device
        parts = []
        for start in range(0, len(images), self.batch):
            pixels = self._preprocess(images[start : start + self.batch].to(device))
            tokens = self.tokenize(list(prompts[start : start + self.batch])).to(device)
            image, text = (
                self.model.encode_image(pixels, True),
                self.model.encode_text(tokens, True),
            )
            parts.append(self.model.logit_scale.exp() * (image * text).sum(1))
        scores = torch.cat(parts) if parts else torch.empty(0)
        return scores.float().to(images.device)

    def to(self, device: str) -> MiniReward:
        """Move the network; images given later are moved to it."""
        self.model.to(device)
        return self

    def _preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Resize to the model's input and normalise as its config says."""
        import torch
        from torch.nn import functional as F

        size, config = self.model.visual.image_size, self.model.visual.preprocess_cfg
        size = (size, size) if isinstance(size, int) else tuple(size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (
            torch.tensor(config[k], device=images.device).view(3, 1, 1) for k in ("mean", "std")
        )
        return (images.float() - mean) / std

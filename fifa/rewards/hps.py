"""HPSv2 and HPSv2.1: a CLIP ViT-H-14 tuned on 800,000 choices of people (arXiv 2306.09341).

    score(image, prompt) = cos(image features, text features)

The files are open_clip checkpoints with their tensors under `state_dict`. Pictures that are not
square are padded with black, not cropped, as HPSv2's own version of open_clip does.
"""

from __future__ import annotations

from dataclasses import replace

from fifa.rewards.clip import DualEncoder, load_open_clip
from fifa.rewards.network import find_weights, precision


class HPSv2(DualEncoder):
    """Choice of people between images, learned on HPDv2: a cosine.

    Args:
        path: the checkpoint, a folder that holds it, or a Hub id.
        model: open_clip name of the architecture.
        dtype: fp32 or bf16.
        batch: images a forward pass.
    """

    name = "hpsv2"
    file = "HPS_v2_compressed.pt"
    needs = "xswu/HPSv2: HPS_v2_compressed.pt"
    source = "HPSv2, arXiv 2306.09341"
    scale = 1.0

    def __init__(
        self,
        path: str = "xswu/HPSv2",
        model: str = "ViT-H-14",
        dtype: str = "fp32",
        batch: int = 32,
    ) -> None:
        weights = find_weights(str(path), (self.file, "model.safetensors"), self.name)
        network, self.tokenize, pixels = load_open_clip(f"{model}:{weights}", self.name)
        network = network.to(precision(dtype, self.name))
        self._set(network, replace(pixels, fit="pad"), batch)


class HPSv21(HPSv2):
    """Choice of people between images, learned on more and better data than HPSv2: a cosine."""

    name = "hpsv2.1"
    file = "HPS_v2.1_compressed.pt"
    needs = "xswu/HPSv2: HPS_v2.1_compressed.pt"

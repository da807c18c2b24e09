"""PickScore: CLIP-H tuned on the choices of Pick-a-Pic (Kirstain et al. 2023, arXiv 2305.01569).

    score(image, prompt) = exp(logit_scale) * cos(image features, text features)      (eq. 1)

A softmax over the scores of two images is the probability that people prefer each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fifa.config import InputError
from fifa.rewards.clip import cosine, once_each
from fifa.rewards.network import NetworkReward, hub_file, is_hub_id, missing, precision
from fifa.rewards.pixels import of_transformers

if TYPE_CHECKING:
    import torch

PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore(NetworkReward):
    """Choice of people between images of one prompt, in logits; typically 16 to 26.

    Args:
        path: a transformers CLIPModel: a folder or a Hub id.
        processor: tokenizer and preprocessing: a folder or a Hub id; default: `path` itself if it
            is a folder that holds them, else those of CLIP-H.
        dtype: fp32 or bf16.
        batch: images a forward pass.
    """

    name = "pickscore"
    needs = f"yuvalkirstain/PickScore_v1; {PROCESSOR}"
    source = "PickScore, arXiv 2305.01569"
    network: Any  # a transformers CLIPModel

    def __init__(
        self,
        path: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = None,
        dtype: str = "fp32",
        batch: int = 32,
    ) -> None:
        model = load_clip_model(str(path), self.name)
        own = (Path(path) / "preprocessor_config.json").is_file()
        source = str(processor or (path if own else PROCESSOR))
        self.tokenizer, pixels = load_processor(source, self.name)
        self.length = model.config.text_config.max_position_embeddings
        self._set(model.to(precision(dtype, self.name)), pixels, batch)

    def _score(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        distinct, places = once_each(prompts)
        tokens = self.tokenizer(
            distinct,
            padding=True,
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        ).to(pixels.device)
        net = self.network
        image = net.visual_projection(net.vision_model(pixel_values=pixels).pooler_output)
        text = net.text_projection(net.text_model(**tokens).pooler_output)[places]
        return net.logit_scale.float().exp() * cosine(image.float(), text.float())


def load_clip_model(path: str, reward: str) -> Any:
    """A transformers CLIPModel with every weight from the checkpoint, in float32."""
    from transformers import CLIPModel

    _check_place(path, "config.json", reward)
    try:
        loaded: Any = CLIPModel.from_pretrained(path, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        if is_hub_id(path):
            raise missing(reward, path, path, error) from None
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"reward '{reward}': cannot load {path} ({reason})") from None
    model, info = loaded
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise InputError(
            f"reward '{reward}': {path} is no complete CLIPModel, {len(absent)} weights are "
            f"missing or of another shape, first {absent[0]}"
        )
    return model.float()


def load_processor(path: str, reward: str) -> tuple[Any, Any]:
    """Tokenizer and preprocessing of a CLIP folder or Hub id."""
    from transformers import AutoTokenizer, CLIPImageProcessor

    _check_place(path, "preprocessor_config.json", reward)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        processor = CLIPImageProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        if is_hub_id(path):
            raise missing(reward, f"the processor {path}", path, error) from None
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"reward '{reward}': no processor in {path} ({reason})") from None
    return tokenizer, of_transformers(processor, f"reward '{reward}'")


def _check_place(path: str, name: str, reward: str) -> None:
    """The file is in the folder or the Hub repository; transformers would ask for it many times."""
    if is_hub_id(path):
        hub_file(path, name, reward, whole=True)
    elif not (Path(path) / name).is_file():
        raise InputError(f"reward '{reward}': {path} is no folder with {name} and no Hub id")

"""ImageReward: BLIP reads the prompt while looking at the image (arXiv 2304.05977).

    score(image, prompt) = (head(text encoder(prompt | ViT(image)))[first token] - mean) / std

The published checkpoint uses the names of BLIP's own code; they are mapped onto transformers'
BLIP classes here, so that code is not needed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fifa.config import InputError
from fifa.rewards.network import (
    NetworkReward,
    fill,
    find_weights,
    hub_file,
    is_hub_id,
    linear_head,
    missing,
    precision,
    read_weights,
)
from fifa.rewards.pixels import Preprocess

if TYPE_CHECKING:
    import torch

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores on the training set
LENGTH = 35  # tokens of a prompt, the first and last included
HEAD_WIDTH = 64  # of an attention head, in BERT and in both of BLIP's vision transformers
FILES = ("ImageReward.pt", "model.safetensors")

# BLIP's names -> those of transformers, applied in order
_RENAMED = (
    (r"^blip\.", ""),
    (r"^visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"^(vision\..*)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"^(vision\..*)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"^(vision\..*)\.attn\.", r"\1.self_attn."),
    (r"^text_encoder\.", "text."),
    (r"^mlp\.", "head."),
)
# BLIP's pre-training keeps these in the checkpoint; the score does not use them
_UNUSED = re.compile(r"^(vision_proj|text_proj)\.|position_ids$")


class ImageReward(NetworkReward):
    """Choice of people between images of one prompt; about 0 on average, with a spread of 1.

    Args:
        path: ImageReward.pt, a folder that holds it, or a Hub id.
        tokenizer: BERT's vocabulary: a folder or a Hub id; default: the folder of the checkpoint if
            it holds one, else bert-base-uncased.
        dtype: fp32 or bf16, of BLIP; the head runs in float32.
        batch: images a forward pass.
    """

    name = "imagereward"
    needs = "THUDM/ImageReward: ImageReward.pt; the tokenizer of google-bert/bert-base-uncased"
    source = "ImageReward, arXiv 2304.05977"
    network: Any  # vision: BlipVisionModel, text: BlipTextModel, head

    def __init__(
        self,
        path: str = "THUDM/ImageReward",
        tokenizer: str | None = None,
        dtype: str = "fp32",
        batch: int = 32,
    ) -> None:
        file = find_weights(str(path), FILES, self.name)
        tensors = renamed(read_weights(file, self.name))
        network = build(tensors, file, self.name)
        fill(network, tensors, file, self.name)
        own = any((file.parent / name).is_file() for name in ("vocab.txt", "tokenizer.json"))
        source = str(tokenizer or (file.parent if own else "google-bert/bert-base-uncased"))
        self.tokenizer = load_tokenizer(source, self.name)
        if len(self.tokenizer) > network["text"].config.vocab_size:
            raise InputError(
                f"reward '{self.name}': the tokenizer {source} has {len(self.tokenizer)} tokens, "
                f"{file} knows {network['text'].config.vocab_size}"
            )
        for part in ("vision", "text"):
            network[part].to(precision(dtype, self.name))
        self._set(network, Preprocess(network["vision"].config.image_size), batch)

    def _score(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        ).to(pixels.device)
        seen = self.network["vision"](pixel_values=pixels).last_hidden_state
        read = self.network["text"](
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
        ).last_hidden_state
        raw: torch.Tensor = self.network["head"]["layers"](read[:, 0].float())
        return (raw.squeeze(1) - MEAN) / STD


def renamed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the published checkpoint under the names of `build`'s network."""
    result = {}
    for name, tensor in tensors.items():
        for pattern, new in _RENAMED:
            name = re.sub(pattern, new, name)
        if not _UNUSED.search(name):
            result[name] = tensor
    return result


def build(tensors: Mapping[str, torch.Tensor], file: Path, reward: str) -> Any:
    """BLIP's two towers and the head, without weights yet, in the sizes that the tensors have."""
    from torch import nn
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    try:
        vision = BlipVisionConfig(**_vision_sizes(tensors))
        text = BlipTextConfig(**_text_sizes(tensors))
        head = linear_head(tensors["head.layers.0.weight"].shape[1])
    except KeyError as error:
        raise InputError(
            f"reward '{reward}': {file} is no ImageReward checkpoint, it has no {error.args[0]}"
        ) from None
    config = file.parent / "med_config.json"
    if config.is_file():  # published beside the checkpoint
        text.num_attention_heads = json.loads(config.read_text())["num_attention_heads"]
    towers = {
        "vision": BlipVisionModel(vision),
        "text": BlipTextModel(text, add_pooling_layer=False),
    }
    return nn.ModuleDict({**towers, "head": head})


def _vision_sizes(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    positions, width = tensors["vision.embeddings.position_embedding"].shape[1:]
    patch = tensors["vision.embeddings.patch_embedding.weight"].shape[-1]
    return {
        "hidden_size": width,
        "intermediate_size": tensors["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _layers(tensors, r"vision\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "image_size": math.isqrt(positions - 1) * patch,
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,  # as in BLIP's own code; transformers' default is 1e-5
    }


def _text_sizes(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    words, width = tensors["text.embeddings.word_embeddings.weight"].shape
    first = "text.encoder.layer.0"
    return {
        "vocab_size": words,
        "hidden_size": width,
        "encoder_hidden_size": tensors[f"{first}.crossattention.self.key.weight"].shape[1],
        "intermediate_size": tensors[f"{first}.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": _layers(tensors, r"text\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "max_position_embeddings": tensors["text.embeddings.position_embeddings.weight"].shape[0],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "is_decoder": True,  # transformers' word for "has cross-attention"; it reads both ways
    }


def _layers(tensors: Mapping[str, torch.Tensor], pattern: str) -> int:
    found = (re.match(pattern, name) for name in tensors)
    return 1 + max(int(match[1]) for match in found if match)


def load_tokenizer(source: str, reward: str) -> Any:
    """BERT's tokenizer with the two tokens that BLIP adds to it."""
    from transformers import BertTokenizer

    if is_hub_id(source):
        # Asked for once; transformers would try each of its files, five times.
        hub_file(source, "tokenizer_config.json", reward, whole=True)
    try:
        tokenizer = BertTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        if is_hub_id(source):
            raise missing(reward, f"the tokenizer {source}", source, error) from None
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"reward '{reward}': no tokenizer in {source} ({reason})") from None
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    return tokenizer

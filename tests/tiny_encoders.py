"""Small CLIP models of the real classes with random weights, for the tests of several rooms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_pipelines import clip_tokenizer

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 2,
    },
}


def seeded(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """A module with random weights that are large enough to tell pictures apart."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module = build().eval()
        for parameter in module.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.08)
    return module


def open_clip_folder(folder: Path) -> Path:
    """An open_clip model as a folder with open_clip_config.json."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    model = seeded(lambda: open_clip.CLIP(**TINY_CLIP))
    config = {
        "model_cfg": TINY_CLIP,
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def transformers_folder(folder: Path) -> Path:
    """A transformers folder of a CLIPModel with tokenizer and preprocessor, as PickScore's."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = clip_tokenizer(folder / "vocabulary")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, **ids}
    config = CLIPConfig(
        text_config={**tower, "num_attention_heads": 2, **text},
        vision_config={**tower, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    seeded(lambda: CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)
    return folder

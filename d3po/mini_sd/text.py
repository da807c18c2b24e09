"""The mini model's text tower: a small CLIP text model over the mini world's tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fifa.miniworld.tokenizer import CONTEXT

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

WIDTH = 128


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text tower;

    initialised from the global generator, which the caller has seeded.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)

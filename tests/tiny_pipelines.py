"""Pipelines of the real diffusers classes with a few thousand random weights, built and saved.

Latents are 8 x 8 (16 x 16 for SD3's positions) and images 64 px or less; tokenizers are real ones
whose vocabulary was learnt from three sentences. The global random state is left as it was.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

CORPUS = (
    "a red circle above a blue square",
    "two small green triangles on a yellow background",
    "a large purple star left of three white circles",
)


def clip_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer whose byte-pair merges were learnt from CORPUS: each of its words is one.

    The same in every process; tokenizers' own trainer breaks ties by a hash of its own.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = sorted({word for line in CORPUS for word in line.split()})
    merges = _merges(words)
    ends = sorted({f"{word[-1]}</w>" for word in words})
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *ends]
    tokens += dict.fromkeys(first + second for first, second in merges)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """The pairs of pieces that byte-pair encoding joins, most frequent first, until words are one.

    Sennrich et al. 2016, algorithm 1; of equally frequent pairs the last by name.
    """
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    found = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        found.append(best)
        for word in pieces:
            for i in reversed(range(len(word) - 1)):
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = ["".join(best)]
    return found


def t5_tokenizer() -> Any:
    """A T5 tokenizer (unigram) whose pieces are the words and letters of CORPUS."""
    from transformers import T5Tokenizer

    words = sorted({word for line in CORPUS for word in line.split()})
    letters = sorted({letter for word in words for letter in word})
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces = [("▁" + word, -3.0) for word in words]
    pieces += [(piece, -8.0) for piece in ["▁", *letters]]
    return T5Tokenizer(vocab=special + pieces, extra_ids=0, model_max_length=512)


def clip_config(tokenizer: Any, **overrides: Any) -> CLIPTextConfig:
    """Two layers of width 16 for this tokenizer."""
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 12,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **overrides,
    }
    return CLIPTextConfig(**settings)


def t5_encoder(tokenizer: Any, width: int) -> T5EncoderModel:
    """T5 as in SD3 and FLUX (gated, v1.1), one layer; its table is padded as theirs is."""
    padded = len(tokenizer) + 5
    config = T5Config(
        vocab_size=padded,
        d_model=width,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def autoencoder(channels: int, blocks: tuple[int, ...] = (4, 4, 8, 8), **overrides: Any) -> Any:
    """A VAE that makes a latent of 2^(len(blocks) - 1) pixels a side."""
    settings: dict[str, Any] = {
        "block_out_channels": blocks,
        "down_block_types": ("DownEncoderBlock2D",) * len(blocks),
        "up_block_types": ("UpDecoderBlock2D",) * len(blocks),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": channels,
        "sample_size": 64,
        "scaling_factor": 0.9,
        **overrides,
    }
    return AutoencoderKL(**settings)


def sdxl(folder: Path) -> StableDiffusionXLPipeline:
    """Two CLIP encoders, micro-conditioning, a VAE that must not be half precision, Euler."""
    first = clip_tokenizer(folder.with_name(folder.name + "-vocabulary"))
    second = clip_tokenizer(folder.with_name(folder.name + "-vocabulary"))
    second.pad_token = "!"
    return StableDiffusionXLPipeline(
        tokenizer=first,
        tokenizer_2=second,
        text_encoder=CLIPTextModel(clip_config(first)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(second, hidden_size=24)),
        vae=autoencoder(4, force_upcast=True),
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=16 + 24,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 12,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )


def sd3(folder: Path, with_t5: bool = True) -> StableDiffusion3Pipeline:
    """Three text encoders (or two), a static time shift of 3."""
    first = clip_tokenizer(folder.with_name(folder.name + "-vocabulary"))
    second = clip_tokenizer(folder.with_name(folder.name + "-vocabulary"))
    third = t5_tokenizer()
    return StableDiffusion3Pipeline(
        tokenizer=first,
        tokenizer_2=second,
        tokenizer_3=third if with_t5 else None,
        text_encoder=CLIPTextModelWithProjection(clip_config(first)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(second, hidden_size=24)),
        text_encoder_3=t5_encoder(third, 48) if with_t5 else None,
        vae=autoencoder(16, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=16,
            pooled_projection_dim=24,
            out_channels=16,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def sd3_without_t5(folder: Path) -> StableDiffusion3Pipeline:
    """As a user saves it who has dropped the third encoder."""
    return sd3(folder, with_t5=False)


def flux(folder: Path, distilled: bool = True) -> FluxPipeline:
    """Pooled CLIP and T5, a guidance embedding, a shift that depends on the number of tokens."""
    first = clip_tokenizer(folder.with_name(folder.name + "-vocabulary"))
    second = t5_tokenizer()
    return FluxPipeline(
        tokenizer=first,
        tokenizer_2=second,
        text_encoder=CLIPTextModel(clip_config(first)),
        text_encoder_2=t5_encoder(second, 20),
        vae=autoencoder(4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=20,
            pooled_projection_dim=16,
            guidance_embeds=distilled,
            axes_dims_rope=(2, 2, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if distilled else 1.0, use_dynamic_shifting=distilled
        ),
    )


def flux_schnell(folder: Path) -> FluxPipeline:
    """No guidance embedding, no shift."""
    return flux(folder, distilled=False)


def save(make: Callable[[Path], Any], folder: Path) -> Path:
    """Build one of the above with fixed random weights and save it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        make(folder).save_pretrained(folder)
    return folder

"""The names that weights had before diffusers renamed them: CompVis', Stability's, OpenCLIP's.

A single-file checkpoint holds UNet, VAE and text encoders under those names. diffusers reads such
files (`from_single_file`) and has no importable function that writes them; this is the inverse of
its reading, for Stable Diffusion 1.x, 2.x and XL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fifa.config import InputError

Weights = dict[str, Tensor]
Renames = Sequence[tuple[str, str]]  # regular expression -> replacement, applied in order


def original_names(pipe: Any) -> Weights:
    """All weights of a Stable Diffusion pipeline under the names of the original checkpoints.

    Raises InputError for another kind of pipeline.
    """
    kind = type(pipe).__name__
    if kind not in TEXT_ENCODERS:
        raise InputError(
            f"{kind} has no single-file layout here, known are those of "
            f"{', '.join(TEXT_ENCODERS)}; export it as merged or denoiser"
        )
    found = _below("model.diffusion_model.", unet_names(pipe.unet.state_dict(), pipe.unet.config))
    found |= _below("first_stage_model.", vae_names(pipe.vae.state_dict(), pipe.vae.config))
    return found | TEXT_ENCODERS[kind](pipe)


def _below(prefix: str, weights: Mapping[str, Tensor]) -> Weights:
    return {prefix + name: weight for name, weight in weights.items()}


def _renamed(name: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


# ---- UNet ---------------------------------------------------------------------------------------

_UNET_OUTSIDE: Renames = (
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
    (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^mid_block\.resnets\.0\.", "middle_block.0."),
    (r"^mid_block\.attentions\.0\.", "middle_block.1."),
    (r"^mid_block\.resnets\.1\.", "middle_block.2."),
)
_UNET_RESNET: Renames = (
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)


def unet_names(weights: Mapping[str, Tensor], config: Any) -> Weights:
    """A UNet2DConditionModel's weights as the original `openaimodel.UNetModel` names them.

    There, the blocks of one direction are numbered through: `input_blocks` counts a convolution,
    then for each resolution its residual blocks and a downsampler.
    """
    return {_unet_name(name, config): weight for name, weight in weights.items()}


def _unet_name(name: str, config: Any) -> str:
    # transformer blocks have a norm1 and norm2 of their own, which keep their names
    inside = _UNET_RESNET if ".resnets." in name or name.startswith("mid_block.resnets") else ()
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if match is None:
        return _renamed(_renamed(name, inside), _UNET_OUTSIDE)
    way, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    layers = config.layers_per_block
    size = layers + 1  # down: its layers and a downsampler; up: one more layer than down
    place = f"input_blocks.{1 + block * size + index}"
    if way == "up":
        place = f"output_blocks.{block * size + index}"
    if kind == "downsamplers":
        return f"input_blocks.{block * size + size}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        after = 2 if "CrossAttn" in config.up_block_types[block] else 1
        return f"output_blocks.{block * size + layers}.{after}.{rest}"
    return _renamed(f"{place}.{'0' if kind == 'resnets' else '1'}.{rest}", inside)


# ---- VAE ----------------------------------------------------------------------------------------

_VAE: Renames = (
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_(q|k|v)\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)


def vae_names(weights: Mapping[str, Tensor], config: Any) -> Weights:
    """An AutoencoderKL's weights as the original names them; attention was a 1x1 convolution."""
    count = len(config.block_out_channels)
    found: Weights = {}
    for name, weight in weights.items():
        # the decoder's blocks are numbered from the finest resolution there, from the coarsest here
        flipped = re.sub(r"(?<=up_blocks\.)\d+", lambda m: str(count - 1 - int(m[0])), name)
        flipped = re.sub(r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block.", flipped)
        flipped = re.sub(r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample.", flipped)
        linear = ".attentions." in name and weight.ndim == 2
        found[_renamed(flipped, _VAE)] = weight[:, :, None, None] if linear else weight
    return found


# ---- text encoders ------------------------------------------------------------------------------


def _clip_names(encoder: Any, prefix: str) -> Weights:
    """Hugging Face's own names, which the original code used too for OpenAI's CLIP."""
    return {
        f"{prefix}text_model.{name.removeprefix('text_model.')}": weight
        for name, weight in encoder.state_dict().items()
        if not name.endswith("position_ids")
    }


_OPEN_CLIP: Renames = (
    (r"^embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm1\.", ".ln_1."),
    (r"\.layer_norm2\.", ".ln_2."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
)


def open_clip_names(weights: Mapping[str, Tensor]) -> Weights:
    """A Hugging Face CLIP text model's weights as OpenCLIP names them.

    OpenCLIP keeps query, key and value in one matrix, and multiplies the projection from the left.
    """
    found: Weights = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for full, weight in weights.items():
        name = full.removeprefix("text_model.")
        if match := re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            layer = _renamed(match[1] + ".", _OPEN_CLIP)
            parts.setdefault(f"{layer}attn.in_proj_{match[3]}", {})[match[2]] = weight
        elif name == "text_projection.weight":
            found["text_projection"] = weight.T
        elif not name.endswith("position_ids"):
            found[_renamed(name, _OPEN_CLIP)] = weight
    joined = {name: torch.cat([own[part] for part in "qkv"]) for name, own in parts.items()}
    return found | joined


def _text_of_sd(pipe: Any) -> Weights:
    """SD 1.x has OpenAI's CLIP; 2.x, whose transformers project with matrices, has OpenCLIP's."""
    if not pipe.unet.config.use_linear_projection:
        return _clip_names(pipe.text_encoder, "cond_stage_model.transformer.")
    return _below("cond_stage_model.model.", open_clip_names(pipe.text_encoder.state_dict()))


def _text_of_sdxl(pipe: Any) -> Weights:
    first = _clip_names(pipe.text_encoder, "conditioner.embedders.0.transformer.")
    second = open_clip_names(pipe.text_encoder_2.state_dict())
    return first | _below("conditioner.embedders.1.model.", second)


TEXT_ENCODERS: dict[str, Callable[[Any], Weights]] = {
    "StableDiffusionPipeline": _text_of_sd,
    "StableDiffusionXLPipeline": _text_of_sdxl,
}

"""A diffusers folder of SD 1.x or SDXL as one file with the names of the original checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

UNET = "model.diffusion_model."
VAE = "first_stage_model."
RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
UNET_ENDS = (
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
VAE_ATTENTION = (
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
)
OPEN_CLIP = (
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
)


def renamed(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    """The name with every old part replaced."""
    for ours, theirs in pairs:
        name = name.replace(ours, theirs)
    return name


def unet_name(name: str, layers: int, config: Mapping[str, Any]) -> str:
    """Of the parts of a UNet: blocks count through, first down, then up."""
    found = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if found:
        side, kind, rest = found[1], found[3], found[5]
        block, layer = int(found[2]), int(found[4])
        index = block * (layers + 1) + layer + (side == "down")
        where = f"{'input' if side == 'down' else 'output'}_blocks"
        if kind == "resnets":
            return f"{where}.{index}.0.{renamed(rest, RESNET)}"
        if kind == "attentions":
            return f"{where}.{index}.1.{rest}"
        if kind == "downsamplers":
            return f"{where}.{block * (layers + 1) + layers + 1}.0.{rest.replace('conv', 'op')}"
        attended = "CrossAttn" in config["up_block_types"][block]
        return f"{where}.{block * (layers + 1) + layers}.{2 if attended else 1}.{rest}"
    found = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name)
    if found:
        index = 2 * int(found[2]) + (found[1] == "attentions")
        rest = renamed(found[3], RESNET) if found[1] == "resnets" else found[3]
        return f"middle_block.{index}.{rest}"
    return renamed(name, UNET_ENDS)


def vae_name(name: str, blocks: int) -> str:
    """Of the parts of a VAE: the decoder's blocks count backwards."""
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.", lambda found: f"up.{blocks - 1 - int(found[1])}.", name)
    name = name.replace(".resnets.", ".block.") if ".up." in name else name
    name = name.replace("upsamplers.0", "upsample")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = renamed(name.replace("mid_block.attentions.0", "mid.attn_1"), VAE_ATTENTION)
    return name


def vae_tensors(vae: Any) -> dict[str, Tensor]:
    """The VAE's attention was made of convolutions of one pixel."""
    blocks = len(vae.config.block_out_channels)
    found = {}
    for name, tensor in vae.state_dict().items():
        new = vae_name(name, blocks)
        linear = ".attn_1." in new and tensor.ndim == 2
        found[VAE + new] = tensor[:, :, None, None] if linear else tensor
    return found


def open_clip_tensors(encoder: Any) -> dict[str, Tensor]:
    """The second encoder of SDXL: one matrix for queries, keys and values."""
    found: dict[str, Tensor] = {}
    state = encoder.state_dict()
    for name, tensor in state.items():
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif part := re.match(r"(.*)\.self_attn\.q_proj\.(weight|bias)", name):
            three = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[f"{renamed(part[1], OPEN_CLIP)}.attn.in_proj_{part[2]}"] = torch.cat(three)
        elif not re.search(r"\.[kv]_proj\.", name):
            found[renamed(name, OPEN_CLIP)] = tensor
    return {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in found.items()}


def clip_tensors(encoder: Any, prefix: str) -> dict[str, Tensor]:
    """CLIP keeps its names, below text_model."""
    return {
        f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in encoder.state_dict().items()
    }


def one_file(pipe: Any, path: Path) -> Path:
    """Write a StableDiffusion(XL)Pipeline to one file as its authors published it."""
    layers, config = pipe.unet.config.layers_per_block, pipe.unet.config
    tensors = {
        UNET + unet_name(name, layers, config): tensor
        for name, tensor in pipe.unet.state_dict().items()
    }
    tensors |= vae_tensors(pipe.vae)
    if hasattr(pipe, "text_encoder_2"):
        tensors |= clip_tensors(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        tensors |= open_clip_tensors(pipe.text_encoder_2)
    else:
        tensors |= clip_tensors(pipe.text_encoder, "cond_stage_model.transformer.")
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return path

"""A dual encoder whose last blocks were tuned by LoRA: `tuned:FOLDER` names it as an encoder.

The folder holds `adapter.json` (which encoder, which layers) and `adapter.safetensors`. The encoder
is named, not copied; other weights under its name are an error. Once loaded, the adapter is merged
into the weights, so it costs nothing.

LoRA: Hu et al. 2021, arXiv 2106.09685. Linear and convolutional layers take part. The attention of
open_clip's transformers is one fused layer and does not; their MLPs do, and all of transformers'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fifa.config import InputError
from fifa.rewards.encoders import Encoder
from fifa.rewards.fitted import encoder_of, read_facts
from fifa.rewards.network import read_weights

FACTS, TENSORS = "adapter.json", "adapter.safetensors"
VERSION = 1  # of the folder's format
_NAME = "default"  # of the adapter inside peft


def last_layers(network: nn.Module, blocks: int) -> tuple[str, ...]:
    """Names of the layers of the last `blocks` blocks of the picture's and the prompt's tower.

    InputError for a network whose blocks are not known, or that has fewer.
    """
    chosen: list[str] = []
    for tower in _towers(network):
        if blocks > len(tower):
            raise InputError(
                f"{blocks} blocks are to be tuned, but a tower of the encoder has {len(tower)}"
            )
        chosen += (f"{prefix}." for prefix in tower[len(tower) - blocks :])
    fused = [n for n, m in network.named_modules() if isinstance(m, nn.MultiheadAttention)]
    return tuple(
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and name.startswith(tuple(chosen))
        and not name.startswith(tuple(f"{attention}." for attention in fused))
    )


def _towers(network: nn.Module) -> list[list[str]]:
    """The blocks of either tower by name, in order: CLIP of transformers, or of open_clip."""
    modules = dict(network.named_modules())
    pictures = ("vision_model.encoder.layers", "visual.transformer.resblocks", "visual.layer")
    prompts = ("text_model.encoder.layers", "transformer.resblocks", "text.transformer.resblocks")
    found = []
    for names in (pictures, prompts):
        towers = [_numbered(modules, name) for name in names]
        tower = next((blocks for blocks in towers if blocks), None)
        if tower is None:
            raise InputError(
                f"a {type(network).__name__} cannot be tuned: LoRA knows the blocks of CLIP models "
                f"of transformers and of open_clip, transformer or ResNet"
            )
        found.append(tower)
    return found


def _numbered(modules: dict[str, nn.Module], name: str) -> list[str]:
    """`name.0`, `name.1` ... or, of a ResNet, `name1`, `name2` ... as far as they are there."""
    dotted = [f"{name}.{i}" for i in range(len(modules)) if f"{name}.{i}" in modules]
    return dotted or [f"{name}{i}" for i in range(1, 5) if f"{name}{i}" in modules]


def add_adapter(network: nn.Module, layers: Sequence[str], rank: int) -> dict[str, nn.Parameter]:
    """Put LoRA of this rank (alpha = rank) into the named layers; its parameters by name.

    Nothing else of the network asks for gradients. The first weights follow from torch's generator.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
    inject_adapter_in_model(config, network, adapter_name=_NAME)
    modules = dict(network.named_modules())
    found: dict[str, nn.Parameter] = {}
    for name in layers:
        layer: Any = modules[name]
        found[f"{name}.A"] = layer.lora_A[_NAME].weight
        found[f"{name}.B"] = layer.lora_B[_NAME].weight
    return found


def merge_adapter(network: nn.Module, layers: Sequence[str]) -> None:
    """Add what was learned to the weights and take the adapter out."""
    modules = dict(network.named_modules())
    for name in layers:
        layer: Any = modules[name]
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, layer.get_base_layer())


def save_adapter(
    adapter: Mapping[str, Tensor], encoder: str, encoder_version: str, folder: Path
) -> None:
    """Write an adapter into an existing folder, and which encoder of which version it tunes."""
    from safetensors.torch import save_file

    layers = [name.removesuffix(".A") for name in adapter if name.endswith(".A")]
    facts = {
        "version": VERSION,
        "encoder": encoder,
        "encoder_version": encoder_version,
        "layers": layers,
        "rank": len(adapter[f"{layers[0]}.A"]),
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in adapter.items()}
    save_file(tensors, str(folder / TENSORS))
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def load_tuned(path: str, spec: str) -> Encoder:
    """The encoder of a folder, with the adapter merged.

    Raises InputError for a folder that is none, is damaged, or whose encoder has changed.
    """
    folder = Path(path).expanduser()
    facts = read_facts(folder / FACTS, VERSION, "fifa reward fit --kind lora")
    encoder = encoder_of(facts, folder)
    tensors = read_weights(folder / TENSORS, "tuned encoder")
    try:
        adapter = add_adapter(encoder.network, facts["layers"], facts["rank"])
        _fill(adapter, tensors)
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the adapter in {folder} does not fit ({reason}); fit again") from None
    merge_adapter(encoder.network, facts["layers"])
    return encoder.renewed(spec)


@torch.no_grad()
def _fill(adapter: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    wanted = {name: value.shape for name, value in adapter.items()}
    given = {name: value.shape for name, value in tensors.items()}
    if wanted != given:
        odd = sorted(n for n in wanted.keys() | given.keys() if wanted.get(n) != given.get(n))
        raise ValueError(f"{odd[0]} is {given.get(odd[0])}, expected {wanted.get(odd[0])}")
    for name, parameter in adapter.items():
        parameter.copy_(tensors[name])

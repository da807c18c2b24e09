"""The networks of a model from its config files alone: on the meta device, without weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d3po.families import FamilyConfig, family_class, find_source, flux, sd3
from d3po.families.pipeline import first_line, vae_factor
from d3po.policy import PolicyConfig
from d3po.schedule import Schedule
from fifa.config import InputError

NOT_TRAINED_WITH = ("safety_checker", "image_encoder")  # parts that no family loads
CLIP_TOKENS = 77


@dataclass(frozen=True)
class Networks:
    """A diffusers pipeline in outline."""

    parts: Mapping[str, Any]  # name -> network on the meta device
    denoiser: Any
    denoiser_name: str
    latent_shape: tuple[int, int, int]  # (C, h, w)
    image_size: int
    schedule: Schedule
    t5_tokens: int | None = None  # as in FamilyConfig

    @property
    def parameters(self) -> dict[str, int]:
        """How many weights each part has."""
        return {
            name: sum(p.numel() for p in part.parameters()) for name, part in self.parts.items()
        }

    def inputs(self, rows: int, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of a denoiser call on `rows` pictures."""
        kind = type(self.denoiser).__name__
        if kind not in INPUTS:
            raise InputError(f"preflight knows no {kind}; known are {', '.join(INPUTS)}")
        return INPUTS[kind](self, rows, dtype)

    def text_bytes(self) -> int:
        """Conditioning of one prompt in float32."""
        inputs = self.inputs(1, torch.float32)
        return sum(
            inputs[name].nbytes
            for name in ("encoder_hidden_states", "pooled_projections")
            if name in inputs
        )


def load_outline(model: str, config: FamilyConfig | None = None) -> Networks:
    """Read model_index.json and each part's config, and build the parts without weights.

    Opened as `config` asks. Raises InputError if the model is not there, is of a kind without a
    family, lacks a part, or cannot be opened like that.
    """
    config = config or FamilyConfig()
    source = find_source(model, config.description)
    family, where = family_class(source), source.description or source.name
    left_out = NOT_TRAINED_WITH if config.t5 else (*NOT_TRAINED_WITH, "text_encoder_3")
    parts = {}
    for name, found in source.index.items():
        if isinstance(found, list) and found[0] in ("diffusers", "transformers"):
            built = None if name in left_out else _part(where, name, *found)
            if built is not None:
                parts[name] = built
    denoiser, vae = parts.get(family.denoiser_folder), parts.get("vae")
    if denoiser is None or vae is None or not source.has("scheduler"):
        raise InputError(f"{model} lacks a denoiser, VAE or scheduler that preflight could look at")
    scheduler = _scheduler(where, *source.index["scheduler"])
    shape, schedule = family.outline(model, {**parts, "scheduler": scheduler}, config.image_size)
    size = shape[1] * vae_factor(vae)
    return Networks(
        parts, denoiser, family.denoiser_folder, shape, size, schedule, config.t5_tokens
    )


def _scheduler(source: str, _: str, kind: str) -> Any:
    import diffusers

    return getattr(diffusers, kind).from_config(_json(source, "scheduler/scheduler_config.json"))


def _part(source: str, name: str, library: str, kind: str) -> nn.Module | None:
    """One network, or None for a part that is none (a tokenizer, a scheduler)."""
    if kind.endswith(("Tokenizer", "TokenizerFast", "Scheduler", "Processor", "Extractor")):
        return None
    config = _json(source, f"{name}/config.json")
    with torch.device("meta"):
        if library == "diffusers":
            import diffusers

            return getattr(diffusers, kind).from_config(config).eval().requires_grad_(False)
        import transformers

        found = getattr(transformers, kind)
        built = found(found.config_class.from_dict(config))
        return built.eval().requires_grad_(False)


def _json(source: str, name: str) -> dict[str, Any]:
    """A config file of a folder or a Hub repository."""
    path = Path(source) / name
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HFValidationError

        try:
            path = Path(hf_hub_download(source, name))
        except (HFValidationError, OSError) as error:
            raise InputError(
                f"model {source}: {first_line(error)} (give 'mini', a diffusers folder, or a Hub "
                "id; of the Hub preflight needs the config files only)"
            ) from None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{source} has no readable {name}: {first_line(error)}") from None
    return found


def train_outline(networks: Networks, config: PolicyConfig, dtype: torch.dtype) -> list[torch.Size]:
    """Make the denoiser trainable as a policy would; the shapes of the weights that are trained."""
    from peft import LoraConfig

    denoiser = networks.denoiser
    if config.method == "full":
        denoiser.requires_grad_(True)
    else:
        with torch.device("meta"):
            denoiser.add_adapter(
                LoraConfig(r=config.rank, target_modules=list(config.targets)), "default"
            )
    nn.Module.to(denoiser, dtype)
    return [p.shape for p in denoiser.parameters() if p.requires_grad]


# ---- arguments of a call ------------------------------------------------------------------------


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def _unet(networks: Networks, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    config = networks.denoiser.config
    tokens = _text_tokens(networks)
    found: dict[str, Any] = {
        "sample": _empty(rows, *networks.latent_shape, dtype=dtype),
        "timestep": _empty(rows, dtype=torch.int64),
        "encoder_hidden_states": _empty(rows, tokens, _width(config), dtype=dtype),
    }
    if config.addition_embed_type == "text_time":
        ids = 6
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        found["added_cond_kwargs"] = {
            "text_embeds": _empty(rows, pooled, dtype=dtype),
            "time_ids": _empty(rows, ids, dtype=dtype),
        }
    return found


def _width(config: Any) -> int:
    width = config.cross_attention_dim
    return int(width if isinstance(width, int) else width[0])


def _text_tokens(networks: Networks) -> int:
    encoder = networks.parts.get("text_encoder")
    return int(getattr(getattr(encoder, "config", None), "max_position_embeddings", CLIP_TOKENS))


def _sd3(networks: Networks, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    config = networks.denoiser.config
    tokens = _text_tokens(networks) + (networks.t5_tokens or sd3.T5_TOKENS)
    return {
        "hidden_states": _empty(rows, *networks.latent_shape, dtype=dtype),
        "timestep": _empty(rows, dtype=dtype),
        "encoder_hidden_states": _empty(rows, tokens, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": _empty(rows, config.pooled_projection_dim, dtype=dtype),
    }


def _flux(networks: Networks, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """FLUX sees 2 x 2 patches of the latent as tokens, each with a place of three numbers."""
    config = networks.denoiser.config
    _, height, width = networks.latent_shape
    patches = math.ceil(height / 2) * math.ceil(width / 2)
    tokens = networks.t5_tokens or flux.T5_TOKENS
    found = {
        "hidden_states": _empty(rows, patches, config.in_channels, dtype=dtype),
        "timestep": _empty(rows, dtype=dtype),
        "encoder_hidden_states": _empty(rows, tokens, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": _empty(rows, config.pooled_projection_dim, dtype=dtype),
        "img_ids": _empty(patches, 3, dtype=dtype),
        "txt_ids": _empty(tokens, 3, dtype=dtype),
    }
    if config.guidance_embeds:
        found["guidance"] = _empty(rows, dtype=dtype)
    return found


INPUTS = {
    "UNet2DConditionModel": _unet,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}

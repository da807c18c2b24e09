"""Text towers of CLIP: what a text-to-image model reads, from open_clip or transformers.

The features are those that CLIP compares with pictures (arXiv 2103.00020): the output at the end
token, projected, scaled to length 1. Texts beyond the context, 77 tokens, are cut.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fifa.config import InputError, fingerprint, quiet_libraries
from fifa.embed.network import NetworkEmbedder, find_model, not_here, read_model
from fifa.rewards.network import is_hub_id

if TYPE_CHECKING:
    import torch


_LOAD_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    struct.error,  # how torch reports a file that is no checkpoint
    pickle.UnpicklingError,
)


class ClipTextEmbedder(NetworkEmbedder):
    """Text encoder of a transformers CLIP model, with its projection.

    Args:
        path: a folder or Hub id of a CLIPModel or a CLIPTextModelWithProjection with its tokenizer;
            default: the text encoder of Stable Diffusion 1.x.
        dtype: fp32 or bf16.
        batch: prompts a forward pass.
    """

    def __init__(
        self, path: str = "openai/clip-vit-large-patch14", dtype: str = "fp32", batch: int = 256
    ) -> None:
        self._spec = f"clip_hf:{path}"
        self._place = find_model(path, "config.json", "clip_hf")
        self._set(f"clip_hf:{self._place.identity}", dtype, batch)

    def _load(self) -> torch.nn.Module:
        with quiet_libraries():  # about the weights of the picture tower, which nobody asked for
            network, info = read_model(self._read, self._place, self._spec)
        absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        if absent:
            raise InputError(
                f"embedder '{self._spec}' is no complete CLIP text encoder with projection: "
                f"{len(absent)} weights are missing or of another shape, first {absent[0]}"
            )
        return network

    def _read(self) -> Any:
        from transformers import CLIPTextModelWithProjection

        return CLIPTextModelWithProjection.from_pretrained(
            self._place.path,
            revision=self._place.commit or "main",
            config=self.config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed, and then told
        )

    @cached_property
    def config(self) -> Any:
        """Of the text encoder; CLIP-H publishes a wrong width beside the one of both encoders."""
        from transformers import AutoConfig

        path, revision = self._place.path, self._place.commit or "main"
        found = read_model(
            lambda: AutoConfig.from_pretrained(path, revision=revision), self._place, self._spec
        )
        if found.model_type != "clip":
            return found
        found.text_config.projection_dim = found.projection_dim
        return found.text_config

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer."""
        from transformers import AutoTokenizer

        place = self._place
        return read_model(
            lambda: AutoTokenizer.from_pretrained(place.path, revision=place.commit or "main"),
            place,
            self._spec,
        )

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=self.config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        features: torch.Tensor = self.network()(**tokens).text_embeds
        return features

    def count_cut(self, prompts: Sequence[str]) -> int:
        """How many prompts have more tokens than the network reads."""
        longest = self.config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]
        return sum(len(row) > longest for row in tokens)


class OpenClipEmbedder(NetworkEmbedder):
    """Text tower of an open_clip model.

    Args:
        path: `model:tag` or `model:file` of open_clip, a folder with open_clip_config.json, or the
            Hub id of one.
        dtype: fp32 or bf16.
        batch: prompts a forward pass.
    """

    def __init__(
        self, path: str = "ViT-B-32:laion2b_s34b_b79k", dtype: str = "fp32", batch: int = 256
    ) -> None:
        self._spec = f"clip:{path}"
        self._model, self._weights, identity = _address(path)
        self._set(f"clip:{identity}", dtype, batch)

    def _load(self) -> torch.nn.Module:
        import open_clip

        try:
            with quiet_libraries():
                return open_clip.create_model(
                    self._model, pretrained=self._weights, require_pretrained=True
                )
        except _LOAD_ERRORS as error:
            if self._model.startswith("local-dir:") or Path(self._weights or "").is_file():
                reason = " ".join(str(error).split())[:200]
                raise InputError(f"embedder '{self._spec}' cannot be loaded: {reason}") from None
            raise not_here(self._spec, _repository(self._spec), error) from None

    @cached_property
    def tokenizer(self) -> Any:
        """What open_clip tokenizes this model's texts with."""
        import open_clip

        with quiet_libraries():
            return open_clip.get_tokenizer(self._model)

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        network = self.network()
        features: torch.Tensor = network.encode_text(self.tokenizer(prompts).to(self.device))
        return features

    def count_cut(self, prompts: Sequence[str]) -> int:
        """How many prompts have more tokens than the network reads."""
        longest = self.tokenizer.context_length
        inner = getattr(self.tokenizer, "tokenizer", None)  # of transformers, where there is one
        empty = 0 if inner is None else inner.pad_token_id
        texts = list(prompts)
        chunks = (texts[start : start + self.batch] for start in range(0, len(texts), self.batch))
        return sum(int((self.tokenizer(c, longest + 1)[:, longest] != empty).sum()) for c in chunks)


def _address(path: str) -> tuple[str, str | None, str]:
    """What open_clip calls the model, where its weights come from, and a name for its content."""
    import open_clip

    folder = Path(path).expanduser()
    if (folder / "open_clip_config.json").is_file():
        return f"local-dir:{folder}", None, f"{folder.resolve().name}@{fingerprint(folder)}"
    if is_hub_id(path):
        place = find_model(path, "open_clip_config.json", "clip")
        return f"hf-hub:{path}", None, place.identity
    name, _, weights = path.partition(":")
    tags = open_clip.list_pretrained_tags_by_model(name) if name in open_clip.list_models() else []
    file = Path(weights).expanduser()
    if weights in tags:
        return name, weights, path
    if name in open_clip.list_models() and file.is_file():
        return name, str(file), f"{name}:{fingerprint(file)}"
    raise InputError(
        f"embedder 'clip:{path}' is no open_clip model with weights; allowed are clip:MODEL:TAG "
        f"such as ViT-B-32:laion2b_s34b_b79k, clip:MODEL:FILE, a folder with "
        f"open_clip_config.json, or its Hub id"
    )


def _repository(spec: str) -> str:
    """The Hub repository behind a spec, for the sentence that says what to download."""
    import open_clip

    _, name, *tag = spec.split(":")
    known = open_clip.get_pretrained_cfg(name, tag[0]) if tag else {}
    return str(known.get("hf_hub") or name).rstrip("/")

"""sentence-transformers models: trained so that texts of one meaning lie close together."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fifa.config import InputError
from fifa.embed.network import NetworkEmbedder, find_model, read_model

if TYPE_CHECKING:
    import torch


class SentenceEmbedder(NetworkEmbedder):
    """A SentenceTransformer with all its modules: pooling, projections, its own prefix of texts.

    Args:
        path: a folder or Hub id with modules.json.
        dtype: fp32 or bf16.
        batch: prompts a forward pass.

    Needs the extra `sentence`.
    """

    def __init__(
        self,
        path: str = "sentence-transformers/all-MiniLM-L6-v2",
        dtype: str = "fp32",
        batch: int = 128,
    ) -> None:
        if importlib.util.find_spec("sentence_transformers") is None:
            raise InputError(
                "embedder 'sentence' needs sentence-transformers, which is not installed; "
                "get it by `pip install 'd3po-fifa[sentence]'`"
            )
        self._spec = f"sentence:{path}"
        self._place = find_model(path, "modules.json", "sentence")
        self._set(f"sentence:{self._place.identity}", dtype, batch)

    def _load(self) -> torch.nn.Module:
        from sentence_transformers import SentenceTransformer

        place = self._place
        model: torch.nn.Module = read_model(
            lambda: SentenceTransformer(place.path, revision=place.commit, device="cpu"),
            place,
            self._spec,
        )
        return model

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        features: torch.Tensor = self.network().encode(
            prompts, batch_size=len(prompts), convert_to_tensor=True, show_progress_bar=False
        )
        return features

    def count_cut(self, prompts: Sequence[str]) -> int:
        """How many prompts have more tokens than the network reads; 0 where it has no limit."""
        from transformers import PreTrainedTokenizerBase

        model = self.network()
        tokenizer, longest = model.tokenizer, model.max_seq_length
        if not isinstance(tokenizer, PreTrainedTokenizerBase) or longest is None:
            return 0
        prefix = model.prompts.get(model.default_prompt_name, "")
        texts = [prefix + prompt for prompt in prompts]
        tokens = tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        return sum(len(row) > longest for row in tokens)

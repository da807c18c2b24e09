"""A CLIP byte-pair tokenizer of the mini world's words, for mini model and mini reward alike.

Every word of the world is one token; any other text still falls back to bytes, so no prompt is ever
refused.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fifa.miniworld import vocabulary as words

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CONTEXT = 24  # tokens a prompt, start and end included; the longest wording of the grammar takes 23
START, END = "<|startoftext|>", "<|endoftext|>"


def vocabulary() -> list[str]:
    """Every word that a prompt of the mini world can contain, sorted."""
    tables = (
        words.SHAPES,
        words.COLOURS,
        words.SIZES,
        words.BACKGROUNDS,
        words.RELATIONS,
        words.COUNTS,
    )
    phrases = [option for table in tables for options in table.values() for option in options]
    phrases += [*words.OPENINGS, *words.SETTINGS, "an and with nothing"]
    phrases += [
        noun + ending for nouns in words.SHAPES.values() for noun in nouns for ending in ("s", "es")
    ]
    return sorted({word for text in phrases for word in text.split() if word != "{}"})


def build_tokenizer() -> CLIPTokenizer:
    """Train the byte-pair merges on the word list until each word is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        min_frequency=1,
        show_progress=False,
    )
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    learner.train_from_iterator(vocabulary(), trainer)
    merges = [(a, b) for a, b in json.loads(learner.to_str())["model"]["merges"]]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [token + "</w>" for token in tokens]
    tokens += ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys([*tokens, START, END]))
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,  # type: ignore[arg-type]  # tuples, whatever the hint says
        model_max_length=CONTEXT,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=END,
    )

"""A CLIP byte-pair tokenizer of the mini world's words, for mini model and mini reward alike.

Every word of the world is one token; any other text still falls back to bytes, so no prompt is ever
refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from fifa.miniworld import vocabulary as world

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CONTEXT = 24  # tokens a prompt, start and end included; the longest wording of the grammar takes 23
START, END = "<|startoftext|>", "<|endoftext|>"


def vocabulary() -> list[str]:
    """Every word that a prompt of the mini world can contain, sorted."""
    tables = (
        world.SHAPES,
        world.COLOURS,
        world.SIZES,
        world.BACKGROUNDS,
        world.RELATIONS,
        world.COUNTS,
    )
    phrases = [option for table in tables for options in table.values() for option in options]
    phrases += [*world.OPENINGS, *world.SETTINGS, "an and with nothing"]
    phrases += [
        noun + ending for nouns in world.SHAPES.values() for noun in nouns for ending in ("s", "es")
    ]
    return sorted({word for text in phrases for word in text.split() if word != "{}"})


def build_tokenizer() -> CLIPTokenizer:
    """A tokenizer whose byte-pair merges make each word of the world one token."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    merges = learned_merges(vocabulary())
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


def learned_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until each word is one token: commonest pair first, ties by spelling.

    The trainer of the tokenizers library breaks ties in the order of a hash map, which is another
    one in each process.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for parts in spelled for pair in pairwise(parts)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merged(parts, best) for parts in spelled]
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    done: list[str] = []
    for part in parts:
        if done and (done[-1], part) == pair:
            done[-1] += part
        else:
            done.append(part)
    return done

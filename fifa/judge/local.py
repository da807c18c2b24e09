"""A language model on this machine as the judge: the mean of the grade that it would answer.

The probability of each whole answer "0".."10", end of turn included, is read off the model, not
sampled: log p(answer | chat) = sum of its tokens' log-probabilities + log p(end of turn). The score
is the mean grade under the softmax of these eleven numbers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fifa.config import InputError, fingerprint
from fifa.judge import Quality, collect, rubric

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


class LocalJudge:
    """A causal LM with a chat template, from a folder or by Hub id; batched, deterministic.

    An answer does not depend on its neighbours in the batch, beyond the rounding of the number
    type. A prompt gets no answer where the model puts less than `least_mass` of its probability on
    the eleven grades: it wants to say something else. Raises InputError for a model that cannot be
    loaded or that has no chat template.
    """

    def __init__(
        self,
        model: str,
        *,
        batch_size: int = 8,
        dtype: str = "auto",
        device: str = "cpu",
        least_mass: float = 0.01,
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"the judge's dtype is '{dtype}', allowed are {', '.join(DTYPES)}")
        if batch_size < 1:
            raise InputError(f"the judge's batch_size is {batch_size}, it must be at least 1")
        self.batch_size, self.least_mass = batch_size, least_mass
        self.tokenizer, self.model = _loaded(model, dtype)
        self.tokenizer.padding_side = "left"  # so that every prompt ends where its answer begins
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.name = f"local:{_identity(model, self.model)}:{dtype}:{least_mass:g}:{rubric.VERSION}"
        self.answers = self._answer_tokens()
        self.ends = self._end_tokens()
        self.control = self._control_tokens()
        self.controls = self._count_controls(self._tokens(self._chat("a red circle")))
        try:
            self.to(device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"judge '{self.name}' cannot run on '{device}': {reason}") from None

    def to(self, device: str) -> None:
        """Move the network; RuntimeError or AssertionError where torch has no such device."""
        self.model.to(device)

    def score(self, prompts: Sequence[str]) -> list[Quality]:
        """Judge each prompt by itself."""
        return collect(self.stream(prompts))

    def stream(self, prompts: Sequence[str]) -> Iterator[tuple[int, Quality]]:
        """Answers batch by batch; prompts of similar length share one, which saves padding."""
        tokens: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            reason = rubric.objection(prompt)
            if reason is None:
                tokens[index] = self._tokens(self._chat(prompt))
                reason = self._objection(tokens[index])
            if reason is not None:
                tokens.pop(index, None)
                yield index, Quality(None, reason)
        by_length = sorted(tokens, key=lambda index: (len(tokens[index]), index))
        for first in range(0, len(by_length), self.batch_size):
            batch = by_length[first : first + self.batch_size]
            logps = self.log_probabilities([tokens[index] for index in batch])
            yield from zip(batch, map(self._quality, logps), strict=True)

    def _quality(self, logps: Sequence[float]) -> Quality:
        mass = math.fsum(math.exp(logp) for logp in logps)
        if not mass >= self.least_mass:  # also NaN
            return Quality(None, f"the model puts only {mass:.2g} of its probability on the grades")
        return Quality(round(rubric.expected(logps), 3), f"mean grade, {mass:.0%} sure of a grade")

    # ---- text to tokens ----

    def _chat(self, prompt: str) -> str:
        """The chat as the model's own template writes it, up to where the model answers."""
        chat: str = self.tokenizer.apply_chat_template(
            rubric.messages(prompt),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # where the template knows the switch: grade at once
        )
        return chat

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _answer_tokens(self) -> list[list[int]]:
        """The tokens that each grade adds to the chat."""
        chat = self._chat("a red circle")
        before = self._tokens(chat)
        whole = [self._tokens(chat + str(grade)) for grade in rubric.ANSWERS]
        if any(ids[: len(before)] != before or len(ids) == len(before) for ids in whole):
            raise InputError(
                f"the judge {self.name} cannot be used: its tokenizer merges the end of the chat "
                f"with the answer"
            )
        return [ids[len(before) :] for ids in whole]

    def _end_tokens(self) -> list[int]:
        """The tokens that end a turn: those that stop the model's own generation."""
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.eos_token_id
        if ends is None:
            raise InputError(f"the judge {self.name} names no token that ends its answer")
        return [ends] if isinstance(ends, int) else list(ends)

    def _control_tokens(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        special = {token for token, added_token in added if added_token.special}
        return frozenset(special | set(self.tokenizer.all_special_ids))

    def _count_controls(self, tokens: Sequence[int]) -> int:
        """Control tokens of a chat, but for unknown letters; they should all be the template's."""
        counted = self.control - {self.tokenizer.unk_token_id}
        return sum(token in counted for token in tokens)

    def _objection(self, tokens: Sequence[int]) -> str | None:
        """Why a chat of these tokens cannot be judged, or None."""
        if self._count_controls(tokens) != self.controls:
            return "the prompt writes a control token of the model"
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest and len(tokens) + max(map(len, self.answers)) > longest:
            return f"the chat has {len(tokens):,} tokens, the model reads {longest:,}"
        return None

    # ---- tokens to probabilities ----

    def log_probabilities(self, chats: Sequence[Sequence[int]]) -> list[list[float]]:
        """Chats, N lists of tokens -> log-probability (nats) of each whole answer, (N, 11).

        Each chat is read once; its key-value cache then serves all eleven answers.
        """
        import torch

        try:
            with torch.inference_mode():
                return self._log_probabilities(chats).tolist()
        except torch.OutOfMemoryError:
            raise InputError(
                f"the judge ran out of memory with a batch_size of {self.batch_size}; "
                f"choose a smaller one"
            ) from None

    def _log_probabilities(self, chats: Sequence[Sequence[int]]) -> torch.Tensor:
        import torch

        device = self.model.device
        batch = self.tokenizer.pad({"input_ids": [list(chat) for chat in chats]}, padding=True)
        ids = torch.tensor(batch["input_ids"], device=device)
        mask = torch.tensor(batch["attention_mask"], device=device)
        read = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), None)
        first = read.logits[:, -1].float().log_softmax(-1)  # (N, vocabulary)

        answers, lengths = self._answer_table(device)
        n, grades, width = len(chats), *answers.shape
        every = torch.arange(grades, device=device)
        cache = read.past_key_values
        cache.batch_repeat_interleave(grades)
        lengthened = torch.cat([mask, mask.new_ones(n, width)], dim=1)
        positions = mask.sum(1, keepdim=True) + torch.arange(width, device=device)
        then = self._forward(
            answers.repeat(n, 1),
            lengthened.repeat_interleave(grades, 0),
            positions.repeat_interleave(grades, 0),
            cache,
        )
        later = then.logits.float().log_softmax(-1).view(n, grades, width, -1)

        total = first[:, answers[:, 0]]  # (N, 11)
        for at in range(1, width):
            step = later[:, every, at - 1, answers[:, at]]
            total = total + torch.where(lengths > at, step, 0.0)
        last = later[:, every, lengths - 1]  # after the whole answer
        return (total + last[..., self.ends].logsumexp(-1)).double()

    def _answer_table(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of the answers (11, longest), filled up at the right, and their lengths (11,)."""
        import torch

        width = max(map(len, self.answers))
        rows = [answer + [answer[-1]] * (width - len(answer)) for answer in self.answers]
        lengths = [len(answer) for answer in self.answers]
        return torch.tensor(rows, device=device), torch.tensor(lengths, device=device)

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> Any:
        """Run the network; of a chat only the last logits are needed, of an answer all."""
        takes = inspect.signature(self.model.forward).parameters
        more: dict[str, Any] = {}
        if "position_ids" in takes:
            more["position_ids"] = positions
        if cache is None and "logits_to_keep" in takes:
            more["logits_to_keep"] = 1
        return self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more
        )


def _loaded(model: str, dtype: str) -> tuple[Any, Any]:
    """Tokenizer and network in evaluation mode."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"the judge's model '{model}' cannot be loaded: {reason}; give a folder with a causal "
            f"LM of transformers, or its Hub id where the Hub can be reached"
        ) from None
    if not tokenizer.chat_template:
        raise InputError(
            f"the judge's model '{model}' has no chat template; choose one tuned for chat"
        )
    return tokenizer, network


def _identity(model: str, network: Any) -> str:
    """A name that changes with the weights: a folder's content, or the commit of a Hub model."""
    if Path(model).is_dir():
        folder = Path(model)
        return f"{folder.resolve().name}@{fingerprint(folder)}"
    commit = getattr(network.config, "_commit_hash", None)
    return f"{model}@{commit[:12]}" if commit else model

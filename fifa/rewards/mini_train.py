"""How the shipped mini reward was made: `python -m fifa.rewards.mini_train --data DIR --out DIR`.

Two phases, as PickScore had: CLIP's contrastive objective on rendered scenes and their captions,
then PickScore's on people's choices: cross-entropy of softmax(score_0, score_1) against the label,
ties as (0.5, 0.5), each pair weighted by one over the pairs of its prompt (Kirstain et al. 2023,
arXiv 2305.01569, section 3). Nothing but captions and noisy labels is seen; the hidden truth of the
data set is not read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fifa.config import InputError
from fifa.images import decode, to_batch
from fifa.miniworld import compose, phrase, render, sample_request
from fifa.miniworld.tokenizer import CONTEXT, build_tokenizer
from fifa.pairs import PairTable, held_out, normalise_prompt
from fifa.rewards.mini import WEIGHTS

if TYPE_CHECKING:
    from open_clip import CLIP
    from transformers import CLIPTokenizer

Log = Callable[[str, int, float], None]
INPUT = (64, 64)  # twice the mini world: the network divides its input by 32
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
FIRST_SCALE = 10.0  # contrast ends near 100, so sure of itself that the first choices undo it
HELD_OUT = 0.1  # share of the prompts that is kept for the agreement reported at the end


def model_config(vocab_size: int) -> dict[str, Any]:
    """The open_clip config of the mini reward: a small ResNet and a small text transformer."""
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 20, "head_width": 64},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocab_size,
            "hf_tokenizer_name": "mini",
            "width": 128,
            "heads": 4,
            "layers": 3,
        },
    }


def build(vocab_size: int) -> CLIP:
    """An untrained dual encoder;

    initialised from the global generator, which the caller has seeded.
    """
    import open_clip

    config = model_config(vocab_size)
    text = {k: v for k, v in config["text_cfg"].items() if k != "hf_tokenizer_name"}
    return open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text)


def normalised(hwc: list[np.ndarray]) -> Tensor:
    """uint8 images to the network's input (N, 3, 64, 64), enlarged as `MiniReward` does."""
    pixels = F.interpolate(to_batch(hwc), INPUT, mode="bicubic", antialias=True).clamp(0, 1)
    return (pixels - MEAN[0]) / STD[0]


def tokens_of(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids (N, 24)."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def contrast(
    model: CLIP,
    tokenizer: CLIPTokenizer,
    *,
    seed: int,
    steps: int,
    batch: int,
    learning_rate: float,
    log: Log,
) -> None:
    """Phase one:

    each caption must find its image in the batch, and the reverse (CLIP, arXiv 2103.00020).
    """
    optimizer, schedule = _optimizer(model, learning_rate, steps)
    target = torch.arange(batch)
    for step in range(steps):
        rng = np.random.default_rng([seed, step])
        requests = [sample_request(rng, "train") for _ in range(batch)]
        images = normalised([render(compose(request, rng)) for request in requests])
        texts = tokens_of(tokenizer, [phrase(request, rng) for request in requests])
        image, text, scale = model(images, texts)[:3]
        logits = scale * image @ text.T
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        _step(model, optimizer, schedule, loss)
        log("contrast", step, loss.item())


class Choices:
    """A pair table in memory:

    images as uint8, tokens, the probability that image 0 was preferred, weights.
    """

    def __init__(
        self, path: str | Path, tokenizer: CLIPTokenizer, limit: int | None = None
    ) -> None:
        table = PairTable.open(path)
        columns = ["caption", "jpg_0", "jpg_1", "label_0"]
        prompts: list[str] = []
        images: list[np.ndarray] = []
        labels: list[float] = []
        for group in range(len(table.row_groups())):
            for i, row in enumerate(table.read_group(group, columns).to_pylist()):
                where = f"row {i} of row group {group}"
                images.append(np.stack([decode(row[c], where) for c in ("jpg_0", "jpg_1")]))
                prompts.append(row["caption"])
                labels.append(row["label_0"])
            if limit is not None and len(prompts) >= limit:
                break
        self.images = np.stack(images)  # (N, 2, 32, 32, 3)
        self.tokens = tokens_of(tokenizer, prompts)
        self.label = torch.tensor(labels, dtype=torch.float32)
        keys = [normalise_prompt(p) for p in prompts]
        pairs_of = Counter(keys)
        self.weight = torch.tensor([1 / pairs_of[key] for key in keys])
        held = np.array([held_out(p, HELD_OUT, 0) for p in prompts])
        self.train, self.test = np.flatnonzero(~held), np.flatnonzero(held)

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images (2B, 3, 64, 64), all first ones first; tokens (B, 24); label (B,); weight (B,)."""
        pixels = self.images[rows]
        flat = list(np.concatenate([pixels[:, 0], pixels[:, 1]]))
        return normalised(flat), self.tokens[rows], self.label[rows], self.weight[rows]


def margins(model: CLIP, images: Tensor, tokens: Tensor) -> Tensor:
    """score(image 0) - score(image 1) of each pair, (B,)."""
    image = model.encode_image(images, normalize=True)
    text = model.encode_text(tokens, normalize=True)
    first, second = image.chunk(2)
    return model.logit_scale.exp() * ((first - second) * text).sum(1)


def prefer(
    model: CLIP, data: Choices, *, seed: int, steps: int, batch: int, learning_rate: float, log: Log
) -> None:
    """Phase two: PickScore's objective on the choices."""
    with torch.no_grad():
        model.logit_scale.fill_(math.log(FIRST_SCALE))
    optimizer, schedule = _optimizer(model, learning_rate, steps)
    for step in range(steps):
        rows = np.random.default_rng([seed, 1, step]).choice(data.train, batch, replace=False)
        images, tokens, label, weight = data.batch(rows)
        each = F.binary_cross_entropy_with_logits(
            margins(model, images, tokens), label, reduction="none"
        )
        _step(model, optimizer, schedule, (each * weight).sum() / weight.sum())
        log("prefer", step, each.mean().item())


@torch.no_grad()
def agreement(model: CLIP, data: Choices) -> tuple[float, int]:
    """Share of held-out strict choices ordered as the person did, and how many there are."""
    model.eval()
    right, total = 0, 0
    for start in range(0, len(data.test), 256):
        images, tokens, label, _ = data.batch(data.test[start : start + 256])
        strict = label != 0.5
        agrees = (margins(model, images, tokens) > 0) == (label > 0.5)
        right, total = right + int((agrees & strict).sum()), total + int(strict.sum())
    if not total:
        raise InputError("the data holds no strict choice for a held-out prompt; give more rows")
    return right / total, total


def save(model: CLIP, tokenizer: CLIPTokenizer, out: Path, facts: dict[str, Any]) -> None:
    """Write an open_clip folder in half precision, and what it took beside it."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    config = {
        "model_cfg": model_config(len(tokenizer)),
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic"},
    }
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(
        {k: v.contiguous() for k, v in state.items()}, str(out / "open_clip_model.safetensors")
    )
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def _optimizer(
    model: CLIP, learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.1
    )
    return optimizer, schedule


def _step(
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    loss: Tensor,
) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, np.log(100))


def train(
    data: Path, out: Path, *, contrast_steps: int, prefer_steps: int, seed: int, log: Log
) -> dict[str, Any]:
    """Both phases on one thread, then the folder; returns what `training.json` says of it."""
    start = time.monotonic()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        model = build(len(tokenizer))
    contrast(
        model, tokenizer, seed=seed, steps=contrast_steps, batch=128, learning_rate=2e-3, log=log
    )
    choices = Choices(data, tokenizer)
    prefer(model, choices, seed=seed, steps=prefer_steps, batch=64, learning_rate=2e-4, log=log)
    share, count = agreement(model, choices)
    facts = {
        "contrast_steps": contrast_steps,
        "prefer_steps": prefer_steps,
        "seed": seed,
        "pairs": len(choices.label),
        "held_out_strict_choices": count,
        "agreement_with_held_out_choices": round(share, 4),
        "minutes": round((time.monotonic() - start) / 60, 1),
    }
    save(model, tokenizer, out, facts)
    return facts


def main() -> None:
    """Command line: which choices to learn from and where to write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="a data set written by `fifa world`"
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="the open_clip folder")
    parser.add_argument("--contrast-steps", type=int, default=1000)
    parser.add_argument("--prefer-steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    def log(phase: str, step: int, loss: float) -> None:
        if step % 50 == 0:
            sys.stderr.write(f"{phase} {step:5d}  loss {loss:.4f}\n")

    facts = train(
        given.data,
        given.out,
        contrast_steps=given.contrast_steps,
        prefer_steps=given.prefer_steps,
        seed=given.seed,
        log=log,
    )
    sys.stderr.write(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()

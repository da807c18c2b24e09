"""Many tastes instead of an average one: PAL's ideal points, as a reward of whom you name.

A person's ideal is a mixture of K prototypes, w_i in the simplex, and a picture is liked the more
the nearer it lies (Chen et al. 2024, arXiv 2406.08469, models A and B):

    A   u(x, c; i) = -tau * |f(x, c) - sum_k w_ik p_k|          the ideal knows no prompt
    B   u(x, c; i) =  tau * cos(f(x, c), sum_k w_ik g_k(c))     the ideal depends on the prompt

f and g_k are small networks on frozen features. `tastes:FOLDER` scores for the average person,
`tastes:FOLDER#user=NAME` for one, `#mix=0.7,0.3` for a mixture, `#worst` by the least pleased
prototype. Differences of scores are logits of a preference, but for `#worst`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fifa.config import InputError, fingerprint, unknown
from fifa.rewards.encoders import Encoder
from fifa.rewards.fitted import encoder_of, read_facts
from fifa.rewards.heads import Standardise, joint, tower
from fifa.rewards.network import fill, read_weights

FACTS, TENSORS = "tastes.json", "tastes.safetensors"
VERSION = 2  # of the folder's format; 1 did not hold the average mixture
GAIN = 10.0  # of the users' logits: they are to move faster than the networks, at one rate
MOST = math.log(100.0)  # of log tau in model B, as CLIP's


@dataclass(frozen=True)
class TasteShape:
    """What a model of tastes is built from."""

    model: str  # A or B
    width: int  # of picture and text features
    tastes: int  # K
    users: int
    dim: int = 16  # of the space of ideals
    hidden: int = 64  # of the networks; 0 makes them linear
    dropout: float = 0.1


class TasteModel(nn.Module):
    """Utilities of pictures to people; `weights` are rows of the simplex, (B, K).

    `average` (K,) is the mixture of the average person, as it was when the tastes were fitted:
    people who come later do not move it.
    """

    average: Tensor

    def __init__(self, shape: TasteShape) -> None:
        super().__init__()
        if shape.model not in ("A", "B"):
            raise unknown("model of tastes", shape.model, ("A", "B"))
        self.shape = shape
        self.input = Standardise(3 * shape.width)
        self.items = tower(3 * shape.width, shape.hidden, shape.dim, shape.dropout)
        self.users = nn.Parameter(torch.randn(shape.users, shape.tastes) * 1e-3)
        self.register_buffer("average", torch.full((shape.tastes,), 1 / shape.tastes))
        if shape.model == "A":
            self.prototypes = nn.Parameter(torch.randn(shape.tastes, shape.dim))
            self.log_scale = nn.Parameter(torch.zeros(()))
        else:
            self.text = Standardise(shape.width)
            outputs = shape.tastes * shape.dim
            self.ideals = tower(shape.width, shape.hidden, outputs, shape.dropout)
            self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def weights(self, users: Tensor | None = None) -> Tensor:
        """Mixtures (B, K) of users (B,) by number; of all of them if None."""
        logits = self.users if users is None else self.users[users]
        return (GAIN * logits).softmax(-1)

    @torch.no_grad()
    def take_average(self, users: Tensor | None = None) -> None:
        """Make the mean mixture of these users (B,), of all if None, the average person's."""
        self.average.copy_(self.weights(users).mean(0))

    def average_logits(self) -> Tensor:
        """Logits (K,) whose softmax is the average mixture."""
        return self.average.clamp(min=torch.finfo(self.average.dtype).tiny).log()

    def utility(self, picture: Tensor, text: Tensor, weights: Tensor) -> Tensor:
        """How much people with these weights (B, K) like pictures under prompts, logits (B,)."""
        return self._utility(self.items(self.input(joint(picture, text))), text, weights)

    def compare(self, first: Tensor, second: Tensor, text: Tensor, weights: Tensor) -> Tensor:
        """Logit that each prefers the first picture, (B,)."""
        return self.utility(first, text, weights) - self.utility(second, text, weights)

    def by_taste(self, picture: Tensor, text: Tensor) -> Tensor:
        """Utilities (B, K) to people who are of one prototype alone."""
        item = self.items(self.input(joint(picture, text)))
        pure = torch.eye(self.shape.tastes, device=item.device)
        columns = [self._utility(item, text, row.expand(len(item), -1)) for row in pure]
        return torch.stack(columns, 1)

    def _utility(self, item: Tensor, text: Tensor, weights: Tensor) -> Tensor:
        if self.shape.model == "A":
            ideal = weights @ self.prototypes
            return -self.log_scale.exp() * (item - ideal).square().sum(1).add(1e-12).sqrt()
        ideals = self.ideals(self.text(text)).view(len(text), self.shape.tastes, self.shape.dim)
        ideal = (weights[:, :, None] * ideals).sum(1)
        return self.log_scale.clamp(max=MOST).exp() * F.cosine_similarity(item, ideal, dim=1)


class TasteReward:
    """How much a person, a mixture of tastes, or the least pleased taste likes a picture.

    Args:
        path: a folder of `fifa reward tastes`, with `#user=NAME`, `#mix=W,W,...` or `#worst`.
        batch: images a forward pass.
    """

    name = "tastes"
    needs = "a folder written by `fifa reward tastes`"
    source = "Chen et al. 2024, arXiv 2406.08469"
    differentiable = True

    def __init__(self, path: str, batch: int = 128) -> None:
        folder, _, whom = str(path).partition("#")
        self.model, self.facts, self.encoder = load_tastes(folder)
        self.mixture = mixture(self.model, self.facts["users"], whom, folder)
        self.batch = batch
        self.name = f"tastes:{Path(folder).name}" + (f"#{whom}" if whom else "")
        self.version = fingerprint(Path(folder) / FACTS, Path(folder) / TENSORS, whom)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 (N,) of images (N, 3, H, W) in [0, 1]."""
        if len(images) != len(prompts):
            raise InputError(
                f"reward '{self.name}' got {len(images)} images but {len(prompts)} prompts"
            )
        parts = [torch.empty(0, device=images.device)]
        for start in range(0, len(images), self.batch):
            some = slice(start, start + self.batch)
            pictures = self.encoder.pictures(images[some])
            texts = self.encoder.texts(list(prompts[some])).to(pictures.device)
            parts.append(self._scores(pictures, texts).to(images.device))
        return torch.cat(parts)

    def to(self, device: str) -> TasteReward:
        """Move the encoder and the model."""
        self.encoder.to(device)
        self.model.to(device)
        return self

    def _scores(self, pictures: Tensor, texts: Tensor) -> Tensor:
        if self.mixture is None:
            return self.model.by_taste(pictures, texts).amin(1)
        weights = self.mixture.to(pictures).expand(len(pictures), -1)
        return self.model.utility(pictures, texts, weights)


def mixture(model: TasteModel, users: Sequence[str], whom: str, where: str) -> Tensor | None:
    """Weights (K,) of whom a reward speaks for; None for the least pleased taste.

    `whom` is "" for the average person, "worst", "user=NAME" or "mix=W,W,...".
    """
    kind, _, value = whom.partition("=")
    if whom == "":
        return model.average
    if whom == "worst":
        return None
    if kind == "user":
        if value not in users:
            raise unknown("user", value, users[:20], f"others ({len(users)} in {where})")
        return model.weights()[users.index(value)].detach()
    if kind == "mix":
        return _parsed_mixture(value, model.shape.tastes)
    raise InputError(
        f"'{where}#{whom}' names nobody; allowed are #user=NAME, #mix=W,W,... and #worst"
    )


def _parsed_mixture(text: str, tastes: int) -> Tensor:
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    total = sum(weights)
    if len(weights) != tastes or min(weights) < 0 or not 0 < total < math.inf:
        raise InputError(
            f"the mixture '{text}' must be {tastes} numbers, none negative and not all 0"
        )
    return torch.tensor(weights) / total


# ---- the folder ----------------------------------------------------------------------------------


def save_tastes(model: TasteModel, users: Sequence[str], encoder: Encoder, folder: Path) -> None:
    """Write `tastes.json` and `tastes.safetensors` into an existing folder."""
    from safetensors.torch import save_file

    facts = {
        "version": VERSION,
        "shape": vars(model.shape),
        "users": list(users),
        "encoder": encoder.spec,
        "encoder_version": encoder.version,
    }
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, str(folder / TENSORS))
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    (folder / FACTS).write_text(text + "\n", encoding="utf-8")


def load_tastes(path: str | Path) -> tuple[TasteModel, dict[str, Any], Encoder]:
    """The model of a folder, what `tastes.json` says, and its encoder.

    Raises InputError for a folder that is none, is damaged, or whose encoder has changed.
    """
    folder = Path(path).expanduser()
    facts = read_facts(folder / FACTS, VERSION, "fifa reward tastes")
    encoder = encoder_of(facts, folder)
    try:
        model = TasteModel(TasteShape(**facts["shape"]))
        facts["users"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / FACTS} is damaged ({error}); fit again") from None
    fill(model, read_weights(folder / TENSORS, TasteReward.name), folder / TENSORS, "tastes")
    return model.eval().requires_grad_(False), facts, encoder

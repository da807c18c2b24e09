"""A proxy that somebody fitted: `fitted:FOLDER`, where `fifa reward fit` wrote the folder.

It holds `proxy.json` (what it is), `proxy.safetensors` (its numbers) and a model card. The frozen
encoder is named, not copied; other weights under its name are an error. Of an encoder that was
tuned with it, the adapter lies beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fifa.config import InputError, fingerprint, unknown
from fifa.rewards.encoders import Encoder, load_encoder
from fifa.rewards.heads import HEADS, Gate, PairHead, ScalarHead, Standardise, joint
from fifa.rewards.network import fill, read_weights
from fifa.rewards.nuisance import NUISANCES, measure

FACTS, TENSORS = "proxy.json", "proxy.safetensors"
VERSION = 1  # of the folder's format
OWN_ENCODER = "tuned:."  # the encoder that was tuned together with the proxy lies in its folder
PANEL = 64  # pictures that a pairwise proxy compares with to make a score


class HeadProxy(nn.Module):
    """Several heads of one kind, fitted from different seeds, and one temperature.

    A score of scalar heads is in logits: the difference of two, through a sigmoid, is the
    calibrated probability that people prefer the first. A pairwise head has no score of one
    picture; its mean logit against a panel of stored pictures stands for it, so a score knows no
    neighbours.
    """

    heads: Any  # a ModuleList of ScalarHead or of PairHead
    panel: Tensor
    temperature: Tensor

    def __init__(self, kind: str, width: int, hidden: int, members: int, dropout: float = 0.1):
        super().__init__()
        if kind not in HEADS:
            raise unknown("kind of proxy", kind, HEADS)
        self.heads = nn.ModuleList(HEADS[kind](width, hidden, dropout) for _ in range(members))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("panel", torch.zeros(PANEL if kind == "pairwise" else 0, width))
        self.facts = {"kind": kind, "width": width, "hidden": hidden, "members": members}

    def scores(self, pictures: Tensor, nuisances: Tensor, texts: Tensor) -> Tensor:
        """Scores (members, N) of picture and text features (N, width)."""
        return torch.stack([self._scores(head, pictures, texts) for head in self.heads])

    def compare(self, first: Tensor, second: Tensor, texts: Tensor) -> Tensor:
        """Logits (members, N) that the first picture is preferred."""
        logits = [head.compare(first, second, texts) for head in self.heads]
        return torch.stack(logits) / self.temperature

    def _scores(self, head: Any, pictures: Tensor, texts: Tensor) -> Tensor:
        if isinstance(head, ScalarHead):
            return head(pictures, texts) / self.temperature
        assert isinstance(head, PairHead)
        count = len(self.panel)
        logits = head.compare(
            pictures.repeat_interleave(count, 0),
            self.panel.repeat(len(pictures), 1),
            texts.repeat_interleave(count, 0),
        )
        return logits.view(-1, count).mean(1) / self.temperature


class ObjectivesProxy(nn.Module):
    """ArmoRM's form: ridge heads, the nuisance taken out of each, a gate on the prompt.

    reward_k = ridge_k(joint features) - sum_j removal_kj * nuisance_j       (N, K)
    total    = sum_k coefficient_k(prompt) * reward_k                        (N,)

    Rewards are in standard deviations of the ratings, nuisances in those of the training pictures.
    """

    removal: Tensor

    def __init__(self, width: int, objectives: Sequence[str], hidden: int) -> None:
        super().__init__()
        count = len(objectives)
        self.objectives = tuple(objectives)
        self.input = Standardise(3 * width)
        self.ridge = nn.Linear(3 * width, count)
        self.nuisance = Standardise(len(NUISANCES))
        self.register_buffer("removal", torch.zeros(count, len(NUISANCES)))
        self.gate = Gate(width, count, hidden)
        self.facts = {
            "kind": "objectives",
            "width": width,
            "hidden": hidden,
            "objectives": list(objectives),
        }

    def rewards(self, pictures: Tensor, nuisances: Tensor, texts: Tensor) -> Tensor:
        """Debiased rewards (N, K)."""
        raw = self.ridge(self.input(joint(pictures, texts)))
        return raw - self.nuisance(nuisances) @ self.removal.T

    def scores(self, pictures: Tensor, nuisances: Tensor, texts: Tensor) -> Tensor:
        """Totals (1, N)."""
        rewards = self.rewards(pictures, nuisances, texts)
        return (self.gate(texts) * rewards).sum(1)[None]


Proxy = HeadProxy | ObjectivesProxy


class FittedReward:
    """What a folder of `fifa reward fit` learned from pairs or ratings, in logits of preference.

    Args:
        path: the folder; `FOLDER#NAME` takes one objective of it alone.
        objective: the same, as an argument.
        pessimism: standard deviations of the members that are taken off their mean.
        batch: images a forward pass.
    """

    name = "fitted"
    needs = "a folder written by `fifa reward fit`"
    differentiable = True

    def __init__(
        self, path: str, objective: str | None = None, pessimism: float = 0.0, batch: int = 128
    ) -> None:
        folder, _, part = str(path).partition("#")
        self.proxy, self.facts, self.encoder = load_proxy(folder)
        self.objective = _checked_objective(self.proxy, part or objective, folder)
        self.pessimism, self.batch = pessimism, batch
        self.name = f"fitted:{Path(folder).name}" + (f"#{self.objective}" if self.objective else "")
        self.differentiable = isinstance(self.proxy, HeadProxy)  # a JPEG has no gradient
        self.version = fingerprint(
            *(Path(folder) / name for name in (FACTS, TENSORS)), f"{self.objective} {pessimism}"
        )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 (N,) of images (N, 3, H, W) in [0, 1]."""
        mean, spread = self.with_disagreement(images, prompts)
        return mean - self.pessimism * spread

    def with_disagreement(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Mean over the members and their standard deviation, (N,) each; 0 for one member."""
        if not len(images):
            return torch.empty(0, device=images.device), torch.empty(0, device=images.device)
        parts = [self._members(*batch) for batch in self._batches(images, prompts)]
        members = torch.cat(parts, dim=1).to(images.device)
        return members.mean(0), members.std(0, correction=0)

    def compare(self, first: Tensor, second: Tensor, prompts: Sequence[str]) -> Tensor:
        """Logits (N,) that the first picture is preferred: of a pairwise proxy, what it learned.

        The mean over its members; any other proxy compares by its scores.
        """
        if not isinstance(self.proxy, HeadProxy) or self.proxy.facts["kind"] != "pairwise":
            return self(first, prompts) - self(second, prompts)
        pairs = zip(self._batches(first, prompts), self._batches(second, prompts), strict=True)
        logits = [self.proxy.compare(a, b, texts).mean(0) for (a, _, texts), (b, _, _) in pairs]
        return torch.cat(logits).to(first.device)

    def explain(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Rewards (N, K) and coefficients (N, K) of an objectives proxy; total = sum of products.

        Raises InputError for a proxy without objectives.
        """
        if not isinstance(self.proxy, ObjectivesProxy):
            raise InputError(
                f"reward '{self.name}' is one black box; only a proxy fitted with "
                f"kind=objectives can be explained"
            )
        rewards, coefficients = [], []
        with torch.no_grad():
            for pictures, nuisances, texts in self._batches(images, prompts):
                rewards.append(self.proxy.rewards(pictures, nuisances, texts))
                coefficients.append(self.proxy.gate(texts))
        return torch.cat(rewards), torch.cat(coefficients)

    def to(self, device: str) -> FittedReward:
        """Move the encoder and the heads."""
        self.encoder.to(device)
        self.proxy.to(device)
        return self

    def _members(self, pictures: Tensor, nuisances: Tensor, texts: Tensor) -> Tensor:
        if self.objective is None:
            return self.proxy.scores(pictures, nuisances, texts)
        assert isinstance(self.proxy, ObjectivesProxy)
        index = self.proxy.objectives.index(self.objective)
        return self.proxy.rewards(pictures, nuisances, texts)[None, :, index]

    def _batches(self, images: Tensor, prompts: Sequence[str]) -> list[tuple[Tensor, ...]]:
        """(picture features, nuisances, text features) of a few images at a time."""
        if len(images) != len(prompts):
            raise InputError(
                f"reward '{self.name}' got {len(images)} images but {len(prompts)} prompts"
            )
        found: list[tuple[Tensor, ...]] = []
        for start in range(0, len(images), self.batch):
            some = images[start : start + self.batch]
            pictures = self.encoder.pictures(some)
            nuisances = torch.zeros(len(some), len(NUISANCES))
            if isinstance(self.proxy, ObjectivesProxy):
                nuisances = measure(some)
            texts = self.encoder.texts(prompts[start : start + self.batch])
            found.append((pictures, nuisances.to(pictures.device), texts))
        return found


# ---- the folder ----------------------------------------------------------------------------------


def save_proxy(proxy: Proxy, encoder: Encoder, folder: Path) -> None:
    """Write `proxy.json` and `proxy.safetensors` into an existing folder."""
    from safetensors.torch import save_file

    facts = {
        "version": VERSION,
        **proxy.facts,
        "encoder": encoder.spec,
        "encoder_version": encoder.version,
    }
    tensors = {name: value.contiguous() for name, value in proxy.state_dict().items()}
    save_file(tensors, str(folder / TENSORS))
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def load_proxy(path: str | Path) -> tuple[Proxy, dict[str, Any], Encoder]:
    """The proxy of a folder, what `proxy.json` says, and its encoder.

    Raises InputError for a folder that is none, is damaged, or whose encoder has changed.
    """
    folder = Path(path).expanduser()
    facts = read_facts(folder / FACTS, VERSION, "fifa reward fit")
    absent = {"kind", "width", "hidden"} - facts.keys()
    if absent:
        raise InputError(f"{folder / FACTS} is damaged ({sorted(absent)[0]} is missing); fit again")
    encoder = encoder_of(facts, folder)
    proxy = _built(facts, folder)
    file = folder / TENSORS
    fill(proxy, read_weights(file, FittedReward.name), file, FittedReward.name)
    return proxy.eval().requires_grad_(False), facts, encoder


def read_facts(file: Path, version: int, command: str) -> dict[str, Any]:
    """What a fitted folder says of itself in JSON, its encoder at least.

    InputError if there is no such file, it is damaged, or not of this format.
    """
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"{file.parent} holds nothing fitted (no readable {file.name}); `{command}` writes it"
        ) from None
    if not isinstance(facts, Mapping) or facts.get("version") != version:
        raise InputError(f"{file} is not of format {version}; fit again")
    absent = {"encoder", "encoder_version"} - facts.keys()
    if absent:
        raise InputError(f"{file} is damaged ({sorted(absent)[0]} is missing); fit again")
    return dict(facts)


def encoder_of(facts: Mapping[str, Any], folder: Path) -> Encoder:
    """The encoder that a folder was fitted on; InputError if it has changed since."""
    spec = facts["encoder"]
    encoder = load_encoder(f"tuned:{folder}" if spec == OWN_ENCODER else spec)
    if encoder.version != facts["encoder_version"]:
        raise InputError(
            f"{folder} was fitted on encoder '{facts['encoder']}' of version "
            f"{facts['encoder_version']}, the one found is {encoder.version}; fit it again"
        )
    return encoder


def _built(facts: Mapping[str, Any], folder: Path) -> Proxy:
    try:
        width, hidden = facts["width"], facts["hidden"]
        if facts["kind"] == "objectives":
            return ObjectivesProxy(width, facts["objectives"], hidden)
        return HeadProxy(facts["kind"], width, hidden, facts["members"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / FACTS} is damaged ({error}); fit the proxy again") from None


def _checked_objective(proxy: Proxy, name: str | None, folder: str) -> str | None:
    if name is None:
        return None
    known = proxy.objectives if isinstance(proxy, ObjectivesProxy) else ()
    if not known:
        raise InputError(f"the proxy {folder} has no objectives, so none is called '{name}'")
    if name not in known:
        raise unknown("objective", name, known)
    return name

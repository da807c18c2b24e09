"""`fifa reward fit`: from pairs, or pairs and ratings, to a folder that is a reward.

A scalar head is PickScore's recipe (Kirstain et al. 2023, arXiv 2305.01569) on frozen features,
with ties as an answer; a pairwise head is the pair preference model of RLHF Workflow (Dong et al.
2024, arXiv 2405.07863); objectives are ArmoRM (`fifa.proxies.objectives`); without freezing, the
last blocks of the encoder learn too (`fifa.proxies.lora`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fifa.config import InputError, atomic_path
from fifa.features import CACHE, PairFeatures, pair_features
from fifa.pairs import BadRow
from fifa.proxies.calibration import temperature
from fifa.proxies.card import Card, card_of, write_card
from fifa.proxies.likelihood import LIKELIHOODS, Likelihood
from fifa.proxies.lora import cosine_proxy, tune
from fifa.proxies.objectives import fit_objectives
from fifa.proxies.settings import READS, FitConfig, unread_settings
from fifa.proxies.splits import Split, split_pairs
from fifa.proxies.training import descend, fresh, recipe_of
from fifa.rewards import on_device
from fifa.rewards.encoders import load_encoder
from fifa.rewards.fitted import PANEL, HeadProxy, Proxy, save_proxy
from fifa.rewards.heads import HEADS, PairHead, ScalarHead, joint

Progress = Callable[[str, int, int], None]

LEARNT_TIE = -1.0  # first value of the tie parameter: about 10 to 20% of ties between equals


def fit(config: FitConfig, progress: Progress = lambda stage, done, total: None) -> Card:
    """Fit a proxy and write its folder with the model card, which is returned.

    Raises InputError if the folder exists, the settings do not fit together, or the data says too
    little; nothing is written then but the cache of features.
    """
    if config.out.exists():
        raise InputError(f"{config.out} exists; choose another folder or delete it")
    if (config.kind == "objectives") != (config.ratings is not None):
        raise InputError("ratings and kind=objectives go together: give both or neither")
    config = _as_read(config)
    encoder = on_device(load_encoder(config.encoder), config.device, "encoder", config.encoder)
    cache = config.cache or config.out.parent / CACHE
    pairs = pair_features(config.pairs, encoder, cache, progress)
    split = split_pairs(pairs, config.held_out, config.seed, config.ties == "drop")
    proxy: Proxy
    objectives: dict[str, Any] = {}
    unrated: tuple[BadRow, ...] = ()
    with atomic_path(config.out) as folder:
        folder.mkdir()
        if config.kind == "objectives":
            proxy, objectives, unrated = fit_objectives(
                config, encoder, cache, pairs, split, progress
            )
        elif config.kind == "lora":
            encoder = tune(config, encoder, pairs, split, folder, progress)
            pairs = pair_features(config.pairs, encoder, cache, progress)
            proxy = cosine_proxy(pairs, split)
        else:
            proxy = fit_heads(config, pairs, split, progress)
        card = card_of(config, proxy, pairs, split, objectives, unrated)
        save_proxy(proxy, encoder, folder)
        write_card(card, folder)
    return card


def _as_read(config: FitConfig) -> FitConfig:
    """The settings as the kind of proxy takes them; InputError for those that it would forget."""
    unread = unread_settings(config)
    if unread:
        raise InputError(
            f"kind={config.kind} does not read {', '.join(unread)}; what it reads is "
            f"{', '.join(READS[config.kind])}"
        )
    if config.kind != "lora" or config.ties == "drop":
        return config
    if config.ties == "davidson":
        raise InputError("kind=lora takes a tie as half a win each; ties may be half or drop")
    return config.model_copy(update={"ties": "half"})


def fit_heads(
    config: FitConfig,
    pairs: PairFeatures,
    split: Split,
    progress: Progress = lambda stage, done, total: None,
) -> HeadProxy:
    """The ensemble of scalar or pairwise heads, calibrated on the validation prompts.

    Raises InputError if the features cannot tell the pictures of any training pair apart.
    """
    data = PairTensors(pairs)
    width = pairs.pictures.shape[1]
    proxy = fresh(
        lambda: HeadProxy(config.kind, width, config.hidden, config.members, config.dropout),
        config.seed,
    )
    rows = torch.from_numpy(split.train)
    first, second, text = data.rows(rows)
    if torch.equal(first, second):
        raise InputError(
            "the features of both pictures are the same in every pair, so there is nothing to "
            "learn from; name another encoder"
        )
    inputs = torch.cat([joint(first, text), joint(second, text)])
    total = config.members * config.epochs
    for member in range(config.members):
        told = partial(_told, progress, member * config.epochs, total)
        proxy.heads[member] = _fit_head(config, data, inputs, split, member, told)
    if config.kind == "pairwise":
        shown = torch.cat([data.first[rows], data.second[rows]])
        rng = np.random.default_rng([config.seed, 1])
        proxy.panel.copy_(data.pictures[shown[rng.choice(len(shown), PANEL)]])
    proxy.eval().requires_grad_(False)
    proxy.temperature.fill_(_temperature(proxy, data, split.validation))
    return proxy


def _fit_head(
    config: FitConfig,
    data: PairTensors,
    inputs: Tensor,
    split: Split,
    member: int,
    told: Callable[[int, int], None],
) -> ScalarHead | PairHead:
    """One head of the ensemble; `inputs` are the joint features that it standardises by."""
    seed = int(np.random.SeedSequence([config.seed, member]).generate_state(1)[0])
    width = data.pictures.shape[1]
    head: ScalarHead | PairHead = fresh(
        lambda: HEADS[config.kind](width, config.hidden, config.dropout), seed
    )
    head.input.learn(inputs)
    trainee = _Trainee(head, LIKELIHOODS[config.ties], data, config.smoothing)
    descend(trainee, trainee.loss, split.train, split.validation, recipe_of(config), seed, told)
    return head


def _told(progress: Progress, before: int, total: int, done: int, of: int) -> None:
    progress("fitting heads", before + done, total)


class PairTensors:
    """The arrays of a PairFeatures as tensors."""

    def __init__(self, pairs: PairFeatures) -> None:
        self.pictures = torch.tensor(pairs.pictures)
        self.nuisances = torch.tensor(pairs.nuisances)
        self.texts = torch.tensor(pairs.texts)
        self.first, self.second = torch.from_numpy(pairs.first), torch.from_numpy(pairs.second)
        self.prompt = torch.from_numpy(pairs.prompt)
        self.label = torch.tensor(pairs.label)

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of the first picture, the second and the prompt of these rows, (B, D) each."""
        return (
            self.pictures[self.first[rows]],
            self.pictures[self.second[rows]],
            self.texts[self.prompt[rows]],
        )


class _Trainee(nn.Module):
    """A head and how readily people call a tie, learned together."""

    def __init__(
        self,
        head: ScalarHead | PairHead,
        likelihood: Likelihood,
        data: PairTensors,
        smoothing: float,
    ) -> None:
        super().__init__()
        self.head = head
        self.tie = nn.Parameter(torch.tensor(LEARNT_TIE))
        self.likelihood, self.data, self.smoothing = likelihood, data, smoothing

    def loss(self, rows: Tensor) -> Tensor:
        """Mean negative log-likelihood of the rows' labels."""
        delta = self.head.compare(*self.data.rows(rows))
        label = self.data.label[rows]
        return self.likelihood(delta, label, self.tie, smoothing=self.smoothing).mean()


def _temperature(proxy: HeadProxy, data: PairTensors, rows: np.ndarray) -> float:
    strict = torch.from_numpy(rows)
    strict = strict[data.label[strict] != 0.5]
    with torch.no_grad():
        margin = proxy.compare(*data.rows(strict)).mean(0)
    return temperature(margin.numpy(), data.label[strict].numpy() == 1)

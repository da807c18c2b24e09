"""`--kind lora`: the cosine of an encoder whose last blocks learn from people's choices.

PickScore's recipe (Kirstain et al. 2023, arXiv 2305.01569) at the cost of an adapter:
with s the learned scale and c(x) the cosine of picture x and the prompt,

    P(a beats b) = exp(s c(a)) / (exp(s c(a)) + exp(s c(b))),

cross-entropy against the choice, a tie counting half for each, and every prompt as one however many
pairs it has; over all pairs, where the published code weighs those of one batch against each other.
Nothing but the adapter and the scale is trained; norms keep their statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fifa.features import PairFeatures
from fifa.images import decode
from fifa.pairs import BadRow, PairTable
from fifa.proxies.calibration import temperature
from fifa.proxies.settings import FitConfig
from fifa.proxies.splits import Rows, Split
from fifa.proxies.training import Recipe, descend, fresh
from fifa.rewards.encoders import Encoder
from fifa.rewards.fitted import OWN_ENCODER, HeadProxy
from fifa.rewards.heads import ScalarHead
from fifa.rewards.tuned import add_adapter, last_layers, load_tuned, save_adapter

Progress = Callable[[str, int, int], None]


def tune(
    config: FitConfig,
    encoder: Encoder,
    pairs: PairFeatures,
    split: Split,
    folder: Path,
    progress: Progress,
) -> Encoder:
    """Tune an encoder, which is used up, write the adapter into `folder` and load it from there.

    The encoded pictures of all pairs are held in memory. Raises InputError for an encoder whose
    blocks are not known.
    """
    spec, version, settings = encoder.spec, encoder.version, config.lora
    layers = last_layers(encoder.network, settings.blocks)
    scale = 1 / cosine_temperature(pairs, split.validation)
    seed = int(np.random.SeedSequence([config.seed, 2]).generate_state(1)[0])
    adapter: dict[str, nn.Parameter] = {}

    def build() -> nn.Module:
        adapter.update(add_adapter(encoder.network, layers, settings.rank))
        return _Trainee(encoder, list(adapter.values()), scale, config, pairs)

    trainee = fresh(build, seed)
    assert isinstance(trainee, _Trainee)
    total = settings.epochs * len(split.train)
    trainee.told = lambda rows: progress("tuning the encoder", min(rows, total), total)
    recipe = Recipe(
        settings.epochs,
        settings.patience,
        settings.learning_rate,
        config.weight_decay,
        settings.batch_size,
    )
    descend(trainee, trainee.loss, split.train, split.validation, recipe, seed)
    progress("tuning the encoder", total, total)
    save_adapter(adapter, spec, version, folder)
    return load_tuned(str(folder), OWN_ENCODER).to(config.device)


class _Trainee(nn.Module):
    """The adapter inside an encoder, and the scale of the cosine."""

    def __init__(
        self,
        encoder: Encoder,
        adapter: Sequence[nn.Parameter],
        scale: float,
        config: FitConfig,
        pairs: PairFeatures,
    ) -> None:
        super().__init__()
        self.encoder, self.smoothing = encoder, config.smoothing
        self.adapter = nn.ParameterList(adapter)
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        self.files = encoded_pictures(config.pairs, pairs.row)
        self.prompts = [pairs.prompts[i] for i in pairs.prompt.tolist()]
        self.label = torch.tensor(pairs.label)
        weight = 1 / np.bincount(pairs.prompt)[pairs.prompt]
        self.weight = torch.tensor(weight / weight.mean()).float()
        self.told: Callable[[int], None] = lambda rows: None
        self._seen = 0

    def loss(self, rows: Tensor) -> Tensor:
        """Cross-entropy of the rows' choices by the weight of a pair, 1 on average over the data.

        Divided by the number of rows and not by their weight, so that batches add up: each prompt
        weighs the same whatever it shares a batch with.
        """
        if self.training:
            self._seen += len(rows)
            self.told(self._seen)
        label = self.label[rows].to(self.log_scale.device)
        label = label * (1 - self.smoothing) + self.smoothing / 2
        margin = self.log_scale.exp() * self.margins(rows).to(label.device)
        each = F.binary_cross_entropy_with_logits(margin, label, reduction="none")
        weight = self.weight[rows].to(label.device)
        return (each * weight).mean()

    def margins(self, rows: Tensor) -> Tensor:
        """Cosine of the first picture less that of the second, (B,)."""
        sides = [self.files[row] for row in rows.tolist()]
        squares = self._squares([first for first, _ in sides] + [second for _, second in sides])
        pictures, texts = self.encoder.prepared(
            squares, [self.prompts[row] for row in rows.tolist()]
        )
        first, second = pictures.chunk(2)
        return ((first - second) * texts).sum(1)

    def _squares(self, files: Sequence[bytes]) -> Tensor:
        def square(file: bytes) -> NDArray[np.uint8]:
            return self.encoder.pixels.square(decode(file, "a picture"))

        with ThreadPoolExecutor(4) as pool:
            return torch.from_numpy(np.stack(list(pool.map(square, files))))


def encoded_pictures(path: Path, rows: Rows) -> list[tuple[bytes, bytes]]:
    """The two picture files of these rows of a pair table, in ascending order of rows."""
    wanted, found, number = set(rows.tolist()), [], 0
    table = PairTable.open(path)
    for group in range(len(table.row_groups())):
        for item in table.judgments(group):
            if number in wanted and not isinstance(item, BadRow):
                found.append((item.image_a, item.image_b))
            number += 1
    return found


def cosine_temperature(pairs: PairFeatures, rows: Rows) -> float:
    """What cosines are divided by so that a difference of two is the logit of a choice."""
    strict = rows[pairs.label[rows] != 0.5]
    difference = pairs.pictures[pairs.first[strict]] - pairs.pictures[pairs.second[strict]]
    margin = (difference * pairs.texts[pairs.prompt[strict]]).sum(1).astype(float)
    return temperature(100 * margin, pairs.label[strict] == 1) / 100


def cosine_proxy(pairs: PairFeatures, split: Split) -> HeadProxy:
    """The cosine as a linear head, calibrated on the validation prompts."""
    width = pairs.pictures.shape[1]
    proxy = HeadProxy("scalar", width, hidden=0, members=1)
    head = proxy.heads[0]
    assert isinstance(head, ScalarHead)
    assert isinstance(head.net, nn.Linear)
    with torch.no_grad():
        head.net.bias.zero_()
        head.net.weight.zero_()[:, 2 * width :] = 1  # the products add up to the cosine
    proxy.temperature.fill_(cosine_temperature(pairs, split.validation))
    return proxy.eval().requires_grad_(False)

"""PickScore's recipe: the last blocks of three kinds of encoder learn from choices."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pair_files import picture, write_loud_pairs
from safetensors.torch import load_file, save_file
from tiny_encoders import open_clip_folder, transformers_folder
from typer.testing import CliRunner

from fifa.cli import app
from fifa.config import InputError
from fifa.features import pair_features
from fifa.images import decode, to_batch
from fifa.proxies import FitConfig
from fifa.proxies.card import read_card
from fifa.proxies.fit import fit
from fifa.proxies.lora import _Trainee, cosine_proxy, cosine_temperature, encoded_pictures
from fifa.proxies.splits import split_pairs
from fifa.proxies.training import _held_out
from fifa.rewards import load_reward, score_images
from fifa.rewards.encoders import load_encoder
from fifa.rewards.tuned import FACTS, TENSORS, add_adapter, last_layers, merge_adapter

ROWS, PROMPT = 240, "a red star"
LAYERS = {  # of the last block of either tower that can take part, by the networks' own names
    "mini": {"visual.layer4.0.conv3", "transformer.resblocks.2.mlp.c_fc"},
    "clip": {"visual.transformer.resblocks.1.mlp.c_proj", "transformer.resblocks.1.mlp.c_fc"},
    "transformers": {
        "vision_model.encoder.layers.1.self_attn.q_proj",
        "text_model.encoder.layers.1.mlp.fc2",
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair table in which people prefer the louder picture, and two encoders beside it."""
    folder = tmp_path_factory.mktemp("lora")
    write_loud_pairs(folder / "d.parquet", ROWS)
    open_clip_folder(folder / "open_clip")
    transformers_folder(folder / "hf")
    return folder


@pytest.fixture(scope="module")
def specs(place: Path) -> dict[str, str]:
    return {
        "mini": "mini",
        "clip": f"clip:{place / 'open_clip'}",
        "transformers": f"transformers:{place / 'hf'}",
    }


def config(place: Path, name: str, encoder: str = "mini", **lora: Any) -> FitConfig:
    settings = {"epochs": 4, "patience": 4, "batch_size": 16, "rank": 4, "learning_rate": 3e-3}
    return FitConfig(
        pairs=place / "d.parquet",
        out=place / name,
        encoder=encoder,
        kind="lora",
        held_out=0.2,
        lora={**settings, **lora},
    )


def accuracy_of_the_cosine(place: Path, encoder: str) -> float:
    pairs = pair_features(place / "d.parquet", load_encoder(encoder))
    rows = split_pairs(pairs, 0.2, 0, drop_ties=False).test
    text = pairs.texts[pairs.prompt[rows]]
    first, second = pairs.pictures[pairs.first[rows]], pairs.pictures[pairs.second[rows]]
    margin = ((first - second) * text).sum(1)
    return float(((margin > 0) == (pairs.label[rows] > 0.5)).mean())


@pytest.fixture(scope="module")
def tuned(place: Path, specs: dict[str, str]) -> dict[str, Path]:
    """The folder that each kind of encoder came to."""
    for kind, spec in specs.items():
        fit(config(place, kind, spec))
    return {kind: place / kind for kind in specs}


# ---- which layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_the_last_blocks_of_both_towers_take_part(kind: str, specs: dict[str, str]) -> None:
    network = load_encoder(specs[kind]).network
    one, two = last_layers(network, 1), last_layers(network, 2)
    assert LAYERS[kind] <= set(one) < set(two)
    modules = dict(network.named_modules())
    for name in two:  # what a fused attention reads as bare tensors would learn nothing
        parent = modules[name.rpartition(".")[0]]
        assert not isinstance(parent, torch.nn.MultiheadAttention)


def test_what_cannot_be_tuned_is_one_sentence(specs: dict[str, str]) -> None:
    with pytest.raises(InputError, match="a Linear cannot be tuned"):
        last_layers(torch.nn.Linear(2, 2), 1)
    with pytest.raises(InputError, match=r"9 blocks are to be tuned, but a tower .* has 2"):
        last_layers(load_encoder(specs["clip"]).network, 9)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_merged_adapter_computes_what_it_did_beside_the_weights(
    kind: str, specs: dict[str, str]
) -> None:
    encoder = load_encoder(specs[kind])
    images = to_batch([decode(picture(seed), "x") for seed in (3, 9)])
    before = encoder.pictures(images)
    layers = last_layers(encoder.network, 1)
    adapter = add_adapter(encoder.network, layers, 4)
    torch.testing.assert_close(encoder.pictures(images), before)  # B starts at 0
    trained = {id(p) for p in encoder.network.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapter.values()}
    with torch.no_grad():
        for parameter in adapter.values():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    beside, words = encoder.pictures(images), encoder.texts([PROMPT])
    assert not torch.allclose(beside, before, atol=1e-3)
    merge_adapter(encoder.network, layers)
    torch.testing.assert_close(encoder.pictures(images), beside, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.texts([PROMPT]), words, rtol=1e-4, atol=1e-5)


# ---- the loss ------------------------------------------------------------------------------------


def test_the_loss_is_that_of_prompts_which_weigh_the_same_by_hand(place: Path) -> None:
    encoder = load_encoder("mini")
    pairs = pair_features(place / "d.parquet", encoder)
    smoothed = config(place, "unused").model_copy(update={"smoothing": 0.1})
    trainee = _Trainee(encoder, [], 12.0, smoothed, pairs)
    rows = np.array([3, 50, 51, 200])
    text = pairs.texts[pairs.prompt[rows]].astype(float)
    first = np.exp(12 * (pairs.pictures[pairs.first[rows]] * text).sum(1))
    second = np.exp(12 * (pairs.pictures[pairs.second[rows]] * text).sum(1))
    chance = first / (first + second)
    label = 0.9 * pairs.label[rows] + 0.05
    each = -label * np.log(chance) - (1 - label) * np.log(1 - chance)
    of_prompt = [int((pairs.prompt == prompt).sum()) for prompt in pairs.prompt[rows]]
    assert len(set(of_prompt)) > 1
    counts = Counter(pairs.prompt.tolist())
    average = len(counts) / len(pairs)  # weight of a pair, whose prompt weighs 1
    expected = (each / of_prompt).mean() / average
    assert trainee.loss(torch.from_numpy(rows)).item() == pytest.approx(expected, rel=1e-5)


def test_the_held_out_loss_does_not_depend_on_the_batch(place: Path) -> None:
    encoder = load_encoder("mini")
    pairs = pair_features(place / "d.parquet", encoder)
    trainee = _Trainee(encoder, [], 40.0, config(place, "unused"), pairs)
    rows = np.arange(20)
    assert len(set(trainee.weight[:20].tolist())) > 1
    found = [_held_out(trainee, trainee.loss, rows, batch) for batch in (1, 3, 20)]
    assert found == pytest.approx([found[-1]] * 3, rel=1e-5)


def test_files_are_those_of_the_rows(place: Path) -> None:
    found = encoded_pictures(place / "d.parquet", np.array([0, 7, 130]))
    assert found == [(picture(7 * i), picture(7 * i + 11)) for i in (0, 7, 130)]


def test_the_cosine_as_a_head_is_the_cosine(place: Path) -> None:
    pairs = pair_features(place / "d.parquet", load_encoder("mini"))
    split = split_pairs(pairs, 0.2, 0, drop_ties=False)
    pictures, text = torch.tensor(pairs.pictures[:9]), torch.tensor(pairs.texts[[0] * 9])
    found = cosine_proxy(pairs, split).scores(pictures, torch.zeros(9, 5), text)[0]
    cosine = (pictures.double() * text.double()).sum(1)
    expected = cosine / cosine_temperature(pairs, split.validation)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


# ---- the whole -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_it_learns_what_people_like_and_is_a_reward(
    kind: str, place: Path, specs: dict[str, str], tuned: dict[str, Path]
) -> None:
    card = read_card(tuned[kind])
    assert card.accuracy.value > accuracy_of_the_cosine(place, specs[kind]) + 0.15
    assert card.accuracy.value > 0.75
    reward = load_reward(f"fitted:{tuned[kind]}")
    images = to_batch([decode(picture(seed), "x") for seed in (22, 0)])  # loud, quiet
    scores = score_images(reward, images, [PROMPT] * 2)
    assert scores[0] > scores[1]
    encoder = load_encoder(f"tuned:{tuned[kind]}")
    cosine = (encoder.pictures(images) * encoder.texts([PROMPT])).sum(1)
    torch.testing.assert_close(scores, cosine / card.temperature, rtol=1e-4, atol=1e-4)
    asked = images.clone().requires_grad_()
    reward(asked, [PROMPT] * 2).sum().backward()
    assert asked.grad is not None
    assert float(asked.grad.abs().sum()) > 0


def test_the_same_seed_is_the_same_adapter(place: Path, tuned: dict[str, Path]) -> None:
    fit(config(place, "again"))
    assert (place / "again" / TENSORS).read_bytes() == (tuned["mini"] / TENSORS).read_bytes()


def test_the_encoder_goes_on_to_carry_heads_and_the_folder_may_move(
    place: Path, tuned: dict[str, Path]
) -> None:
    moved = place / "moved"
    shutil.copytree(tuned["mini"], moved)
    reward, there = load_reward(f"fitted:{moved}"), load_reward(f"fitted:{tuned['mini']}")
    images = to_batch([decode(picture(5), "x")])
    assert float(reward(images, [PROMPT])) == float(there(images, [PROMPT]))
    card = fit(
        FitConfig(
            pairs=place / "d.parquet",
            out=place / "head",
            encoder=f"tuned:{moved}",
            held_out=0.2,
            epochs=5,
            members=1,
        )
    )
    assert card.accuracy.value > 0.7


def test_other_weights_and_damage_are_one_sentence(tmp_path: Path, tuned: dict[str, Path]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tuned["mini"], folder)
    facts = json.loads((folder / FACTS).read_text())
    (folder / FACTS).write_text(json.dumps({**facts, "encoder_version": "other"}))
    with pytest.raises(InputError, match="of version other"):
        load_encoder(f"tuned:{folder}")
    (folder / FACTS).write_text(json.dumps({**facts, "layers": ["visual.nowhere"]}))
    with pytest.raises(InputError, match=r"does not fit .*nowhere"):
        load_encoder(f"tuned:{folder}")
    (folder / FACTS).write_text(json.dumps(facts))
    tensors = load_file(folder / TENSORS)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][:1].clone()}, folder / TENSORS)
    with pytest.raises(InputError, match=r"does not fit .*expected"):
        load_reward(f"fitted:{folder}")
    with pytest.raises(InputError, match="holds nothing fitted"):
        load_encoder(f"tuned:{tmp_path}")


def test_the_command_tunes(place: Path) -> None:
    out = place / "by_command"
    given = ["--kind", "lora", "--set", "lora.epochs=1", "--set", "lora.blocks=1"]
    done = CliRunner().invoke(
        app, ["reward", "fit", str(place / "d.parquet"), "--out", str(out), *given]
    )
    assert done.exit_code == 0, done.output
    assert "held-out strict pairs" in done.output
    assert sorted(file.name for file in out.iterdir()) == sorted(
        [FACTS, TENSORS, "proxy.json", "proxy.safetensors", "card.json", "card.md"]
    )

"""Diffusion-DPO: which rows become pairs, what is cached, and the published loss on them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from train_runs import environment, kill

from d3po.draws import derive_seed, shuffled
from d3po.families import Family, load_family
from d3po.losses import BoundObjective, ObjectiveConfig
from d3po.offline import OfflineConfig, OfflineSource
from d3po.pair_cache import (
    PairCache,
    build_cache,
    cached_pairs,
    held_out_prompts,
    skipped_rows,
    told,
)
from d3po.policy import Policy, PolicyConfig
from d3po.run import Run, RunConfig
from d3po.sampling import image_noise
from d3po.trainer import Learner, OptimConfig, train_step
from fifa.config import InputError
from fifa.images import encode_png, to_batch
from fifa.pairs import held_out

SEED = 5
Row = tuple[str, bytes, bytes, float]  # prompt, two encoded pictures, label of the first


def picture(number: int, size: int = 64) -> np.ndarray[Any, np.dtype[np.uint8]]:
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (size, size, 3), dtype=np.uint8)


def write_pairs(path: Path, rows: list[Row]) -> Path:
    captions, first, second, labels = zip(*rows, strict=True)
    table = {
        "caption": list(captions),
        "jpg_0": list(first),
        "jpg_1": list(second),
        "label_0": list(labels),
        "label_1": [1 - label for label in labels],
    }
    pq.write_table(pa.table(table), path, row_group_size=3)
    return path


def good_rows(count: int) -> list[Row]:
    """Pairs of pictures 2i and 2i + 1; the first wins in even rows; every prompt comes twice."""
    return [
        (
            f"prompt {i // 2}",
            encode_png(picture(2 * i)),
            encode_png(picture(2 * i + 1)),
            float(i % 2 == 0),
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def family(tiny_sd: Path) -> Family:
    return load_family(tiny_sd)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(RunConfig(dir=str(tmp_path / "run"), seed=SEED))
    yield run
    run.close()


def config_of(tmp_path: Path, rows: list[Row], **more: Any) -> OfflineConfig:
    tmp_path.mkdir(exist_ok=True)
    data = write_pairs(tmp_path / "pairs.parquet", rows)
    return OfflineConfig(data=str(data), cache=str(tmp_path / "cache"), encode_batch=3, **more)


# ---- the cache ----------------------------------------------------------------------------------


def test_the_cache_holds_what_the_encoders_give(tmp_path: Path, family: Family, run: Run) -> None:
    cache = cached_pairs(config_of(tmp_path, good_rows(5)), family, run)
    assert len(cache) == 5
    for i in range(5):
        win, lose = (2 * i, 2 * i + 1) if i % 2 == 0 else (2 * i + 1, 2 * i)
        latents = family.encode_images(to_batch([picture(win), picture(lose)]))
        assert np.allclose(cache.win[i], latents[0].numpy(), atol=1e-5)
        assert np.allclose(cache.lose[i], latents[1].numpy(), atol=1e-5)
        text = family.encode_text([f"prompt {i // 2}"]).tensors["text"][0]
        assert np.allclose(cache.cond["text"][cache.prompt[i]], text.numpy(), atol=1e-5)
    empty = family.encode_text([""]).tensors["text"][0]
    assert len(cache.cond["text"]) == 4  # three prompts and the empty one
    assert np.allclose(cache.cond["text"][0], empty.numpy(), atol=1e-5)


def test_half_precision_halves_the_cache(tmp_path: Path, family: Family, run: Run) -> None:
    config = config_of(tmp_path, good_rows(3), cache_dtype="float16")
    half, full = (
        cached_pairs(c, family, run)
        for c in (config, config.model_copy(update={"cache_dtype": "float32"}))
    )
    assert half.win.nbytes * 2 == full.win.nbytes
    assert np.allclose(half.win, full.win, atol=1e-2)


def test_rows_that_are_no_pairs_are_counted_and_listed(
    tmp_path: Path, family: Family, run: Run
) -> None:
    rows = good_rows(7)
    rows[1] = (rows[1][0], rows[1][1], rows[1][2], 0.5)  # a tie
    rows[2] = (rows[2][0], rows[2][1], rows[2][2][:100], 1.0)  # a truncated picture
    rows[4] = (rows[4][0], rows[4][1], rows[4][2], 0.7)  # no label
    rows[5] = ("  ", *rows[5][1:])
    cache = cached_pairs(config_of(tmp_path, rows), family, run)
    assert len(cache) == 3
    assert cache.summary["dropped"] == {"tie": 1, "undecodable picture": 1, "bad row": 2}
    assert told(cache.summary) == (
        "3 pairs of 7 rows, 2 x bad row, 1 x tie, 1 x undecodable picture"
    )
    listed = {row["row"]: row["reason"] for row in skipped_rows(cache)}
    assert sorted(listed) == [2, 4, 5]
    assert "row 2 (pairs.parquet): cannot decode the image" in listed[2]


def test_a_second_run_encodes_nothing(tmp_path: Path, family: Family, run: Run) -> None:
    config = config_of(tmp_path, good_rows(3))
    first = cached_pairs(config, family, run)
    calls: list[int] = []
    family.vae.encoder.register_forward_pre_hook(lambda *_: calls.append(1))  # type: ignore[attr-defined]
    assert cached_pairs(config, family, run).folder == first.folder
    assert calls == []
    write_pairs(tmp_path / "pairs.parquet", [(*row[:3], 1 - row[3]) for row in good_rows(3)])
    flipped = cached_pairs(config, family, run)
    assert flipped.folder != first.folder
    assert calls
    assert np.allclose(flipped.win, first.lose, atol=1e-6)


def test_another_encoder_is_another_cache(
    tmp_path: Path, make_tiny_sd: Any, tiny_sd: Path, run: Run
) -> None:
    config = config_of(tmp_path, good_rows(2))
    one, same = load_family(tiny_sd), load_family(make_tiny_sd("copy"))
    other = load_family(tiny_sd)
    with torch.no_grad():
        next(other.text_encoder.parameters()).add_(1e-6)  # type: ignore[attr-defined]
    folders = [cached_pairs(config, family, run).folder for family in (one, same, other)]
    assert folders[0] == folders[1] != folders[2]


def test_held_out_prompts_are_not_trained_on(tmp_path: Path, family: Family, run: Run) -> None:
    config = config_of(tmp_path, good_rows(24), held_out_fraction=0.4, held_out_seed=1)
    aside = held_out_prompts(config)
    assert aside == [f"prompt {i}" for i in range(12) if held_out(f"prompt {i}", 0.4, 1)]
    assert 0 < len(aside) < 12
    kept = [f"prompt {i}" for i in range(12) if f"prompt {i}" not in aside]
    # besides, what is evaluated on is left out, however it is written
    cache = cached_pairs(config, family, run, exclude=[f"  {kept[0].upper()}. "])
    assert len(cache) == 2 * (len(kept) - 1)
    assert cache.summary["dropped"] == {"held-out prompt": 24 - len(cache)}


def test_pictures_of_other_sizes_are_cut_to_the_models_square(
    tmp_path: Path, family: Family, run: Run
) -> None:
    wide = np.zeros((32, 96, 3), dtype=np.uint8)
    wide[:, 32:64] = 255  # the centre square
    rows = [("x", encode_png(wide), encode_png(picture(1)), 1.0)]
    cache = cached_pairs(config_of(tmp_path, rows), family, run)
    white = family.encode_images(torch.ones(1, 3, 64, 64))
    assert np.allclose(cache.win[0], white[0].numpy(), atol=1e-4)


def test_no_pair_left_is_one_sentence(tmp_path: Path, family: Family, run: Run) -> None:
    rows = [(*row[:3], 0.5) for row in good_rows(2)]
    with pytest.raises(InputError, match=r"no pair is left .*: 0 pairs of 2 rows, 2 x tie"):
        cached_pairs(config_of(tmp_path, rows), family, run)


def test_a_missing_table_leaves_no_cache(tmp_path: Path, family: Family, run: Run) -> None:
    config = OfflineConfig(data=str(tmp_path / "no.parquet"), cache=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"no\.parquet does not exist"):
        cached_pairs(config, family, run)
    assert not (tmp_path / "cache").exists()


# ---- updates ------------------------------------------------------------------------------------


def start(
    tiny_sd: Path, config: OfflineConfig, run: Run, **optim: Any
) -> tuple[Learner, OfflineSource]:
    family = load_family(tiny_sd)
    policy = Policy(family, PolicyConfig())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.trainable():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    plain = {"micro_batch": 2, "learning_rate": 1.0, "max_grad_norm": None}
    settings = OptimConfig(**{**plain, **optim})
    sgd = torch.optim.SGD(policy.trainable(), lr=1.0)
    policy.denoiser, wrapped = run.accelerator.prepare(policy.bare, sgd)
    objective = BoundObjective.from_config(ObjectiveConfig(name="dpo", beta=2000.0))
    cache = cached_pairs(config, family, run)
    return Learner(policy, wrapped, objective, settings), OfflineSource(
        config, settings, family, policy, cache, run
    )


def published_loss(learner: Learner, cache: PairCache, pairs: list[tuple[int, int]]) -> Tensor:
    """Diffusion-DPO's loss as its authors compute it, with diffusers' own noising.

    inside = -beta/2 * ((mse_w - mse_l)_policy - (mse_w - mse_l)_ref), loss = -log sigmoid(inside).
    """
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_pretrained(learner.policy.family.name, subfolder="scheduler")

    def mse(latents: np.ndarray[Any, Any], epoch: int, row: int) -> Tensor:
        noise = image_noise([derive_seed(SEED, "noise", epoch, row)], latents.shape, 0)
        t = torch.tensor([derive_seed(SEED, "time", epoch, row) % 1000])
        noisy = scheduler.add_noise(torch.from_numpy(latents.copy())[None], noise, t)
        cond = cache.conditioning([cache.prompt[row]]).tensors["text"]
        return (learner.policy.bare(noisy, t, cond).sample - noise).square().mean()

    losses = []
    for epoch, row in pairs:
        difference = mse(cache.win[row], epoch, row) - mse(cache.lose[row], epoch, row)
        with learner.policy.reference():
            reference = mse(cache.win[row], epoch, row) - mse(cache.lose[row], epoch, row)
        losses.append(torch.nn.functional.softplus(1000.0 * (difference - reference)))
    return torch.stack(losses).mean()


def gradient(learner: Learner, source: OfflineSource, run: Run, index: int) -> Tensor:
    before = [p.detach().clone() for p in learner.policy.trainable()]
    train_step(learner, next(source.round(index).updates), run, 0)
    now = learner.policy.trainable()
    found = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, now, strict=True)])
    with torch.no_grad():
        for p, b in zip(now, before, strict=True):
            p.copy_(b)
    return found


def test_an_update_is_the_published_loss_over_an_epochs_border(
    tmp_path: Path, tiny_sd: Path, run: Run
) -> None:
    learner, source = start(tiny_sd, config_of(tmp_path, good_rows(5)), run, accumulation=2)
    order = shuffled(SEED, 5, 0, 10)
    pairs = [(0, order[4]), (1, order[5]), (1, order[6]), (1, order[7])]  # the second update of 4
    loss = published_loss(learner, source.cache, pairs)
    expected = torch.autograd.grad(loss, learner.policy.trainable())
    flat = torch.cat([part.flatten() for part in expected])
    found = gradient(learner, source, run, 1)
    assert float((found - flat).abs().max() / flat.abs().max()) < 1e-4
    result = train_step(learner, next(source.round(1).updates), run, 0)
    assert result["loss"] == pytest.approx(loss.item(), rel=5e-4)  # float32, beta 2000
    assert result["pairs"] == 4


def test_the_micro_batch_does_not_change_the_gradient(
    tmp_path: Path, tiny_sd: Path, run: Run
) -> None:
    config = config_of(tmp_path, good_rows(5))
    found = [
        gradient(*start(tiny_sd, config, run, micro_batch=m, accumulation=a), run, 0)
        for m, a in ((4, 1), (1, 4))
    ]
    # float32 kernels differ with the batch: 7e-5 seen on one processor, 1e-5 on another
    assert float((found[0] - found[1]).abs().max() / found[0].abs().max()) < 3e-4


def test_winner_and_loser_meet_the_same_noise(tmp_path: Path, tiny_sd: Path, run: Run) -> None:
    rows = [("x", encode_png(picture(1)), encode_png(picture(1)), 1.0)] * 2
    learner, source = start(tiny_sd, config_of(tmp_path, rows), run)
    update = next(source.round(0).updates)
    logp = update.chunks[0].logp(learner.policy.bare)
    assert torch.equal(logp[:2], logp[2:])  # a picture against itself
    assert not torch.equal(logp[0], logp[1])  # another pair, another time and noise


def watch_reference(learner: Learner) -> list[int]:
    """Grows by the rows of every forward pass of the reference."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next(m for m in learner.policy.bare.modules() if isinstance(m, BaseTunerLayer))
    rows: list[int] = []

    def count(module: Any, args: tuple[Tensor, ...]) -> None:
        if layer.disable_adapters:
            rows.append(len(args[0]))

    learner.policy.bare.register_forward_pre_hook(count)
    return rows


def test_a_limited_list_of_draws_asks_the_reference_once(
    tmp_path: Path, tiny_sd: Path, run: Run
) -> None:
    config = config_of(tmp_path, good_rows(4), noise_draws=2)
    learner, source = start(tiny_sd, config, run)
    rows = watch_reference(learner)
    found = [gradient(learner, source, run, index) for index in range(4)]  # 2 updates an epoch
    assert rows == [6, 2, 6, 2]  # batches of 3 pairs and 1, once for each of the two draws
    # the third epoch meets the noise of the first, and its gradients in another order of pairs
    order = shuffled(SEED, 4, 0, 16)
    for index in (4, 5, 6, 7):
        pairs = [(index // 2 % 2, order[place]) for place in (2 * index, 2 * index + 1)]
        loss = published_loss(learner, source.cache, pairs)
        flat = torch.cat(
            [part.flatten() for part in torch.autograd.grad(loss, learner.policy.trainable())]
        )
        again = gradient(learner, source, run, index)
        # float32 kernels differ with the batch, as above; other noise would make a difference of 1
        assert float((again - flat).abs().max() / flat.abs().max()) < 1e-3
    assert len(rows) == 4 + 16  # nothing but what `published_loss` asked for itself
    # another run on the same pairs reads the same numbers, also where its updates are cut otherwise
    learner, source = start(tiny_sd, config, run, micro_batch=1)
    rows = watch_reference(learner)
    gradient(learner, source, run, 0)
    learner, source = start(tiny_sd, config, run)
    assert torch.equal(gradient(learner, source, run, 1), found[1])
    assert rows == []


def test_scores_of_another_reference_are_other_scores(
    tmp_path: Path, tiny_sd: Path, run: Run
) -> None:
    config = config_of(tmp_path, good_rows(2), noise_draws=1)
    family = load_family(tiny_sd)
    cache = cached_pairs(config, family, run)
    next(family.denoiser.parameters()).data.add_(1e-3)
    other = Policy(family, PolicyConfig())
    own = Policy(load_family(tiny_sd), PolicyConfig())
    noisy = config.model_copy(update={"noise": (0.5, 1.0)})
    folders = []
    for policy, settings in ((own, config), (other, config), (own, noisy)):
        source = OfflineSource(settings, OptimConfig(), policy.family, policy, cache, run)
        assert source.reference is not None
        folders.append(source.reference.folder)
    assert len(set(folders)) == 3


def test_the_encoders_are_not_used_in_the_loop(tmp_path: Path, tiny_sd: Path, run: Run) -> None:
    learner, source = start(tiny_sd, config_of(tmp_path, good_rows(3)), run)
    calls: list[int] = []
    for part in (source.family.vae, source.family.text_encoder):  # type: ignore[attr-defined]
        for module in part.modules():
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    train_step(learner, next(source.round(0).updates), run, 0)
    assert calls == []


def test_prompts_are_dropped_as_often_as_asked(tmp_path: Path, tiny_sd: Path, run: Run) -> None:
    config = config_of(tmp_path, good_rows(4), empty_prompts=0.25)
    _, source = start(tiny_sd, config, run)
    rows = [source._prompt(epoch, row) for epoch in range(500) for row in range(4)]
    assert abs(np.mean([row == 0 for row in rows]) - 0.25) < 0.04  # 4 standard deviations
    assert rows == [source._prompt(epoch, row) for epoch in range(500) for row in range(4)]


def test_times_are_drawn_from_the_part_of_the_schedule_that_is_asked_for(
    tmp_path: Path, tiny_sd: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from d3po import offline

    seen: list[int] = []
    real = offline.renoise_logp

    def watched(
        predict: Any, schedule: Any, x0: Tensor, noise: Tensor, t: Tensor, *rest: Any
    ) -> Any:
        seen.extend(t.flatten().tolist())
        return real(predict, schedule, x0, noise, t, *rest)

    monkeypatch.setattr(offline, "renoise_logp", watched)
    config = config_of(tmp_path, good_rows(5), noise=(0.5, 0.75))
    learner, source = start(tiny_sd, config, run, accumulation=2)
    for index in range(60):
        for update in source.round(index).updates:
            for chunk in update.chunks:
                chunk.logp(learner.policy.bare)
    assert 500 <= min(seen) < 520
    assert 730 < max(seen) < 750


@pytest.mark.parametrize(("part", "time"), [((0.9999, 1.0), 999), ((0.0, 0.0001), 0)])
def test_a_part_narrower_than_a_time_is_its_nearest_one(
    tmp_path: Path, tiny_sd: Path, run: Run, part: tuple[float, float], time: int
) -> None:
    _, source = start(tiny_sd, config_of(tmp_path, good_rows(5), noise=part), run)
    assert {source._time(epoch, row) for epoch in range(5) for row in range(5)} == {time}


@pytest.mark.parametrize("part", [(0.5, 0.5), (-0.1, 1), (0, 1.1), (0.9, 0.1)])
def test_a_part_that_is_none_is_one_sentence(part: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="0 <= low < high <= 1"):
        OfflineConfig(data="x", noise=part)


class Stopped(Exception):
    """What ends a process in the tests below."""


def mixed_rows() -> list[Row]:
    """24 rows, some of which are no pairs, and 12 prompts."""
    rows = good_rows(24)
    rows[4] = ("a tie", rows[4][1], rows[4][2], 0.5)
    rows[13] = ("no picture", rows[13][1], b"no picture", 1.0)
    return rows


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def entries(cache: PairCache) -> list[str]:
    """What lies in the folder of caches, but for locks."""
    return sorted(p.name for p in cache.folder.parent.iterdir() if p.name[:6] != ".lock-")


@pytest.fixture
def encoding(
    tmp_path: Path, tiny_sd: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, PairCache, OfflineConfig]:
    """A family, the cache that it made without a stop, and the settings of another like it."""
    monkeypatch.setattr("d3po.pair_cache.KEPT_EVERY", 5)
    monkeypatch.setattr("d3po.pair_cache.TEXTS", 5)
    family = load_family(tiny_sd)
    whole = cached_pairs(config_of(tmp_path / "whole", mixed_rows()), family, run)
    return family, whole, config_of(tmp_path / "part", mixed_rows())


@pytest.mark.parametrize(("call", "stops"), [("encode_images", 4), ("encode_text", 3)])
def test_encoding_goes_on_where_it_was_stopped(
    encoding: Any, run: Run, monkeypatch: pytest.MonkeyPatch, call: str, stops: int
) -> None:
    family, whole, config = encoding
    own, calls = getattr(family, call), 0

    def stopping(given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % stops == 0:
            raise Stopped
        return own(given)

    monkeypatch.setattr(family, call, stopping)
    stopped = 0
    while True:
        try:
            cache = cached_pairs(config, family, run)
            break
        except Stopped:
            stopped += 1
    assert stopped >= 2
    assert contents(cache.folder) == contents(whole.folder)
    assert cache.folder.name == whole.folder.name
    assert entries(cache) == [whole.folder.name]


def test_encoding_survives_a_kill_and_leaves_nothing_behind(
    encoding: Any, tmp_path: Path, tiny_sd: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, whole, config = encoding
    making = Path(config.cache) / f".making-{whole.folder.name}"
    old = making.with_name(f".tmp-0123abcd-{whole.folder.name}")  # of versions that began anew
    old.mkdir(parents=True)
    given = [str(tiny_sd), config.model_dump_json(), str(tmp_path / "killed")]
    command = [sys.executable, "-c", ENCODE_SLOWLY, *given]
    with subprocess.Popen(command, env=environment()) as process:
        while rows_kept(making) < 12:
            assert process.poll() is None
            time.sleep(0.01)
        kill(process)
    kept = rows_kept(making)
    own, seen = family.encode_images, 0

    def counted(images: Tensor) -> Tensor:
        nonlocal seen
        seen += len(images) // 2
        return own(images)

    monkeypatch.setattr(family, "encode_images", counted)
    cache = cached_pairs(config, family, run)
    assert 0 < seen <= 24 - kept
    assert contents(cache.folder) == contents(whole.folder)
    assert entries(cache) == [whole.folder.name]


ENCODE_SLOWLY = """
import sys, time
from d3po import pair_cache
from d3po.families import load_family
from d3po.offline import OfflineConfig
from d3po.run import Run, RunConfig

model, config, folder = sys.argv[1:]
pair_cache.KEPT_EVERY = 5
family = load_family(model)
own = family.encode_images

def slowly(images):
    time.sleep(0.3)
    return own(images)

family.encode_images = slowly
run = Run(RunConfig(dir=folder))
pair_cache.cached_pairs(OfflineConfig.model_validate_json(config), family, run)
"""


def rows_kept(making: Path) -> int:
    """How far a cache in the making is."""
    file = making / "progress.json"
    return int(json.loads(file.read_text())["rows"]) if file.exists() else 0


def test_a_cache_in_the_making_that_lost_a_file_is_made_anew(
    encoding: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, whole, config = encoding
    own = family.encode_text
    with monkeypatch.context() as patch:
        patch.setattr(family, "encode_text", lambda texts: own(texts) if texts == [""] else stop())
        with pytest.raises(Stopped):
            cached_pairs(config, family, run)
    (making,) = Path(config.cache).glob(".making-*")
    assert rows_kept(making) == 24
    (making / "cache" / "lose.bin").unlink()
    assert contents(cached_pairs(config, family, run).folder) == contents(whole.folder)


def stop() -> Any:
    raise Stopped


def test_the_summary_is_plain_json(tmp_path: Path, family: Family, run: Run) -> None:
    cache = cached_pairs(config_of(tmp_path, good_rows(3)), family, run)
    summary = json.loads((cache.folder / "summary.json").read_text())
    assert (summary["rows"], summary["pairs"], summary["dropped"]) == (3, 3, {})


def test_two_runs_that_want_the_same_pairs_build_them_once(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, family = config_of(tmp_path, good_rows(4)), load_family(tiny_sd)
    built: list[Path] = []

    def slowly(*given: Any) -> None:
        built.append(given[4])
        time.sleep(0.5)  # the other one is there by then
        build_cache(*given)

    monkeypatch.setattr("d3po.pair_cache.build_cache", slowly)
    runs = [Run(RunConfig(dir=str(tmp_path / name))) for name in ("one", "other")]
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda run: cached_pairs(config, family, run), runs)
    for run in runs:
        run.close()
    assert len(built) == 1
    assert one.folder == other.folder
    assert np.array_equal(one.win, other.win)

"""Forecasts against hand counts, against torch's own counter, and against the real networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pair_files import write_pairs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d3po import preflight, recipe
from d3po.families import load_family
from d3po.policy import Policy
from d3po.preflight.networks import INPUTS, Networks, load_outline
from d3po.preflight.playing import NOTHING, Played, play
from d3po.preflight.rates import Rates, measured
from fifa.config import InputError

RATES = Rates(flops=1e9, bytes=1e8, start=1e-6)


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def config(model: Path, tmp_path: Path, *overrides: str) -> recipe.TrainConfig:
    own = [
        f"model={model}",
        "objective={name: d3po, beta: 1}",
        "optim={max_steps: 5, micro_batch: 2}",
        "online={groups: 4, images: 3, judges: [mini], step_count: 2, steps: early}",
        "sampler={steps: 4, batch: 6, guidance: 1}",
        f"run.dir={tmp_path / 'run'}",
    ]
    return recipe.load(None, [*own, *overrides])


def ahead(model: Path, tmp_path: Path, *overrides: str, device: str = "cpu") -> Any:
    return preflight.forecast(config(model, tmp_path, *overrides), device, RATES, lambda: 1e6)


# ---- playing ------------------------------------------------------------------------------------


def test_what_is_alive_and_what_it_costs_is_counted_by_hand() -> None:
    x, w = meta(8, 16), meta(16, 32)

    def work() -> None:
        a = x + 1  # 512 bytes
        b = a @ w  # 1024 bytes, 2 * 8 * 16 * 32 operations
        del a
        _ = b.t() * 2  # the view is free, the product another 1024 bytes
        del b

    found = play(work, RATES)
    assert found.bytes == 2048  # b and the product; a is gone by then
    assert found.flops == 2 * 8 * 16 * 32
    touched = [2 * 512, 512 + 2048 + 1024, 2 * 1024]
    seconds = [max(t / 1e8, f / 1e9) + 1e-6 for t, f in zip(touched, (0, 8192, 0), strict=True)]
    assert found.seconds == pytest.approx(sum(seconds))


def test_what_autograd_keeps_is_alive() -> None:
    layers = [torch.nn.Linear(64, 64, bias=False, device="meta") for _ in range(4)]

    def work(keep: bool) -> None:
        y = meta(32, 64)
        with torch.set_grad_enabled(keep):
            for layer in layers:
                y = torch.sigmoid(layer(y))

    one = 32 * 64 * 4
    # with gradients each sigmoid's output is kept, and the first input; without, two at a time
    assert play(lambda: work(True), RATES).bytes == 6 * one
    assert play(lambda: work(False), RATES).bytes == 3 * one


def test_attention_keeps_its_matrix_only_where_it_is_not_fused() -> None:
    q, k = (meta(2, 3, 50, 8).requires_grad_() for _ in range(2))

    def work() -> None:
        F.scaled_dot_product_attention(q, k, k).sum().backward()
        q.grad = k.grad = None

    fused, plain = play(work, RATES), play(work, RATES, fused_attention=False)
    matrix = 2 * 3 * 50 * 50 * 4
    assert fused.bytes < matrix <= plain.bytes
    forward = 4 * 2 * 3 * 50 * 50 * 8
    assert fused.flops == 3.5 * forward
    assert plain.flops == pytest.approx(3 * forward)


def test_pieces_add_up() -> None:
    a, b = Played(10, 1.0, 2.0), Played(4, 5.0, 6.0)
    assert a.then(b) == Played(10, 6.0, 8.0)
    assert a.times(3) == Played(10, 3.0, 6.0)
    assert NOTHING.then(a) == a


def test_rates_are_measured_and_told() -> None:
    found = measured(torch.device("cpu"))
    assert found.flops > 1e8
    assert found.bytes > 1e7
    assert 0 < found.start < 1e-2
    told = Rates.told(100)
    assert told.seconds(1e14, 0) == pytest.approx(1.0, rel=1e-4)
    assert told.seconds(0, 5e11) == pytest.approx(1.0, rel=1e-4)


# ---- networks -----------------------------------------------------------------------------------


def test_the_outline_has_the_weights_of_the_real_networks(tiny_sd: Path) -> None:
    family: Any = load_family(tiny_sd)
    outline = load_outline(str(tiny_sd))
    assert outline.parameters == {
        name: sum(p.numel() for p in part.parameters())
        for name, part in (
            ("text_encoder", family.text_encoder),
            ("unet", family.denoiser),
            ("vae", family.vae),
        )
    }
    assert outline.latent_shape == family.latent_shape
    assert outline.image_size == family.image_size
    text = family.encode_text(["x"]).tensors.values()
    assert outline.text_bytes() == sum(tensor.nbytes for tensor in text)


def test_operations_are_those_that_torch_counts_on_the_real_network(tiny_sd: Path) -> None:
    family: Any = load_family(tiny_sd)
    x, cond = torch.zeros(3, *family.latent_shape), family.encode_text(["a"] * 3)
    products = sdpa_kernel([SDPBackend.MATH])  # the counter knows no fused attention of CPUs
    with torch.no_grad(), products, FlopCounterMode(display=False) as counter:
        family.predict(family.denoiser, x, torch.tensor([1, 2, 3]), cond)
    outline = load_outline(str(tiny_sd))
    inputs = outline.inputs(3, torch.float32)
    with torch.no_grad():
        found = play(lambda: outline.denoiser(**inputs), RATES)
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=1e-6)


def _tiny(name: str) -> Any:
    import diffusers

    if name == "UNet2DConditionModel":  # as in SDXL
        return diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=40,
        )
    if name == "SD3Transformer2DModel":
        return diffusers.SD3Transformer2DModel(
            sample_size=8,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=8,
            pooled_projection_dim=8,
            in_channels=4,
            out_channels=4,
        )
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )


@pytest.mark.parametrize("name", INPUTS)
def test_every_denoiser_is_called_as_it_wants(name: str) -> None:
    with torch.device("meta"):
        denoiser = _tiny(name)
    networks = Networks({"denoiser": denoiser}, denoiser, "denoiser", (4, 8, 8), 64)
    inputs = networks.inputs(2, torch.float32)
    found = play(lambda: denoiser(**inputs, return_dict=False)[0].sum().backward(), RATES)
    assert found.flops > 0
    assert found.bytes > 0
    assert networks.text_bytes() > 0


# ---- forecasts ----------------------------------------------------------------------------------


def test_a_forecast_adds_up(tiny_sd: Path, tmp_path: Path) -> None:
    found = ahead(tiny_sd, tmp_path)
    policy = Policy(load_family(tiny_sd), config(tiny_sd, tmp_path).policy)
    assert found.trained == sum(p.numel() for p in policy.trainable())
    assert found.updates == 6  # 5, rounded up to whole rounds of 2
    assert found.memory["Adam's moments"] == 8 * found.trained
    assert found.memory["unet"] == 4 * found.parameters["unet"]
    assert found.disk["checkpoints"] == 2 * 3 * 4 * found.trained
    assert found.peak == 1e6 + sum(found.memory.values()) + max(found.peaks.values())
    assert set(found.peaks) == {"learning", "sampling", "decoding pictures"}
    assert json.loads(found.to_json())["peak"] == found.peak


def test_settings_move_what_they_should(tiny_sd: Path, tmp_path: Path) -> None:
    base = ahead(tiny_sd, tmp_path)
    twice = ahead(tiny_sd, tmp_path, "optim.micro_batch=4")
    assert twice.peaks["learning"] == pytest.approx(2 * base.peaks["learning"], rel=0.2)
    saved = ahead(tiny_sd, tmp_path, "optim.gradient_checkpointing=true")
    assert saved.peaks["learning"] < 0.9 * base.peaks["learning"]
    assert saved.flops_a_step > base.flops_a_step
    full = ahead(tiny_sd, tmp_path, "policy={method: full, ema_decay: 0.9}")
    assert full.trained == full.parameters["unet"]
    assert full.memory["EMA"] == full.memory["the reference's copy"] == 4 * full.trained
    half = ahead(tiny_sd, tmp_path, "run.mixed_precision=bf16", device="cuda")
    assert half.memory["unet"] == 2 * half.parameters["unet"]


def test_inverted_paths_are_counted(tiny_sd: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.parquet", 20)

    def look(*overrides: str) -> Any:
        stored = ["model=" + str(tiny_sd), "method=dpo", "objective={name: dpo, beta: 2000}"]
        stored += [f"run.dir={tmp_path / 'x'}", f"offline.data={pairs}", *overrides]
        return preflight.forecast(recipe.load(None, stored), "cpu", RATES, lambda: 1e6)

    plain = look()
    found = look("offline.path=inverted", "offline.inversion={steps: 6, iterations: 2}")
    assert found.disk["inverted paths"] == 20 * 2 * 6 * 4 * (4 * 8 * 8)  # float32 latents
    assert found.disk["encoded pairs"] == plain.disk["encoded pairs"]
    assert found.seconds > plain.seconds
    assert {*found.peaks} - {*plain.peaks} == {"inverting pairs"}
    half = look("offline.path=inverted", "offline.noise=[0.5, 1]", "offline.cache_dtype=float16")
    assert half.disk["inverted paths"] == 20 * 2 * 5 * 2 * (4 * 8 * 8)
    guided = look("offline.path=inverted", "offline.inversion.guidance=3")
    assert guided.peaks["inverting pairs"] > 1.5 * found.peaks["inverting pairs"]


def test_the_verdict_is_one_sentence(tiny_sd: Path, tmp_path: Path) -> None:
    found = ahead(tiny_sd, tmp_path, "sampler.batch=1")
    assert found.verdict(1e12).startswith("fits in 1e+03 GB: needs ")
    told = found.verdict(1e6)
    assert told.startswith("does not fit in 0.001 GB: needs 0.0 GB at its peak (while learning)")
    assert "try optim.gradient_checkpointing=true or optim.micro_batch=1" in told


def test_a_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no readable model_index\.json"):
        load_outline(str(tmp_path))

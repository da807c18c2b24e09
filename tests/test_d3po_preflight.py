"""Forecasts against hand counts, against torch's own counter, and against the real networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
import torch.nn.functional as F
from pair_files import write_pairs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d3po import preflight, recipe
from d3po.families import FamilyConfig, load_family
from d3po.optimizers import Kind, build_optimizer
from d3po.policy import Policy
from d3po.preflight.networks import INPUTS, Networks, load_outline
from d3po.preflight.playing import NOTHING, Played, play
from d3po.preflight.rates import Rates, measured
from d3po.schedule import FlowSchedule
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


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_the_outline_is_opened_as_the_family_is(name: str, tmp_path: Path) -> None:
    folder = tiny_pipelines.save(getattr(tiny_pipelines, name), tmp_path / name)
    opened = FamilyConfig(image_size=32, t5=name != "sd3", t5_tokens=9)
    family: Any = load_family(folder, config=opened)
    outline = load_outline(str(folder), opened)
    names = {"denoiser": family.denoiser_folder}
    assert outline.parameters == {
        names.get(name, name): sum(p.numel() for p in part.parameters())
        for name, part in vars(family).items()
        if isinstance(part, torch.nn.Module)
    }
    assert outline.latent_shape == family.latent_shape
    assert outline.image_size == family.image_size == 32
    (tmp_path / "one.safetensors").touch()  # of one file only the configs beside it are read
    described = opened.model_copy(update={"description": str(folder)})
    one_file = load_outline(str(tmp_path / "one.safetensors"), described)
    assert one_file.parameters == outline.parameters
    grid, expected = (one.schedule.grid(5, 0.7) for one in (outline, family))
    assert torch.equal(grid.times, expected.times)
    assert torch.equal(grid.sigma, expected.sigma)
    text = family.encode_text(["x"]).tensors.values()
    assert name == "sdxl" or outline.text_bytes() == sum(tensor.nbytes for tensor in text)


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
    parts = {"denoiser": denoiser}
    networks = Networks(parts, denoiser, "denoiser", (4, 8, 8), 64, FlowSchedule())
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


def test_a_larger_picture_takes_more(tiny_sd: Path, tmp_path: Path) -> None:
    base, large = (ahead(tiny_sd, tmp_path, f"family.image_size={side}") for side in (64, 128))
    assert ahead(tiny_sd, tmp_path) == base
    for work in ("learning", "sampling", "decoding pictures"):
        assert large.peaks[work] > 3 * base.peaks[work]
    assert large.seconds_a_step > 2 * base.seconds_a_step
    with pytest.raises(InputError, match=r"family\.image_size is 60"):
        ahead(tiny_sd, tmp_path, "family.image_size=60")


def test_steps_that_go_through_together_need_room_together(tiny_sd: Path, tmp_path: Path) -> None:
    base, two, eight = (ahead(tiny_sd, tmp_path, f"online.steps_at_once={n}") for n in (1, 2, 8))
    assert two.peaks["learning"] == pytest.approx(2 * base.peaks["learning"], rel=0.2)
    assert two.seconds_a_step < base.seconds_a_step  # fewer starts
    assert eight == two  # an update learns from 2 steps


def test_a_round_that_is_no_multiple_is_refused_as_in_training(
    tiny_sd: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"online\.groups=4 must be a multiple"):
        ahead(tiny_sd, tmp_path, "optim.micro_batch=3")
    with pytest.raises(InputError, match=r"x 4 \(processes\) = 8"):
        preflight.forecast(config(tiny_sd, tmp_path), "cpu", RATES, lambda: 1e6, 4)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "adafactor"])
def test_moments_are_those_of_the_real_optimizer(
    tiny_sd: Path, tmp_path: Path, kind: Kind, method: str
) -> None:
    settings = (f"optim.kind={kind}", f"policy={{method: {method}, rank: 64}}")
    found = ahead(tiny_sd, tmp_path, *settings)
    policy = Policy(load_family(tiny_sd), config(tiny_sd, tmp_path, *settings).policy)
    weights = policy.trainable()
    rates: dict[str, Any] = {"learning_rate": 1e-3, "betas": (0.9, 0.99), "epsilon": 1e-8}
    optimizer = build_optimizer(weights, kind, weight_decay=0.0, **rates)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.ndim and not name.startswith("qmap")
    )  # of 8 bits one table of 256 values is shared by all
    whose = "Adafactor" if kind == "adafactor" else "Adam"
    assert found.memory[f"{whose}'s moments"] == held
    copies = 2 * 4 * sum(weight.numel() for weight in weights)
    assert found.disk["checkpoints"] == copies + 2 * held  # two are kept


def test_what_waits_in_cpu_memory_is_not_on_the_device(tiny_sd: Path, tmp_path: Path) -> None:
    offload = ("optim.offload=true", "speed.offload_encoders=true")
    here, away = (ahead(tiny_sd, tmp_path, *own, device="cuda") for own in ((), offload))
    assert here.memory.keys() - away.memory.keys() == {"Adam's moments", "text_encoder", "vae"}
    encoders = here.memory["text_encoder"] + here.memory["vae"]
    assert away.peaks["learning"] == here.peaks["learning"]
    assert away.peaks["sampling"] == here.peaks["sampling"] + encoders
    assert away.peaks["decoding pictures"] == here.peaks["decoding pictures"] + encoders
    cpu = ahead(tiny_sd, tmp_path, *offload)  # where all memory is one
    assert cpu.memory["Adam's moments"] == 2 * cpu.memory["the optimizer's copy"]
    assert cpu.memory["vae"] == here.memory["vae"]


def test_a_flow_learns_from_all_steps_but_the_last(tmp_path: Path) -> None:
    folder = tiny_pipelines.save(tiny_pipelines.sd3, tmp_path / "sd3")
    everything, without_last = (
        ahead(folder, tmp_path, f"online={{groups: 4, images: 3, skip_last: {skip}}}")
        for skip in ("false", "true")
    )
    assert everything == without_last  # the last of its steps has no noise
    with pytest.raises(InputError, match="3 of the 4 sampler steps have noise"):
        ahead(folder, tmp_path, "online={groups: 4, steps: early, step_count: 4}")


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
    with pytest.raises(InputError, match=r"it has no model_index\.json"):
        load_outline(str(tmp_path))

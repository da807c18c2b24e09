"""The contract that every family keeps, on tiny pipelines of the real classes.

`Kind` says how a kind's own pipeline is called; everything else is the same for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from conftest import build_tiny_sd
from diffusers import DDIMScheduler, DiffusionPipeline, FluxPipeline
from pair_files import write_pairs
from torch import Tensor

from d3po import recipe
from d3po.families import FAMILIES, Family, FamilyConfig, guided, load_family
from d3po.generate import Order, SamplerConfig, generate
from d3po.policy import Policy, PolicyConfig
from d3po.sampling import image_noise, invert, path_noise, rollout, step_logp, step_mean

PROMPTS = ["a red circle above a blue square", "two small green triangles"]
AT_64 = FamilyConfig(image_size=64)


@dataclass(frozen=True)
class Kind:
    """A tiny pipeline, and how the calls of its class differ from those of the others."""

    pipeline: str  # its class
    build: Callable[[Path], Path]
    load: Mapping[str, Any] = field(default_factory=dict)  # arguments of from_pretrained
    guidance: str = "guidance_scale"  # the pipeline's name for classifier-free guidance
    call: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the pipeline
    flow: bool = False
    packed: bool = False  # the pipeline's latents are tokens


def saved(make: Callable[[Path], Any]) -> Callable[[Path], Path]:
    return lambda folder: tiny_pipelines.save(make, folder)


FLUX: dict[str, Any] = {
    "guidance": "true_cfg_scale",
    "call": {"negative_prompt": ["", ""], "guidance_scale": 3.5, "height": 64, "width": 64},
    "flow": True,
    "packed": True,
}
KINDS = {
    "sd": Kind("StableDiffusionPipeline", build_tiny_sd),
    "sd-v-zero-snr": Kind(
        "StableDiffusionPipeline",
        lambda folder: build_tiny_sd(folder, prediction_type="v_prediction", zero_snr=True),
    ),
    "sdxl": Kind("StableDiffusionXLPipeline", saved(tiny_pipelines.sdxl)),
    "sd3": Kind("StableDiffusion3Pipeline", saved(tiny_pipelines.sd3), flow=True),
    "sd3-without-t5": Kind(
        "StableDiffusion3Pipeline",
        saved(tiny_pipelines.sd3_without_t5),
        load={"text_encoder_3": None, "tokenizer_3": None},
        flow=True,
    ),
    "flux": Kind("FluxPipeline", saved(tiny_pipelines.flux), **FLUX),
    "flux-schnell": Kind("FluxPipeline", saved(tiny_pipelines.flux_schnell), **FLUX),
}


@dataclass(frozen=True)
class Subject:
    """A family under test beside the pipeline that it was taken from."""

    kind: Kind
    folder: Path
    pipe: Any

    def load(self) -> Family:
        return load_family(self.folder, config=AT_64)

    @property
    def denoiser(self) -> Any:
        return self.pipe.components.get("unet") or self.pipe.components["transformer"]

    def paint(self, latents: Tensor, scale: float, steps: int = 3) -> Tensor:
        """What the diffusers pipeline makes of these start latents (2, C, h, w)."""
        if self.kind.packed:
            latents = FluxPipeline._pack_latents(latents, *latents.shape)
        arguments = {
            "latents": latents,
            "num_inference_steps": steps,
            "output_type": "pt",
            **self.kind.call,
            self.kind.guidance: scale,
        }
        with torch.no_grad():
            images: Tensor = self.pipe(PROMPTS, **arguments).images
        return images


@pytest.fixture(scope="module", params=KINDS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    kind = KINDS[request.param]
    folder = kind.build(tmp_path_factory.mktemp("families") / request.param)
    pipe = DiffusionPipeline.from_pretrained(folder, **kind.load)
    assert type(pipe).__name__ == kind.pipeline
    if not kind.flow:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return Subject(kind, folder, pipe)


def starts(family: Family) -> Tensor:
    return image_noise([1, 2], family.latent_shape, -1)


def test_every_family_is_tried() -> None:
    assert {kind.pipeline for kind in KINDS.values()} == set(FAMILIES)


def test_networks_are_frozen_and_in_eval_mode(subject: Subject) -> None:
    family = subject.load()
    parts = [part for part in vars(family).values() if isinstance(part, torch.nn.Module)]
    assert family.denoiser in parts
    assert len(parts) >= 3
    for part in parts:
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())
    assert family.image_size == 64
    assert family.latent_shape[1:] == (8, 8)


def encoded(pipe: Any, kind: Kind) -> tuple[list[Tensor], list[Tensor]]:
    """What the pipeline makes of PROMPTS, and of as many empty prompts."""
    if kind.pipeline == "FluxPipeline":
        return list(pipe.encode_prompt(PROMPTS)[:2]), list(pipe.encode_prompt(["", ""])[:2])
    if kind.pipeline == "StableDiffusionPipeline":
        text, empty = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
        return [text], [empty]
    more = [None] if kind.pipeline == "StableDiffusionXLPipeline" else [None, None]
    text, empty, pooled, empty_pooled = pipe.encode_prompt(PROMPTS, *more)
    return [text, pooled], [empty, empty_pooled]


@torch.no_grad()
def test_text_is_that_of_the_pipeline(subject: Subject) -> None:
    cond = subject.load().encode_text([*PROMPTS, ""])
    text, empty = encoded(subject.pipe, subject.kind)
    assert len(cond) == 3
    for ours, theirs in ((cond[:2], text), (cond[[2, 2]], empty)):
        for tensor, want in zip(ours.tensors.values(), theirs, strict=True):
            torch.testing.assert_close(tensor, want, rtol=0, atol=1e-6)


@torch.no_grad()
def test_predict_is_the_pipelines_call_of_its_denoiser(subject: Subject) -> None:
    """The arguments and the output of the pipeline's own first call, caught on their way."""
    calls: list[Tensor] = []
    hook = subject.denoiser.register_forward_hook(
        lambda module, given, out: calls.append(out[0] if isinstance(out, tuple) else out.sample)
    )
    family = subject.load()
    x_t = starts(family)
    subject.paint(x_t, 1.0)
    hook.remove()
    grid = family.schedule.grid(3, 0.0)
    got = family.predict(family.denoiser, x_t, grid.times[[0, 0]], family.encode_text(PROMPTS))
    want = calls[0]
    if subject.kind.packed:
        want = FluxPipeline._unpack_latents(want, 64, 64, 8)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_deterministic_path_ends_in_the_pipelines_picture(subject: Subject, scale: float) -> None:
    family = subject.load()
    cond, uncond = family.encode_text(PROMPTS), family.encode_text([""])
    path = rollout(
        guided(family, family.denoiser, cond, uncond, scale),
        family.schedule.grid(3, 0.0),
        family.schedule,
        starts(family),
        path_noise([1, 2], family.latent_shape),
    )
    want = subject.paint(starts(family), scale)
    torch.testing.assert_close(family.decode(path.x0), want, rtol=0, atol=1e-4)


@torch.no_grad()
def test_latents_are_scaled_and_shifted_as_the_vae_says(subject: Subject) -> None:
    family, vae = subject.load(), subject.pipe.vae
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scaling, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    latents = family.encode_images(images)
    mean = vae.encode(images * 2 - 1).latent_dist.mean
    assert latents.shape == (2, *family.latent_shape)
    torch.testing.assert_close(latents, (mean - shift) * scaling)
    want = (vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(family.decode(latents), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_every_step_is_that_of_the_models_scheduler(subject: Subject, eta: float) -> None:
    """Mean and spread in float64, last step included; the noisy flow is in test_d3po_flow."""
    family, scheduler = subject.load(), subject.pipe.scheduler
    subject.paint(starts(family), 1.0, steps=10)  # lets the pipeline set its times
    if not subject.kind.flow:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.sigmas = getattr(scheduler, "sigmas", torch.zeros(1)).double()
    scheduler._step_index = None
    grid = family.schedule.grid(10, 0.0 if subject.kind.flow else eta)
    shape = (3, 2, *family.latent_shape)
    generator = torch.Generator().manual_seed(0)
    x_t, pred, noise = torch.randn(shape, generator=generator).double()
    for i, t in enumerate(scheduler.timesteps):
        more = {} if subject.kind.flow else {"eta": eta, "variance_noise": noise}
        want = scheduler.step(pred, t, x_t, **more).prev_sample
        got = step_mean(grid, family.schedule, i, x_t, pred) + grid.sigma[i] * noise
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@torch.no_grad()
def test_an_inverted_path_leads_back_to_its_picture(subject: Subject) -> None:
    """Walked down again by the pipeline and its own scheduler, from the noise that was found."""
    family = subject.load()
    predict = guided(family, family.denoiser, family.encode_text(PROMPTS))
    x_0 = image_noise([3, 4], family.latent_shape, 0)  # as large as latents of real models
    grid = family.schedule.grid(50, 0.0)  # short steps: what is iterated contracts
    errors = []
    for iterations in (1, 10):
        path = invert(predict, grid, family.schedule, x_0, iterations)
        assert path.shape == (2, 51, *family.latent_shape)
        assert torch.equal(path[:, -1], x_0)
        back = subject.paint(path[:, 0], 1.0, steps=50)
        errors.append(float((back - family.decode(x_0)).abs().max()))
    assert errors[1] < 1e-3 < errors[0]


def test_rescoring_under_the_same_weights_is_bitwise_equal(subject: Subject) -> None:
    family = subject.load()
    cond, uncond = family.encode_text(PROMPTS), family.encode_text([""])
    predict = guided(family, family.denoiser, cond, uncond, 3.0)
    grid = family.schedule.grid(4, 0.7)
    noise = path_noise([4, 5], family.latent_shape)
    path = rollout(predict, grid, family.schedule, starts(family), noise)
    assert len(grid.stochastic) >= 3
    for i in grid.stochastic:
        x_t, x_s = path.latents[:, i], path.latents[:, i + 1]
        again = step_logp(predict, grid, family.schedule, i, x_t, x_s)
        assert torch.equal(again, path.logp[:, i])


def disturb(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in policy.trainable():
            p += 0.3 * torch.randn(p.shape, generator=generator)


def test_a_lora_loads_in_the_pipeline_and_paints_the_same(subject: Subject, tmp_path: Path) -> None:
    family = subject.load()
    policy = Policy(family, PolicyConfig(rank=2, alpha=5))
    disturb(policy)
    policy.save(tmp_path)
    sampler = SamplerConfig(steps=3, eta=0.0, guidance=3.0)
    orders = [Order(prompt, seed, 0) for prompt, seed in zip(PROMPTS, (1, 2), strict=True)]
    (made,) = generate(family, policy.bare, sampler, orders)
    before = subject.paint(starts(family), 3.0)
    subject.pipe.load_lora_weights(tmp_path)
    try:
        after = subject.paint(starts(family), 3.0)
    finally:
        subject.pipe.unload_lora_weights()
    assert float((after - before).abs().max()) > 0.01
    torch.testing.assert_close(made.images, after, rtol=0, atol=1e-3)
    again = Policy(subject.load(), PolicyConfig(rank=2, alpha=5))
    again.load(tmp_path)
    for ours, theirs in zip(again.trainable(), policy.trainable(), strict=True):
        assert torch.equal(ours, theirs)


def test_gradient_checkpointing_changes_memory_not_gradients(subject: Subject) -> None:
    family: Any = subject.load()
    family.denoiser.requires_grad_(True)
    x_t, cond = starts(family), family.encode_text(PROMPTS)
    t = family.schedule.grid(3, 0.0).times[[1, 1]]
    gradients: list[list[Tensor | None]] = []
    calls: list[int] = []
    blocks = [m for m in family.denoiser.modules() if "attentions" in dict(m.named_children())]
    block = blocks[0].resnets[0] if blocks else family.denoiser.transformer_blocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append(len(gradients)))
    for enabled in (False, True, False):
        family.gradient_checkpointing(enabled)
        family.denoiser.zero_grad()
        family.predict(family.denoiser, x_t, t, cond).square().sum().backward()
        gradients.append(
            [None if p.grad is None else p.grad.clone() for p in family.denoiser.parameters()]
        )
    assert [calls.count(run) for run in range(3)] == [1, 2, 1]  # recomputed although in eval mode
    assert sum(g is not None for g in gradients[0]) > 10
    for plain, checkpointed in zip(gradients[0], gradients[1], strict=True):
        assert (plain is None) == (checkpointed is None)
        if plain is not None and checkpointed is not None:
            torch.testing.assert_close(plain, checkpointed)


@torch.no_grad()
def test_half_precision_networks_take_and_give_float32(subject: Subject) -> None:
    family = load_family(subject.folder, torch.bfloat16, config=AT_64)
    assert family.denoiser.dtype == torch.bfloat16
    x_t, cond = starts(family), family.encode_text(PROMPTS)
    pred = family.predict(family.denoiser, x_t, family.schedule.grid(3, 0.0).times[[1, 1]], cond)
    assert pred.dtype == family.decode(x_t).dtype == torch.float32
    whole = subject.load()
    full = whole.predict(
        whole.denoiser, x_t, whole.schedule.grid(3, 0.0).times[[1, 1]], whole.encode_text(PROMPTS)
    )
    assert float((pred - full).abs().max()) < 0.1 * float(full.abs().max())


SMALL = {
    "family": {"image_size": 64},
    "sampler": {"steps": 3, "guidance": 3.0, "eta": 0.7},
    "optim": {"max_steps": 1, "learning_rate": 1e-3},
    "policy": {"rank": 2},
    "eval": {"prompts": None},
}


def trained(subject: Subject, folder: Path, **settings: Any) -> Mapping[str, Any]:
    """The metrics of one optimizer step of the whole recipe."""
    values = {**SMALL, "model": str(subject.folder), "run": {"dir": str(folder)}, **settings}
    run = recipe.train(recipe.TrainConfig.model_validate(values))
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert (run.weights / "pytorch_lora_weights.safetensors").is_file()
    (update,) = [row for row in rows if row["kind"] == "update"]
    return update


def test_a_round_of_d3po(subject: Subject, tmp_path: Path) -> None:
    update = trained(
        subject,
        tmp_path / "run",
        method="d3po",
        objective={"name": "d3po_clipped", "beta": 0.1},
        online={"groups": 1, "images": 3, "prompt_count": 2, "judges": ["jpeg_incompressibility"]},
    )
    assert update["pairs"] > 0
    assert update["skipped"] == 0
    assert update["grad_norm"] > 0


@pytest.mark.parametrize("path", ["renoise", "inverted"])
def test_a_step_of_diffusion_dpo(subject: Subject, tmp_path: Path, path: str) -> None:
    data = write_pairs(tmp_path / "pairs.parquet", rows=4)
    update = trained(
        subject,
        tmp_path / "run",
        method="dpo",
        objective={"name": "dpo", "beta": 2000.0},
        offline={"data": str(data), "cache": str(tmp_path / "cache"), "path": path},
    )
    assert update["pairs"] > 0
    assert update["skipped"] == 0
    assert update["grad_norm"] > 0
    assert update["loss"] == pytest.approx(0.6931, abs=1e-3)  # the policy is still the reference

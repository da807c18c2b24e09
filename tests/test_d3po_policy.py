from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from d3po.families import Family, load_family
from d3po.policy import Policy, PolicyConfig
from fifa.config import InputError

METHODS = ["lora", "full"]
LORA_FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture
def make(tiny_sd: Path) -> Callable[..., Policy]:
    def build(method: str = "lora", dtype: torch.dtype = torch.float32, **settings: Any) -> Policy:
        return Policy(load_family(tiny_sd, dtype), PolicyConfig(method=method, **settings))

    return build


def disturb(policy: Policy, seed: int = 0) -> None:
    """Move every trained weight, as some optimizer steps would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.trainable():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def output(family: Family, network: Any) -> Tensor:
    x_t = torch.linspace(-2, 2, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
    cond = family.encode_text(["a red circle", "two stars"])
    return family.predict(network, x_t, torch.tensor([3, 900]), cond)


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}


# ---- what is trained ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_new_policy_is_the_base(method: str, make: Callable[..., Policy], tiny_sd: Path) -> None:
    base = load_family(tiny_sd)
    policy = make(method)
    assert torch.equal(output(policy.family, policy.denoiser), output(base, base.denoiser))
    assert not policy.bare.training


def test_lora_trains_two_matrices_for_each_attention_projection(
    make: Callable[..., Policy],
) -> None:
    policy = make(rank=3)
    names = [n for n, p in policy.bare.named_parameters() if p.requires_grad]
    assert names == list(policy.state_dict())
    layers = {name.split(".lora_")[0] for name in names}
    assert len(names) == 2 * len(layers)
    assert {layer.split("attn")[1][2:] for layer in layers} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert all(3 in p.shape for p in policy.trainable())


def test_full_training_trains_everything(make: Callable[..., Policy]) -> None:
    policy = make("full")
    assert len(policy.trainable()) == len(list(policy.bare.parameters()))


def test_lora_starts_from_its_seed_alone(make: Callable[..., Policy]) -> None:
    before = torch.get_rng_state()
    first = make(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    second, other = make(seed=1), make(seed=2)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
        assert torch.equal(tensor, other.state_dict()[name]) == ("lora_B" in name)  # zeros


@pytest.mark.parametrize("method", METHODS)
def test_trained_weights_are_float32_over_a_bfloat16_base(
    method: str, make: Callable[..., Policy]
) -> None:
    policy = make(method, torch.bfloat16)
    disturb(policy)
    assert {p.dtype for p in policy.trainable()} == {torch.float32}
    pred = output(policy.family, policy.denoiser)
    assert pred.dtype == torch.float32
    pred.square().mean().backward()
    gradients = [p.grad for p in policy.trainable()]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)
    assert all(float(g.abs().sum()) > 0 for g in gradients if g is not None and g.ndim > 1)


def test_targets_that_match_nothing_are_one_sentence(make: Callable[..., Policy]) -> None:
    with pytest.raises(InputError, match="cannot add LoRA"):
        make(targets=("no_such_layer",))


# ---- the reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_the_reference_is_the_base_and_the_policy_comes_back(
    method: str, dtype: torch.dtype, make: Callable[..., Policy], tiny_sd: Path
) -> None:
    policy = make(method, dtype)
    base = load_family(tiny_sd, dtype)
    if method == "full":
        base.denoiser.float()  # the reference is computed in the precision of the policy
    want = output(base, base.denoiser)
    disturb(policy)
    before, trained = output(policy.family, policy.denoiser), weights(policy)
    assert not torch.allclose(before, want)
    with policy.reference():
        assert torch.equal(output(policy.family, policy.denoiser), want)
        assert not torch.is_grad_enabled()
        with policy.reference():
            pass
        assert torch.equal(output(policy.family, policy.denoiser), want)
    assert torch.is_grad_enabled()
    assert torch.equal(output(policy.family, policy.denoiser), before)
    assert all(p.requires_grad for p in policy.trainable())
    assert all(torch.equal(t, trained[n]) for n, t in policy.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_the_policy_comes_back_after_an_exception(method: str, make: Callable[..., Policy]) -> None:
    policy = make(method)
    disturb(policy)
    before = output(policy.family, policy.denoiser)
    with pytest.raises(RuntimeError, match="out of memory"), policy.reference():
        raise RuntimeError("out of memory")
    assert torch.equal(output(policy.family, policy.denoiser), before)
    assert torch.is_grad_enabled()
    assert all(p.requires_grad for p in policy.trainable())


@pytest.mark.parametrize("method", METHODS)
def test_a_backward_pass_may_span_the_reference(method: str, make: Callable[..., Policy]) -> None:
    policy = make(method)
    disturb(policy)
    output(policy.family, policy.denoiser).square().mean().backward()
    want = [p.grad.clone() for p in policy.trainable() if p.grad is not None]
    policy.bare.zero_grad()
    loss = output(policy.family, policy.denoiser).square().mean()
    with policy.reference():
        output(policy.family, policy.denoiser)
    loss.backward()
    got = [p.grad for p in policy.trainable() if p.grad is not None]
    assert len(got) == len(want)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_wrapped_by_ddp_it_is_the_same_policy(
    method: str, make: Callable[..., Policy], tiny_sd: Path, tmp_path: Path
) -> None:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    base = load_family(tiny_sd)
    policy = make(method)
    disturb(policy)
    trained = output(policy.family, policy.bare)
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        policy.denoiser = DistributedDataParallel(policy.bare)
        output(policy.family, policy.denoiser).square().mean().backward()  # arms the reducer
        assert torch.equal(output(policy.family, policy.denoiser), trained)
        with policy.reference():
            assert torch.equal(output(policy.family, policy.denoiser), output(base, base.denoiser))
        loss = output(policy.family, policy.denoiser).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in policy.trainable())
        policy.save(tmp_path / "saved")
    finally:
        distributed.destroy_process_group()


# ---- fingerprint --------------------------------------------------------------------------------


def test_the_fingerprint_belongs_to_the_base_alone(
    make: Callable[..., Policy], make_tiny_sd: Callable[..., Path]
) -> None:
    first = make()
    print_ = first.fingerprint()
    assert len(print_) == 16
    assert print_ == make("full").fingerprint() == make(rank=2, seed=9).fingerprint()
    for method in METHODS:
        trained = make(method)
        disturb(trained)
        assert trained.fingerprint() == print_
    assert print_ != make(dtype=torch.bfloat16).fingerprint()
    assert make("full", torch.bfloat16).fingerprint() == make(dtype=torch.bfloat16).fingerprint()
    altered = make("full")
    with torch.no_grad():
        altered.trainable()[3].view(-1)[0] += 1e-6
    other = make_tiny_sd("other")
    altered.bare.save_pretrained(other / "unet")
    assert Policy(load_family(other), PolicyConfig()).fingerprint() != print_


# ---- files --------------------------------------------------------------------------------------


def test_diffusers_loads_the_lora_and_predicts_the_same(
    make: Callable[..., Policy], tiny_sd: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    policy = make(rank=4, alpha=6)
    disturb(policy)
    policy.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    plain = output(policy.family, pipe.unet)
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        got, want = output(policy.family, pipe.unet), output(policy.family, policy.denoiser)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert not torch.allclose(plain, want, atol=1e-2)


def test_another_process_has_the_same_reference_and_the_same_start(
    make: Callable[..., Policy], tiny_sd: Path, tmp_path: Path
) -> None:
    code = (
        "from d3po.families import load_family; from d3po.policy import Policy, PolicyConfig;"
        f"policy = Policy(load_family({str(tiny_sd)!r}), PolicyConfig(alpha=8));"
        f"policy.save({str(tmp_path)!r}); print(policy.fingerprint())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    policy = make(alpha=8)
    assert run.stdout.strip() == policy.fingerprint()
    policy.save(tmp_path / "here")
    here, there = load_file(tmp_path / "here" / LORA_FILE), load_file(tmp_path / LORA_FILE)
    assert here.keys() == there.keys()
    assert all(torch.equal(tensor, there[name]) for name, tensor in here.items())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_loaded_and_the_reference_stays(
    method: str, make: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make(method, ema_decay=0.9)
    disturb(policy)
    policy.save(tmp_path)
    loaded = make(method, ema_decay=0.9)
    loaded.load(tmp_path)
    assert torch.equal(
        output(loaded.family, loaded.denoiser), output(policy.family, policy.denoiser)
    )
    assert loaded.fingerprint() == policy.fingerprint()
    with loaded.reference(), policy.reference():
        assert torch.equal(
            output(loaded.family, loaded.denoiser), output(policy.family, policy.denoiser)
        )
    with loaded.averaged():  # the average starts from what was loaded
        assert torch.equal(
            output(loaded.family, loaded.denoiser), output(policy.family, policy.denoiser)
        )


def test_diffusers_loads_the_fully_trained_unet(
    make: Callable[..., Policy], tmp_path: Path
) -> None:
    from diffusers import UNet2DConditionModel

    policy = make("full")
    disturb(policy)
    policy.save(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert torch.equal(output(policy.family, unet), output(policy.family, policy.denoiser))


def test_weights_of_another_policy_are_one_sentence(
    make: Callable[..., Policy], tmp_path: Path
) -> None:
    make(rank=4, alpha=8).save(tmp_path)
    refused = [
        (make(rank=2, alpha=8), "has r 4, this policy has 2"),
        (make(rank=4), "has lora_alpha 8, this policy has 4"),
        (make(rank=4, alpha=8, targets=("to_q",)), "it also has"),
        (make("full"), "there is no folder"),
    ]
    for policy, says in refused:
        before = weights(policy)
        with pytest.raises(InputError, match=says):
            policy.load(tmp_path)
        assert all(torch.equal(t, before[n]) for n, t in policy.state_dict().items())
    with pytest.raises(InputError, match=f"holds no {LORA_FILE}"):
        make().load(tmp_path / "nowhere")


@pytest.mark.parametrize(("method", "file"), [("lora", LORA_FILE), ("full", "unet/*.safetensors")])
def test_a_file_that_was_cut_short_is_one_sentence(
    method: str, file: str, make: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make(method)
    policy.save(tmp_path)
    (path,) = tmp_path.glob(file)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match="no readable") as caught:
        policy.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_inside_averaged_the_average_is_saved(make: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make(ema_decay=0.5)
    disturb(policy)
    policy.ema_update()
    with policy.averaged():
        policy.save(tmp_path)
        want = output(policy.family, policy.denoiser)
    assert not torch.equal(want, output(policy.family, policy.denoiser))
    policy.load(tmp_path)
    assert torch.equal(want, output(policy.family, policy.denoiser))


@pytest.mark.parametrize("method", METHODS)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    method: str, make: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make(method)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # writing beyond it fails
    try:
        with pytest.raises(InputError, match="cannot write") as caught:
            policy.save(tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "saved").iterdir()) == []


# ---- state and average --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_state_comes_back_exactly(method: str, make: Callable[..., Policy]) -> None:
    policy = make(method, ema_decay=0.5)
    for seed in range(3):
        disturb(policy, seed)
        policy.ema_update()
    state = weights(policy)
    resumed = make(method, ema_decay=0.5)
    resumed.load_state_dict(state)
    for one in (policy, resumed):  # also the counter of the average's updates
        disturb(one, 7)
        one.ema_update()
    assert all(torch.equal(t, policy.state_dict()[n]) for n, t in resumed.state_dict().items())
    with pytest.raises(InputError, match="ema"):
        make(method).load_state_dict(state)


def test_the_average_worked_example(make: Callable[..., Policy]) -> None:
    # weights 1, then 2, then 4; decay min(0.15, (1 + n) / (10 + n)) = 1/10, then 0.15:
    #   1/10 * 1 + 9/10 * 2 = 1.9;    0.15 * 1.9 + 0.85 * 4 = 3.685
    policy = make(ema_decay=0.15)
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            for p in policy.trainable():
                p.fill_(value)
        if value == 1.0:
            policy.load_state_dict(
                {
                    n: torch.zeros_like(t) if n == "ema_updates" else torch.ones_like(t)
                    for n, t in policy.state_dict().items()
                }
            )
        else:
            policy.ema_update()
    with policy.averaged():
        for p in policy.trainable():
            torch.testing.assert_close(p.detach(), torch.full_like(p, 3.685))
    assert all(bool((p == 4).all()) for p in policy.trainable())


def test_without_an_average_the_weights_stand_in_for_it(make: Callable[..., Policy]) -> None:
    policy = make()
    disturb(policy)
    policy.ema_update()
    before = output(policy.family, policy.denoiser)
    with policy.averaged():
        assert torch.equal(output(policy.family, policy.denoiser), before)
    assert not any(name.startswith("ema") for name in policy.state_dict())

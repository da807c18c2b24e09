"""Ways to compute the same faster: that each takes effect, and that results agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d3po import speed
from d3po.families import Family, load_family
from d3po.generate import SamplerConfig, generate, independent_orders
from d3po.policy import Policy, PolicyConfig
from d3po.speed import SpeedConfig, encoders, encoders_at_hand, kernels, prepare_network
from fifa.config import InputError

CPU = torch.device("cpu")


def gradient(model: Path, method: str = "lora", precision: str = "no", **settings: Any) -> Tensor:
    """The gradient of a loss through policy and reference, computed as `settings` say."""
    config, family = SpeedConfig(**settings), load_family(model)
    prepare_network(config, family.denoiser)
    policy = Policy(family, PolicyConfig(method=method))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.trainable():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    x = torch.randn(3, *family.latent_shape, generator=generator)
    cond = family.encode_text(["a red circle", "a star", ""])
    t = torch.tensor([1, 500, 998])
    with kernels(config, CPU, precision):
        with policy.reference():
            reference = family.predict(policy.denoiser, x, t, cond)
        loss = (family.predict(policy.denoiser, x, t, cond) - reference).square().sum()
    loss.backward()
    grads = [p.grad for p in policy.trainable()]
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---- attention ----------------------------------------------------------------------------------


def enabled() -> tuple[bool, bool]:
    """Whether torch may use its flash and its math kernel."""
    return torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize(
    ("attention", "precision", "inside"),
    [
        ("sdpa", "no", (True, True)),
        ("sdpa", "bf16", (False, True)),  # products are faster there, see `kernels`
        ("math", "no", (False, True)),
        ("flash", "bf16", (True, False)),
    ],
)
def test_attention_is_that_which_was_asked_for(
    attention: Any, precision: str, inside: tuple[bool, bool]
) -> None:
    before = enabled()
    with kernels(SpeedConfig(attention=attention), CPU, precision):
        assert enabled() == inside
    assert enabled() == before == (True, True)


def test_every_attention_has_the_same_gradient(tiny_sd: Path) -> None:
    expected = gradient(tiny_sd)
    products = gradient(tiny_sd, attention="math")
    assert not torch.equal(products, expected)  # another order of sums: it was another kernel
    assert apart(products, expected) < 1e-5
    assert apart(gradient(tiny_sd, attention="flash"), expected) < 1e-5


def test_a_kernel_that_does_not_exist_is_one_sentence() -> None:
    q = torch.randn(1, 1, 4, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    with (
        pytest.raises(InputError, match="no FlashAttention kernel for these numbers"),
        kernels(SpeedConfig(attention="flash"), CPU, "no"),
    ):
        attend(q, q, q, dropout_p=0.5)
    with pytest.raises(RuntimeError, match="must match"), kernels(SpeedConfig(), CPU, "no"):
        torch.ones(2) + torch.ones(3)


def test_what_this_machine_lacks_is_one_sentence(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_family(tiny_sd).denoiser
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed; pip install 'd3po-fifa\[xformers\]'"):
        prepare_network(SpeedConfig(attention="xformers"), network)
    monkeypatch.setattr(speed, "find_spec", lambda name: object())
    with pytest.raises(InputError, match="xformers needs a CUDA GPU"):
        prepare_network(SpeedConfig(attention="xformers"), network)
    tf32 = SpeedConfig(tf32=True)
    with (
        pytest.raises(InputError, match=r"needs an NVIDIA GPU of the Ampere .* this is cpu"),
        kernels(tf32, CPU, "no"),
    ):
        pass
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(InputError, match="Ampere"), kernels(tf32, torch.device("cuda:0"), "no"):
        pass


def test_tf32_is_on_inside_and_as_before_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with kernels(SpeedConfig(tf32=True), torch.device("cuda:0"), "no"):
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    assert before == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)


# ---- layout and compilation ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
def test_channels_last_is_another_layout_of_the_same(tiny_sd: Path, method: str) -> None:
    family = load_family(tiny_sd)
    prepare_network(SpeedConfig(channels_last=True), family.denoiser)
    policy = Policy(family, PolicyConfig(method=method))
    kernel = policy.bare.down_blocks[0].resnets[0].conv1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert not kernel.is_contiguous()
    found = gradient(tiny_sd, method, channels_last=True)
    assert apart(found, gradient(tiny_sd, method)) < 1e-5


def test_compiled_blocks_give_the_same(tiny_sd: Path) -> None:
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    found = gradient(tiny_sd, compile="aot_eager")
    assert graphs["unique_graphs"] > before
    assert apart(found, gradient(tiny_sd)) < 1e-5


def test_what_cannot_be_compiled_is_one_sentence(tiny_sd: Path) -> None:
    network = load_family(tiny_sd).denoiser
    with pytest.raises(InputError, match=r"no back end 'fastest', it has .*inductor"):
        prepare_network(SpeedConfig(compile="fastest"), network)
    vae: Any = load_family(tiny_sd).vae  # type: ignore[attr-defined]
    vae.__class__ = type("Plain", (type(vae),), {"_repeated_blocks": ["Nothing"]})
    with pytest.raises(InputError, match="Plain has no repeated blocks"):
        prepare_network(SpeedConfig(compile="eager"), vae)


# ---- encoders -----------------------------------------------------------------------------------


def moves(family: Family) -> list[tuple[str, str]]:
    """Grows by (name, device) with every encoder that is moved, which then stays where it is."""
    seen: list[tuple[str, str]] = []
    for name, part in vars(family).items():
        if isinstance(part, nn.Module) and part is not family.denoiser:
            part.to = lambda place, name=name: seen.append((name, str(place)))
    return seen


def test_encoders_come_when_they_are_needed_and_go_again(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load_family(tiny_sd)
    assert {type(part).__name__ for part in encoders(family)} == {"CLIPTextModel", "AutoencoderKL"}
    seen = moves(family)
    orders = independent_orders(["a star"], 1, 0, [0])
    expected = [made.images for made in generate(family, family.denoiser, SAMPLER, orders)]
    assert seen == []  # they are where the denoiser is
    resting = torch.device("cuda:1")
    monkeypatch.setattr(speed, "_place", lambda part: resting)
    found = [made.images for made in generate(family, family.denoiser, SAMPLER, orders)]
    assert seen == [(n, d) for d in ("cpu", "cuda:1") for n in ("text_encoder", "vae")]
    assert torch.equal(found[0], expected[0])
    seen.clear()
    with pytest.raises(ZeroDivisionError), encoders_at_hand(family):
        raise ZeroDivisionError
    assert seen[-1] == ("vae", "cuda:1")


SAMPLER = SamplerConfig(steps=2, guidance=1.0)

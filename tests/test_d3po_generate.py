"""What a picture depends on: its prompt, its two seeds and the weights, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from d3po.families import Family, load_family
from d3po.generate import (
    Order,
    SamplerConfig,
    encode_prompts,
    generate,
    independent_orders,
)

SAMPLER = SamplerConfig(steps=2, guidance=2.0, batch=2)


@pytest.fixture(scope="module")
def family(tiny_sd: Path) -> Family:
    return load_family(tiny_sd)


def test_independent_pictures_share_no_noise() -> None:
    orders = independent_orders(["a", "b"], 3, seed=1, rows=[0, 1])
    assert [order.prompt for order in orders] == ["a"] * 3 + ["b"] * 3
    assert len({order.start for order in orders} | {order.path for order in orders}) == 12
    assert independent_orders(["a", "b"], 3, seed=1, rows=[1]) == orders[3:]
    assert independent_orders(["a", "b"], 3, seed=2, rows=[0])[0].start != orders[0].start


def test_a_picture_does_not_know_its_neighbours(family: Family) -> None:
    orders = [Order("a star", 1, 2), Order("a circle", 3, 4), Order("a star", 1, 5)]
    together = torch.cat(
        [part.images for part in generate(family, family.denoiser, SAMPLER, orders)]
    )
    assert together.shape == (3, 3, 64, 64)
    for order, image in zip(orders, together, strict=True):
        (alone,) = generate(family, family.denoiser, SAMPLER, [order])
        assert torch.allclose(alone.images[0], image, atol=1e-4)
    assert not torch.allclose(together[0], together[2], atol=1e-2)  # another path


def test_it_draws_what_diffusers_draws(family: Family, tiny_sd: Path) -> None:
    """Without path noise, StableDiffusionPipeline from the same x_T gives the same picture."""
    from diffusers import StableDiffusionPipeline

    from d3po.sampling import image_noise

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipe.set_progress_bar_config(disable=True)
    start = image_noise([7], family.latent_shape, -1)
    theirs = pipe(
        "a star", latents=start, num_inference_steps=4, guidance_scale=3.0, output_type="pt"
    )
    sampler = SamplerConfig(steps=4, eta=0.0, guidance=3.0)
    (ours,) = generate(family, family.denoiser, sampler, [Order("a star", 7, 0)])
    assert torch.allclose(ours.images, theirs.images, atol=1e-4)


def test_a_repeated_prompt_is_encoded_once_and_put_back_in_order(family: Family) -> None:
    prompts = ["a star", "a circle", "a star"]
    seen: list[int] = []
    encoder = family.text_encoder  # type: ignore[attr-defined]
    hook = encoder.register_forward_hook(lambda module, given, out: seen.append(len(out[0])))
    found = encode_prompts(family, prompts)
    hook.remove()
    assert seen == [2]
    again = family.encode_text(prompts)
    assert torch.allclose(found.tensors["text"], again.tensors["text"], atol=1e-6)

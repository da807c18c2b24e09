"""Real models of tiny random width, built once a session: the tests use no stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import autoencoder, clip_config, clip_tokenizer


def build_tiny_sd(folder: Path, **overrides: Any) -> Path:
    """Save a StableDiffusionPipeline of some 40,000 random weights in `folder`.

    Latents are `latent_channels` x 8 x 8 and images 64 px (VAE factor 8); `overrides` also takes
    prediction_type, zero_snr, set_alpha_to_one, shift_factor and sample_size. Global RNG state is
    kept.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet
    from transformers import CLIPTextModel

    channels = overrides.get("latent_channels", 4)
    size = overrides.get("sample_size", 8)
    tokenizer = clip_tokenizer(folder.with_name(folder.name + "-vocabulary"))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        pipe = StableDiffusionPipeline(
            tokenizer=tokenizer,
            text_encoder=CLIPTextModel(clip_config(tokenizer)),
            vae=autoencoder(
                channels, sample_size=8 * size, shift_factor=overrides.get("shift_factor")
            ),
            unet=UNet(
                sample_size=size,
                in_channels=channels,
                out_channels=channels,
                block_out_channels=(8, 16),
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                layers_per_block=1,
                norm_num_groups=4,
                attention_head_dim=2,
                cross_attention_dim=16,
            ),
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                steps_offset=1,
                clip_sample=False,
                set_alpha_to_one=overrides.get("set_alpha_to_one", False),
                prediction_type=overrides.get("prediction_type", "epsilon"),
                rescale_betas_zero_snr=overrides.get("zero_snr", False),
                timestep_spacing="trailing" if overrides.get("zero_snr") else "leading",
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder: epsilon prediction, 4 latent channels, 64 px."""
    return build_tiny_sd(tmp_path_factory.mktemp("models") / "tiny-sd")


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder: v-prediction, 8 latent channels, a VAE shift, a path to abar = 1."""
    return build_tiny_sd(
        tmp_path_factory.mktemp("models") / "tiny-sd-v",
        prediction_type="v_prediction",
        latent_channels=8,
        shift_factor=0.1,
        set_alpha_to_one=True,
    )


@pytest.fixture
def make_tiny_sd(tmp_path: Path) -> Callable[..., Path]:
    """`make_tiny_sd(name, **overrides)` builds a tiny model folder of its own for one test."""
    return lambda name, **overrides: build_tiny_sd(tmp_path / name, **overrides)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The documents first: their commands take minutes, and would be the last to end."""
    items.sort(key=lambda item: item.path.name != "test_docs.py")

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from d3po import recipe
from d3po.implicit import ImplicitReward
from d3po.run_folder import RunFolder
from fifa.config import InputError
from fifa.rewards import Reward, load_reward, score_images

PROMPTS = ["a red circle", "two blue squares", "a red circle", ""]


@pytest.fixture(scope="module")
def run(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of two steps on its own pictures, and its LoRA weights."""
    folder = tmp_path_factory.mktemp("implicit")
    (folder / "train.txt").write_text("a red circle\na blue square\ntwo stars\n")
    config = recipe.load(
        None,
        [
            f"model={tiny_sd}",
            "objective={name: dpo, beta: 20}",
            "optim={max_steps: 2, learning_rate: 1e-2, micro_batch: 1}",
            "sampler={steps: 2, guidance: 1.0}",
            f"online.prompts={folder / 'train.txt'}",
            "online.groups=2",
            "online.images=2",
            "online.judges=[jpeg_incompressibility]",
            f"run.dir={folder / 'run'}",
        ],
    )
    return recipe.train(config)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_diffusers(model: Path, weights: Path, pictures: Tensor, reward: ImplicitReward) -> Tensor:
    """The same by the pipeline of diffusers and its own scheduler: mean error of the two UNets."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(weights)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    x0 = pipe.vae.encode(2 * pictures - 1).latent_dist.mean * pipe.vae.config.scaling_factor
    tokens = pipe.tokenizer(
        PROMPTS, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    text = pipe.text_encoder(tokens)[0]
    gains = []
    for noise, t in zip(reward.noise, reward.times, strict=True):
        eps, times = noise.expand_as(x0), t.expand(len(x0))
        x_t = scheduler.add_noise(x0, eps, times)
        errors = []
        for switch in (pipe.enable_lora, pipe.disable_lora):
            switch()
            error = (pipe.unet(x_t, times, text).sample - eps).double().square()
            errors.append(error.mean((1, 2, 3)))
        gains.append(errors[1] - errors[0])
    return reward.beta * 0.5 * torch.stack(gains).mean(0)


def test_it_is_the_gain_in_denoising_error(tiny_sd: Path, run: RunFolder, pictures: Tensor) -> None:
    reward = ImplicitReward(run.path, draws=4)
    found = score_images(reward, pictures, PROMPTS)
    wanted = by_diffusers(tiny_sd, run.weights, pictures, reward)
    assert float(wanted.abs().min()) > 0
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3 * scale)


def test_it_is_a_reward_by_name_and_a_function_of_one_picture(
    run: RunFolder, pictures: Tensor
) -> None:
    reward = load_reward(f"d3po.implicit:ImplicitReward:{run.path}")
    assert isinstance(reward, Reward)
    assert reward.name == "implicit:run"
    whole = score_images(reward, pictures, PROMPTS)
    again = score_images(ImplicitReward(run.path), pictures, PROMPTS)
    assert torch.equal(whole, again)
    alone = torch.cat(
        [score_images(reward, pictures[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)]
    )
    scale = float(whole.abs().max())
    torch.testing.assert_close(whole, alone, rtol=1e-3, atol=1e-3 * scale)


def test_draws_cover_the_schedule_and_follow_the_seed(run: RunFolder) -> None:
    reward = ImplicitReward(run.path, draws=10)
    parts = (reward.times * 10 // 1000).tolist()  # of 1,000 training times
    assert parts == list(range(10))
    other = ImplicitReward(run.path, draws=10, seed=1)
    assert not torch.equal(reward.noise, other.noise)
    assert reward.version != other.version


def test_pictures_of_another_size_are_resized(run: RunFolder) -> None:
    flat = torch.full((1, 3, 64, 64), 0.5)
    reward = ImplicitReward(run.path, draws=2)
    small = score_images(reward, flat[..., ::2, ::2], ["a red circle"])
    grey = (flat * 255).round() / 255
    torch.testing.assert_close(small, score_images(reward, grey, ["a red circle"]))


def test_what_makes_no_sense_is_told(run: RunFolder, pictures: Tensor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="draws >= 1"):
        ImplicitReward(run.path, draws=0)
    with pytest.raises(InputError, match="is not a run folder"):
        ImplicitReward(tmp_path)
    with pytest.raises(InputError, match="4 images but 1 prompts"):
        ImplicitReward(run.path, draws=1)(pictures, ["a"])

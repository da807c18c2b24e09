"""How the shipped mini Stable Diffusion was made: `python -m d3po.mini_sd.train --out DIR`.

Three stages, each saved when it is done and skipped when its result is there: the VAE, the latents
of rendered scenes, the text tower with the UNet. The result is an ordinary
`StableDiffusionPipeline` folder in half precision, with `training.json` beside it saying what it
took. Deterministic on one machine and thread count.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from d3po.mini_sd import autoencoder, denoiser, text
from fifa.config import write_atomic
from fifa.miniworld.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 0
    threads: int = 2
    vae_steps: tuple[int, ...] = (2600, 1300, 1200)  # cycles of the learning rate
    vae_learning_rate: tuple[float, ...] = (2e-3, 1.2e-3, 1e-3)
    vae_guided_share: tuple[float, ...] = (0.3, 0.0, 0.0)
    vae_decoder_only: tuple[bool, ...] = (False, False, True)
    vae_batch: int = 16
    scenes: int = 98_304
    unet_steps: tuple[int, ...] = (10_000,)  # cycles of the learning rate
    unet_snr_power: tuple[float, ...] = (0.5,)
    unet_batch: int = 64
    unet_learning_rate: float = 1e-3


def train(recipe: Recipe, work: Path, out: Path) -> None:
    """Run the stages that have no result in `work` yet, then write the pipeline folder to `out`."""
    torch.set_num_threads(recipe.threads)
    work.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"recipe": asdict(recipe), "minutes": {}}
    vae = _vae(recipe, work, facts)
    trained = _denoiser(recipe, vae, work, facts)
    save(vae, trained, out)
    write_atomic(out / "training.json", json.dumps(facts, indent=2) + "\n")


def _vae(recipe: Recipe, work: Path, facts: dict[str, Any]) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    folder = work / "vae"
    if not folder.exists():
        start = time.monotonic()
        with torch.random.fork_rng():
            torch.random.manual_seed(recipe.seed)
            vae = autoencoder.build()
        cycles = zip(
            recipe.vae_steps,
            recipe.vae_learning_rate,
            recipe.vae_guided_share,
            recipe.vae_decoder_only,
            strict=True,
        )
        for i, (steps, rate, guided_share, decoder_only) in enumerate(cycles):
            autoencoder.train(
                vae,
                recipe.seed + 10 * i,
                steps,
                recipe.vae_batch,
                rate,
                lambda step, loss, _: _log("vae", step, loss, start),
                guided_share,
                decoder_only,
            )
        vae.save_pretrained(folder)
        facts["minutes"]["vae"] = round((time.monotonic() - start) / 60, 1)
    vae = AutoencoderKL.from_pretrained(folder).eval()
    # Ship what was trained against: half precision first, so that the latents are those of the
    # saved VAE.
    return vae.half().float()


def _latents(recipe: Recipe, vae: AutoencoderKL, work: Path) -> tuple[torch.Tensor, list[Any]]:
    file = work / "latents.pt"
    if not file.exists():
        start = time.monotonic()
        latents, requests = denoiser.encode_scenes(
            vae, recipe.scenes, recipe.seed, lambda n: _log("encode", n, 0.0, start, 4096)
        )
        torch.save({"latents": latents.half(), "requests": requests}, file)
    saved = torch.load(file, weights_only=False)  # our own file, written above
    return saved["latents"], saved["requests"]


def _denoiser(
    recipe: Recipe, vae: AutoencoderKL, work: Path, facts: dict[str, Any]
) -> denoiser.Denoiser:
    tokenizer = build_tokenizer()
    with torch.random.fork_rng():
        torch.random.manual_seed(recipe.seed)
        fresh = denoiser.Denoiser(text.build_text_encoder(tokenizer), denoiser.build_unet())
    file = work / "denoiser.pt"
    if not file.exists():
        latents, requests = _latents(recipe, vae, work)
        start = time.monotonic()

        def log(step: int, loss: float, average: denoiser.Denoiser) -> None:
            _log("unet", step, loss, start)
            if step % 1000 == 999:  # a look at the model before it is done
                torch.save(average.state_dict(), work / "preview.pt")

        cycles = zip(recipe.unet_steps, recipe.unet_snr_power, strict=True)
        for i, (steps, snr_power) in enumerate(cycles):
            fresh = denoiser.train(
                fresh.requires_grad_(True).train(),
                tokenizer,
                latents,
                requests,
                seed=recipe.seed + 10 * i,
                steps=steps,
                batch=recipe.unet_batch,
                learning_rate=recipe.unet_learning_rate,
                snr_power=snr_power,
                log=log,
            )
        torch.save(fresh.state_dict(), file)
        facts["minutes"]["unet"] = round((time.monotonic() - start) / 60, 1)
    fresh.load_state_dict(torch.load(file))
    return fresh.eval()


def save(vae: AutoencoderKL, trained: denoiser.Denoiser, out: Path) -> None:
    """Write an ordinary Stable Diffusion pipeline folder in half precision."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=trained.text_encoder,
        tokenizer=build_tokenizer(),
        unet=trained.unet,
        scheduler=denoiser.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out)
    pipeline.to(torch.float32)
    # diffusers loads float32 unless told otherwise, transformers >= 5 what the config says: they
    # must agree, or the text encoder hands half precision to a float32 UNet.
    config = out / "text_encoder" / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    write_atomic(config, json.dumps({**settings, "dtype": "float32"}, indent=2) + "\n")


def _log(stage: str, step: int, loss: float, start: float, every: int = 100) -> None:
    if step % every == 0:
        print(f"{stage} {step:6d}  loss {loss:.4f}  {time.monotonic() - start:6.0f} s", flush=True)


def main() -> None:
    """Command line: where to work and where to write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/mini_sd"), help="stage results")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="the pipeline folder")
    arguments = parser.parse_args()
    train(Recipe(), arguments.work, arguments.out)


if __name__ == "__main__":
    main()

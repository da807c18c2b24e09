"""How good is the mini Stable Diffusion? `python benchmarks/mini_sd.py --prompts 1000`

Share of samples in which every condition of a held-out prompt holds, judged by the oracle, for 20
DDIM steps at eta 1 and each guidance scale; and the same for the VAE's reconstructions of clean
renders, its ceiling.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from d3po.families import Family, load_family
from d3po.generate import Order, SamplerConfig, generate
from fifa.config import write_atomic
from fifa.images import encode_png, grid, to_batch, to_uint8
from fifa.miniworld import phrase, prompts, render, sample_scene
from fifa.miniworld.oracle import Verdict, check


def shares(verdicts: list[Verdict]) -> dict[str, float]:
    """Share of images with every condition, and share of conditions by kind."""
    kinds: dict[str, list[bool]] = defaultdict(list)
    for verdict in verdicts:
        kinds["all"].append(verdict.all_hold)
        for condition in verdict.conditions:
            kinds[condition.kind].append(condition.holds)
    return {kind: round(float(np.mean(holds)), 4) for kind, holds in sorted(kinds.items())}


@torch.no_grad()
def reconstruction(family: Family, count: int) -> dict[str, float]:
    """The oracle on decode(encode(render))."""
    rng = np.random.default_rng(1)
    verdicts = []
    for start in range(0, count, 50):
        scenes = [sample_scene(rng) for _ in range(min(50, count - start))]
        latents = family.encode_images(to_batch([render(scene) for scene, _ in scenes]))
        for image, (_, request) in zip(to_uint8(family.decode(latents)), scenes, strict=True):
            verdicts.append(check(image, phrase(request, rng)))
    return shares(verdicts)


def samples(
    family: Family, texts: list[str], guidance: float, seed: int
) -> tuple[dict[str, float], list[np.ndarray]]:
    """The oracle on one sample a prompt."""
    sampler = SamplerConfig(steps=20, eta=1.0, guidance=guidance)
    orders = [Order(text, seed * 10**6 + i, seed * 10**6 + i) for i, text in enumerate(texts)]
    images: list[np.ndarray] = []
    for made in generate(family, family.denoiser, sampler, orders):
        images += list(to_uint8(made.images))
    return shares([check(image, text) for image, text in zip(images, texts, strict=True)]), images


def main() -> None:
    """Print one line a setting; write the table and a picture when asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON with the table; a grid is written beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    family = load_family(arguments.model)
    texts = prompts("heldout", arguments.prompts, 1)
    table = {"vae": reconstruction(family, arguments.prompts)}
    print("vae", table["vae"], flush=True)
    for guidance in arguments.guidance:
        table[f"guidance {guidance:g}"], images = samples(family, texts, guidance, arguments.seed)
        print("guidance", guidance, table[f"guidance {guidance:g}"], flush=True)
        if arguments.out:
            picture = grid(images[:40], 10, labels=[text[:22] for text in texts[:40]], scale=2)
            write_atomic(arguments.out.with_suffix(f".g{guidance:g}.png"), encode_png(picture))
    if arguments.out:
        facts = {"model": arguments.model, "prompts": arguments.prompts, "table": table}
        write_atomic(arguments.out, json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()

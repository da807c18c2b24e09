"""Loading a family, what is refused, and guidance."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline
from original_names import one_file
from pair_files import write_pairs
from safetensors.torch import save_file
from torch import Tensor, nn

from d3po import families
from d3po.families import FAMILIES, FamilyConfig, guided, load_family
from d3po.offline import OfflineConfig
from d3po.pair_cache import _cache_key
from fifa.config import InputError
from fifa.pairs import PairTable

PROMPTS = ["a red circle above a blue square", "", "two small green triangles"]


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_images_of_a_wrong_shape_are_refused(tiny_sd: Path) -> None:
    family = load_family(tiny_sd)
    for shape in [(3, 64, 64), (1, 1, 64, 64), (1, 3, 60, 64)]:
        with pytest.raises(InputError, match="multiples of 8"):
            family.encode_images(torch.zeros(shape))


def test_long_prompts_are_cut_not_refused(tiny_sd: Path) -> None:
    family = load_family(tiny_sd)
    assert family.encode_text(["circle " * 100]).tensors["text"].shape == (1, 16, 16)


def test_half_precision_networks_take_and_give_float32(tiny_sd: Path) -> None:
    family = load_family(tiny_sd, torch.bfloat16)
    assert family.denoiser.dtype == torch.bfloat16
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    pred = family.predict(family.denoiser, x_t, t, family.encode_text([""]))
    assert pred.dtype == torch.float32
    assert family.encode_images(images(1)).dtype == torch.float32
    assert family.decode(x_t).dtype == torch.float32


# ---- guidance -----------------------------------------------------------------------------------


class Counted(nn.Module):
    """The network itself, with its calls counted, as a wrapper such as DDP would sit around it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.batches: list[int] = []

    def forward(self, x: Tensor, *args: Any) -> Any:
        self.batches.append(len(x))
        return self.module(x, *args)


@torch.no_grad()
def test_guidance_is_its_formula_in_one_doubled_forward(tiny_sd: Path) -> None:
    family = load_family(tiny_sd)
    network = Counted(family.denoiser)
    cond, uncond = family.encode_text(PROMPTS), family.encode_text([""])
    x_t, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999])
    got = guided(family, network, cond, uncond, 5.0)(x_t, t)
    assert network.batches == [6]
    with_text = family.predict(family.denoiser, x_t, t, cond)
    without = family.predict(family.denoiser, x_t, t, uncond.expand(len(cond)))
    torch.testing.assert_close(got, without + 5 * (with_text - without), rtol=0, atol=1e-5)
    each = guided(family, network, cond, uncond.expand(len(cond)), 5.0)(x_t, t)
    assert torch.equal(each, got)


@torch.no_grad()
def test_scale_one_is_the_plain_network_at_half_the_work(tiny_sd: Path) -> None:
    family = load_family(tiny_sd)
    network = Counted(family.denoiser)
    cond, uncond = family.encode_text(PROMPTS), family.encode_text([""])
    x_t, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999])
    got = guided(family, network, cond, uncond, 1.0)(x_t, t)
    assert network.batches == [3]
    assert torch.equal(got, family.predict(family.denoiser, x_t, t, cond))


def test_guidance_without_the_empty_prompt_is_refused(tiny_sd: Path) -> None:
    family = load_family(tiny_sd)
    with pytest.raises(InputError, match="empty prompt"):
        guided(family, family.denoiser, family.encode_text(["a"]), None, 5.0)


# ---- loading ------------------------------------------------------------------------------------


def test_every_family_in_the_table_exists() -> None:
    import importlib

    for place in FAMILIES.values():
        module, name = place.split(":")
        assert callable(getattr(importlib.import_module(module), name).load)


def test_a_missing_mini_model_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "MINI", tmp_path / "weights")
    with pytest.raises(InputError, match="mini model's weights are not in this installation"):
        load_family("mini")


def test_mini_is_a_folder_like_any_other(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "MINI", tiny_sd)
    assert load_family("mini").latent_shape == (4, 8, 8)


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model_index\.json"):
        load_family(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match="does not name a pipeline"):
        load_family(tmp_path)


def test_a_pipeline_without_a_family_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(InputError, match=r"KandinskyPipeline; supported are StableDiffusion"):
        load_family(tmp_path)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(part: str, tiny_sd: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_sd, broken)
    shutil.rmtree(broken / part)
    with pytest.raises(InputError, match=f"no usable {part}") as caught:
        load_family(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_part_that_was_cut_short_is_named(file: str, tiny_sd: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_sd, broken)
    content = (broken / file).read_bytes()
    (broken / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"no usable {file.split('/')[0]}") as caught:
        load_family(broken)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_length_takes_that_of_the_text_encoder(
    tiny_sd: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd, folder)
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    assert load_family(folder).encode_text(["a star"]).tensors["text"].shape == (1, 16, 16)


@pytest.mark.parametrize("model", ["somebody/some-model", "runs/not/there", "/not/there"])
def test_offline_a_model_that_is_not_here_is_one_sentence(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=f"model {model}: .*diffusers folder.*") as caught:
        load_family(model)
    assert "\n" not in str(caught.value)


def test_models_with_more_inputs_than_latents_are_refused(
    make_tiny_sd: Callable[..., Path],
) -> None:
    folder = make_tiny_sd("inpainting")
    other = make_tiny_sd("wide", latent_channels=8)
    shutil.rmtree(folder / "vae")
    shutil.copytree(other / "vae", folder / "vae")
    with pytest.raises(InputError, match="takes 4 channels, the VAE has 8"):
        load_family(folder)


# ---- settings -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sdxl", "sd3", "flux"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of each other class."""
    folder = tmp_path_factory.mktemp("others") / request.param
    return tiny_pipelines.save(getattr(tiny_pipelines, request.param), folder)


@torch.no_grad()
def test_pictures_may_have_another_size_in_whole_patches(other: Path) -> None:
    family = load_family(other, config=FamilyConfig(image_size=32))
    assert family.latent_shape[1:] == (4, 4)
    assert family.image_size == 32
    x_t, cond = torch.randn(2, *family.latent_shape), family.encode_text(PROMPTS[:2])
    t = family.schedule.grid(2, 0.0).times[[0, 0]]
    assert family.predict(family.denoiser, x_t, t, cond).shape == x_t.shape
    assert family.decode(x_t).shape == (2, 3, 32, 32)
    with pytest.raises(InputError, match=r"family\.image_size is 72, .* a multiple of 16"):
        load_family(other, config=FamilyConfig(image_size=72))


def test_sd3_has_positions_for_so_many_pixels(tmp_path: Path) -> None:
    folder = tiny_pipelines.save(tiny_pipelines.sd3, tmp_path / "sd3")
    assert load_family(folder, config=FamilyConfig(image_size=128)).latent_shape[1] == 16
    with pytest.raises(InputError, match="positions for 128 at most"):
        load_family(folder, config=FamilyConfig(image_size=144))


def test_t5_is_left_out_when_asked(tmp_path: Path) -> None:
    folder = tiny_pipelines.save(tiny_pipelines.sd3, tmp_path / "sd3")
    with_t5, without = (load_family(folder, config=FamilyConfig(t5=t5)) for t5 in (True, False))
    whole, short = (one.encode_text(["a star"]).tensors["text"] for one in (with_t5, without))
    assert whole.shape == short.shape
    assert torch.equal(whole[:, :16], short[:, :16])
    assert not short[:, 16:].any()
    assert whole[:, 16:].any()
    fewer = load_family(folder, config=FamilyConfig(t5_tokens=20))
    assert fewer.encode_text(["a star"]).tensors["text"].shape[1] == 16 + 20


def test_a_vae_that_overflows_stays_in_float32(tmp_path: Path) -> None:
    folder = tiny_pipelines.save(tiny_pipelines.sdxl, tmp_path / "sdxl")
    family: Any = load_family(folder, torch.float16)
    assert family.vae.dtype == torch.float32
    assert family.denoiser.dtype == family.text_encoder_2.dtype == torch.float16
    assert load_family(folder, torch.bfloat16).vae.dtype == torch.bfloat16  # type: ignore[attr-defined]
    config = folder / "vae" / "config.json"
    fixed = {**json.loads(config.read_text()), "force_upcast": False}
    config.write_text(json.dumps(fixed))
    assert load_family(folder, torch.float16).vae.dtype == torch.float16  # type: ignore[attr-defined]


def test_flux_is_told_how_strong_guidance_is_to_look(tmp_path: Path) -> None:
    folder = tiny_pipelines.save(tiny_pipelines.flux, tmp_path / "flux")
    outputs = []
    for strength in (3.5, 3.5, 7.0):
        family = load_family(folder, config=FamilyConfig(image_size=64, embedded_guidance=strength))
        x_t = torch.ones(1, *family.latent_shape)
        cond, t = family.encode_text(["a star"]), torch.tensor([500.0])
        with torch.no_grad():
            outputs.append(family.predict(family.denoiser, x_t, t, cond))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_the_wrong_tokenizer_of_t5_is_refused(tmp_path: Path) -> None:
    folder = tiny_pipelines.save(tiny_pipelines.flux, tmp_path / "flux")
    shutil.rmtree(folder / "tokenizer_2")
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    with pytest.raises(InputError, match="no usable tokenizer"):
        load_family(folder)


# ---- one file -----------------------------------------------------------------------------------


def without_weights(folder: Path, to: Path) -> Path:
    """What a Hub repository of configs holds: everything but the weights."""
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_one_file_is_the_same_family_as_its_folder(
    kind: str, tiny_sd: Path, tmp_path: Path
) -> None:
    folder = tiny_sd
    if kind == "sdxl":
        folder = tiny_pipelines.save(tiny_pipelines.sdxl, tmp_path / "sdxl")
    file = one_file(DiffusionPipeline.from_pretrained(folder), tmp_path / "model.safetensors")
    configs = str(without_weights(folder, tmp_path / "configs"))
    family = load_family(file, config=FamilyConfig(description=configs))
    same: Any = load_family(folder)
    assert family.name == str(file)
    for name, part in vars(same).items():
        if isinstance(part, nn.Module):
            found = getattr(family, name)
            assert not any(p.requires_grad for p in found.parameters())
            for key, tensor in part.state_dict().items():
                assert torch.equal(found.state_dict()[key], tensor), f"{name}.{key}"
    grids = [one.schedule.grid(5, 1.0) for one in (family, same)]
    assert torch.equal(grids[0].to_x0, grids[1].to_x0)
    texts = [one.encode_text(PROMPTS) for one in (family, same)]
    assert torch.equal(texts[0].tensors["text"], texts[1].tensors["text"])
    assert (
        load_family(file, torch.bfloat16, config=FamilyConfig(description=configs)).denoiser.dtype
        == torch.bfloat16
    )


def test_one_file_says_what_kind_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    mark = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
    keys = {"stable-diffusion-v1-5": "anything", "stable-diffusion-xl-base-1.0": mark}
    for name, key in keys.items():
        file = tmp_path / f"{name}.safetensors"
        save_file({key: torch.zeros(1)}, file)
        # recognised; its configs would have to come from the Hub
        with pytest.raises(InputError, match=rf"{name}: .*family\.description"):
            load_family(file)


def test_a_file_that_is_no_model_is_one_sentence(tiny_sd: Path, tmp_path: Path) -> None:
    missing, broken, other = (tmp_path / f"{name}.safetensors" for name in ("no", "cut", "other"))
    broken.write_bytes(b"nothing")
    save_file({"a": torch.zeros(1)}, other)
    for file in (missing, broken, other):
        with pytest.raises(InputError, match=f"{file.name}") as caught:
            load_family(file, config=FamilyConfig(description=str(tiny_sd)))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"no\.safetensors"):
        load_family(missing)


def test_another_length_of_text_is_another_cache(tmp_path: Path) -> None:
    folder = tiny_pipelines.save(tiny_pipelines.sd3, tmp_path / "sd3")
    config = OfflineConfig(data=str(write_pairs(tmp_path / "pairs.parquet", rows=4)))
    table = PairTable.open(config.data)
    keys = {
        _cache_key(config, table, load_family(folder, config=how), frozenset())
        for how in (
            FamilyConfig(),
            FamilyConfig(t5_tokens=20),
            FamilyConfig(t5=False),
            FamilyConfig(image_size=32),
        )
    }
    assert len(keys) == 4

"""Scorers with published weights, on small models of the same classes with random weights.

Each is built here, saved under the names of the original files, loaded back by the scorer, and
compared with the original's own processing: open_clip's transform, transformers' image processor.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pair_files import write_pairs
from PIL import Image
from tiny_encoders import TINY_CLIP, seeded, transformers_folder
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from typer.testing import CliRunner

from fifa.cli import app
from fifa.config import InputError
from fifa.images import to_batch
from fifa.rewards import REWARDS, describe_rewards, load_reward, score_images, score_pictures
from fifa.rewards.blip import MEAN, STD
from fifa.rewards.network import linear_head, weights_version
from fifa.rewards.pixels import CLIP_MEAN, CLIP_STD, Preprocess

PROMPTS = ["a red circle above a blue square", "stars", "word " * 200]
SIZES = [(61, 40), (40, 75), (32, 32), (33, 35), (20, 18), (224, 224)]


def pictures(height: int = 61, width: int = 40, n: int = 3) -> list[np.ndarray]:
    """Smooth colours with edges and noise, uint8 (H, W, 3)."""
    rng = np.random.default_rng(height * width)
    small = Image.fromarray(rng.integers(0, 256, (4 * n, 4, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height * n), Image.Resampling.BICUBIC))
    noisy = smooth.astype(int) + rng.integers(-30, 30, smooth.shape)
    noisy[:, : width // 3] = 255 * (noisy[:, : width // 3] > 128)
    return list(noisy.clip(0, 255).astype(np.uint8).reshape(n, height, width, 3))


# ---- the models ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_open_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the open_clip model `tiny-clip`, as HPSv2 publishes its own."""
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder / "tiny-clip.json")
    model = seeded(lambda: open_clip.create_model("tiny-clip"))
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, folder / "HPS_v2_compressed.pt")
    return folder / "HPS_v2_compressed.pt"


@pytest.fixture(scope="module")
def tiny_clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return transformers_folder(tmp_path_factory.mktemp("pickscore"))


WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "circle",
    "above",
    "blue",
    "square",
]


def original_names(vision: torch.nn.Module, text: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of transformers' towers under the names of BLIP's own code."""
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
        "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
        "post_layernorm.weight": "norm.weight",
        "post_layernorm.bias": "norm.bias",
    }
    parts = {
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "self_attn.qkv": "attn.qkv",
        "self_attn.projection": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for name in vision.state_dict():
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            names[name] = f"blocks.{match[1]}.{parts[match[2]]}.{match[3]}"
    seen = {f"blip.visual_encoder.{names[k]}": v for k, v in vision.state_dict().items()}
    return {**seen, **{f"blip.text_encoder.{k}": v for k, v in text.state_dict().items()}}


@pytest.fixture(scope="module")
def tiny_blip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """ImageReward.pt with its vocabulary, and the transformers model it was exported from."""
    from transformers import BlipConfig, BlipForImageTextRetrieval

    folder = tmp_path_factory.mktemp("imagereward")
    config = BlipConfig(
        text_config={
            "vocab_size": len(WORDS) + 2,
            "hidden_size": 128,
            "encoder_hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 40,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "image_size": 32,
            "patch_size": 8,
            "layer_norm_eps": 1e-6,
        },
    )
    model = seeded(lambda: BlipForImageTextRetrieval(config))
    head = seeded(lambda: linear_head(128))
    state = original_names(model.vision_model, model.text_encoder)
    state |= {f"mlp.{name}": value for name, value in head.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    state["blip.vision_proj.weight"] = torch.zeros(256, 64)
    torch.save(state, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "med_config.json").write_text('{"num_attention_heads": 4}')
    return folder / "ImageReward.pt", torch.nn.ModuleDict({"blip": model, "mlp": head})


@pytest.fixture(scope="module")
def tiny_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The aesthetic head under the names and in the form of the published file."""
    file = tmp_path_factory.mktemp("aesthetic") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(seeded(lambda: linear_head(16)).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def make(
    tiny_open_clip: Path,
    tiny_clip_model: Path,
    tiny_blip: tuple[Path, torch.nn.Module],
    tiny_head: Path,
) -> Callable[..., Any]:
    """`make("hpsv2", dtype="bf16")` loads a scorer of the table with the tiny weights."""
    sources: dict[str, dict[str, Any]] = {
        "pickscore": {"path": tiny_clip_model},
        "clip": {"path": f"tiny-clip:{tiny_open_clip}"},
        "hpsv2": {"path": tiny_open_clip, "model": "tiny-clip"},
        "hpsv2.1": {"path": tiny_open_clip, "model": "tiny-clip"},
        "imagereward": {"path": tiny_blip[0]},
        "aesthetic": {"path": tiny_head, "clip": f"tiny-clip:{tiny_open_clip}"},
    }
    return lambda name, **more: load_reward(name, **{**sources[name], **more})


NAMES = ["pickscore", "clip", "hpsv2", "hpsv2.1", "imagereward", "aesthetic"]


# ---- pixels --------------------------------------------------------------------------------------


def by_open_clip(size: int, mode: str) -> Callable[[Image.Image], torch.Tensor]:
    import open_clip

    return open_clip.image_transform(size, is_train=False, resize_mode=mode)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("fit", "mode"), [("crop", "shortest"), ("pad", "longest"), ("squash", "squash")]
)
def test_pixels_are_those_of_open_clip(size: tuple[int, int], fit: Any, mode: str) -> None:
    images = pictures(*size)
    original = torch.stack([by_open_clip(32, mode)(Image.fromarray(image)) for image in images])
    torch.testing.assert_close(
        Preprocess(32, fit=fit)(to_batch(images)), original, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_transformers(size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = pictures(*size)
    crop = {"height": 32, "width": 32}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop)
    original = processor([Image.fromarray(image) for image in images], return_tensors="pt")
    mine = Preprocess(32, centre="floor")(to_batch(images))
    torch.testing.assert_close(mine, original["pixel_values"], atol=2e-6, rtol=0)


def test_the_two_libraries_cut_the_middle_at_different_places() -> None:
    batch = to_batch(pictures(32, 35))  # 3 pixels to cut: 1 or 2 of them on the left
    torchvision, transformers = Preprocess(32), Preprocess(32, centre="floor")
    assert not torch.equal(torchvision(batch), transformers(batch))


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_pixels_with_gradients_differ_by_rounding_only(fit: Any) -> None:
    batch = to_batch(pictures(300, 200))
    preprocess = Preprocess(224, mean=(0, 0, 0), std=(1, 1, 1), fit=fit)
    exact = preprocess(batch)
    smooth = preprocess(batch.clone().requires_grad_())
    assert smooth.requires_grad
    # Grey levels: rounded to 8 bits twice by Pillow, after each direction, never here. Where the
    # proportions change Pillow chooses which direction goes first, so only the mean is held.
    gap = 255 * (exact - smooth.detach()).abs()
    assert float(gap.mean()) < (0.6 if fit == "squash" else 0.25)
    assert fit == "squash" or float(gap.max()) < 1.1


# ---- scores --------------------------------------------------------------------------------------


def test_clip_scores_are_those_of_open_clip(make: Callable[..., Any], tiny_open_clip: Path) -> None:
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(
        "tiny-clip", pretrained=str(tiny_open_clip)
    )
    images = pictures()
    pixels = torch.stack([transform(Image.fromarray(image)) for image in images])
    tokens = open_clip.get_tokenizer("tiny-clip")(PROMPTS)
    with torch.no_grad():
        image, text, _ = model.eval()(pixels, tokens)
    expected = 100 * (image @ text.T).diagonal()
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(make("clip")(to_batch(images), PROMPTS), expected)


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1"])
def test_hps_pads_and_takes_the_cosine(
    name: str, make: Callable[..., Any], tiny_open_clip: Path
) -> None:
    import open_clip

    model = open_clip.create_model("tiny-clip").eval()
    model.load_state_dict(torch.load(tiny_open_clip)["state_dict"])
    images = pictures()
    pixels = torch.stack([by_open_clip(32, "longest")(Image.fromarray(i)) for i in images])
    with torch.no_grad():
        image, text, _ = model(pixels, open_clip.get_tokenizer("tiny-clip")(PROMPTS))
    expected = (image @ text.T).diagonal()
    torch.testing.assert_close(make(name)(to_batch(images), PROMPTS), expected)


def test_pickscore_is_that_of_its_model_card(
    make: Callable[..., Any], tiny_clip_model: Path
) -> None:
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(tiny_clip_model).eval()
    images = pictures()
    pixels = CLIPImageProcessorPil.from_pretrained(tiny_clip_model)(
        [Image.fromarray(image) for image in images], return_tensors="pt"
    )
    tokens = AutoTokenizer.from_pretrained(tiny_clip_model)(
        PROMPTS, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    assert tokens.input_ids.shape[1] == 16  # the long prompt was cut
    with torch.no_grad():
        expected = model(**tokens, **pixels).logits_per_image.diagonal()
    assert float(expected.std()) > 0.05
    torch.testing.assert_close(make("pickscore")(to_batch(images), PROMPTS), expected)


def test_imagereward_is_that_of_transformers_blip(
    make: Callable[..., Any], tiny_blip: tuple[Path, torch.nn.Module]
) -> None:
    model = tiny_blip[1]
    images = pictures()
    transform = transforms.Compose(
        [
            transforms.Resize(32, interpolation=InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    # Of each prompt alone and without padding, so that the mask is tested too. "word" is unknown
    # and the long prompt is cut to 35 tokens with its end token.
    known = {word: i for i, word in enumerate(WORDS)}
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        ids = [known.get(word, 1) for word in prompt.split()][:33]
        with torch.no_grad():
            found = model["blip"](
                input_ids=torch.tensor([[2, *ids, 3]]),
                pixel_values=transform(Image.fromarray(image))[None],
                attention_mask=torch.ones(1, len(ids) + 2, dtype=torch.long),
            )
            raw = model["mlp"]["layers"](found.question_embeds[:, 0])
        expected.append((float(raw) - MEAN) / STD)
    scores = make("imagereward")(to_batch(images), PROMPTS)
    assert float(scores.std()) > 0.01
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_aesthetic_is_a_linear_map_of_unit_features(
    make: Callable[..., Any], tiny_open_clip: Path, tiny_head: Path
) -> None:
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(
        "tiny-clip", pretrained=str(tiny_open_clip)
    )
    images = pictures()
    with torch.no_grad():
        features = model.eval().encode_image(
            torch.stack([transform(Image.fromarray(image)) for image in images])
        )
    found = (features / features.norm(dim=1, keepdim=True)).double().T
    weights = torch.load(tiny_head)
    for i in (0, 2, 4, 6, 7):  # layers without activations: one matrix product after another
        bias = weights[f"layers.{i}.bias"].double()[:, None]
        found = weights[f"layers.{i}.weight"].double() @ found + bias
    reward = make("aesthetic")
    scores = reward(to_batch(images), PROMPTS)
    torch.testing.assert_close(scores.double(), found[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(scores, reward(to_batch(images), [""] * 3))


# ---- what they share -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_scores_do_not_depend_on_the_batch(name: str, make: Callable[..., Any]) -> None:
    images = to_batch(pictures(n=5))
    prompts = [*PROMPTS, "a", "blue square"]
    together = score_images(make(name), images, prompts)
    split = score_images(make(name, batch=2), images, prompts)
    alone = torch.cat([make(name)(images[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, split, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert make(name)(images[:0], []).shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_prepared_pictures_score_to_the_bit_as_a_call_does(
    name: str, make: Callable[..., Any]
) -> None:
    reward = make(name, batch=2)
    images = pictures()
    prepared = [reward.prepare(image) for image in images]
    called = score_images(reward, to_batch(images), PROMPTS)
    assert torch.equal(score_pictures(reward, prepared, PROMPTS), called)
    mixed = [images[0], *pictures(32, 32, 1), *pictures(20, 33, 1)]  # of one shape when prepared
    together = score_pictures(reward, [reward.prepare(image) for image in mixed], PROMPTS)
    alone = [reward(to_batch([i]), [p]) for i, p in zip(mixed, PROMPTS, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="it must be float32"):
        score_pictures(reward, prepared[:2], PROMPTS)


def test_a_picture_too_narrow_to_be_resized_is_refused() -> None:
    narrow = np.zeros((2, 9000, 3), np.uint8)
    assert Preprocess(224, fit="pad").square(narrow).shape == (224, 224, 3)
    with pytest.raises(InputError, match="9000 x 2 pixels is too narrow"):
        Preprocess(224).square(narrow)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_images_and_are_right(name: str, make: Callable[..., Any]) -> None:
    reward = make(name)
    assert reward.differentiable
    images = to_batch(pictures()).requires_grad_()
    scores = reward(images, PROMPTS)
    scores.sum().backward()
    assert images.grad is not None
    assert bool((images.grad.flatten(1).abs().amax(1) > 0).all())
    # A small step along the gradient raises every score by about step * |gradient|^2.
    slope = images.grad.flatten(1).square().sum(1)
    step = 1e-2 / slope.max().sqrt()
    with torch.enable_grad():
        moved = reward((images.detach() + step * images.grad).requires_grad_(), PROMPTS)
    torch.testing.assert_close((moved - scores).detach(), step * slope, rtol=0.2, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_nothing_is_recorded(name: str, make: Callable[..., Any]) -> None:
    assert not make(name)(to_batch(pictures()), PROMPTS).requires_grad
    with torch.no_grad():
        images = to_batch(pictures()).requires_grad_()
        assert not make(name)(images, PROMPTS).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_close_and_another_version(name: str, make: Callable[..., Any]) -> None:
    full, half = make(name), make(name, dtype="bf16")
    images = to_batch(pictures())
    a, b = full(images, PROMPTS), half(images, PROMPTS)
    assert b.dtype == torch.float32
    # bfloat16 keeps 8 bits, a cosine is off by up to 0.01; PickScore multiplies it by this:
    scale = float(full.network.logit_scale.exp()) if name == "pickscore" else 1.0
    largest = max(scale, float(a.abs().max()))
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * largest)
    assert full.version != half.version
    assert full.version == make(name).version


@pytest.mark.parametrize("name", NAMES)
def test_odd_arguments_are_one_sentence(name: str, make: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="allowed are fp32 and bf16"):
        make(name, dtype="fp8")
    with pytest.raises(InputError, match="batch is 0"):
        make(name, batch=0)
    with pytest.raises(InputError, match="got 3 images but 2 prompts"):
        make(name)(to_batch(pictures()), PROMPTS[:2])


def test_the_version_follows_the_weights_and_not_the_file(
    tiny_open_clip: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    state = torch.load(tiny_open_clip)["state_dict"]
    save_file(state, tmp_path / "same.safetensors")
    state["logit_scale"] = state["logit_scale"] + 1
    save_file(state, tmp_path / "other.safetensors")
    versions = [
        load_reward(f"clip:tiny-clip:{file}").version  # type: ignore[attr-defined]
        for file in (tiny_open_clip, tmp_path / "same.safetensors", tmp_path / "other.safetensors")
    ]
    assert versions[0] == versions[1] != versions[2]


def test_a_version_depends_on_names_and_values() -> None:
    linear = torch.nn.Linear(2, 2)
    before = weights_version(linear)
    assert weights_version(torch.nn.Sequential(linear)) != before
    with torch.no_grad():
        linear.bias[0] += 1
    assert weights_version(linear) != before


# ---- specs, and what is missing ------------------------------------------------------------------


def test_a_spec_may_name_the_weights(tiny_clip_model: Path, tiny_open_clip: Path) -> None:
    images = to_batch(pictures())
    alone = load_reward(f"pickscore:{tiny_clip_model}")(images, PROMPTS)
    clip = load_reward(f"clip:tiny-clip:{tiny_open_clip}")(images, PROMPTS)
    both = load_reward(f"0.5*pickscore:{tiny_clip_model} + 2*clip:tiny-clip:{tiny_open_clip}")
    torch.testing.assert_close(both(images, PROMPTS), 0.5 * alone + 2 * clip)
    assert both.version  # type: ignore[attr-defined]


def test_a_path_may_hold_a_plus(tiny_head: Path, tiny_open_clip: Path) -> None:
    reward = load_reward(f"aesthetic:{tiny_head}", clip=f"tiny-clip:{tiny_open_clip}")
    assert reward.name == "aesthetic"


def test_the_sum_has_another_version_with_other_weights(tiny_clip_model: Path) -> None:
    spec = f"1*pickscore:{tiny_clip_model}+mini"
    one, two = load_reward(spec), load_reward("1*oracle+mini")
    assert one.version != two.version  # type: ignore[attr-defined]
    assert one.version == load_reward(spec).version  # type: ignore[attr-defined]


def test_a_folder_with_an_open_clip_config_is_loaded() -> None:
    from fifa.rewards.mini import WEIGHTS, MiniReward

    images = to_batch(pictures(32, 32))
    prompts = ["a red circle", "a blue square", "a star"]
    mini = MiniReward()
    clip = load_reward(f"clip:{WEIGHTS}")
    scale = float(mini.model.logit_scale.exp()) / 100
    # The mini reward resizes in floating point, this one through 8 bits.
    torch.testing.assert_close(
        mini(images, prompts), scale * clip(images, prompts), rtol=5e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("pickscore:./none", "./none is no folder with config.json"),
        ("hpsv2:./none.pt", "there are no weights at ./none.pt"),
        ("imagereward:./none", "there are no weights at ./none"),
        ("clip:ViT-B-99:openai", "is no open_clip model"),
        ("clip:ViT-B-32:nobody", "neither a file nor published weights of ViT-B-32"),
        ("clip:ViT-B-32", "allowed are model:tag"),
        ("oracle:./x", "unexpected keyword argument 'path'"),
    ],
)
def test_what_is_missing_is_one_sentence(spec: str, part: str) -> None:
    with pytest.raises(InputError, match=re.escape(part)) as caught:
        load_reward(spec)
    assert "\n" not in str(caught.value)


def test_offline_says_what_to_download(tmp_path: Path) -> None:
    program = (
        "from fifa import load_reward, InputError\n"
        "for name in ('pickscore', 'hpsv2', 'hpsv2.1', 'imagereward', 'clip', 'aesthetic'):\n"
        "    try: load_reward(name)\n"
        "    except InputError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 6, result.stdout
    assert "ERROR" not in result.stderr
    for line, what in zip(
        lines,
        (
            "hf download yuvalkirstain/PickScore_v1`",
            "hf download xswu/HPSv2 HPS_v2_compressed.pt`",
            "hf download xswu/HPSv2 HPS_v2.1_compressed.pt`",
            "hf download THUDM/ImageReward ImageReward.pt`",
            "hf download timm/vit_large_patch14_clip_224.openai`",
            "hf download trl-lib/ddpo-aesthetic-predictor aesthetic-model.pth`",
        ),
        strict=True,
    ):
        assert what in line


def test_a_checkpoint_of_another_network_is_one_sentence(
    tiny_open_clip: Path, tiny_head: Path, tmp_path: Path, tiny_clip_model: Path
) -> None:
    cases = {
        f"imagereward:{tiny_head}": "is no ImageReward checkpoint",
        f"aesthetic:{tiny_open_clip}": "holds no aesthetic head",
    }
    for spec, part in cases.items():
        with pytest.raises(InputError, match=part):
            load_reward(spec)
    with pytest.raises(InputError, match="cannot load tiny-clip"):
        load_reward("hpsv2", path=tiny_head, model="tiny-clip")
    (tmp_path / "cut.pt").write_bytes(tiny_head.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot read the weights"):
        load_reward(f"aesthetic:{tmp_path / 'cut.pt'}")
    with pytest.raises(InputError, match=r"holds none of ImageReward\.pt"):
        load_reward(f"imagereward:{tiny_clip_model / 'vocabulary'}")


def test_an_incomplete_clip_model_is_refused(tiny_clip_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in tiny_clip_model.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tiny_clip_model / "model.safetensors")
    del weights["logit_scale"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights are missing .* first logit_scale"):
        load_reward(f"pickscore:{tmp_path}")


def test_a_head_of_another_width_is_refused(tiny_open_clip: Path, tmp_path: Path) -> None:
    torch.save(linear_head(24).state_dict(), tmp_path / "head.pth")
    with pytest.raises(InputError, match=r"reads 24 features, .* has 16"):
        load_reward(f"aesthetic:{tmp_path / 'head.pth'}", clip=f"tiny-clip:{tiny_open_clip}")


def test_every_reward_says_what_it_is() -> None:
    told = describe_rewards()
    assert len(told) == len(REWARDS)
    assert all(line.scores.endswith(".") and line.needs and line.source for line in told)
    by_name = dict(zip(REWARDS, told, strict=True))
    assert by_name["pickscore"].differentiable
    assert not by_name["jpeg_compressibility"].differentiable
    assert by_name["imagereward"].source == "ImageReward, arXiv 2304.05977"


def test_the_command_lists_every_reward() -> None:
    result = CliRunner().invoke(app, ["rewards"])
    assert result.exit_code == 0, result.exception
    lines = [line.split("\t") for line in result.output.splitlines()]
    assert lines[1] == ["name", "scores", "needs", "gradient", "source"]
    assert [line[0] for line in lines[2:]] == list(REWARDS)
    assert {line[0] for line in lines[2:] if "/" in line[2] or ":" in line[2]} == set(NAMES)


def test_a_pass_notices_other_weights(
    tiny_head: Path, tiny_open_clip: Path, tmp_path: Path
) -> None:
    from fifa.scoring import ScoreConfig, read_manifest, score

    data, out, file = write_pairs(tmp_path / "a.parquet"), tmp_path / "out", tmp_path / "head.pth"
    file.write_bytes(tiny_head.read_bytes())
    config = ScoreConfig(
        data=data,
        out=out,
        reward=f"aesthetic:{file}",
        reward_args={"clip": f"tiny-clip:{tiny_open_clip}"},
        limit=8,
    )
    score(config)
    assert read_manifest(out)["pass"]["reward"] == f"aesthetic:{file}"
    head = torch.load(file)
    head["layers.7.bias"] += 1
    torch.save(head, file)
    with pytest.raises(InputError, match="reward_version"):
        score(config)

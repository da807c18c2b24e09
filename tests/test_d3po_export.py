"""What others load: the same pictures as the trained policy, whoever's names the weights have."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import diffusers
import pytest
import torch
from conftest import build_tiny_sd
from original_names import one_file
from tiny_pipelines import save, sdxl

from d3po.export import FORMATS, KOHYA_FILE, SINGLE_FILE, export
from d3po.export.card import last_evaluation, model_card
from d3po.export.original import open_clip_names, original_names, unet_names
from d3po.families import FamilyConfig, load_family
from d3po.generate import SamplerConfig, generate, independent_orders
from d3po.policy import Policy, PolicyConfig
from d3po.run_folder import RunFolder
from d3po.sampling import image_noise
from fifa.config import InputError

SETTINGS = {"model": "tiny", "method": "d3po", "objective.beta": 0.1, "run.seed": 3}
PROMPT = "a red circle above a star"
SAMPLER = SamplerConfig(steps=4, eta=0.0, guidance=3.0)


def trained(
    model: Path, method: str, ema: float | None = None, family: FamilyConfig | None = None
) -> Policy:
    """A policy of rank 3 and alpha 6 whose weights have moved."""
    config = PolicyConfig(method=method, rank=3, alpha=6, ema_decay=ema)
    policy = Policy(load_family(model, config=family), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.trainable():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return policy


def painted(policy: Policy) -> torch.Tensor:
    """(1, 3, H, W): a picture of this project's own sampler."""
    orders = independent_orders([PROMPT], 1, 5, [0])
    (made,) = generate(policy.family, policy.bare, SAMPLER, orders)
    return made.images


def painted_by_diffusers(pipe: Any, shape: tuple[int, int, int]) -> torch.Tensor:
    """The same picture by diffusers' pipeline: same start, steps, guidance, no noise on the way."""
    from diffusers import DDIMScheduler

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    (order,) = independent_orders([PROMPT], 1, 5, [0])
    return pipe(
        PROMPT,
        num_inference_steps=SAMPLER.steps,
        guidance_scale=SAMPLER.guidance,
        eta=SAMPLER.eta,
        latents=image_noise([order.start], shape, -1),
        output_type="pt",
    ).images


def loaded(model: Path, form: str, folder: Path) -> Any:
    """diffusers' pipeline with the exported files, loaded as the card says."""
    from diffusers import AutoModel, DiffusionPipeline, StableDiffusionPipeline

    if form == "merged":
        return DiffusionPipeline.from_pretrained(folder)
    if form == "single-file":
        file = folder / SINGLE_FILE
        return StableDiffusionPipeline.from_single_file(
            file, config=str(model), local_files_only=True
        )
    if form == "denoiser":
        unet = AutoModel.from_pretrained(str(folder))
        return DiffusionPipeline.from_pretrained(model, unet=unet)
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(folder, **({"weight_name": KOHYA_FILE} if form == "kohya" else {}))
    return pipe


@pytest.fixture(scope="module")
def second_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model laid out like SD 2.x: matrices around the attention, OpenCLIP's text encoder."""
    from diffusers import UNet2DConditionModel

    folder = build_tiny_sd(
        tmp_path_factory.mktemp("models") / "tiny-sd2", prediction_type="v_prediction"
    )
    config = UNet2DConditionModel.load_config(folder / "unet")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        made = UNet2DConditionModel.from_config(
            {**config, "use_linear_projection": True, "block_out_channels": (8, 16, 16)}
            | {
                "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                "layers_per_block": 2,
            }
        )
    made.save_pretrained(folder / "unet")
    return folder


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("form", FORMATS)
def test_what_diffusers_loads_paints_the_policys_picture(
    tiny_sd: Path, tmp_path: Path, form: str, method: str
) -> None:
    policy, out = trained(tiny_sd, method), tmp_path / "out"
    if method == "full" and form in ("lora", "kohya"):
        with pytest.raises(InputError, match="there is no LoRA; export it as merged"):
            export(policy, RunFolder(tmp_path / "run"), SETTINGS, form, out)
        assert list(tmp_path.iterdir()) == []
        return
    export(policy, RunFolder(tmp_path / "run"), SETTINGS, form, out)
    wanted = painted(policy)
    with policy.reference():
        assert (painted(policy) - wanted).abs().max() > 0.02  # the training is seen
    found = painted_by_diffusers(loaded(tiny_sd, form, out), policy.family.latent_shape)
    assert (found - wanted).abs().max() < 1e-3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing temporary stays


@pytest.mark.parametrize("form", ["merged", "denoiser"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_run_of_one_file_is_exported_too(
    kind: str, form: str, tiny_sd: Path, tmp_path: Path
) -> None:
    from diffusers import AutoModel, DiffusionPipeline

    folder = tiny_sd if kind == "sd" else save(sdxl, tmp_path / "sdxl")
    file = one_file(DiffusionPipeline.from_pretrained(folder), tmp_path / "model.safetensors")
    configs = shutil.copytree(
        folder, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors")
    )
    described = FamilyConfig(description=str(configs))
    policy, out = trained(file, "lora", family=described), tmp_path / "out"
    export(policy, RunFolder(tmp_path / "run"), {**SETTINGS, "model": str(file)}, form, out)
    if form == "merged":
        pipe = DiffusionPipeline.from_pretrained(out)
    else:
        kinds = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
        card = (out / "README.md").read_text()
        opened = f"{kinds[kind]}.from_single_file({str(file)!r}, config={str(configs)!r}"
        assert f"pipe = {opened}, unet=AutoModel.from_pretrained('.'))" in card
        assert f"from diffusers import AutoModel, {kinds[kind]}" in card
        opener = getattr(diffusers, kinds[kind]).from_single_file
        pipe = opener(str(file), config=str(configs), unet=AutoModel.from_pretrained(str(out)))
    found = painted_by_diffusers(pipe, policy.family.latent_shape)
    assert (found - painted(policy)).abs().max() < 1e-3


def test_a_single_file_of_the_second_version(second_version: Path, tmp_path: Path) -> None:
    policy, out = trained(second_version, "lora"), tmp_path / "out"
    export(policy, RunFolder(tmp_path / "run"), SETTINGS, "single-file", out)
    pipe = loaded(second_version, "single-file", out)
    found = painted_by_diffusers(pipe, policy.family.latent_shape)
    assert (found - painted(policy)).abs().max() < 1e-3


def test_kohyas_names_and_the_true_alpha(tiny_sd: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    export(trained(tiny_sd, "lora"), RunFolder(tmp_path / "run"), SETTINGS, "kohya", tmp_path / "o")
    stored = load_file(tmp_path / "o" / KOHYA_FILE)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert stored[f"{layer}.lora_down.weight"].shape[0] == 3
    assert stored[f"{layer}.lora_up.weight"].shape[1] == 3
    assert {float(v) for k, v in stored.items() if k.endswith(".alpha")} == {6.0}
    assert {k.rpartition(".")[2] for k in stored} == {"weight", "alpha"}


def test_averaged_and_live_weights_can_be_chosen(tiny_sd: Path, tmp_path: Path) -> None:
    policy = trained(tiny_sd, "lora", ema=0.5)  # the average still is the start
    with policy.averaged():
        export(policy, RunFolder(tmp_path / "run"), SETTINGS, "lora", tmp_path / "averaged")
        start = painted(policy)
    export(policy, RunFolder(tmp_path / "run"), SETTINGS, "lora", tmp_path / "live")
    shape = policy.family.latent_shape
    found = painted_by_diffusers(loaded(tiny_sd, "lora", tmp_path / "averaged"), shape)
    assert (found - start).abs().max() < 1e-3
    found = painted_by_diffusers(loaded(tiny_sd, "lora", tmp_path / "live"), shape)
    assert (found - painted(policy)).abs().max() < 1e-3
    assert (start - painted(policy)).abs().max() > 0.02


# ---- original names, against names known from the published checkpoints -------------------------

PUBLISHED = {
    # of the SD 1.x files, which everyone's converters look for
    "input_blocks.1.0.in_layers.0.weight": "down_blocks.0.resnets.0.norm1.weight",
    "input_blocks.1.1.proj_in.weight": "down_blocks.0.attentions.0.proj_in.weight",
    "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
    "input_blocks.4.0.skip_connection.weight": "down_blocks.1.resnets.0.conv_shortcut.weight",
    "input_blocks.11.0.out_layers.3.bias": "down_blocks.3.resnets.1.conv2.bias",
    "middle_block.0.emb_layers.1.bias": "mid_block.resnets.0.time_emb_proj.bias",
    "middle_block.1.norm.weight": "mid_block.attentions.0.norm.weight",
    "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
    "output_blocks.5.2.conv.weight": "up_blocks.1.upsamplers.0.conv.weight",
    "output_blocks.11.0.skip_connection.weight": "up_blocks.3.resnets.2.conv_shortcut.weight",
    "output_blocks.11.1.transformer_blocks.0.norm1.weight": "up_blocks.3.attentions.2"
    ".transformer_blocks.0.norm1.weight",
    "time_embed.2.bias": "time_embedding.linear_2.bias",
}


def test_a_full_size_unet_gets_the_published_names() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)  # the defaults are SD 1.x
    named = unet_names(unet.state_dict(), unet.config)
    assert len(named) == len(unet.state_dict()) == 686
    own = {id(weight): name for name, weight in unet.state_dict(keep_vars=True).items()}
    back = {
        theirs: own[id(weight)]
        for theirs, weight in unet_names(unet.state_dict(keep_vars=True), unet.config).items()
    }
    assert {theirs: back[theirs] for theirs in PUBLISHED} == PUBLISHED


def test_sdxl_files_are_read_back_by_diffusers(tmp_path: Path) -> None:
    """The second text encoder and the UNet's added embedding, as diffusers' reader sees them."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_open_clip_checkpoint,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=40,
    )
    theirs = unet_names(unet.state_dict(), unet.config)
    read = convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{k}": v for k, v in theirs.items()}, dict(unet.config)
    )
    assert_same(read, unet.state_dict())
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=16,
        )
    )
    stored = {f"x.{k}": v for k, v in open_clip_names(text.state_dict()).items()}
    assert_same(convert_open_clip_checkpoint(text, stored, prefix="x."), text.state_dict())


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_pipeline_without_original_names_is_refused() -> None:
    with pytest.raises(InputError, match=r"object has no single-file layout here, known are"):
        original_names(object())


# ---- the card -----------------------------------------------------------------------------------


def test_what_is_there_is_not_overwritten_and_nothing_is_half_written(
    tiny_sd: Path, tmp_path: Path
) -> None:
    policy, run = trained(tiny_sd, "full"), RunFolder(tmp_path / "run")
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="is there already"):
        export(policy, run, SETTINGS, "merged", tmp_path / "there")
    with pytest.raises(InputError, match="unknown format 'merge'; did you mean 'merged'"):
        export(policy, run, SETTINGS, "merge", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def evaluated(run: RunFolder) -> None:
    judge = {
        "policy": 2.0,
        "reference": 1.5,
        "difference": 0.5,
        "difference_interval": [0.25, 0.75],
        "win_rate": 0.625,
    }
    for row in (
        {"kind": "eval", "step": 0, "judges": {}},
        {"kind": "eval", "step": 9, "judges": {"oracle": judge}},
        {"kind": "update", "step": 10},
    ):
        run.append(run.metrics, row)


def test_the_card_tells_the_last_evaluation_and_shows_its_pictures(
    tiny_sd: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    assert last_evaluation(run) is None
    run.samples.mkdir(parents=True)
    evaluated(run)
    (run.samples / "step-000009.png").write_bytes(b"the grid")
    export(trained(tiny_sd, "lora"), run, SETTINGS, "lora", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| oracle | 1.5 | 2 | +0.5 (+0.25 to +0.75) | 62.5% |" in card
    assert "At step 9" in card
    assert "| objective.beta | 0.1 |" in card
    assert "](before_after.png)" in card
    assert (tmp_path / "out" / "before_after.png").read_bytes() == b"the grid"
    assert "pipe = DiffusionPipeline.from_pretrained('tiny')\npipe.load_lora_weights('.')" in card
    assert card.startswith("---\nbase_model: tiny\nlibrary_name: diffusers\n")
    assert "not evaluated" in model_card(SETTINGS, None, "")


def test_the_card_tells_of_no_evaluation_later_than_the_weights(
    tiny_sd: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    evaluated(run)
    found = {step: last_evaluation(run, step) for step in (8, 9, None)}
    assert {step: row and row["step"] for step, row in found.items()} == {8: 0, 9: 9, None: 9}
    export(trained(tiny_sd, "lora"), run, SETTINGS, "lora", tmp_path / "out", 8)
    assert "At step 0," in (tmp_path / "out" / "README.md").read_text()


def test_a_base_model_that_the_hub_cannot_know_is_no_metadata(tmp_path: Path) -> None:
    for local in ("mini", str(tmp_path)):
        assert "base_model:" not in model_card({**SETTINGS, "model": local}, None, "")


def test_the_card_tells_what_was_learned_from(tmp_path: Path) -> None:
    own = {"online.prompts": "miniworld:train", "online.judges": ("oracle", "mini")}
    told = model_card({**SETTINGS, **own}, None, "")
    assert "its own pictures of miniworld:train, judged by oracle, mini." in told

    data = tmp_path / "kept.parquet"
    assert "Trained on the pairs of `kept.parquet`." in model_card(
        {**SETTINGS, "offline.data": str(data)}, None, ""
    )
    selection = {
        "settings": {"k": "0.5%", "method": "importance", "alpha": 0.5, "scores": "private/place"},
        "scored_with": {"reward": "mini"},
        "kept": 100,
        "eligible": 19000,
        "agreement": {"all": 0.6, "kept": 0.9},
        "prompts": {"all": 9000, "kept": 100},
    }
    (tmp_path / "selection.json").write_text(json.dumps(selection))
    told = model_card({**SETTINGS, "offline.data": str(data)}, None, "")
    assert "| kept | 100 of 19,000 eligible pairs |" in told
    assert "| margin of | mini |" in told
    assert "| agrees with people | 90.0% of what was kept, 60.0% of all |" in told
    assert "| select.alpha | 0.5 |" in told
    assert "private/place" not in told


# ---- the Hub ------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    """A server on loopback that speaks the Hub's upload protocol: (address, files committed)."""
    files: dict[str, bytes] = {}

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("authorization") != "Bearer hf_right":
                self._answer({"error": "Invalid username or password."}, 401)
            elif self.path == "/api/repos/create":
                name = json.loads(body)["name"]
                self._answer({"url": f"{address}/someone/{name}", "id": f"someone/{name}"})
            elif "/preupload/" in self.path:
                asked = [file["path"] for file in json.loads(body)["files"]]
                mode = {"uploadMode": "regular", "shouldIgnore": False}
                self._answer({"files": [{"path": path, **mode} for path in asked]})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                url = f"{address}/someone/x/commit/{'0' * 40}"
                self._answer({"commitOid": "0" * 40, "commitUrl": url, "success": True})
            else:
                self._answer({"warnings": [], "errors": []})

        def do_GET(self) -> None:
            self._answer({"id": "someone/x", "sha": "0" * 40, "siblings": []})

        def _answer(self, value: dict[str, Any], status: int = 200) -> None:
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield address, files
    server.shutdown()
    server.server_close()


@pytest.fixture
def pushed(tmp_path: Path) -> Callable[[str, str], str]:
    """pushed(endpoint, token): what a process of its own says that pushes a small folder."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlibrary_name: diffusers\n---\ncard\n")
    (folder / "w.safetensors").write_bytes(b"weights")
    script = (
        "import sys; from pathlib import Path; from d3po.export.hub import push\n"
        "from fifa.config import InputError\n"
        "try: print(push(Path(sys.argv[1]), 'someone/x'))\n"
        "except InputError as error: print(error)"
    )

    def run(endpoint: str, token: str) -> str:
        own = {"HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "home")}
        own |= {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder)],
            env={**kept, **own},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip()

    return run


def test_a_push_arrives(
    hub: tuple[str, dict[str, bytes]], pushed: Callable[[str, str], str]
) -> None:
    address, files = hub
    assert pushed(address, "hf_right") == f"{address}/someone/x"
    assert sorted(files) == ["README.md", "w.safetensors"]
    assert files["w.safetensors"] == b"weights"


def test_a_push_that_is_refused_says_why(
    hub: tuple[str, dict[str, bytes]], pushed: Callable[[str, str], str]
) -> None:
    address, files = hub
    told = pushed(address, "hf_wrong")
    assert "someone/x could not be reached" in told
    assert "401" in told
    assert "HF_TOKEN" in told
    assert files == {}

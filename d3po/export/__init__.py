"""A run as files that others load, with a model card: LoRA, networks, pipelines, one big file.

`card` writes the README, `original` knows the names that weights had before diffusers, `hub`
sends a finished folder away. Whatever the format, what it holds is the policy inside the block
that `export` is called from: averaged weights inside `policy.averaged()`, the live ones outside.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from d3po.export.card import last_evaluation, model_card
from d3po.export.original import original_names
from d3po.policy import Policy
from d3po.run_folder import RunFolder
from fifa.config import InputError, atomic_path, unknown

KOHYA_FILE = "lora.safetensors"
SINGLE_FILE = "model.safetensors"


def export(
    policy: Policy,
    run: RunFolder,
    settings: Mapping[str, Any],
    form: str,
    out: Path,
    step: int | None = None,
) -> None:
    """Write the folder `out` as a whole: the weights in one of FORMATS, and README.md, the card.

    `settings` are those of the run, dotted key to value; `step` is that of the weights, if it is
    known: the card then tells of no later evaluation. Raises InputError for an unknown format,
    if the policy has no such thing, or if `out` is there already.
    """
    check_target(form, out)
    with atomic_path(out) as folder:
        folder.mkdir()
        FORMATS[form](policy, folder)
        evaluation = last_evaluation(run, step)
        picture = _before_after(run, evaluation, folder)
        names = {**_opening(policy, settings["model"]), "part": policy.family.denoiser_folder}
        card = model_card(settings, evaluation, LOADING[form].format(**names), picture)
        (folder / "README.md").write_text(card, encoding="utf-8")


def check_target(form: str, out: Path) -> None:
    """What can be said before anything is loaded; InputError as `export`."""
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if out.exists():
        raise InputError(f"{out} is there already; choose another folder or remove it")


def _before_after(run: RunFolder, evaluation: Mapping[str, Any] | None, folder: Path) -> str | None:
    """Copy the picture grid of the evaluation beside the card; its name, if there is one."""
    if evaluation is None:
        return None
    drawn = run.samples / f"step-{evaluation['step']:06d}.png"
    if not drawn.is_file():
        return None
    shutil.copyfile(drawn, folder / "before_after.png")
    return "before_after.png"


# ---- formats ------------------------------------------------------------------------------------


def export_lora(policy: Policy, folder: Path) -> None:
    """`pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(folder)`; knows its alpha."""
    _check_lora(policy)
    policy.save(folder)


def export_kohya(policy: Policy, folder: Path) -> None:
    """`lora_unet_*.lora_down.weight`, `.lora_up.weight`, `.alpha`: kohya, ComfyUI, A1111.

    diffusers' converter writes the rank as alpha; the true one is put in its place.
    """
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file
    from torch import tensor

    _check_lora(policy)
    part = policy.family.denoiser_folder
    if part != "unet":
        raise InputError(
            f"kohya's names are for UNets, this model's denoiser is a {part}; ComfyUI loads the "
            "diffusers LoRA of such models as it is: export it as lora"
        )
    with TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as trained:
        policy.save(trained)
        weights, metadata = policy.family.load_lora(Path(trained))
    named = convert_state_dict_to_kohya({f"{part}.{name}": w for name, w in weights.items()})
    alpha = float(metadata["lora_alpha"])
    stored = {k: tensor(alpha) if k.endswith(".alpha") else v for k, v in named.items()}
    stored = {k: v.detach().cpu().contiguous() for k, v in stored.items()}
    save_file(stored, folder / KOHYA_FILE, {"ss_network_dim": str(metadata["r"])})


def export_denoiser(policy: Policy, folder: Path) -> None:
    """The denoiser alone, adapters merged in, for `from_pretrained(folder)` of its class."""
    getattr(_merged(policy, folder.parent), policy.family.denoiser_folder).save_pretrained(folder)


def export_merged(policy: Policy, folder: Path) -> None:
    """A whole pipeline, for `DiffusionPipeline.from_pretrained(folder)`."""
    _merged(policy, folder.parent).save_pretrained(folder)


def export_single_file(policy: Policy, folder: Path) -> None:
    """One checkpoint with the names of the original code, for ComfyUI, A1111, `from_single_file`.

    Raises InputError for a pipeline whose original names are not known here.
    """
    from safetensors.torch import save_file

    pipe = _merged(policy, folder.parent)
    stored = {name: w.detach().cpu().contiguous() for name, w in original_names(pipe).items()}
    save_file(stored, folder / SINGLE_FILE, {"format": "pt"})


FORMATS: dict[str, Callable[[Policy, Path], None]] = {
    "lora": export_lora,
    "kohya": export_kohya,
    "denoiser": export_denoiser,
    "merged": export_merged,
    "single-file": export_single_file,
}

_BASE = "from diffusers import {kind}\n\n"
LOADING: dict[str, str] = {
    # how a reader of the card loads it, see `_opening`; {part} is the name of the base's denoiser
    "lora": _BASE + "pipe = {opened})\npipe.load_lora_weights('.')",
    "kohya": _BASE + "pipe = {opened})\n"
    f"pipe.load_lora_weights('.', weight_name='{KOHYA_FILE}')  # or ComfyUI's models/loras",
    "denoiser": "from diffusers import AutoModel, {kind}\n\n"
    "pipe = {opened}, {part}=AutoModel.from_pretrained('.'))",
    "merged": "from diffusers import DiffusionPipeline\n\n"
    "pipe = DiffusionPipeline.from_pretrained('.')",
    "single-file": "from diffusers import StableDiffusionPipeline as Pipeline  # or XL\n\n"
    f"pipe = Pipeline.from_single_file('{SINGLE_FILE}', config={{described!r}})\n"
    "# or ComfyUI's models/checkpoints",
}


def _opening(policy: Policy, model: str) -> dict[str, str]:
    """How the card opens the base model: a folder or Hub id, or one file and its description."""
    source = policy.family.source
    if source.description is None:
        opened = f"DiffusionPipeline.from_pretrained({model!r}"
        return {"kind": "DiffusionPipeline", "opened": opened, "described": model}
    kind, described = str(source.index["_class_name"]), source.description
    opened = f"{kind}.from_single_file({model!r}, config={described!r}"
    return {"kind": kind, "opened": opened, "described": described}


def _check_lora(policy: Policy) -> None:
    if policy.config.method != "lora":
        raise InputError(
            "this run trained the whole network, there is no LoRA; export it as merged, denoiser "
            "or single-file"
        )


def _merged(policy: Policy, nearby: Path) -> Any:
    """The pipeline of the base model with what was learned put into its denoiser."""
    family = policy.family
    one_file = family.source.description is not None
    # a file of SD3 may be without T5, as it was then opened
    lacks = one_file and getattr(family, "text_encoder_3", family) is None
    pipe = family.source.pipeline(("text_encoder_3", "tokenizer_3") if lacks else ())
    with TemporaryDirectory(prefix=".tmp-", dir=nearby) as trained:
        policy.save(trained)
        if policy.config.method == "lora":
            pipe.load_lora_weights(trained)
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        else:
            part = policy.family.denoiser_folder
            whole = type(getattr(pipe, part)).from_pretrained(Path(trained) / part)
            pipe.register_modules(**{part: whole})
    return pipe

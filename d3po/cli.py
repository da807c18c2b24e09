"""`d3po`: the demo, training, sampling; evaluate, report on and export a run."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from fifa.config import InputError, write_atomic
from fifa.terminal import run_app

app = typer.Typer(
    help="Preference fine-tuning of diffusion models. `d3po demo` shows all of it in minutes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PROMPTS = "miniworld:train, miniworld:heldout, or a text file with one prompt a line."
RunPath = Annotated[Path, typer.Argument(help="Run folder, as train.py wrote it.")]
Seed = Annotated[int, typer.Option(help="Seed of all noise.", min=0)]
Steps = Annotated[int | None, typer.Option(help="Denoising steps; default as trained.", min=1)]
Eta = Annotated[
    float | None,
    typer.Option(help="0 deterministic, 1 like DDPM; default as trained.", min=0, max=1),
]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale, 1 is none; default as trained.", min=0)
]


def _placed(device: str) -> str:
    """The device meant by "auto"."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


Device = Annotated[
    str,
    typer.Option(
        callback=_placed, help="cpu, cuda, cuda:1, mps, ...; auto: a CUDA GPU where there is one."
    ),
]


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder; an unfinished demo in it is continued.")
    ] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Another seed is another demo.", min=0)] = 0,
    quick: Annotated[bool, typer.Option(help="Tiny sizes: it runs, it learns nothing.")] = False,
) -> None:
    """Do the main job: pairs, filter, Diffusion-DPO and D3PO, a report with pictures."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # all that is loaded is local
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the trainings end too
    from d3po.demo import run_demo

    with _bars() as show:
        found = run_demo(out, seed, quick, show, _say)
    for name, run in found["runs"].items():
        print(f"{name}: {run['verdict']}")
        for warning in run["warnings"]:
            print(f"  {warning}")
    print(f"pictures, curves and numbers are in {found['report']}")


@app.command()
def train(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG.yaml | KEY=VALUE", help="File, then overrides."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List every setting.")] = False,
) -> None:
    """Train in one process; the same command again resumes. For more: accelerate launch."""
    from d3po import recipe
    from fifa.config import to_yaml

    if keys:
        print_keys()
        return
    if not settings:
        raise InputError("name a config, such as configs/mini_d3po_alignment.yaml, or key=value")
    config = recipe.load(*_file_and_overrides(settings))
    print(f"{to_yaml(config)}\n{recipe.arithmetic(config)}", flush=True)
    if not dry_run:
        recipe.train(config)


def print_keys() -> None:
    """Every setting of a training: key, default, type, meaning."""
    from d3po.recipe import TrainConfig
    from fifa.config import describe

    for setting in describe(TrainConfig):
        print(f"{setting.key} = {setting.default}  ({setting.type})\n    {setting.description}")


@app.command()
def preflight(
    settings: Annotated[
        list[str], typer.Argument(metavar="CONFIG.yaml | KEY=VALUE", help="File, then overrides.")
    ],
    memory: Annotated[
        float | None, typer.Option(help="GB of the device; default: of this machine.", min=0)
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(help="Of a GPU that is not here: matrix TFLOP/s (A100 bf16: 312).", min=0),
    ] = None,
    processes: Annotated[int, typer.Option(help="Devices that train together.", min=1)] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers here too.")
    ] = None,
) -> None:
    """Predict memory, time and disk of a training from config files alone: no weights are read."""
    from d3po import preflight as ahead
    from d3po import recipe

    config = recipe.load(*_file_and_overrides(settings))
    device, rates, process = ahead.place(tflops, config.run.mixed_precision)
    found = ahead.forecast(config, device, rates, process, processes)
    available = ahead.available_memory(device) if memory is None else memory * ahead.GB
    print(ahead.told(found, None if tflops and memory is None else available))
    if json_file is not None:
        write_atomic(json_file, found.to_json())


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="A run folder, mini, a diffusers folder, a Hub id.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    prompts: Annotated[str | None, typer.Option(help=PROMPTS)] = None,
    count: Annotated[int, typer.Option(help="How many of --prompts.", min=1)] = 8,
    images: Annotated[int, typer.Option(help="Pictures of each prompt.", min=1)] = 4,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
    before: Annotated[bool, typer.Option(help="The reference of the run, not its policy.")] = False,
    seed: Seed = 0,
    steps: Steps = None,
    eta: Eta = None,
    guidance: Guidance = None,
    device: Device = "auto",
) -> None:
    """Draw pictures; equal seeds mean equal noise, before and after training."""
    from d3po.families import load_family
    from d3po.generate import SamplerConfig, generate, independent_orders
    from d3po.recipe import load_run, read_prompts
    from fifa.images import encode_png, grid, to_uint8

    texts = list(prompt or []) + (read_prompts(prompts, count, seed)[:count] if prompts else [])
    if not texts:
        raise InputError("nothing to draw: give --prompt 'a red circle' or --prompts FILE")
    if (Path(model) / "config.yaml").is_file():
        config, policy = load_run(model, device)
        family, sampler = policy.family, config.sampler
        weights = policy.reference() if before else nullcontext()
    else:
        family, sampler, weights = load_family(model, device=device), SamplerConfig(), nullcontext()
    sampler = _changed(sampler, steps=steps, eta=eta, guidance=guidance)
    orders = independent_orders(texts, images, seed, range(len(texts)))
    tiles: list[Any] = []
    with weights, _progress("drawing", len(orders)) as advance:
        for part in generate(family, family.denoiser, sampler, orders):
            tiles += list(to_uint8(part.images))
            advance(len(tiles))
    for i, tile in enumerate(tiles):
        write_atomic(out / f"{i // images:04d}-{i % images}.png", encode_png(tile))
    labels = [order.prompt for order in orders]
    write_atomic(out / "grid.png", encode_png(grid(tiles, images, 4, labels, 2)))
    print(f"{len(tiles)} pictures and grid.png are in {out}")


@app.command()
def evaluate(
    run: RunPath,
    prompts: Annotated[str | None, typer.Option(help=PROMPTS + " Default as trained.")] = None,
    count: Annotated[int | None, typer.Option(help="How many; default as trained.", min=1)] = None,
    images: Annotated[int | None, typer.Option(help="Pictures of each prompt.", min=1)] = None,
    judges: Annotated[
        str | None, typer.Option(help="Rewards, comma-separated, the one trained on first.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all noise.", min=0)] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file; default RUN/evaluation.json.")
    ] = None,
    steps: Steps = None,
    eta: Eta = None,
    guidance: Guidance = None,
    device: Device = "auto",
) -> None:
    """Compare a run's policy with its reference: equal prompts, equal seeds, several judges."""
    from d3po.evaluate import evaluate_policy, sentence
    from d3po.judging import Rewards
    from d3po.recipe import evaluation_prompts, load_run
    from fifa.images import encode_png

    config, policy = load_run(run, device)
    asked = [name.strip() for name in judges.split(",")] if judges else None
    changes = {"prompts": prompts, "count": count, "images": images, "seed": seed, "judges": asked}
    settings = _changed(config.eval, **changes)
    texts = evaluation_prompts(config.model_copy(update={"eval": settings}))
    if not texts:
        raise InputError(f"{run} was trained without eval.prompts; give --prompts")
    rewards = Rewards(device)(settings.judges)
    sampler = _changed(config.sampler, steps=steps, eta=eta, guidance=guidance)
    with _progress("drawing", 2 * len(texts) * settings.images) as advance:
        result, picture = evaluate_policy(settings, sampler, policy, rewards, texts, advance)
    out = run / "evaluation.json" if out is None else out
    write_atomic(out, result.to_json())
    for judge in result.judges:
        print(sentence(judge))
    if picture is not None:
        write_atomic(out.with_suffix(".png"), encode_png(picture))
    print(f"{result.prompts} prompts x {result.images} pictures; details are in {out}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    filtered: Annotated[
        Path | None, typer.Option("--filter", help="Folder that `fifa select` wrote, told of too.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Prompts to show of each run.", min=0)] = 9,
    images: Annotated[int, typer.Option(help="Pictures of each prompt.", min=1)] = 3,
    device: Device = "auto",
) -> None:
    """Write one HTML page about finished runs: pictures before and after, verdicts, curves."""
    from d3po.report import write_report

    with _bars() as show:
        write_report(
            runs,
            out,
            filtered,
            prompts,
            images,
            device,
            progress=lambda task, done, total: show(task, done, total, ""),
        )
    print(out)


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")],
    form: Annotated[
        str,
        typer.Option(
            "--to",
            "--format",
            help="lora, kohya (ComfyUI, A1111), merged (a whole pipeline), denoiser (its network "
            "alone), single-file (original names).",
        ),
    ] = "lora",
    live: Annotated[
        bool, typer.Option(help="Weights of the last checkpoint, not their average (EMA).")
    ] = False,
    repository: Annotated[
        str | None, typer.Option("--push", help="Also upload to the Hub: user/name.")
    ] = None,
    public: Annotated[bool, typer.Option(help="What is pushed is for all to see.")] = False,
) -> None:
    """Write a run's weights as others load them, with a model card."""
    from d3po.export import check_target
    from d3po.export import export as write
    from d3po.export.hub import push
    from d3po.recipe import load_run
    from d3po.run_folder import RunFolder, flatten

    check_target(form, out)
    config, policy = load_run(run, live=live)
    folder = RunFolder(run)
    write(policy, folder, flatten(config.model_dump()), form, out, folder.step_of_weights(live))
    print(f"{form} weights and a model card are in {out}")
    if repository is not None:
        print(f"pushed to {push(out, repository, private=not public)}")


def _file_and_overrides(settings: list[str]) -> tuple[str | None, list[str]]:
    files = [text for text in settings if "=" not in text]
    if len(files) > 1:
        raise InputError(f"one config file at most, got {', '.join(files)}")
    return files[0] if files else None, [text for text in settings if "=" in text]


def _changed(config: Any, **changes: Any) -> Any:
    """The settings with those that were given put in, checked again."""
    given = {key: value for key, value in changes.items() if value is not None}
    return type(config).model_validate({**config.model_dump(), **given})


Show = Callable[[str, int, int, str], None]  # task, done, total, a few words


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress of a single task."""
    with _bars() as show:
        yield lambda done: show(name, done, total, "")


@contextmanager
def _bars() -> Iterator[Show]:
    """A bar for each task on a terminal; in a pipe a line every few seconds."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich import progress
    from rich.console import Console
    from rich.table import Column

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn(
            "{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis")
        ),
    )
    console, out = Console(stderr=True), sys.stdout.isatty()
    with progress.Progress(*columns, console=console, redirect_stdout=out) as bar:
        tasks: dict[str, progress.TaskID] = {}

        def show(task: str, done: int, total: int, text: str) -> None:
            if task not in tasks:
                for old in bar.tasks:
                    bar.update(old.id, visible=not old.finished)
                tasks[task] = bar.add_task(task, text="")
            bar.update(tasks[task], completed=done, total=total, text=text)

        yield show


def _lines(every: float = 10.0) -> Show:
    """Plain lines on stderr: at the beginning and the end of a task, and now and then between."""
    told: dict[str, tuple[float, int]] = {}

    def show(task: str, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        last, before = told.get(task, (0.0, -1))
        finished = done == total and before != total
        if task in told and not finished and (now - last < every or done == before):
            return
        told[task] = (now, done)
        print(f"{task}: {done:,} of {total:,}  {text}".rstrip(), file=sys.stderr, flush=True)

    return show


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    """Entry point of the console script."""
    run_app(app)


if __name__ == "__main__":
    main()

"""The command line `fifa`: parse, one call, print. Defaults live in the settings classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fifa.reward_cli import reward_app
from fifa.terminal import File, Settings, config_of, progress_shown, run_app, share_text, table

if TYPE_CHECKING:
    from fifa.bench import Quarter
    from fifa.sweep import Point

app = typer.Typer(
    name="fifa",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Where preferences come from: score a preference data set, keep its best pairs.",
)

app.add_typer(reward_app, name="reward")


def main() -> None:
    """Entry point of the console script."""
    run_app(app)


@app.command(epilog="Example: `fifa world --rows 20000 --out runs/pairs`")
def world(
    out: Annotated[Path, typer.Option(help="Folder for the Parquet shards.")],
    rows: Annotated[int, typer.Option(help="Pairs to make.")],
    seed: Annotated[int | None, typer.Option(help="Another seed is another data set.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes.")] = None,
    pipeline: Annotated[
        str | None, typer.Option(help="Local diffusers folder that paints 5% of the images.")
    ] = None,
) -> None:
    """Make a preference data set of the mini world, of any size, without a download."""
    from fifa.miniworld.dataset import write_dataset

    given: dict[str, Any] = {"seed": seed, "workers": workers, "pipeline": pipeline}
    with progress_shown() as progress:
        shards = write_dataset(
            out,
            rows=rows,
            progress=lambda done, total: progress("painting and judging", done, total),
            **{key: value for key, value in given.items() if value is not None},
        )
    print(f"{rows:,} pairs in {len(shards)} shards of {out}")


@app.command(epilog="Example: `fifa convert jsonl pairs.jsonl --out runs/pairs`")
def convert(
    source: Annotated[str, typer.Argument(help="Kind of source, see `fifa sources`.")],
    path: Annotated[str, typer.Argument(help="File, folder, or name of a Hub data set.")],
    out: Annotated[Path, typer.Option(help="Folder for the table; continued if unfinished.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder that the paths of pictures start from.")
    ] = None,
    ties: Annotated[str | None, typer.Option(help="keep or drop.")] = None,
    check: Annotated[
        str | None, typer.Option(help="decode every picture, or look at the header only.")
    ] = None,
    config: File = None,
    settings: Settings = None,
) -> None:
    """Turn a public preference data set into a pair table that `fifa score` reads."""
    from fifa.sources.convert import REJECTED, ConvertConfig
    from fifa.sources.convert import convert as run

    given = {
        "source": source,
        "path": path,
        "out": out,
        "images": images,
        "ties": ties,
        "check": check,
    }
    chosen = config_of(ConvertConfig, config, given, settings)
    with progress_shown() as progress:
        counts = run(chosen, progress)
    print(
        f"{counts.written:,} pairs ({counts.ties:,} ties) of {counts.found:,} found, "
        f"in {counts.shards:,} shards of {out}"
    )
    for kind, count in sorted(counts.gone.items()):
        print(f"  set aside, {count:,}: {kind}")
    if counts.gone:
        print(f"reasons in {out / REJECTED}")


@app.command()
def sources() -> None:
    """List the kinds of data sets that `convert` reads, a line each."""
    from fifa.sources import described

    for kind, line in described():
        print(f"{kind:24}{line}")


@app.command(epilog="Example: `fifa score runs/pairs --out runs/scores --reward mini`")
def score(
    data: Annotated[
        Path,
        typer.Argument(help="Parquet file or folder, Pick-a-Pic v2 columns; or a list of prompts."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the scores; continued if unfinished.")],
    reward: Annotated[
        str | None, typer.Option(help="Proxy reward, see `fifa rewards`; none: text alone.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Judge of text quality: heuristic, local:..., openai:...")
    ] = None,
    embedder: Annotated[
        str | None, typer.Option(help="Prompts to vectors: tfidf, clip:..., clip_hf:..., ...")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Score only the first rows.")] = None,
    ray: Annotated[
        str | None, typer.Option(help="Ray cluster to score on: local, auto, or an address.")
    ] = None,
    config: File = None,
    settings: Settings = None,
) -> None:
    """Give every pair its margin, text quality and diversity; killed, it continues where it was.

    Several GPUs: `accelerate launch -m fifa.cli score ...`, or `--ray` for many machines.
    """
    from fifa.scoring import ScoreConfig, score_share
    from fifa.scoring import score as run
    from fifa.scoring.processes import launched_team

    given = {
        "data": data,
        "out": out,
        "reward": reward,
        "judge": judge,
        "embedder": embedder,
        "limit": limit,
        "ray": ray,
    }
    chosen = config_of(ScoreConfig, config, given, settings)
    with launched_team() as team:
        if team.rank > 0:
            score_share(chosen, team)
            return
        with progress_shown() as progress:
            summary = run(chosen, progress, team)
    found = "" if chosen.text_only else f"reward and people agree on {summary.agreement:.1%}"
    ties = "" if chosen.text_only else f"{summary.ties:,} ties, "
    print(
        f"{summary.scored:,} of {summary.rows:,} rows scored ({summary.resumed:,} found done), "
        f"{ties}{summary.prompts:,} prompts{found and '; '}{found}"
    )
    for kind, count in summary.rejected.items():
        print(f"  set aside, {count:,} rows: {kind}")
    if summary.cut:
        print(f"  {summary.cut:,} prompts are longer than the embedder reads and were cut for it")
    print(f"scores in {summary.out}")


@app.command(epilog="Example: `fifa select runs/scores -k 0.5% --method greedy --cap 1`")
def select(
    scores: Annotated[Path, typer.Argument(help="Folder that `fifa score` wrote.")],
    k: Annotated[str | None, typer.Option("-k", help="Pairs to keep: 4000, or 0.5%.")] = None,
    method: Annotated[str | None, typer.Option(help="importance, greedy, random, ...")] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of text quality.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Weight of diversity.")] = None,
    cap: Annotated[int | None, typer.Option(help="Most pairs of a prompt, 0: no limit.")] = None,
    min_quality: Annotated[float | None, typer.Option(help="Least text quality, 0..10.")] = None,
    deny: Annotated[Path | None, typer.Option(help="File of prompts to drop, a line each.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of methods by chance.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for kept.parquet.")] = None,
    config: File = None,
    settings: Settings = None,
) -> None:
    """Keep the best pairs: the same Parquet columns, fewer rows."""
    from fifa.filtering import KEPT, SelectConfig
    from fifa.filtering import select as run

    given = {
        "scores": scores,
        "k": k,
        "method": method,
        "alpha": alpha,
        "gamma": gamma,
        "cap": cap,
        "min_quality": min_quality,
        "deny": deny,
        "seed": seed,
        "out": out,
    }
    summary = run(config_of(SelectConfig, config, given, settings))
    for fate, count in summary.fates.items():
        print(f"{count:>10,}  {fate}")
    if summary.kept < summary.wanted:
        print(f"only {summary.kept:,} of the {summary.wanted:,} wanted: there are no more to keep")
    told = ", ".join(
        f"{name} {value:.3f}" for name, value in summary.f.items() if value is not None
    )
    if told:
        print(f"f(S) at {summary.kept:,} pairs: {told}")
    if summary.agreement is not None:
        print(f"reward and people agree on {summary.agreement:.1%} of the kept")
    print(summary.out / KEPT)


@app.command(epilog="Example: `fifa sweep runs/scores --methods importance,greedy,random`")
def sweep(
    scores: Annotated[Path, typer.Argument(help="Folder that `fifa score` wrote.")],
    methods: Annotated[str | None, typer.Option(help="Methods to follow, with commas.")] = None,
    sizes: Annotated[str | None, typer.Option(help="Sizes, with commas: 0.1%,1%,4000.")] = None,
    alphas: Annotated[str | None, typer.Option(help="Weights of text quality.")] = None,
    gammas: Annotated[str | None, typer.Option(help="Weights of diversity.")] = None,
    k: Annotated[str | None, typer.Option("-k", help="Pairs to keep by these weights.")] = None,
    method: Annotated[str | None, typer.Option(help="Method whose weights are changed.")] = None,
    grid: Annotated[
        bool | None, typer.Option("--grid", help="Also every alpha with every gamma.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for sweep.json and sweep.png.")] = None,
    config: File = None,
    settings: Settings = None,
) -> None:
    """Draw how the kept set changes with its size and with the weights."""
    from fifa.sweep import NUMBERS, PICTURE, SweepConfig
    from fifa.sweep import sweep as run

    given = {
        "scores": scores,
        "methods": methods,
        "sizes": sizes,
        "alphas": alphas,
        "gammas": gammas,
        "k": k,
        "method": method,
        "grid": grid,
        "out": out,
    }
    chosen = config_of(SweepConfig, config, given, settings)
    with progress_shown() as progress:
        swept = run(chosen, progress)
    header = ("kept", "prompts", "f(S)", "margin", "quality", "entropy", "reward right", "overlap")
    size_rows = [(point.method, *_worth(point)) for point in swept.sizes]
    table(f"By size, overlap with '{chosen.method}'", ("method", *header), size_rows)
    weighed = [*swept.alphas, *swept.gammas, *swept.grid]
    weight_rows = [(f"{p.alpha:g}", f"{p.gamma:g}", *_worth(p)) for p in weighed]
    table(f"By weights, '{chosen.method}'", ("alpha", "gamma", *header), weight_rows)
    for name in (NUMBERS, PICTURE):
        print((out or scores) / name)


def _worth(point: Point) -> tuple[str, ...]:
    values = (point.f, point.margin, point.quality, point.entropy)
    terms = ("-" if value is None else f"{value:.3f}" for value in values)
    return (
        f"{point.kept:,}",
        f"{point.prompts:,}",
        *terms,
        share_text(point.agreement),
        f"{point.overlap:.3f}",
    )


@app.command(epilog="Example: `fifa report runs/scores`")
def report(
    folder: Annotated[Path, typer.Argument(help="Folder that `fifa select` wrote to.")],
    examples: Annotated[int, typer.Option(min=0, help="Pairs to show of each kind.")] = 8,
) -> None:
    """Write one HTML page: what was kept, what was dropped, and why."""
    from fifa.report import write_report

    print(write_report(folder, examples))


@app.command(epilog="Example: `fifa bench runs/scores pairs.json --json bench.json`")
def bench(
    paths: Annotated[
        list[Path], typer.Argument(help="Scored pairs: .json files, or folders of `fifa score`.")
    ],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers to this file as well.")
    ] = None,
) -> None:
    """How often a proxy agrees with people: overall, and by how sure it is."""
    from fifa.bench import bench as run
    from fifa.bench import write_json

    results = run(paths)
    table(
        "Agreement with people, 95% Wilson interval",
        ("proxy", "pairs", "ties", "set aside", "all", "largest margins", "smallest margins"),
        [
            (
                result.proxy,
                f"{result.strict:,}",
                f"{result.ties:,}",
                f"{sum(result.set_aside.values()):,}",
                *(share_text(part) for part in (result.overall, result.largest, result.smallest)),
            )
            for result in results
        ],
    )
    table(
        "By quarter of |margin|, smallest first: share right (share that the proxy expects)",
        ("proxy", "1st", "2nd", "3rd", "4th"),
        [(result.proxy, *map(_calibration, result.quarters)) for result in results],
    )
    for result in results:
        for reason, count in result.set_aside.items():
            print(f"{result.proxy}: set aside, {count:,} rows: {reason}")
    if json_file is not None:
        write_json(json_file, results)
        print(json_file)


def _calibration(quarter: Quarter) -> str:
    if quarter.agreement.pairs == 0:
        return "-"
    expected = "" if quarter.expected is None else f" ({quarter.expected:.3f})"
    return f"{quarter.agreement.value:.3f}{expected}"


@app.command()
def rewards() -> None:
    """List every reward that `--reward` knows by name."""
    from fifa.rewards import REWARDS, describe_rewards

    table(
        "Rewards: NAME, NAME:WEIGHTS, package.module:factory, or a sum such as 0.5*a+0.5*b",
        ("name", "scores", "needs", "gradient", "source"),
        [
            (name, entry.scores, entry.needs, "yes" if entry.differentiable else "no", entry.source)
            for name, entry in zip(REWARDS, describe_rewards(), strict=True)
        ],
    )


@app.command()
def settings() -> None:
    """List every setting of the commands that take a config, its default and its meaning."""
    from fifa.config import describe
    from fifa.filtering import SelectConfig
    from fifa.proxies import FitConfig, TasteConfig
    from fifa.rewardbench import BenchConfig, BuildConfig, ReadConfig
    from fifa.scoring.settings import ScoreConfig
    from fifa.sources.convert import ConvertConfig
    from fifa.sweep import SweepConfig

    kinds = (
        ("convert", ConvertConfig),
        ("score", ScoreConfig),
        ("select", SelectConfig),
        ("sweep", SweepConfig),
        ("reward fit", FitConfig),
        ("reward tastes", TasteConfig),
        ("reward bench-build", BuildConfig),
        ("reward bench-read", ReadConfig),
        ("reward bench", BenchConfig),
    )
    for name, cls in kinds:
        print(f"fifa {name}")
        for setting in describe(cls):
            print(f"  {setting.key} = {setting.default}  ({setting.type})  {setting.description}")


if __name__ == "__main__":
    main()

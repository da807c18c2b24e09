"""The command line `fifa`: parse, one call, print. Defaults live in the settings classes."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from fifa.config import Config, InputError, calm_libraries, load_config

if TYPE_CHECKING:
    from fifa.bench import Quarter, Share
    from fifa.sweep import Point

C = TypeVar("C", bound=Config)
Progress = Callable[[str, int, int], None]

app = typer.Typer(
    name="fifa",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Where preferences come from: score a preference data set, keep its best pairs.",
)

reward_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Reward models of your own: fit one to pairs or ratings, ask it why, export a part.",
)
app.add_typer(reward_app, name="reward")


def main() -> None:
    """Entry point of the console script: bad input is one line on stderr and exit code 2."""
    calm_libraries()
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, see `fifa settings`."),
]
File = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")]


def _config(cls: type[C], file: Path | None, given: Mapping[str, Any], more: list[str] | None) -> C:
    """Settings from the file, then `--set`, then the options that were given."""
    named = [f"{key}={_quoted(str(value))}" for key, value in given.items() if value is not None]
    return load_config(cls, file, [*(more or []), *named])


def _quoted(text: str) -> str:
    """Text as YAML reads it back, without quotes where none are needed."""
    return text if re.fullmatch(r"[\w./%+-]+", text) else json.dumps(text)


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
    with _progress() as progress:
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
    chosen = _config(ConvertConfig, config, given, settings)
    with _progress() as progress:
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
    chosen = _config(ScoreConfig, config, given, settings)
    with launched_team() as team:
        if team.rank > 0:
            score_share(chosen, team)
            return
        with _progress() as progress:
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
    summary = run(_config(SelectConfig, config, given, settings))
    for fate, count in summary.fates.items():
        print(f"{count:>10,}  {fate}")
    if summary.kept < summary.wanted:
        print(f"only {summary.kept:,} of the {summary.wanted:,} wanted: there are no more to keep")
    told = ", ".join(
        f"{name} {value:.3f}" for name, value in summary.f.items() if value is not None
    )
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
    chosen = _config(SweepConfig, config, given, settings)
    with _progress() as progress:
        swept = run(chosen, progress)
    header = ("kept", "prompts", "f(S)", "margin", "quality", "entropy", "reward right", "overlap")
    size_rows = [(point.method, *_worth(point)) for point in swept.sizes]
    _table(f"By size, overlap with '{chosen.method}'", ("method", *header), size_rows)
    weighed = [*swept.alphas, *swept.gammas, *swept.grid]
    weight_rows = [(f"{p.alpha:g}", f"{p.gamma:g}", *_worth(p)) for p in weighed]
    _table(f"By weights, '{chosen.method}'", ("alpha", "gamma", *header), weight_rows)
    for name in (NUMBERS, PICTURE):
        print((out or scores) / name)


def _worth(point: Point) -> tuple[str, ...]:
    values = (point.f, point.margin, point.quality, point.entropy)
    terms = ("-" if value is None else f"{value:.3f}" for value in values)
    return (
        f"{point.kept:,}",
        f"{point.prompts:,}",
        *terms,
        _share(point.agreement),
        f"{point.overlap:.3f}",
    )


@app.command(epilog="Example: `fifa report runs/scores`")
def report(
    folder: Annotated[Path, typer.Argument(help="Folder that `fifa select` wrote to.")],
    examples: Annotated[int, typer.Option(help="Pairs to show of each kind.")] = 8,
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
    _table(
        "Agreement with people, 95% Wilson interval",
        ("proxy", "pairs", "ties", "set aside", "all", "largest margins", "smallest margins"),
        [
            (
                result.proxy,
                f"{result.strict:,}",
                f"{result.ties:,}",
                f"{sum(result.set_aside.values()):,}",
                *(_share(part) for part in (result.overall, result.largest, result.smallest)),
            )
            for result in results
        ],
    )
    _table(
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


def _share(part: Share) -> str:
    return f"{part.value:.3f} [{part.low:.3f}, {part.high:.3f}]" if part.pairs else "-"


def _calibration(quarter: Quarter) -> str:
    if quarter.agreement.pairs == 0:
        return "-"
    expected = "" if quarter.expected is None else f" ({quarter.expected:.3f})"
    return f"{quarter.agreement.value:.3f}{expected}"


@app.command()
def rewards() -> None:
    """List every reward that `--reward` knows by name."""
    from fifa.rewards import REWARDS, describe_rewards

    _table(
        "Rewards: NAME, NAME:WEIGHTS, package.module:factory, or a sum such as 0.5*a+0.5*b",
        ("name", "scores", "needs", "gradient", "source"),
        [
            (name, entry.scores, entry.needs, "yes" if entry.differentiable else "no", entry.source)
            for name, entry in zip(REWARDS, describe_rewards(), strict=True)
        ],
    )


@reward_app.command("fit", epilog="Example: `fifa reward fit runs/pairs --out runs/proxy`")
def reward_fit(
    pairs: Annotated[Path, typer.Argument(help="Parquet file or folder, Pick-a-Pic v2 columns.")],
    out: Annotated[Path, typer.Option(help="Folder for the proxy and its model card.")],
    kind: Annotated[str | None, typer.Option(help="scalar, pairwise, objectives or lora.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Frozen features: mini, clip:..., transformers:...")
    ] = None,
    ratings: Annotated[
        Path | None, typer.Option(help="Rating table for objectives: .parquet, .csv, .jsonl.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of split, weights and order.")] = None,
    config: File = None,
    settings: Settings = None,
) -> None:
    """Fit a proxy to people's choices; use it as the reward `fitted:OUT`."""
    from fifa.proxies import FitConfig
    from fifa.proxies.card import PAGE
    from fifa.proxies.fit import fit

    given = {
        "pairs": pairs,
        "out": out,
        "kind": kind,
        "encoder": encoder,
        "ratings": ratings,
        "seed": seed,
    }
    with _progress() as progress:
        card = fit(_config(FitConfig, config, given, settings), progress)
    for reason, count in {**card.dropped, **card.rejected}.items():
        print(f"  set aside, {count:,} rows: {reason}")
    print(f"agrees with {_share(card.accuracy)} of {card.accuracy.pairs:,} held-out strict pairs")
    print(f"model card in {out / PAGE}")


@reward_app.command("explain", epilog="Example: `fifa reward explain runs/armo 'a red star' a.png`")
def reward_explain(
    folder: Annotated[Path, typer.Argument(help="Folder of a proxy of kind objectives.")],
    prompt: Annotated[str, typer.Argument(help="What the pictures were asked to show.")],
    pictures: Annotated[list[Path], typer.Argument(help="One picture, or several to compare.")],
    plot: Annotated[Path | None, typer.Option(help="Draw the parts of the score here.")] = None,
) -> None:
    """Say why pictures score as they do: objectives x what the prompt makes of them."""
    from fifa.proxies.explain import draw, explain

    found = explain(folder, prompt, pictures)
    _table(
        f"{prompt}: reward x coefficient = part of the score",
        ("objective", "coefficient", *(path.name for path in pictures)),
        found.lines(),
    )
    if plot is not None:
        draw(found, plot)
        print(plot)


@reward_app.command(
    "export", epilog="Example: `fifa reward export runs/armo 'neat=1' --out runs/n`"
)
def reward_export(
    folder: Annotated[Path, typer.Argument(help="Folder of a proxy of kind objectives.")],
    weights: Annotated[str, typer.Argument(help="Fixed weights: NAME=NUMBER,NAME=NUMBER.")],
    out: Annotated[Path, typer.Option(help="Folder for the new reward.")],
) -> None:
    """Make a reward of an objective, or of several at fixed weights in place of the gate."""
    from fifa.proxies.explain import export, parse_weights

    export(folder, parse_weights(weights), out)
    print(out)


@reward_app.command("tastes", epilog="Example: `fifa reward tastes runs/pairs --out runs/tastes`")
def reward_tastes(
    pairs: Annotated[Path, typer.Argument(help="Pair table that names people: `user_id`.")],
    out: Annotated[Path, typer.Option(help="Folder for the tastes and their card.")],
    model: Annotated[str | None, typer.Option(help="A: ideals know no prompt; B: they do.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of split, weights and order.")] = None,
    config: File = None,
    settings: Settings = None,
) -> None:
    """Fit many tastes to the choices of known people; use them as the reward `tastes:OUT`."""
    from fifa.proxies import TasteConfig
    from fifa.proxies.tastes import tastes

    given = {"pairs": pairs, "out": out, "model": model, "seed": seed}
    with _progress() as progress:
        card = tastes(_config(TasteConfig, config, given, settings), progress)
    if card.note:
        print(card.note)
    weights = ", ".join(f"{share:.0%}" for share in card.shares)
    print(f"{card.tastes} tastes of {card.users:,} people, by weight {weights}")
    print(f"agrees with {_share(card.own)} of held-out strict pairs by each person's own mixture,")
    print(f"with {_share(card.average)} by the average one")
    print(out)


@reward_app.command(
    "adapt", epilog="Example: `fifa reward adapt runs/tastes new.parquet --user me --out runs/t2`"
)
def reward_adapt(
    folder: Annotated[Path, typer.Argument(help="Folder of `fifa reward tastes`.")],
    pairs: Annotated[Path, typer.Argument(help="Pair table with the new person's choices.")],
    user: Annotated[str, typer.Option(help="Their name: `user_id` in the table.")],
    out: Annotated[Path, typer.Option(help="Folder for the tastes with one person more.")],
    limit: Annotated[int | None, typer.Option(help="Use their first pairs only.")] = None,
) -> None:
    """Take in a new person from a few choices; everything else stays as it is, to the bit."""
    from fifa.proxies.tastes import adapt_folder

    with _progress() as progress:
        weights = adapt_folder(folder, pairs, out, user, limit, progress)
    print(f"{user}: " + ", ".join(f"{weight:.0%}" for weight in weights))
    print(out)


@reward_app.command(
    "disputes", epilog="Example: `fifa reward disputes runs/tastes runs/pairs --most 10`"
)
def reward_disputes(
    folder: Annotated[Path, typer.Argument(help="Folder of `fifa reward tastes`.")],
    pairs: Annotated[Path, typer.Argument(help="Pair table to look at.")],
    most: Annotated[int, typer.Option(help="How many pairs to show.")] = 20,
) -> None:
    """List the pairs that divide the tastes most: where more answers are worth having."""
    from fifa.proxies.tastes import disputes_of

    with _progress() as progress:
        found = disputes_of(folder, pairs, most, progress)
    _table(
        "chance that each taste prefers the first picture",
        ("row", "prompt", "by taste"),
        [
            (str(d.row), d.prompt, "  ".join(f"{chance:.0%}" for chance in d.preference))
            for d in found
        ],
    )


@reward_app.command("bench-build", epilog="Example: `fifa reward bench-build runs/bench`")
def reward_bench_build(
    out: Annotated[Path, typer.Argument(help="Folder for the bench.")],
    pairs: Annotated[int | None, typer.Option(help="Pairs a scenario.")] = None,
    scenarios: Annotated[str | None, typer.Option(help="Scenarios, with commas.")] = None,
    judges: Annotated[str | None, typer.Option(help="Simulated judges, with commas.")] = None,
    agree: Annotated[int | None, typer.Option(help="Judges who must give the label.")] = None,
    panel: Annotated[str | None, typer.Option(help="Weak rewards that rate difficulty.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed is another bench.")] = None,
    config: File = None,
    settings: Settings = None,
) -> None:
    """Make pairs of known truth in the mini world, by scenario, to test rewards on."""
    from fifa.rewardbench import BuildConfig
    from fifa.rewardbench.build import build

    lists = {"scenarios": scenarios, "judges": judges, "panel": panel}
    given = {"out": out, "pairs": pairs, "agree": agree, "seed": seed}
    chosen = _config(BuildConfig, config, given, _listed(lists, settings))
    with _progress() as progress:
        _told_bench(build(chosen, progress), out)


@reward_app.command(
    "bench-read", epilog="Example: `fifa reward bench-read pairs runs/pairs --out runs/bench`"
)
def reward_bench_read(
    kind: Annotated[str, typer.Argument(help="Layout, see `fifa reward bench-kinds`.")],
    path: Annotated[Path, typer.Argument(help="File or folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the bench.")],
    images: Annotated[Path | None, typer.Option(help="Folder with the pictures.")] = None,
    agree: Annotated[int | None, typer.Option(help="Judges who must give the label.")] = None,
    panel: Annotated[str | None, typer.Option(help="Weak rewards that rate difficulty.")] = None,
    config: File = None,
    settings: Settings = None,
) -> None:
    """Make a bench of pairs or ratings that people have judged."""
    from fifa.rewardbench import ReadConfig
    from fifa.rewardbench.reading import read

    given = {"kind": kind, "path": path, "out": out, "images": images, "agree": agree}
    chosen = _config(ReadConfig, config, given, _listed({"panel": panel}, settings))
    with _progress() as progress:
        facts = read(chosen, progress)
    _told_bench(facts, out)
    for reason, count in facts["set_aside"].items():
        print(f"  set aside, {count:,}: {reason}")


@reward_app.command("bench-kinds")
def reward_bench_kinds() -> None:
    """List the layouts that `bench-read` reads, a line each."""
    from fifa.rewardbench.reading import described

    for kind, line in described():
        print(f"{kind:12}{line}")


@reward_app.command(
    "bench", epilog="Example: `fifa reward bench runs/bench --rewards mini,fitted:runs/proxy`"
)
def reward_bench(
    bench: Annotated[Path, typer.Argument(help="Folder of a bench.")],
    rewards: Annotated[str | None, typer.Option(help="Rewards by name, with commas.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the leaderboard.")] = None,
    keep: Annotated[str | None, typer.Option(help="Difficulties that count: 0.2,0.8.")] = None,
    config: File = None,
    settings: Settings = None,
) -> None:
    """Measure rewards by scenario before trusting them; a leaderboard as HTML and JSON."""
    from fifa.rewardbench import BenchConfig
    from fifa.rewardbench.leaderboard import table_of, write_leaderboard
    from fifa.rewardbench.standing import run

    lists = {"rewards": rewards, "keep": keep}
    given = {"bench": bench, "out": out}
    chosen = _config(BenchConfig, config, given, _listed(lists, settings))
    with _progress() as progress:
        found = run(chosen, progress)
    for title, header, rows in table_of(found):
        _table(title, header, rows)
    for standing in found.standings:
        for reason, count in standing.set_aside.items():
            print(f"{standing.reward}: set aside, {count:,} pairs: {reason}")
    print(write_leaderboard(found, out or bench))


def _listed(options: Mapping[str, str | None], settings: list[str] | None) -> list[str]:
    """`--set` settings, and after them options whose values are lists with commas."""
    given = [
        f"{name}={json.dumps([part.strip() for part in text.split(',') if part.strip()])}"
        for name, text in options.items()
        if text is not None
    ]
    return [*(settings or []), *given]


def _told_bench(facts: Mapping[str, Any], out: Path) -> None:
    """How many pairs of a bench count, by scenario, and how true their labels are."""
    for name, part in facts["scenarios"].items():
        print(f"{part['agreed']:>8,} of {part['pairs']:,} pairs count  {name}")
    truth = facts["label_truth"]
    if "kept" in truth:
        kept, loose = truth["kept"]["value"], truth["majority"]["value"]
        print(f"labels are true in {kept:.1%} of them; by majority alone in {loose:.1%}")
    print(out)


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


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with lines on a terminal, tab-separated columns under a title in a pipe."""
    if not sys.stdout.isatty():
        print(f"# {title}")
        for row in (header, *rows):
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar with rate and time left on a terminal, a line every few seconds in a pipe."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total or None, rate="")
            speed = bar.tasks[tasks[stage]].speed
            rate = f"{speed:,.0f} a second" if speed else ""
            bar.update(tasks[stage], completed=done, total=total or None, rate=rate)

        yield show


def _lines(every: float = 5.0) -> Progress:
    """Plain lines on stderr: when a stage begins, ends, and every few seconds between.

    A total of 0 stands for one that is not known yet.
    """
    begun: dict[str, tuple[float, int]] = {}
    told = 0.0

    def show(stage: str, done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        first = stage not in begun
        start, before = begun.setdefault(stage, (now, done))
        if not first and (done < total or not total) and now - told < every:
            return
        told = now
        rate = (done - before) / (now - start) if now > start else 0.0
        speed = f", {rate:,.0f} a second" if rate else ""
        left = f", {(total - done) / rate:,.0f} s left" if rate and total else ""
        of = f" of {total:,}" if total else ""
        print(f"{stage}: {done:,}{of}{speed}{left}", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    main()

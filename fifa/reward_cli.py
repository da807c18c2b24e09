"""`fifa reward ...`: parse, one call, print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fifa.terminal import File, Settings, config_of, progress_shown, share_text, table

if TYPE_CHECKING:
    from fifa.bench import Share

reward_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Reward models of your own: fit one to pairs or ratings, ask it why, export a part.",
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
    with progress_shown() as progress:
        card = fit(config_of(FitConfig, config, given, settings), progress)
    if card.objectives:
        print(f"objectives: {', '.join(card.objectives)}")
    for line in card.set_aside():
        print(f"  set aside, {line}")
    print(
        f"agrees with {share_text(card.accuracy)} of {card.accuracy.pairs:,} held-out strict pairs"
    )
    if doubt := doubt_about(card.accuracy):
        print(f"warning: {doubt}")
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
    table(
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
    with progress_shown() as progress:
        card = tastes(config_of(TasteConfig, config, given, settings), progress)
    if card.note:
        print(card.note)
    weights = ", ".join(f"{share:.0%}" for share in card.shares)
    print(f"{card.tastes} tastes of {card.users:,} people, by weight {weights}")
    print(
        f"agrees with {share_text(card.own)} of held-out strict pairs by each person's own mixture,"
    )
    print(f"with {share_text(card.average)} by the average one")
    print(out)


@reward_app.command(
    "adapt", epilog="Example: `fifa reward adapt runs/tastes new.parquet --user me --out runs/t2`"
)
def reward_adapt(
    folder: Annotated[Path, typer.Argument(help="Folder of `fifa reward tastes`.")],
    pairs: Annotated[Path, typer.Argument(help="Pair table with the new person's choices.")],
    user: Annotated[str, typer.Option(help="Their name: `user_id` in the table.")],
    out: Annotated[Path, typer.Option(help="Folder for the tastes with one person more.")],
    limit: Annotated[int | None, typer.Option(help="Use their first pairs only.", min=1)] = None,
) -> None:
    """Take in a new person from a few choices; everything else stays as it is, to the bit."""
    from fifa.proxies.tastes import adapt_folder

    with progress_shown() as progress:
        weights = adapt_folder(folder, pairs, out, user, limit, progress)
    print(f"{user}: " + ", ".join(f"{weight:.0%}" for weight in weights))
    print(out)


@reward_app.command(
    "disputes", epilog="Example: `fifa reward disputes runs/tastes runs/pairs --most 10`"
)
def reward_disputes(
    folder: Annotated[Path, typer.Argument(help="Folder of `fifa reward tastes`.")],
    pairs: Annotated[Path, typer.Argument(help="Pair table to look at.")],
    most: Annotated[int, typer.Option(help="How many pairs to show.", min=1)] = 20,
) -> None:
    """List the pairs that divide the tastes most: where more answers are worth having."""
    from fifa.proxies.tastes import disputes_of

    with progress_shown() as progress:
        found = disputes_of(folder, pairs, most, progress)
    table(
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
    chosen = config_of(BuildConfig, config, given, _listed(lists, settings))
    with progress_shown() as progress:
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
    chosen = config_of(ReadConfig, config, given, _listed({"panel": panel}, settings))
    with progress_shown() as progress:
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
    chosen = config_of(BenchConfig, config, given, _listed(lists, settings))
    with progress_shown() as progress:
        found = run(chosen, progress)
    for title, header, rows in table_of(found):
        table(title, header, rows)
    for standing in found.standings:
        for reason, count in standing.set_aside.items():
            print(f"{standing.reward}: set aside, {count:,} pairs: {reason}")
    print(write_leaderboard(found, out or bench))


def doubt_about(accuracy: Share) -> str:
    """What to be wary of in a share of held-out pairs; "" for nothing."""
    if not accuracy.pairs:
        return "no pair was held out, so nobody knows whether it is right"
    if accuracy.high < 0.5:
        return "it is worse than chance: are winners and losers exchanged, in pairs or in ratings?"
    if accuracy.low < 0.5:
        return "by so few pairs it cannot be told from chance"
    return ""


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

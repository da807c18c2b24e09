"""Train: `accelerate launch train.py configs/x.yaml optim.learning_rate=1e-5`.

Settings come from a YAML file, then `dotted.key=value`, then flags that carry the names known from
diffusers' scripts. `--keys` lists every setting with its meaning; `--dry-run` shows what would be
done. Plain `python train.py` works too. To resume a run, type the same command again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from d3po import recipe
from d3po.cli import print_keys
from d3po.run import ToldElsewhere
from fifa.config import InputError, calm_libraries, print_any_text, to_yaml


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; bad input is one sentence on stderr and exit code 2."""
    calm_libraries()
    print_any_text()
    rank, processes = (int(os.environ.get(name, d)) for name, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    arguments = parser().parse_intermixed_args(argv)
    if arguments.keys:
        print_keys()
        return 0
    try:
        config = recipe.load(*chosen(arguments))
        plan = recipe.arithmetic(config, processes)
    except InputError as error:
        return failed(error, rank, say=rank == 0)  # every process reads the same settings
    if rank == 0:
        print(f"{to_yaml(config)}\n{plan}", flush=True)
    try:
        if not arguments.dry_run:
            recipe.train(config)
    except InputError as error:
        return failed(error, rank, say=not isinstance(error, ToldElsewhere))
    except KeyboardInterrupt:
        failed("interrupted; the same command resumes from the last checkpoint", rank, rank == 0)
        return 130
    return 0


def failed(error: InputError | str, rank: int, say: bool) -> int:
    """Print the sentence, if this is the process to say it."""
    if say:
        print(f"process {rank}: {error}" if rank else f"error: {error}", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    """The command line; recipe.FLAGS is where its flags come from."""
    described = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    described.add_argument("settings", nargs="*", metavar="config.yaml | key=value")
    described.add_argument("--dry-run", action="store_true", help="show what would be done")
    described.add_argument("--keys", action="store_true", help="list every setting")
    known = described.add_argument_group("flags known from diffusers, and what each one sets")
    for flag, override in recipe.FLAGS.items():
        known.add_argument(f"--{flag}", metavar="VALUE", help=override.format("VALUE"))
    return described


def chosen(arguments: argparse.Namespace) -> tuple[str | None, list[str]]:
    """(config file or None, overrides, those of flags last)."""
    overrides = [text for text in arguments.settings if "=" in text]
    files = [text for text in arguments.settings if "=" not in text]
    if len(files) > 1:
        raise InputError(f"one config file at most, got {', '.join(files)}")
    for flag, override in recipe.FLAGS.items():
        if (value := getattr(arguments, flag)) is not None:
            overrides.append(override.format(value))
    return (files[0] if files else None), overrides


if __name__ == "__main__":
    sys.exit(main())

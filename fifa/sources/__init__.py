"""Public preference data sets -> Judgments: one reader a layout, one line of SOURCES a reader.

A reader takes a path (or the name of a Hub data set) and `ReadOptions`, and yields a Judgment or a
BadRow for everything that it finds, one at a time. `fifa.sources.convert` writes what it yields as
the pair table. Outside code plugs in as `package.module:reader`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from fifa.config import InputError, import_from_here, unknown
from fifa.sources.reading import Reader

SOURCES: dict[str, str] = {
    "pickapic": "fifa.sources.columns:pickapic",
    "open-image-preferences": "fifa.sources.columns:open_image_preferences",
    "hpdv2": "fifa.sources.rankings:hpdv2",
    "imagereward": "fifa.sources.rankings:imagereward",
    "d3po": "fifa.sources.rankings:d3po",
    "jsonl": "fifa.sources.records:jsonl",
    "csv": "fifa.sources.records:csv_table",
    "invoke-training": "fifa.sources.records:invoke_training",
    "kto": "fifa.sources.records:kto",
    "folders": "fifa.sources.folders:folders",
    "sd-scripts": "fifa.sources.folders:sd_scripts",
}


def load_source(kind: str) -> Reader:
    """The reader that `kind` names: a key of SOURCES or `package.module:reader`."""
    address = kind if ":" in kind else SOURCES.get(kind)
    if address is None:
        raise unknown("kind of source", kind, SOURCES, "package.module:reader")
    module, _, name = address.partition(":")
    try:
        reader = getattr(import_from_here(module), name)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        raise InputError(f"source '{kind}' cannot be loaded: {error}") from None
    if not callable(reader):
        raise InputError(f"source '{kind}' is no reader, it cannot be called")
    return reader


def described() -> Iterator[tuple[str, str]]:
    """Each kind of source and the first line of what its reader says about itself."""
    for kind in SOURCES:
        yield kind, (inspect.getdoc(load_source(kind)) or "").partition("\n")[0]

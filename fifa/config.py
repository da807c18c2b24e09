"""Typed settings, errors told in one sentence, and files that are either whole or absent.

The lowest room of the house: every other room may import it, it imports none of them.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import io
import logging
import math
import os
import re
import shutil
import sys
import types
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails


class InputError(ValueError):
    """What the user gave is wrong; the message is one sentence: what, where, what is allowed."""


class Config(BaseModel):
    """Base of every settings class: unknown keys are errors, values are checked and final.

    Each field must carry a description (a sentence, with its unit); a class without them does not
    get defined.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        populate_by_name=True,
        protected_namespaces=(),
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a field nobody described."""
        super().__pydantic_init_subclass__(**kwargs)
        silent = [name for name, field in cls.model_fields.items() if not field.description]
        if silent:
            raise TypeError(f"{cls.__name__}: no description for {', '.join(silent)}")


C = TypeVar("C", bound=Config)


class Setting(NamedTuple):
    """One line of `describe`: where a value lives, what it may be, and what it means."""

    key: str
    type: str
    default: Any  # REQUIRED when there is none
    description: str


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()


# ---- YAML ---------------------------------------------------------------------------------------

# YAML 1.1, which PyYAML speaks, reads 1e-5 as text, `no` as False and 12:30 as 750. These are the
# scalars of YAML 1.2, so that a value means the same in a file, in an override and to the reader.
_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first in _SCALARS:
        rule = (f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"))
        for letter in first:
            table.setdefault("" if letter == "\0" else letter, []).append(rule)
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key '{key.value}' is there twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise InputError(f"{where}{place}: not valid YAML, {problem}") from None


def to_yaml(config: Config) -> str:
    """The settings as YAML text that `load_config` reads back to an equal value."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True
    )


# ---- load ---------------------------------------------------------------------------------------


def load_config(
    cls: type[C],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> C:
    """Read settings: the defaults of `cls`, a YAML file, `dotted.key=value` overrides, options.

    An override's value is parsed as YAML (`1e-5`, `[1, 2]`, `null`); an option's is taken as it is,
    so that a file may be called `null` or `2024`. Raises InputError that names the key, where it
    was set and what is allowed; for an unknown key it suggests the nearest one.
    """
    values = {} if path is None else _read_mapping(Path(path))
    origin: dict[str, str] = {}
    for override in overrides:
        key, value = _split_override(override)
        _assign(values, key, value, override)
        origin[key] = f"the override '{override}'"
    for key, value in (options or {}).items():
        values[key], origin[key] = value, f"the option {key}"
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        default_origin = "the settings" if path is None else str(path)
        raise InputError(_sentence(cls, error, origin, default_origin)) from None


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"config file {path} does not exist") from None
    except UnicodeDecodeError:
        raise InputError(f"config file {path} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"cannot read config file {path}: {error.strerror}") from None
    values = _parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected 'key: value' lines, found a {type(values).__name__}")
    return values


def _split_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"override '{override}' must look like key=value or part.key=value")
    return key.strip(), _parse_yaml(text, f"the override '{override}'")


def _assign(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, leaf = key.split(".")
    for depth, parent in enumerate(parents):
        inner = values.setdefault(parent, {})
        if inner is None:  # `optim:` with nothing below it
            inner = values[parent] = {}
        if not isinstance(inner, dict):
            above = ".".join(parents[: depth + 1])
            raise InputError(f"override '{override}': '{above}' is {inner!r}, it has no parts")
        values = inner
    values[leaf] = value


def _sentence(
    cls: type[Config], error: ValidationError, origin: Mapping[str, str], default_origin: str
) -> str:
    """The first complaint as one sentence; unknown keys go first, they explain missing ones."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    first = details[0]
    key = ".".join(str(part) for part in first["loc"])
    where = next((text for k, text in origin.items() if _covers(k, key)), default_origin)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return _complaint(cls, first, key, where) + more


def _covers(set_key: str, key: str) -> bool:
    return set_key == key or key.startswith(set_key + ".") or set_key.startswith(key + ".")


def _complaint(cls: type[Config], detail: ErrorDetails, key: str, where: str) -> str:
    known = {setting.key: setting for setting in describe(cls)}
    if detail["type"] == "extra_forbidden":
        near = nearest(key, known)
        hint = f"did you mean '{near}'?" if near else f"known are {', '.join(known)}"
        return f"{where}: unknown key '{key}'; {hint}"
    meaning = f" ({known[key].description})" if key in known else ""
    if detail["type"] == "missing":
        return f"{where}: '{key}' is missing{meaning}"
    wish = detail["msg"]
    wish = wish.removeprefix("Value error, ")
    wish = wish.replace("Input should be", "it should be", 1)
    subject = f"'{key}' is {detail['input']!r}: " if key else ""
    return f"{where}: {subject}{wish}{meaning}"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name a person most likely meant, or None; a dotted key also matches by its end.

    Initials count as well: `optim.lr` is optim.learning_rate.
    """
    names = list(known)
    for name in names:
        part, _, last = name.rpartition(".")
        initials = "".join(word[:1] for word in last.split("_"))
        if len(initials) > 1 and word in (initials, f"{part}.{initials}"):
            return name
    for shorten in (str, lambda name: name.rsplit(".", 1)[-1]):
        by_short = {shorten(name): name for name in reversed(names)}
        if close := difflib.get_close_matches(shorten(word), by_short, n=1, cutoff=0.6):
            return by_short[close[0]]
    return None


def unknown(what: str, name: str, known: Iterable[str], more: str = "") -> InputError:
    """The one sentence for a name that is in no table; `more` is what else is allowed."""
    names = list(known)
    near = nearest(name, names)
    hint = f"did you mean '{near}'? " if near else ""
    also = f" and {more}" if more else ""
    return InputError(f"unknown {what} '{name}'; {hint}known are {', '.join(names)}{also}")


def describe(cls: type[Config]) -> list[Setting]:
    """Every setting of `cls`, nested parts included: dotted key, type, default and sentence."""
    return _describe(cls, None, "")


def _describe(cls: type[Config], value: Config | None, prefix: str) -> list[Setting]:
    settings: list[Setting] = []
    for name, field in cls.model_fields.items():
        if value is not None:
            default = getattr(value, name)
        elif field.is_required():
            default = REQUIRED
        else:
            default = field.get_default(call_default_factory=True, validated_data={})
        inner = type(default) if isinstance(default, Config) else _config_inside(field.annotation)
        if inner is not None:
            nested = default if isinstance(default, Config) else None
            settings += _describe(inner, nested, f"{prefix}{name}.")
        else:
            text = _type_name(field.annotation)
            settings.append(Setting(prefix + name, text, default, field.description or ""))
    return settings


def _config_inside(annotation: Any) -> type[Config] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Config):
            return candidate
    return None


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) in (Union, types.UnionType):
        return " | ".join(_type_name(inner) for inner in get_args(annotation))
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("Literal", "one of ")


def calm_libraries() -> None:
    """For a program's start: no bars of libraries where nobody watches, and no advice of theirs.

    What a program has to say of its progress it says itself.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # installed is not yet used


def import_from_here(module: str) -> ModuleType:
    """A module that is installed, or lies in the working directory, where `python -m` finds it too.

    Raises what `import` raises.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    return importlib.import_module(module)


def print_any_text() -> None:
    """For a program's start: a sign that the output's encoding lacks is printed as a "?"."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No log lines of libraries: what matters of them is raised as well, and told in a sentence."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


# ---- files --------------------------------------------------------------------------------------


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` if the block succeeds and is removed if it does not.

    The block may create a file or a folder; both reach the disk (fsync) before the rename, so a
    reader, also one after a crash, sees the old content or the new one and nothing in between. A
    folder only replaces a path that does not exist yet. A failed write, such as a full disk, is an
    InputError. A killed process leaves `.tmp-*` behind, never a partial `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync_one(path.parent)
    except OSError as error:
        # An error on some other file, say an input that vanished, is not ours to explain.
        if error.filename is not None and not _is_below(error.filename, path.parent):
            raise
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        _remove(temporary)


def _is_below(name: str | bytes | int, folder: Path) -> bool:
    text = os.fsdecode(name) if isinstance(name, (str, bytes)) else str(name)
    return text == str(folder) or Path(text).parent == folder or folder in Path(text).parents


def _sync(path: Path) -> None:
    if path.is_dir():
        for inner in sorted(path.rglob("*")):
            _sync_one(inner)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(NotADirectoryError):  # a file stands where a folder should
            path.unlink(missing_ok=True)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a whole file or nothing (see `atomic_path`); text is stored as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def take_lock(path: Path, wait: bool = False) -> IO[str] | None:
    """Hold an exclusive lock on a file; None if another process holds it and we do not `wait`.

    It lasts until the file is closed or the process ends, however it ends. Windows has no flock:
    two writers there go unnoticed.
    """
    file = path.open("w")
    if sys.platform == "win32":
        return file
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextmanager
def only_writer(folder: Path, lock: str, doing: str, parts: Sequence[str] = ()) -> Iterator[None]:
    """Be the only process that writes to a folder; what a killed one left there is swept away.

    `lock` is a file in the folder. Half-written files are looked for in the folder, beside the lock
    and in the subfolders `parts`, no deeper: what else lies below may be in another's work. Raises
    InputError "another process is {doing} {folder}", and where the folder cannot be written to.
    """
    try:
        (folder / lock).parent.mkdir(parents=True, exist_ok=True)
        held = take_lock(folder / lock)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    if held is None:
        raise InputError(f"another process is {doing} {folder}")
    with held:
        for place in {folder, (folder / lock).parent, *(folder / part for part in parts)}:
            for left_over in place.glob(".tmp-*"):
                if not left_over.is_dir():  # a folder in the making is never ours
                    _remove(left_over)
        yield


def finite(value: Any) -> Any:
    """The value with NaN and infinities, which JSON does not know, as None; at any depth."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fingerprint(*parts: str | bytes | Path) -> str:
    """16 hex digits (64 bits of BLAKE2b) of the parts in order; a Path stands for its content.

    A folder stands for the names and contents of the files in it. Raises InputError for a path that
    cannot be read.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, Path):
            kind, inner = b"path", _path_digest(part)
        elif isinstance(part, str):
            kind, inner = b"text", hashlib.blake2b(part.encode("utf-8"))
        else:
            kind, inner = b"data", hashlib.blake2b(part)
        digest.update(kind + inner.digest())  # of fixed length: ("ab", "c") is not ("a", "bc")
    return digest.hexdigest()


def _path_digest(path: Path) -> hashlib.blake2b:
    digest = hashlib.blake2b()
    try:
        if path.is_dir():
            for inner in sorted(item for item in path.rglob("*") if item.is_file()):
                digest.update(inner.relative_to(path).as_posix().encode("utf-8") + b"\0")
                digest.update(_path_digest(inner).digest())
            return digest
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or path}: {error.strerror}") from None
    return digest

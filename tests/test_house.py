"""The rules of the house, read from the files themselves.

Each rule is a function from sources to a list of complaints. It is run twice: on the repository,
where the list must be empty, and on a few lines that break it, where it must not be.
"""

from __future__ import annotations

import ast
import configparser
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Imports run left to right, never back, also between the names of one group. The package's own
# __init__ stands after the rooms that it offers: only a command line may import it by name.
ORDER = {
    "fifa": (
        "config, images | pairs | miniworld, sources, rewards, embed, judge | knn"
        " | features | selection, bench, denylist | proxies | scoring, filtering, sweep, report"
        " | rewardbench"
        " | __init__ | terminal | reward_cli | cli | __main__"
    ),
    "d3po": (
        "draws, schedule, advantage, judging, optimizers, speed, sharding, launch, zero | sampling"
        " | likelihood, objectives"
        " | updates | losses | families | generate | policy | run_folder, display, engine"
        " | run, health"
        " | trainer, reference | pair_cache | inversion"
        " | offline, held_out, online, evaluate, export"
        " | recipe, preflight, mini_sd | report, implicit | demo | __init__ | cli | __main__"
    ),
}
PACKAGES = tuple(ORDER)
FORBIDDEN_PACKAGE = {"fifa": "d3po"}

# room -> the only packages outside the standard library that it may import
ONLY = {"d3po.objectives": {"torch"}}
# room -> what it may not import, although the order would let it
NEVER = {
    "fifa.pairs": {"torch"},
    "fifa.selection": {"torch", "transformers", "faiss", "open_clip"},
    "d3po.trainer": {"datasets", "argparse", "fifa.rewards", "fifa.sources"},
    "d3po.sampling": {"diffusers", "transformers"},
    "d3po.likelihood": {"diffusers", "transformers"},
}

HEAVY = {"torch", "diffusers", "transformers", "faiss", "open_clip"}
MAY_PRINT = {"cli.py", "reward_cli.py", "terminal.py", "train.py", "display.py"}
VAGUE_NAMES = {"util", "utils", "common", "helper", "helpers", "misc"}
SEEDERS = {
    "torch.manual_seed",
    "torch.seed",
    "torch.random.manual_seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "numpy.random.seed",
    "random.seed",
    "accelerate.utils.set_seed",
    "transformers.set_seed",
    "diffusers.training_utils.set_seed",
}
WEIGHT_LIMITS = {"d3po/mini_sd/weights": 25_000_000, "fifa/rewards/weights": 8_000_000}  # bytes
# what the packages may import beyond install_requires: features that a user asks for by name
OPTIONAL_EXTRAS = ("trackers", "hub", "ray", "sentence", "xformers", "bitsandbytes", "deepspeed")
# import name -> the package that setup.cfg asks for, where the two differ
PROVIDED_BY = {
    "PIL": "pillow",
    "faiss": "faiss-cpu",
    "open_clip": "open_clip_torch",
    "pydantic_core": "pydantic",
    "sklearn": "scikit-learn",
    "yaml": "PyYAML",
}


# --- reading ------------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    """`fifa/rewards/__init__.py` -> `fifa.rewards.__init__`."""
    return ".".join(path.with_suffix("").parts)


@functools.cache
def modules() -> dict[str, str]:
    """Every module of both packages, by dotted name, with its source."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            found[module_name(path.relative_to(ROOT))] = path.read_text(encoding="utf-8")
    return found


def dotted(node: ast.expr) -> str:
    """`a.b.c` for an attribute chain on a name, '' for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def imports(module: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted target) of every import: at the top, in functions, relative, by string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `a.b.__init__` and `a.b.c` both live in the folder a.b
            folder = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*folder, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # the tables name rooms as "package.module:name"
            if match := re.fullmatch(r"((?:fifa|d3po)(?:\.\w+)+):\w+", node.value):
                yield node.lineno, match.group(1)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("import_module"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def rooms(order: str) -> list[str]:
    """The rooms of one package, leftmost first."""
    return [room.strip() for group in order.split("|") for room in group.split(",")]


def room_of(target: str) -> tuple[str, str]:
    """`fifa.rewards.mini` -> (`fifa`, `rewards`); a name that is no room is the __init__'s."""
    package, _, rest = target.partition(".")
    room = rest.split(".")[0]
    return package, room if room in rooms(ORDER[package]) else "__init__"


# --- rules --------------------------------------------------------------------------------------


def order_complaints(module: str, source: str) -> list[str]:
    package, room = module.split(".")[:2]
    order = rooms(ORDER[package])
    if room not in order:
        return [f"{module} is in no room of the import order"]
    complaints = []
    for line, target in imports(module, ast.parse(source)):
        top = target.split(".")[0]
        if top == FORBIDDEN_PACKAGE.get(package):
            complaints.append(f"{module}:{line} {package} never imports {top}")
        elif top == package:
            _, wanted = room_of(target)
            if wanted != room and order.index(wanted) > order.index(room):
                complaints.append(
                    f"{module}:{line} imports {package}.{wanted}, which stands to its right"
                )
        elif top in PACKAGES and room_of(target)[1] in {"cli", "__main__"}:
            complaints.append(f"{module}:{line} imports a command line")
    return complaints


def boundary_complaints(module: str, source: str) -> list[str]:
    room = ".".join(module.split(".")[:2])
    complaints = []
    for line, target in imports(module, ast.parse(source)):
        top = target.split(".")[0]
        if room in ONLY and top not in sys.stdlib_module_names and top not in ONLY[room]:
            complaints.append(f"{module}:{line} may import {sorted(ONLY[room])} only, not {target}")
        if any(f"{target}.".startswith(f"{banned}.") for banned in NEVER.get(room, ())):
            complaints.append(f"{module}:{line} may not import {target}")
    return complaints


def print_complaints(module: str, source: str) -> list[str]:
    if f"{module.rsplit('.', 1)[-1]}.py" in MAY_PRINT:
        return []
    return [
        f"{module}:{node.lineno} prints"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and dotted(node.func) in {"print", "builtins.print"}
    ]


def except_complaints(module: str, source: str) -> list[str]:
    """A blind handler is allowed only where it tidies up and raises on."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        blind = any(
            kind is None or dotted(kind) in {"Exception", "BaseException"} for kind in caught
        )
        last = node.body[-1]
        if blind and not (isinstance(last, ast.Raise) and last.exc is None):
            complaints.append(f"{module}:{node.lineno} catches everything")
    return complaints


def aliases(tree: ast.AST) -> dict[str, str]:
    """Local name -> full dotted name, for every import."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def seed_complaints(module: str, source: str) -> list[str]:
    """Seeding a global generator is allowed inside `with fork_rng(...)` only: it puts it back."""
    tree = ast.parse(source)
    names = aliases(tree)
    forked = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        and any(
            isinstance(item.context_expr, ast.Call)
            and dotted(item.context_expr.func).endswith("fork_rng")
            for item in node.items
        )
        for inner in ast.walk(node)
    }
    complaints = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and id(node) not in forked:
            head, _, rest = dotted(node.func).partition(".")
            full = f"{names.get(head, head)}.{rest}".rstrip(".")
            if full in SEEDERS:
                complaints.append(f"{module}:{node.lineno} seeds a global generator with {full}")
    return complaints


def name_complaints(module: str, source: str) -> list[str]:
    return [f"{module}: {part} says nothing" for part in module.split(".") if part in VAGUE_NAMES]


def table_complaints(known: Mapping[str, str]) -> list[str]:
    """Every "package.module:name" string must lead to a name that the module defines."""
    complaints = []
    for module, source in known.items():
        for node in ast.walk(ast.parse(source)):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            match = re.fullmatch(r"((?:fifa|d3po)(?:\.\w+)+):(\w+)", node.value)
            if match is None:
                continue
            target = known.get(match[1], known.get(f"{match[1]}.__init__"))
            if target is None or match[2] not in defined(ast.parse(target)):
                complaints.append(f"{module}:{node.lineno} {node.value} leads nowhere")
    return complaints


def defined(tree: ast.Module) -> set[str]:
    """Names that a module defines at its top level."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {dotted(target) for target in node.targets}
        elif isinstance(node, ast.AnnAssign):
            names.add(dotted(node.target))
    return names


RULES = {
    "order": order_complaints,
    "boundary": boundary_complaints,
    "print": print_complaints,
    "except": except_complaints,
    "seed": seed_complaints,
    "name": name_complaints,
}


@pytest.mark.parametrize("rule", RULES)
def test_every_module_keeps_the_rule(rule: str) -> None:
    found = modules()
    assert len(found) > 20, "the packages were not found"
    assert [line for name, source in found.items() for line in RULES[rule](name, source)] == []


BROKEN = [
    ("order", "fifa.config", "from fifa.images import grid"),
    ("order", "fifa.images", "def f():\n    from .pairs import Pair"),
    ("order", "fifa.rewards.mini", "from fifa import knn"),
    ("order", "fifa.rewards.mini", "from .. import selection"),
    ("order", "fifa.rewards.__init__", "TABLE = {'x': 'fifa.report:Reward'}"),
    ("order", "fifa.rewards.__init__", "from ..report import table"),
    ("order", "fifa.report", "import d3po.schedule"),
    ("order", "fifa.report", "importlib.import_module('d3po.schedule')"),
    ("order", "fifa.config", "from fifa import __version__"),
    ("order", "d3po.schedule", "if TYPE_CHECKING:\n    from d3po.trainer import fit"),
    ("order", "d3po.families.sd", "from d3po.policy import Policy"),
    ("order", "d3po.evaluate", "from fifa.cli import main"),
    ("order", "d3po.cupboard", ""),
    ("boundary", "d3po.objectives", "import numpy"),
    ("boundary", "d3po.objectives", "from d3po.schedule import NoiseSchedule"),
    ("boundary", "fifa.pairs", "def f():\n    import torch.nn"),
    ("boundary", "d3po.trainer", "from fifa import rewards"),
    ("print", "fifa.report", "def f():\n    print('x')"),
    ("except", "fifa.report", "try:\n    f()\nexcept:\n    pass"),
    ("except", "fifa.report", "try:\n    f()\nexcept Exception as e:\n    raise ValueError from e"),
    ("except", "fifa.report", "try:\n    f()\nexcept (OSError, Exception):\n    pass"),
    ("seed", "d3po.policy", "import torch\ntorch.manual_seed(0)"),
    ("seed", "d3po.policy", "from torch import manual_seed as m\nm(0)"),
    ("seed", "d3po.policy", "import numpy as np\nnp.random.seed(0)"),
    ("seed", "d3po.policy", "from accelerate.utils import set_seed\nset_seed(0)"),
    ("name", "d3po.families.utils", ""),
]


@pytest.mark.parametrize(("rule", "module", "source"), BROKEN)
def test_the_rule_notices_when_it_is_broken(rule: str, module: str, source: str) -> None:
    assert len(RULES[rule](module, source)) == 1


KEPT = [
    ("order", "fifa.images", "from fifa.config import InputError\nfrom . import config"),
    ("order", "fifa.rewards.mini", "from fifa.rewards import Reward\nfrom . import jpeg"),
    ("order", "fifa.rewards.__init__", "from . import jpeg\nTABLE = {'x': 'fifa.rewards.jpeg:X'}"),
    ("order", "fifa.cli", "from fifa import __version__, report"),
    ("order", "d3po.recipe", "from fifa.pairs import Pair\nfrom d3po.online import rounds"),
    ("boundary", "d3po.objectives", "import math\nimport torch.nn.functional as F"),
    ("print", "d3po.display", "print('1/10')"),
    ("print", "fifa.report", "console.print('x')"),
    ("except", "fifa.config", "try:\n    f()\nexcept BaseException:\n    tidy()\n    raise"),
    ("seed", "d3po.policy", "import torch\ntorch.Generator().manual_seed(0)"),
    (
        "seed",
        "d3po.policy",
        "import torch\nwith torch.random.fork_rng():\n    torch.manual_seed(0)",
    ),
]


@pytest.mark.parametrize(("rule", "module", "source"), KEPT)
def test_the_rule_lets_good_code_pass(rule: str, module: str, source: str) -> None:
    assert RULES[rule](module, source) == []


def test_names_in_tables_lead_somewhere() -> None:
    assert table_complaints(modules()) == []
    known = {
        "fifa.a": "T = {'x': 'fifa.b:f', 'y': 'fifa.b:g', 'z': 'fifa.c:f'}",
        "fifa.b": "def f(): ...",
    }
    assert len(table_complaints(known)) == 2


# --- packaging ----------------------------------------------------------------------------------


def settings() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(parser: configparser.RawConfigParser, extras: Sequence[str]) -> set[str]:
    """Canonical names of the packages that setup.cfg asks for, with these extras."""
    wanted = [parser["options.extras_require"][extra] for extra in extras]
    blocks = [parser["options"]["install_requires"], *wanted]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    names = (re.match(r"[\w.-]+", line) for line in lines if not line.startswith("#"))
    return {canonical(match.group()) for match in names if match}


def undeclared(module: str, source: str, known: set[str]) -> list[str]:
    """Third-party imports that no line of setup.cfg accounts for."""
    complaints = []
    for line, target in imports(module, ast.parse(source)):
        top = target.split(".")[0]
        if top in sys.stdlib_module_names or top in PACKAGES:
            continue
        if canonical(PROVIDED_BY.get(top, top)) not in known:
            complaints.append(f"{module}:{line} imports {top}, which setup.cfg does not ask for")
    return complaints


def test_every_import_is_declared() -> None:
    known = declared(settings(), OPTIONAL_EXTRAS)
    sources = {**modules(), "train": (ROOT / "train.py").read_text(encoding="utf-8")}
    assert [
        line for name, source in sources.items() for line in undeclared(name, source, known)
    ] == []
    for stranger in ("tensorflow", "pytest"):  # one nobody asks for, one that only tests ask for
        assert len(undeclared("fifa.embed", f"def f():\n    import {stranger} as x", known)) == 1


def unpinned(names: set[str], constraints: str) -> list[str]:
    """Declared packages without an exact version, and lines that are not `name==version`."""
    lines = [line for line in constraints.splitlines() if line and not line.startswith("#")]
    odd = [
        line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+(; python_version .*)?", line)
    ]
    pinned = {canonical(line.split("==")[0]) for line in lines}
    return sorted(names - pinned) + odd


def test_every_declared_package_has_an_exact_version() -> None:
    # xformers is bound to one torch build each; the extras of `all` name the project itself
    extras = list(settings()["options.extras_require"])
    names = declared(settings(), extras) - {"xformers", settings()["metadata"]["name"]}
    assert unpinned(names, (ROOT / "constraints.txt").read_text(encoding="utf-8")) == []
    assert unpinned({"rich", "torch"}, "# note\ntorch==2.0\n-e .\n") == ["rich", "-e ."]


def test_pyproject_holds_the_build_backend_only() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r"^\[.*\]$", text, re.MULTILINE) == ["[build-system]"]


def test_the_changelog_knows_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version = settings()["metadata"]["version"]
    assert f"## [{version}]" in text or "## [Unreleased]" in text


# --- what happens when it is imported or called -------------------------------------------------


def run_python(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("module", [name.removesuffix(".__init__") for name in modules()])
def test_every_module_imports(module: str) -> None:
    if not module.endswith("__main__"):
        importlib.import_module(module)


def loaded_by(statement: str, wanted: set[str]) -> set[str]:
    result = run_python("-c", f"{statement}\nimport sys\nprint(*sys.modules)")
    assert result.returncode == 0, result.stderr
    return wanted & set(result.stdout.split())


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    assert loaded_by(f"import {package}, {package}.cli", HEAVY) == set()


def test_a_heavy_import_would_be_seen() -> None:
    assert loaded_by("import fifa, faiss", {"faiss", "torch"}) == {"faiss"}


def entry_points() -> dict[str, str]:
    lines = settings()["options.entry_points"]["console_scripts"].strip().splitlines()
    return dict(re.split(r"\s*=\s*", line.strip()) for line in lines)


def help_complaints(script: str, entry_point: str) -> list[str]:
    """What is wrong with the answer to `script --help`, given "module:function"."""
    module, function = entry_point.split(":")
    call = f"import sys, {module} as m; sys.argv = ['{script}', '--help']; sys.exit(m.{function}())"
    result = run_python("-c", call)
    if result.returncode == 0 and not result.stderr and script in result.stdout:
        return []
    return [f"{script} --help ended with {result.returncode}: {result.stderr[-500:]}"]


@pytest.mark.parametrize("script", entry_points())
def test_console_script_answers_help(script: str) -> None:
    assert help_complaints(script, entry_points()[script]) == []


def test_a_script_without_help_would_be_seen() -> None:
    assert len(help_complaints("pdb", "json.tool:mian")) == 1


@pytest.mark.parametrize("script", entry_points())
def test_every_command_answers_help(script: str) -> None:
    from typer.main import get_command
    from typer.testing import CliRunner

    app = importlib.import_module(entry_points()[script].split(":")[0]).app
    commands = sorted(getattr(get_command(app), "commands", {}))
    assert commands, f"{script} has no commands"
    failed = [name for name in commands if CliRunner().invoke(app, [name, "--help"]).exit_code != 0]
    assert failed == []


def test_train_answers_help() -> None:
    result = run_python("train.py", "--help")
    assert (result.returncode, result.stderr) == (0, "")


# --- files --------------------------------------------------------------------------------------


def project_files() -> list[Path]:
    """What is or would be committed: tracked files and untracked ones that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, capture_output=True, cwd=ROOT, check=False)
    if result.returncode != 0:
        pytest.skip("not a git checkout, so there is no list of its files")
    paths = (ROOT / name for name in result.stdout.decode().split("\0") if name)
    return [path for path in paths if path.is_file()]


# a folder of somebody's machine at the start of a path; inside a URL or a longer path it is fine
MACHINE_PATH = re.compile(r"(?:(?<![\w./~}-])|(?<=file:/{2}))/(?:home|root|work|Users)/[\w.-]+")
INDEX_OPTION = re.compile(r"-{2}(?:extra-)?index-url|find[-]links")


def machine_complaints(name: str, text: str) -> list[str]:
    lines = enumerate(text.splitlines(), start=1)
    return [
        f"{name}:{number} names a place that others do not have: {line.strip()[:120]}"
        for number, line in lines
        if MACHINE_PATH.search(line) or INDEX_OPTION.search(line)
    ]


def test_no_file_names_a_developers_machine() -> None:
    complaints = []
    for path in project_files():
        data = path.read_bytes()
        if b"\0" not in data:
            text = data.decode("utf-8", errors="replace")
            complaints += machine_complaints(str(path.relative_to(ROOT)), text)
    assert complaints == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data = '/" + "home/ann/pairs'", 1),
        ("file:/" + "/" + "/" + "root/x.py", 1),
        ("/" + "Users/ann", 1),
        ("pip install --" + "index-url x", 1),
        ("see https://example.org/home/page and homework/work/x", 0),
        ("~/work/x, $HOME/work/x, ./work/x, and/or", 0),
    ],
)
def test_machine_paths_are_told_from_other_slashes(text: str, expected: int) -> None:
    assert len(machine_complaints("x", text)) == expected


def weight_complaints(sizes: Mapping[str, int], limits: Mapping[str, int]) -> list[str]:
    """Folders whose files, path -> bytes, add up to more than their limit."""
    totals = {
        folder: sum(n for p, n in sizes.items() if p.startswith(f"{folder}/")) for folder in limits
    }
    return [f"{f}: {n} bytes, limit {limits[f]}" for f, n in totals.items() if n > limits[f]]


def test_packaged_weights_stay_small() -> None:
    paths = [
        path for folder in WEIGHT_LIMITS for path in (ROOT / folder).rglob("*") if path.is_file()
    ]
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in paths}
    assert weight_complaints(sizes, WEIGHT_LIMITS) == []
    assert len(weight_complaints({"a/x": 3, "a/b/y": 3, "ab/z": 9}, {"a": 5, "ab": 9})) == 1


def ignored(paths: Sequence[str]) -> list[str]:
    """Those of the paths, existing or not, that git would leave out of a commit."""
    command = ["git", "check-ignore", "--no-index", *paths]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if result.returncode not in {0, 1}:
        pytest.skip("not a git checkout, so nothing is ignored")
    return result.stdout.split()


def test_git_takes_packaged_weights() -> None:
    names = ["unet/model.safetensors", "vocab.json", "merges.txt", "model.bin", "model.pt"]
    assert ignored([f"{folder}/{name}" for folder in WEIGHT_LIMITS for name in names]) == []
    assert ignored(["runs/demo/report.html", "d3po/__init__.py"]) == ["runs/demo/report.html"]


def readme_targets(readme: str) -> list[str]:
    """`make X` of every fenced sh block."""
    blocks = re.findall(r"^```sh\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    return [
        target
        for block in blocks
        for target in re.findall(r"^(?:\$ )?make ([\w-]+)", block, re.MULTILINE)
    ]


def missing_targets(readme: str, makefile: str) -> list[str]:
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    return [target for target in readme_targets(readme) if target not in targets]


def test_make_targets_of_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"demo", "test"} <= set(readme_targets(readme))
    assert missing_targets(readme, (ROOT / "Makefile").read_text(encoding="utf-8")) == []
    assert missing_targets("```sh\nmake demo  # x\nmake coffee\n```\n", "demo: x\n") == ["coffee"]


def misnamed_rooms(readme: str, packages: Sequence[str]) -> list[str]:
    """Rooms that the README's tree does not name once, and what it names that is no room."""
    wrong = []
    for package in packages:
        tree = re.search(rf"^{package}/ .*\n((?:  .*\n)+)", readme, re.MULTILINE)
        told = re.findall(r"^  (\S+)", tree.group(1), re.MULTILINE) if tree else []
        rooms = [
            path.name if path.suffix == ".py" else f"{path.name}/"
            for path in (ROOT / package).iterdir()
            if not path.name.startswith("__") and (path.suffix == ".py" or any(path.glob("*.py")))
        ]
        names = sorted({*told, *rooms})
        wrong += [f"{package}/{n}" for n in names if told.count(n) != 1 or n not in rooms]
    return wrong


def test_the_readme_names_every_room_once_and_no_other() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert misnamed_rooms(readme, PACKAGES) == []
    broken = readme.replace("  config.py ", "  conf.py ").replace("  images.py", "  pairs.py ", 1)
    found = misnamed_rooms(broken, PACKAGES)
    assert found == [f"fifa/{name}.py" for name in ("conf", "config", "images", "pairs")]

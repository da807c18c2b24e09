from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import d3po

HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "numpy",
    "pyarrow",
    "open_clip",
)


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in run.stdout.split()}


@pytest.mark.parametrize("statement", ["import d3po", "import d3po.policy"])
def test_the_import_is_light(statement: str) -> None:
    assert not modules_after(statement) & set(HEAVY)


def test_public_names_are_found_when_asked_for() -> None:
    assert d3po.ddim_grid is importlib.import_module("d3po.schedule").ddim_grid
    assert set(d3po.__all__) <= set(dir(d3po))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        d3po.nonsense  # noqa: B018


@pytest.mark.parametrize("name", d3po.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(d3po, name) is not None

"""Every notebook is committed without outputs and runs from its first cell to its last."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from d3po.families import MINI
from fifa.rewards.mini import WEIGHTS

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS] == ["quickstart.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    assert "widgets" not in notebook.metadata


@pytest.mark.skipif(
    not (MINI.is_dir() and WEIGHTS.is_dir()), reason="the weights of the mini model are not there"
)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At tiny sizes, in an empty folder; a second run finds its folders and goes on."""
    monkeypatch.setenv("QUICKSTART_SIZE", "tiny")
    monkeypatch.setenv("QUICKSTART_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    pictures = [output for output in _outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(pictures) >= 6  # the pairs, kept, dropped, two comparisons, the painted ones
    assert (tmp_path / "out" / "dpo" / "weights" / "pytorch_lora_weights.safetensors").is_file()
    said = "".join(output.get("text", "") for output in _outputs(notebook))
    assert "reward and people agree on" in said
    assert "jpeg_compressibility" in said
    assert {item.name for item in tmp_path.iterdir()} == {"out"}  # nothing strewn about


def _outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]

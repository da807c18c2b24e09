from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import typer
from pair_files import write_pairs
from typer.testing import CliRunner

from fifa.bench import share
from fifa.cli import app
from fifa.filtering import SelectConfig
from fifa.reward_cli import doubt_about
from fifa.terminal import config_of, plain_lines, run_app


def fifa(*args: object) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would, with its output in pipes."""
    command = [sys.executable, "-m", "fifa.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_score_select_report(tmp_path: Path) -> None:
    data, out = write_pairs(tmp_path / "a.parquet"), tmp_path / "scores"
    scored = fifa("score", data, "--out", out, "--reward", "jpeg_incompressibility", "--limit", 36)
    assert scored.returncode == 0, scored.stderr
    assert "36 of 36 rows scored (0 found done), 9 ties" in scored.stdout
    assert re.search(r"^scoring: 36 of 36", scored.stderr, re.MULTILINE)
    assert "\x1b" not in scored.stderr  # no bars in a pipe
    run = CliRunner()
    kept = run.invoke(
        app, ["select", str(out), "-k", "25%", "--method", "greedy", "--alpha", "0.1"]
    )
    assert kept.exit_code == 0, kept.output
    assert "9  kept" in kept.output
    assert "f(S) at 9 pairs: greedy" in kept.output
    assert pq.read_metadata(out / "kept.parquet").num_rows == 9
    assert run.invoke(app, ["report", str(out)]).output.strip() == str(out / "report.html")


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["score", "nowhere", "--out", "x"], "nowhere does not exist"),
        (["select", "nowhere"], "nowhere holds no scores"),
        (["select", "nowhere", "-k", "lots"], "the number of pairs is 'lots'"),
        (["select", "nowhere", "-k", "0"], "'0', it must be at least 1, or a share up to 100%"),
        (["sweep", "nowhere", "--sizes", "101%"], "'101%', it must be at least 1, or a share"),
        (["select", "nowhere", "--method", "gredy"], "should be 'importance', 'greedy'"),
        (["select", "nowhere", "--alpha", "-1"], "greater than or equal to 0"),
        (["select", "nowhere", "--set", "kap=3"], "unknown key 'kap'; did you mean 'cap'?"),
        (["report", "nowhere"], "nowhere holds no selection"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    args: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = CliRunner().invoke(app, args)
    assert part in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not Path("x").exists()


def test_an_error_reaches_the_shell_as_one_line(tmp_path: Path) -> None:
    result = fifa("score", tmp_path / "none.parquet", "--out", tmp_path / "out")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        f"error: {tmp_path / 'none.parquet'} does not exist "
        f"(expected a .parquet file or a folder of them)\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_file_sets_what_the_options_do_not(tmp_path: Path) -> None:
    data, out = write_pairs(tmp_path / "a.parquet"), tmp_path / "with space: #1"
    (tmp_path / "c.yaml").write_text("reward: jpeg_compressibility\nlimit: 8\n")
    options = ["--config", str(tmp_path / "c.yaml"), "--set", "neighbours=2", "--limit", "12"]
    result = CliRunner().invoke(app, ["score", str(data), "--out", str(out), *options])
    assert result.exit_code == 0, result.exception
    assert pq.read_metadata(out / "scores.parquet").num_rows == 12


def test_a_diffusion_model_paints_some_of_the_world(tmp_path: Path) -> None:
    from d3po.families import MINI

    arguments = ["--out", str(tmp_path / "a"), "--rows", "40", "--workers", "1"]
    made = CliRunner().invoke(app, ["world", *arguments, "--pipeline", str(MINI)])
    assert made.exit_code == 0, made.output
    table = pq.read_table(tmp_path / "a")
    painters = [*table["model_0"].to_pylist(), *table["model_1"].to_pylist()]
    assert 0 < painters.count("pipeline") < 15


def test_settings_lists_every_setting_with_its_meaning() -> None:
    output = CliRunner().invoke(app, ["settings"]).output
    assert "min_quality = 0.0  (float)  Drop prompts judged below this." in output
    assert "data = required" in output


@pytest.mark.parametrize("command", ["world", "convert", "score", "select", "sweep", "report"])
def test_help_has_an_example(command: str) -> None:
    assert f"fifa {command}" in CliRunner().invoke(app, [command, "--help"]).output


@pytest.mark.parametrize("name", ["null", "2024", "a b", "x: y", "#1", "[", "out 😀", "1e-3"])
def test_options_are_taken_as_they_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = config_of(SelectConfig, None, {"scores": Path("runs"), "out": Path(name)}, ["k=3"])
    assert (chosen.out, chosen.k) == (Path(name), 3)


def test_plain_progress_begins_ends_and_is_quiet_between(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show = plain_lines(every=60.0)
    for done in range(0, 101, 10):
        show("scoring", done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0] == "scoring: 0 of 100"
    assert lines[1].startswith("scoring: 100 of 100")


@pytest.mark.parametrize(
    ("right", "pairs", "part"),
    [(0, 40, "worse than chance"), (22, 40, "cannot be told from chance"), (0, 0, "nobody knows")],
)
def test_a_proxy_that_may_be_wrong_is_doubted(right: int, pairs: int, part: str) -> None:
    assert part in doubt_about(share(right, pairs))
    assert doubt_about(share(36, 40)) == ""


def test_ctrl_c_is_a_line_and_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()

    @app.command()
    def work() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["work"])
    with pytest.raises(SystemExit, match="130"):
        run_app(app)
    assert capsys.readouterr().err == "interrupted; type the same command again\n"

"""`cmg-gguf eval`: runs from the command line, their reports, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from commands import PROGRAM, environment, flat, invoke
from tiny_llava import TinyPair

from cmg_gguf.cli.app import app
from cmg_gguf.cli.evaluate.task_flags import TASKS
from cmg_gguf.evaluation.report import make_report
from cmg_gguf.evaluation.report_text import markdown
from cmg_gguf.evaluation.run import read_run
from cmg_gguf.settings import load_settings

SCENES = ("--pictures", "2", "--methods", "greedy,cmg", "--parallel", "1")


@pytest.fixture(scope="module")
def model(pair: TinyPair) -> list[str]:
    files = ["-m", str(pair.llm), "--mmproj", str(pair.mmproj)]
    return [*files, "-c", "512", "-t", "1", "-ctk", "f32", "-ctv", "f32", "-fa", "off"]


@pytest.fixture(scope="module")
def run(model: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "run"
    result = invoke("eval", "scenes", *SCENES, *model, "-o", str(folder), "--alpha", "3")
    assert result.exit_code == 0, result.stderr
    assert "All items: n = " in result.stdout
    assert "too few" in result.stdout
    assert "new answers in" in result.stderr
    return folder


def test_a_run_goes_on_and_reports_from_its_folder_alone(run: Path, model: list[str]) -> None:
    again = invoke("eval", "scenes", *SCENES, *model, "-o", str(run), "--alpha", "3")
    assert again.exit_code == 0
    assert "0 new answers" in again.stderr
    shown = invoke("eval", "report", str(run))
    assert shown.exit_code == 0
    assert shown.stdout == again.stdout
    for name in ("report.md", "figures.csv", "accuracy-by-yes.png", "changes.png"):
        assert (run / name).stat().st_size > 0
    assert (run / "report.md").read_text() == markdown(make_report(read_run(run)))


def test_strengths_make_a_curve_of_each_method(model: list[str], tmp_path: Path) -> None:
    flags = ["eval", "scenes", "--ask", "captions", "--pictures", "1", *model, "-o"]
    flags += [str(tmp_path / "run"), "--methods", "greedy,icd", "--alphas"]
    assert invoke(*flags, "1, 2").exit_code == 0
    longer = invoke(*flags, "0.5,1,2")
    assert longer.exit_code == 0, longer.stderr
    assert "1 new answer in" in longer.stderr
    assert list(read_run(tmp_path / "run").methods) == ["greedy", "icd@0.5", "icd@1", "icd@2"]
    assert "chair i at matched recall" in longer.stdout
    refused = invoke(*flags, "0")
    assert refused.exit_code == 1
    assert "strength 0 is out of range" in refused.stderr


def test_without_matplotlib_a_report_is_its_tables_and_one_note(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    shown = invoke("eval", "report", str(run), str(run))
    assert shown.exit_code == 0
    assert shown.stdout.count("All items: n = ") == 2
    assert shown.stderr.count("note: plots need matplotlib: pip install matplotlib") == 1
    assert shown.stderr.count("report.md, figures.csv") == 2
    assert ".png" not in shown.stderr
    assert "matplotlib" not in invoke("eval", "report", str(run), "--no-plots").stderr


def test_a_run_goes_on_with_any_number_of_answers_at_once(model: list[str], tmp_path: Path) -> None:
    flags = ["eval", "scenes", *SCENES, *model, "-o", str(tmp_path / "run")]
    first = invoke(*flags, "--parallel", "3")
    assert first.exit_code == 0, first.stderr
    told = (tmp_path / "run" / "results.jsonl").read_text().splitlines()
    assert {json.loads(line)["parallel"] for line in told} == {3}
    assert "for up to 3 answers were made at once" in flat(first.stdout)
    again = invoke(*flags, "--parallel", "1")
    assert again.exit_code == 0
    assert "0 new answers" in again.stderr
    assert "n_parallel" not in (tmp_path / "run" / "run.json").read_text()


def test_other_settings_in_the_same_folder_are_an_error(run: Path, model: list[str]) -> None:
    result = invoke("eval", "scenes", *SCENES, *model, "-o", str(run), "--alpha", "2")
    assert result.exit_code == 1
    assert "methods.cmg.guidance.alpha=3.0, and 2.0 is asked for" in flat(result.stderr)
    assert result.stdout == ""


def test_shards_are_merged(run: Path, model: list[str], tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("one", "two")]
    flags = [*SCENES, *model, "--alpha", "3"]
    for i, folder in enumerate(folders, start=1):
        result = invoke("eval", "scenes", *flags, "--shard", f"{i}/2", "-o", folder)
        assert result.exit_code == 0
        assert f"is shard {i}/2" in result.stderr
    merged = invoke("eval", "merge", *folders, "-o", str(tmp_path / "all"))
    assert merged.exit_code == 0
    whole, parts = (
        [
            {**json.loads(line), "encode": 0, "seconds": 0}
            for line in (folder / "results.jsonl").read_text().splitlines()
        ]
        for folder in (run, tmp_path / "all")
    )
    assert parts == whole
    assert "shard 2/2 is missing" in invoke("eval", "merge", folders[0], "-o", "x").stderr


def test_tuned_settings_are_for_other_items(model: list[str], tmp_path: Path) -> None:
    scenes = ["scenes", "--pictures", "4", *model]
    tried = ["--try-alpha", "0.5", "--try-alpha", "3", "--try-layers", "0.5-", "--tokens", "top:1"]
    tuned = invoke("eval", "tune", *scenes, *tried, "-o", str(tmp_path / "tune"))
    assert tuned.exit_code == 0, tuned.stderr
    assert "best of 2 on" in tuned.stderr
    path = tmp_path / "tune" / "settings.json"
    settings = load_settings(path)
    assert settings.guidance.alpha in (0.5, 3.0)
    flags = [*scenes, "--methods", "cmg", "--settings", str(path), "-o", str(tmp_path / "run")]
    assert invoke("eval", *flags[:-1], str(tmp_path / "test")).exit_code == 0  # another split
    flags += ["--split", "tune"]
    refused = invoke("eval", *flags)
    assert refused.exit_code == 1
    assert "the settings were tuned on" in refused.stderr
    assert invoke("eval", *flags, "--skip-tuned", "--beta", "0.2").exit_code == 0
    told = json.loads((tmp_path / "run" / "run.json").read_text())["methods"]["cmg"]["guidance"]
    assert (told["alpha"], told["beta"]) == (settings.guidance.alpha, 0.2)
    assert told["layers"] == {"rule": "layer_range", "start": 0.5, "stop": 1.0}


def test_settings_files_work_for_single_questions_too(model: list[str], tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text('{"guidance": {"alpha": 7}}')
    flags = ["run", *model, "-p", "Why?", "-n", "2", "--json", "--settings", str(path)]
    for given, alpha in (([], 7), (["--alpha", "2"], 2)):
        told = json.loads(invoke(*flags, *given).stdout)["cmg"]
        assert told["alpha"] == alpha
    path.write_text("{")
    result = invoke(*flags)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "is no JSON" in result.stderr
    assert invoke(*flags, "--no-guidance").exit_code == 2


def test_ctrl_c_stops_between_answers_and_the_run_goes_on(model: list[str], tmp_path: Path) -> None:
    flags = ["eval", "scenes", "--pictures", "40", "--methods", "greedy,cmg", *model]
    journal = tmp_path / "run" / "journal.jsonl"
    with subprocess.Popen(
        [*PROGRAM, *flags, "-o", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd="/",
    ) as process:
        while not (journal.exists() and journal.stat().st_size > 1000):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert b"stopped; the same command goes on from here" in err
    assert journal.read_bytes().endswith(b"}\n")
    assert not (tmp_path / "run" / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["scenes", "-o", "x", "--methods", "best"], "method 'best' is unknown"),
        (["scenes", "-o", "x", "--shard", "2"], "write 2/3 for the second of three"),
        (["folder", "-o", "x", "--images", "/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_run_is_exit_1(flags: list[str], message: str, model: list[str]) -> None:
    result = invoke("eval", *flags, *model)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in flat(result.stderr)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["scenes"], "'--out' / '-o': none is given"),
        (["scenes", "-o", "x", "--ask", "colours", "--rule", "strict"], "no effect on colours"),
        (["scenes", "-o", "x", "--style", "brief"], "no effect on pope"),
        (["scenes", "-o", "x", "--jobs", "2", "--dask", "tcp://h:1"], "leave one of the two out"),
        (["scenes", "-o", "x", "--parallel", "0"], "greater than or equal to 1"),
        (["scenes", "-o", "x", "--alphas", "1", "--alpha", "2"], "tries its own strengths"),
        (["scenes", "-o", "x", "--alphas", "1", "--layers", "1/3-"], "tries its own layers"),
        (["scenes", "-o", "x", "--alphas", "1;2"], "'1;2' is no list of numbers"),
        (["pope", "-o", "x", "--images", "/"], "name a POPE question file"),
        (["chair", "-o", "x"], "name COCO's instance annotations"),
        (["mme", "-o", "x"], "name MME's folder"),
        (["amber", "-o", "x"], "name AMBER's data folder"),
        (["hallusion", "-o", "x"], "name HallusionBench.json"),
        (["dash-b", "-o", "x"], "name the folder that neg and pos are in"),
        (["folder", "-o", "x", "--images", ".", "-p", " "], "'--prompt' / '-p': it is empty"),
        (["chair", "-o", "x", "--instances", "x", "--images", ".", "-p", " "], "it is empty"),
        (["tune", "scenes"], "'--out' / '-o': none is given"),
        (["tune", "scenes", "-o", "x", "--try-layers", "x"], "no choice of layers"),
        (["tune", "scenes", "-o", "x", "--try-alpha", "1000"], "alpha=1000.0 is out of range"),
        (["merge", "a"], "'--out' / '-o': none is given"),
    ],
)
def test_wrong_usage_is_exit_2(flags: list[str], message: str, model: list[str]) -> None:
    result = invoke("eval", *flags, *([] if flags[0] == "merge" else model))
    assert result.exit_code == 2, result.stderr
    assert message in flat(result.stderr)


def commands() -> list[tuple[str, ...]]:
    names = [*((name,) for name in TASKS), *(("tune", name) for name in TASKS)]
    return [*names, ("report",), ("merge",)]


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_help_explains_every_flag(path: tuple[str, ...]) -> None:
    shown = invoke("eval", *path, "--help").stdout
    group: Any = typer.main.get_command(app)
    for name in ("eval", *path):
        group = group.commands[name]
    for parameter in group.params:
        assert parameter.help, parameter.name
        for name in parameter.opts:
            assert not name.startswith("-") or f" {name} " in shown.replace("/", " "), name
    assert "Examples:" in shown


def test_help_needs_no_llama() -> None:
    code = "import sys; from cmg_gguf.cli import main\ntry: main(sys.argv[1:])\n"
    code += "except SystemExit as end: sys.exit(end.code or 'llama_cpp' in sys.modules)"
    done = subprocess.run(
        [*PROGRAM[:1], "-c", code, "eval", "pope", "--help"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_python_api_is_what_is_documented() -> None:
    import cmg_gguf.evaluation as evaluation

    for name in evaluation.__all__:
        assert getattr(evaluation, name).__doc__, name
    with pytest.raises(AttributeError):
        _ = evaluation.nothing
    code = (
        "import sys, cmg_gguf; cmg_gguf.GuidedVLM; sys.exit('cmg_gguf.evaluation' in sys.modules)"
    )
    assert subprocess.run([*PROGRAM[:1], "-c", code], check=False, cwd="/").returncode == 0

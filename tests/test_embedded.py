"""The model that comes with the package, and what is shown with it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import environment, flat, invoke
from gguf import GGMLQuantizationType, GGUFReader
from PIL import Image

from cmg_gguf import Guidance, GuidedVLM, ModelError
from cmg_gguf.cli.demo import PROMPT, _marked, _named, _truth
from cmg_gguf.settings import Settings, save_settings
from cmg_gguf.tiny import pair as embedded
from cmg_gguf.tiny.pair import embedded_guidance, embedded_pair
from cmg_gguf.tiny.scenes import draw, make_scene
from cmg_gguf.tiny.scenes.texts import CAPTION_PROMPTS, existence_question

MEGABYTE = 1_000_000


def plain(text: str) -> str:
    return " ".join(text.split())


def test_the_pair_is_small_and_made_of_standard_parts() -> None:
    llm, mmproj = embedded_pair()
    assert llm.stat().st_size + mmproj.stat().st_size <= 8 * MEGABYTE
    language, vision = GGUFReader(llm), GGUFReader(mmproj)
    assert language.fields["general.architecture"].contents() == "llama"
    assert vision.fields["general.architecture"].contents() == "clip"
    matrices = [t for t in language.tensors if t.name.endswith(("attn_q.weight", "output.weight"))]
    assert {t.tensor_type for t in matrices} == {GGMLQuantizationType.Q8_0}


def test_a_missing_pair_is_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded, "FOLDER", tmp_path)
    with pytest.raises(ModelError, match="is not part of this installation"):
        embedded_pair()


def test_importing_the_package_does_not_touch_the_model() -> None:
    code = "import sys, cmg_gguf; print([m for m in sys.modules if 'tiny' in m])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_it_sees_what_is_there() -> None:
    """Far from a benchmark: that the files are the trained ones and not noise."""
    right = []
    with GuidedVLM(*embedded_pair(), n_ctx=1024) as vlm:
        for index in range(40):
            scene = make_scene("tune", index)
            for thing in scene.things:
                if thing.sight == "clear":
                    reply = vlm.generate(
                        existence_question(thing.name),
                        [draw(scene)],
                        guidance=Guidance(alpha=0, beta=0),
                        max_tokens=4,
                    )
                    right.append(reply.text == "Yes")
    assert np.mean(right) > 0.85


@pytest.mark.slow
def test_the_demo_prints_truth_and_both_answers_and_writes_pictures(tmp_path: Path) -> None:
    result = invoke("demo", "--scene", "3", "--save", str(tmp_path / "new"))
    assert result.exit_code == 0, result.stderr
    scene = make_scene("test", 3, "counter")
    assert plain(_truth(scene)) in plain(result.stdout)
    with GuidedVLM(*embedded_pair(), n_ctx=1024) as vlm:
        for guidance in (Guidance(alpha=0, beta=0), embedded_guidance()):
            answer = vlm.generate(PROMPT, [draw(scene)], guidance=guidance).text
            shown = plain(result.stdout).replace(" (not there)", "")
            assert plain(answer) in re.sub(r"\[\[|\]\]", "", shown)
    with Image.open(tmp_path / "new" / "scene.png") as image:
        np.testing.assert_array_equal(np.asarray(image), draw(scene))
    with Image.open(tmp_path / "new" / "looked.png") as image:
        assert min(image.size) > 240


@pytest.mark.slow
def test_by_itself_the_demo_shows_the_first_scene_where_guidance_changes_what_is_named(
    tmp_path: Path,
) -> None:
    result = invoke("demo", "--save", str(tmp_path))
    assert result.exit_code == 0, result.stderr
    found = re.search(r"test scene (\d+), the first of (\d+) scenes?", plain(result.stdout))
    assert found is not None
    number = int(found[1])
    assert int(found[2]) == number + 1
    assert "[[" in result.stdout
    for earlier in range(number):
        again = invoke("demo", "--scene", str(earlier), "--save", str(tmp_path))
        assert "in which guidance changes" not in again.stdout
        rows = re.split(r"\n(?=plain|guided|\n)", again.stdout)
        named = [set(_named(re.sub(r"\[\[|\]\]| \(not there\)", "", plain(r)))) for r in rows[1:3]]
        assert named[0] == named[1]


def test_what_is_not_in_the_picture_is_said_to_be_so() -> None:
    scene = make_scene("test", 0, "counter")
    there = sorted(scene.names)[0]
    marked = _marked(f"There is a {there}. There is a [[ghost]] and [[chair]].", scene).plain
    assert f"{there} (not there)" not in marked
    assert ("[[chair]] (not there)" in marked) == ("chair" not in scene.names)
    assert "ghost]] (" not in marked


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = invoke("demo", "--scene", "0", "--save", str(tmp_path / "file" / "folder"))
    assert result.exit_code == 1
    assert "cannot be written" in flat(result.stderr)


def test_the_demo_needs_no_network_and_no_arguments(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from cmg_gguf.cli import main; main()", "demo"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
        check=True,
    )
    assert "guided" in done.stdout
    assert "written:" in done.stderr
    assert sorted(path.name for path in (tmp_path / "cmg-gguf-demo").iterdir()) == [
        "looked.png",
        "scene.png",
    ]


def test_run_without_a_model_takes_the_one_that_is_built_in(tmp_path: Path) -> None:
    Image.fromarray(draw(make_scene("test", 0))).save(tmp_path / "scene.png")
    asked = ["run", "--image", str(tmp_path / "scene.png"), "-p", CAPTION_PROMPTS["plain"]]
    result = invoke(*asked)
    assert result.exit_code == 0, result.stderr
    assert "built-in" in flat(result.stderr)
    with GuidedVLM(*embedded_pair()) as vlm:
        expected = vlm.generate(
            CAPTION_PROMPTS["plain"], [tmp_path / "scene.png"], guidance=embedded_guidance()
        )
    assert result.stdout == expected.text + "\n"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "answers, with the guidance chosen for it: it knows only"),
        (["--alpha", "2"], "answers, with the guidance chosen for it, but for --alpha: "),
        (["--layers", "1", "--beta", "0"], "chosen for it, but for --beta, --layers: "),
        (["--settings", "own.json"], "answers, with the guidance of own.json: "),
        (["--settings", "own.json", "--scope", "all"], "of own.json, but for --scope: "),
        (["--no-guidance"], "answers, without guidance: "),
        (["--alpha", "0"], "answers, without guidance: "),
    ],
)
def test_the_built_in_model_says_what_guides_it(
    flags: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(draw(make_scene("test", 0))).save("scene.png")
    save_settings("own.json", Settings(Guidance(alpha=2.0)))
    shown = ["--image", "scene.png", "-n", "1", *flags]
    assert told in flat(invoke("run", *shown, "-p", "What?").stderr)
    assert told in flat(invoke("chat", *shown, input="").stderr)
    blind = flat(invoke("run", *shown[2:], "-p", "What?").stderr)
    assert ("without guidance" in blind) == ("without guidance" in told)
    assert "with the guidance" not in blind


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["scenes", "--methods", "greedy,cmg"], "answers, cmg with the guidance chosen for it: "),
        (["scenes", "--methods", "greedy,cmg", "--alpha", "0"], "answers, cmg without guidance: "),
        (["scenes", "--methods", "greedy"], "tiny model answers: it knows only"),
        (["tune", "scenes", "--trials", "1"], "tiny model answers: it knows only"),
    ],
)
def test_an_evaluation_of_the_built_in_model_says_what_guides_it(
    flags: list[str], told: str, tmp_path: Path
) -> None:
    task = ["--ask", "colours", "--pictures", "8", "--limit", "1", "-o", str(tmp_path / "run")]
    result = invoke("eval", *flags, *task)
    assert result.exit_code == 0, result.stderr
    assert told in flat(result.stderr)

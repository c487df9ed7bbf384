"""DASH-B: its folders, its question, its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluated import bad, check_figures_are_sound, figures, good, labels, write_images

from cmg_gguf.errors import EvaluationError
from cmg_gguf.evaluation.tasks.dash_b import DashB

FILES = (
    *("neg/coco/umbrella/1.jpg", "neg/coco/umbrella/2.JPG", "neg/imagenet/fire truck/1.jpg"),
    *("pos/coco/umbrella/1.jpg", "pos/fire truck/9.png"),
)


@pytest.fixture
def dash(tmp_path: Path) -> DashB:
    root = write_images(tmp_path / "images", FILES)
    (root / "neg" / "coco" / "umbrella" / "notes.txt").write_text("none")
    return DashB(root)


def test_items_are_the_images_with_their_folders_object(dash: DashB) -> None:
    items = good(dash)
    assert [item.id for item in items] == list(FILES)
    assert labels(dash) == {f: "No" if f.startswith("neg") else "Yes" for f in FILES}
    assert [item.cluster for item in items] == [
        *("umbrella", "umbrella", "fire truck", "umbrella", "fire truck")
    ]
    assert items[2].prompt == (
        "Can you see a fire truck in this image? Please answer only with yes or no."
    )
    assert all(dash.load(item).is_file() for item in items)


def test_its_own_lists_say_which_images_are_asked_about(dash: DashB) -> None:
    """As in the repository: {source: {object: [files]}}, beside the unpacked folders."""
    root = Path(dash.root)
    listed: dict[str, dict[str, list[str]]]
    listed = {"coco": {"umbrella": ["2.JPG"]}, "imagenet": {"fire truck": []}}
    (root / "dash_benchmark_neg.json").write_text(json.dumps(listed, indent=4))
    assert [item.id for item in good(dash)] == [FILES[1], *FILES[3:]]
    listed = {"coco": {"umbrella": ["2.JPG", "7.jpg"]}}
    (root / "dash_benchmark_neg.json").write_text(json.dumps(listed, indent=4))
    assert bad(dash) == {"neg/coco/umbrella/7.jpg": "its list names it, and it is not there"}
    for wrong in (["1.jpg"], {"coco": ["1.jpg"]}, {"coco": {"umbrella": 1}}):
        (root / "dash_benchmark_neg.json").write_text(json.dumps(wrong))
        with pytest.raises(EvaluationError, match=r"dash_benchmark_neg\.json' is no list of DASH"):
            list(dash.items())


def test_what_an_unpacker_leaves_beside_the_images_is_none(dash: DashB) -> None:
    before = good(dash)
    beside = Path(dash.root) / "neg" / "__MACOSX" / "coco" / "umbrella"
    beside.mkdir(parents=True)
    (beside / "._1.jpg").write_bytes(b"\x00\x05\x16\x07")
    assert good(dash) == before


def test_figures_by_hand(dash: DashB) -> None:
    answers = {**labels(dash), FILES[0]: "Yes.", FILES[1]: "yes, I can", FILES[4]: "Maybe"}
    found = figures(dash, answers)
    tpr, tnr = 50, 100 / 3
    assert found == pytest.approx(
        {
            "accuracy": 40,
            "tpr": tpr,
            "tnr": tnr,
            "harmonic_mean": 2 * tpr * tnr / (tpr + tnr),
            "yes_ratio": 60,
            "unparsed": 20,
        }
    )


def test_figures_are_sound(dash: DashB) -> None:
    check_figures_are_sound(dash, labels(dash))


def test_what_is_not_there_is_told(dash: DashB) -> None:
    root = Path(dash.root)
    write_images(root, ["pos/loose.jpg"])
    assert bad(dash) == {"pos/loose.jpg": "it lies in no object's folder"}
    for path in sorted((root / "pos").rglob("*.*")):
        path.unlink()
    with pytest.raises(EvaluationError, match=r"pos' has no image: put DASH-B's pos\.zip there"):
        list(dash.items())
    with pytest.raises(EvaluationError, match=r"DASH-B's folder neg .* is no folder"):
        list(DashB(root / "pos").items())
    with pytest.raises(EvaluationError, match=r"DASH-B's folder .* is no folder"):
        list(DashB(root / "gone").items())

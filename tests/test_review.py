"""Captions to review: sorted by the least supported word, marked, escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from html import unescape
from pathlib import Path

import pytest
from captioned import MODEL, draw_pictures
from commands import invoke

from cmg_gguf import EvidenceModel
from cmg_gguf.captioning import caption
from cmg_gguf.captioning.review import Reviewed, placed
from cmg_gguf.errors import CaptionError
from cmg_gguf.evaluation.answering import Job, Work
from cmg_gguf.evaluation.records import Record

WEIGHTS = EvidenceModel(fitted_on="a <test> & more")
SAYS = {
    "a.png": ("A  cat and\na <b>hat</b>.", [0.9, 0.8, 0.1, 0.1, 0.7, 0.45, 0.7]),
    "b & c.png": ("A dog.", [0.2, 0.3]),
    "d.png": ("It is the.", [0.1, 0.1, 0.1]),
}


def told(answer: str, scores: Sequence[float]) -> list[list[float]]:
    found = re.finditer(r"\w+", answer)
    return [
        [m.start(), m.end(), -1.0, -2.0, 0.1, 0.5, s] for m, s in zip(found, scores, strict=True)
    ]


def parrot(job: Job, works: Sequence[Work]) -> Iterator[Record]:
    assert job.evidence == WEIGHTS
    for work in works:
        ((item, names),) = work.items
        answer, scores = SAYS[item.id]
        (method,) = names
        words = told(answer, scores)
        yield Record(item=item.id, method=method, answer=answer, finish="stop", words=words)


def test_a_folder_is_reviewed(tmp_path: Path) -> None:
    draw_pictures(tmp_path, list(SAYS))
    made = caption(tmp_path, MODEL, executor=parrot, evidence=WEIGHTS, prefix="hat,")
    assert made.review == (tmp_path / "review.jsonl", tmp_path / "review.html")
    lines = [json.loads(line) for line in made.review[0].read_text().splitlines()]
    assert [(line["image"], line["least"], line["score"]) for line in lines] == [
        ("b & c.png", "dog", 0.3),
        ("a.png", "hat", 0.45),
        ("d.png", None, None),
    ]
    for line in lines:
        assert line["caption"] == (tmp_path / line["image"]).with_suffix(".txt").read_text().strip()
        for word in line["words"]:
            assert line["caption"][word["start"] : word["stop"]] == word["text"]
            assert word["start"] >= len("hat, ")
    page = made.review[1].read_text()
    assert page.count("<tr>") == page.count("data:image/jpeg;base64,") == 3
    assert re.findall(r"<mark[^>]*>(.*?)</mark>", page) == ["dog", "hat"]
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "a &lt;test&gt; &amp; more" in page
    assert 'href="b%20%26%20c.png"' in page
    assert "A cat and a <b>hat</b>." in unescape(re.sub(r"</?mark[^>]*>", "", page))


def test_a_later_run_keeps_the_review_of_other_pictures(tmp_path: Path) -> None:
    draw_pictures(tmp_path, ["a.png", "d.png"])
    caption(tmp_path, MODEL, executor=parrot, evidence=WEIGHTS)
    (tmp_path / "d.png").unlink()
    draw_pictures(tmp_path, ["b & c.png"])
    caption(tmp_path, MODEL, executor=parrot, evidence=WEIGHTS)
    lines = (tmp_path / "review.jsonl").read_text().splitlines()
    assert [json.loads(line)["image"] for line in lines] == ["b & c.png", "a.png"]
    (tmp_path / "review.jsonl").write_text("[]\n")
    draw_pictures(tmp_path, ["d.png"])
    with pytest.raises(CaptionError, match="no reviewed caption: move the file away"):
        caption(tmp_path, MODEL, executor=parrot, evidence=WEIGHTS)


def test_words_are_placed_in_what_is_kept_of_an_answer() -> None:
    answer = "A cat.\n A dog and a cat."
    words = told(answer, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    text = "cat, A cat. A dog cat"
    found = placed(words, answer, text, 5, 17)
    assert [(text[int(w[0]) : int(w[1])], w[0], w[-1]) for w in found] == [
        ("A", 5, 0.1),
        ("cat", 7, 0.2),
        ("A", 12, 0.3),
        ("dog", 14, 0.4),
    ]
    assert Reviewed("x", text, found).least == ("cat", 0.2)


def test_what_is_no_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptionError, match="no EvidenceModel"):
        caption(tmp_path, MODEL, evidence=True)


def test_the_command_reviews_with_the_weights_of_the_model(tmp_path: Path) -> None:
    draw_pictures(tmp_path, ["one.png", "two.png"])
    result = invoke("caption", str(tmp_path), "--evidence", "-t", "1", "-n", "24")
    assert result.exit_code == 0, result.stderr
    assert "review.html shows the captions" in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "review.jsonl").read_text().splitlines()]
    assert {line["image"] for line in lines} == {"one.png", "two.png"}
    assert all(0 <= word["score"] <= 1 for line in lines for word in line["words"])
    assert [line["score"] for line in lines] == sorted(line["score"] for line in lines)

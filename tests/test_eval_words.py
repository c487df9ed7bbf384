"""What is told of captions besides their figures: equal lengths, and what kinds of words change."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scripted import told

from cmg_gguf import Guidance, Reply, Seconds, Token, TopRatio
from cmg_gguf.evaluation.changed import changed_by_class, changes_of
from cmg_gguf.evaluation.lengths import FIGURE, matched_lengths
from cmg_gguf.evaluation.manifest import ModelFiles
from cmg_gguf.evaluation.mentions import caption_counts, caption_figures, mentions_in
from cmg_gguf.evaluation.methods import chosen
from cmg_gguf.evaluation.records import Record
from cmg_gguf.evaluation.report import make_report
from cmg_gguf.evaluation.report_text import markdown, rendered
from cmg_gguf.evaluation.run import evaluate, read_run
from cmg_gguf.evaluation.task import Item, Mention
from cmg_gguf.evaluation.tasks.scenes import SceneCaptions
from cmg_gguf.evaluation.words import Lexicon, with_plurals, word_at
from cmg_gguf.tiny.pair import embedded_pair

LEXICON = Lexicon(
    with_plurals({"dog": "dog", "hot dog": "food", "train track": None, "cat": "cat"})
)


@dataclass(frozen=True)
class Captions:
    """Finds the objects above; those that an item's truth lists are there."""

    def mentions(self, item: Item, answer: str) -> list[Mention]:
        return mentions_in(answer, LEXICON, item.truth["objects"])


def item(name: str, *objects: str) -> Item:
    return Item(name, name, "?", {"objects": list(objects)}, cluster=name)


@pytest.mark.parametrize("text", ["A Dog, two CATS; a hot-dog on a train track.", "", "no such"])
def test_what_is_named_stands_where_it_is_said(text: str) -> None:
    spans = LEXICON.spans(text)
    assert [named.name for named in spans] == LEXICON.find(text)
    words = {"dog": {"dog"}, "cat": {"cats"}, "food": {"hot-dog"}}
    assert all(text[n.start : n.end].lower() in words[n.name] for n in spans)
    assert len(spans) == (3 if text.startswith("A") else 0)


def test_the_word_at_a_place() -> None:
    assert [word_at("The dog's tail", i) for i in (0, 2, 3, 4, 6, 7, 8, 13)] == [
        *("the", "the", "", "dog", "dog", "", "s", "tail")
    ]
    assert word_at("", 0) == ""


def test_repeated_words_lower_distinct_1() -> None:
    counts = [
        caption_counts(text, [], []) for text in ("A dog and a dog.", "A dog and the cat", "")
    ]
    sums = {name: np.asarray(sum(c[name] for c in counts)) for name in counts[0]}
    assert caption_figures(sums)["distinct_1"] == pytest.approx(100 * (3 + 5) / (5 + 5))


def test_captions_are_cut_to_the_mentions_of_the_shorter() -> None:
    items = [item("a", "dog"), item("b", "cat"), item("c", "dog")]
    answers = {
        "greedy": ["dog, cat, cat", "dog", "dog"],
        "short": ["dog", "cat, dog, dog", ""],
        "twin": ["dog, cat, cat", "dog", "dog"],
    }
    found = matched_lengths(Captions(), items, answers, baseline="greedy", n=500)
    # greedy's whole captions: cat, cat and dog of five mentions are not there.
    assert found["greedy"].own.value == pytest.approx(60)
    assert found["greedy"].difference is None
    # Cut to 1, 1 and 0: "dog" and "cat" are there; greedy's "dog" is and "dog" is not.
    gap = found["short"].difference
    assert (found["short"].own.value, gap and gap.value) == (0, -50)
    gap = found["twin"].difference
    assert gap is not None
    assert (gap.value, gap.low, gap.high) == (0, 0, 0)


VOCABULARY = [b" A", b" dog", b" s\xc3", b"\xa9", b" the", b" hot", b" dog", b".", b" ", b"<end>"]
END = len(VOCABULARY) - 1


class Vocabulary:
    def token_bytes(self, token: int) -> bytes:
        return VOCABULARY[token]

    def is_end(self, token: int) -> bool:
        return token == END


def reply(said: list[int], plain: list[int], **settings: Any) -> Reply:
    """An answer of these tokens where plain decoding would have drawn those; the end may be one."""
    tokens = [Token(a, "", b) for a, b in zip(said, plain, strict=True)]
    end = tokens.pop() if said[-1] == END else None
    text = b"".join(VOCABULARY[token.id] for token in tokens).decode().lstrip()
    return Reply(
        **{
            "text": text,
            "tokens": tuple(tokens),
            "finish_reason": "stop",
            "n_prompt_tokens": 1,
            "n_image_tokens": 0,
            "guidance": Guidance(),
            "layers": (),
            "seed": 0,
            "seconds": Seconds(),
            "end": end,
            **settings,
        }
    )


def test_changes_stand_at_the_characters_of_their_tokens() -> None:
    said = [0, 1, 2, 3, 4, 5, 6, 7, END]
    answer = reply(said, said)
    assert (answer.text, changes_of(answer, Vocabulary())) == ("A dog s\xe9 the hot dog.", ())
    for i, place in enumerate([0, 2, 6, 7, 9, 13, 17, 20]):
        plain = [*said]
        plain[i] = 8
        assert changes_of(reply(said, plain), Vocabulary()) == (place,), i


def test_an_end_that_was_drawn_or_put_off_is_a_change_of_the_ending() -> None:
    vocabulary = Vocabulary()
    assert changes_of(reply([0, 1, END], [0, 1, 7]), vocabulary) == (-1,)
    assert changes_of(reply([0, 1, END], [0, END, END]), vocabulary) == (-1,)
    assert changes_of(reply([0, 1], [4, END]), vocabulary) == (0, -1)


def test_reasoning_is_left_out() -> None:
    answer = reply([4, 0, 1, 7], [0, 0, 5, 7], text="A dog.", n_reasoning_tokens=1)
    assert changes_of(answer, Vocabulary()) == (2,)


def test_changes_are_told_by_what_is_said() -> None:
    answer = "A dog and the hot dog sit."
    places = {
        "article": (0, 10),
        "object": (2, 4, 14, 18, 20),
        "other": (6, 22, 25),
        "ending": (-1,),
    }
    for kind, found in places.items():
        for place in found:
            record = Record(item="a", method="cmg", answer=answer, changes=(place,))
            assert changed_by_class(Captions(), [item("a")], [record]) == {kind: 1}, place
    record = Record(item="a", method="cmg", answer=answer, changes=(0, 2, 2, -1))
    told_twice = changed_by_class(Captions(), [item("a"), item("b")], [record, record])
    assert told_twice == {"article": 2, "object": 4, "ending": 2}


def test_an_answer_tells_its_end_token() -> None:
    run = told("a", "b", draws=[0, 1, (39, 5)])
    end = run.answer.end
    assert end is not None
    assert (end.id, end.plain, end.changed) == (39, 5, True)
    assert [token.id for token in run.answer.tokens] == [0, 1]
    assert told("a", "b", max_tokens=2).answer.end is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("words") / "run"
    model = ModelFiles(*embedded_pair(), {"n_threads": 1, "n_parallel": 1})
    guidance = Guidance(alpha=2.0, tokens=TopRatio(1.0))
    methods = chosen(["greedy", "cmg", "no-image"], guidance)
    evaluate(SceneCaptions("tune", "counter", 6), model, methods, home)
    return home


def test_a_report_of_captions_tells_all_this(folder: Path) -> None:
    run = read_run(folder)
    report = make_report(run, n_samples=50)
    rows = {row.method: row for row in report.parts[0].rows}
    assert {"distinct_1", FIGURE} <= set(rows["greedy"].figures)
    assert rows["greedy"].figures[FIGURE].own.value == pytest.approx(
        rows["greedy"].figures["chair_i"].own.value
    )
    assert not rows["greedy"].classes
    for name in ("cmg", "no-image"):
        records = [record for record in run.records if record.method == name]
        classes = rows[name].classes
        assert classes is not None
        counted = sum(n for kind, n in classes.items() if kind != "ending")
        changed = [place for record in records for place in record.changes]
        assert counted == sum(place >= 0 for place in changed)
        # What went on where plain decoding would have ended counts among the changed tokens.
        assert 0 < sum(r.changed for r in records) <= len(changed)
        assert classes["object"] > 0
    text = markdown(report)
    assert "| method | changed | object | article | ending | other |" in text
    assert "as many as the shorter of it and greedy's has" in text
    console = Console(width=220, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(rendered(report))
    assert "chair i cut" in console.export_text()


def test_changes_survive_the_journal(folder: Path) -> None:
    records = read_run(folder).records
    assert any(record.changes for record in records)
    for record in records:
        assert Record.parse(json.loads(record.line())) == record
    assert replace(records[0], changes=(1, -1)).line().count("[1, -1]") == 1

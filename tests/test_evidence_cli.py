"""Evidence where people see it: `run --evidence`, `chat --evidence`, the cmg block."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from commands import flat, invoke
from guided import QUESTION, asked
from PIL import Image
from prompts import picture
from tiny_llava import TinyPair

from cmg_gguf import EvidenceModel, Guidance, GuidedVLM, Reply, Sampling
from cmg_gguf.cli.evidence import marked
from cmg_gguf.evidence import UNFITTED, is_doubtful
from cmg_gguf.reply import Seconds, Word
from cmg_gguf.settings import Settings, save_settings

N = 16
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": N}


@pytest.fixture(scope="module")
def vlm(pair: TinyPair) -> Iterator[GuidedVLM]:
    with GuidedVLM(pair.llm, pair.mmproj, n_ctx=2048, n_threads=1, strategy="exact") as opened:
        yield opened


@pytest.fixture
def asking(pair: TinyPair, tmp_path: Path) -> list[str]:
    """Flags of `run` but for the question's."""
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    model = ["-m", str(pair.llm), "--mmproj", str(pair.mmproj), "-c", "2048", "-t", "1"]
    return [*model, "--image", str(tmp_path / "a.png"), "-n", str(N), "--no-guidance"]


def told(text: str, *words: tuple[str, float | None]) -> Reply:
    """A reply with these words in it, in order, and their scores."""
    found, end = [], 0
    for word, score in words:
        start = text.index(word, end)
        end = start + len(word)
        found.append(Word(word, start, end, 0, 0, score))
    return Reply(text, (), "stop", 1, 1, Guidance(), (), 0, Seconds(), words=tuple(found))


def test_doubtful_words_are_marked_and_no_others() -> None:
    reply = told("A fork, a kettle!", ("A", 0.1), ("fork", 0.9), ("a", 0.1), ("kettle", 0.308))
    assert marked(reply) == "A fork, a kettle[?.31]!"
    assert marked(told("no words")) == "no words"
    assert marked(told("fork", ("fork", None))) == "fork"
    assert marked(told("fork", ("fork", 0.0))) == "fork[?.00]"
    assert is_doubtful("Kettle", 0.4)
    assert not is_doubtful("Kettle", 0.5)
    assert not is_doubtful("The", 0.1)


def test_run_marks_what_the_library_says(vlm: GuidedVLM, asking: list[str], tmp_path: Path) -> None:
    weights = EvidenceModel(intercept=-1.0, log_p_o=0.7, difference=1.5, fitted_on="a test")
    save_settings(tmp_path / "s.json", Settings(Guidance(alpha=2.0), {}, weights))
    reply = vlm.generate(
        QUESTION, [picture(0)], guidance=Guidance(alpha=2.0), max_tokens=N, evidence=weights
    )
    flags = [flag for flag in asking if flag != "--no-guidance"]
    given = ("--settings", str(tmp_path / "s.json"), "--strategy", "exact", "--evidence")
    result = invoke("run", *flags, "-p", QUESTION, *given)
    assert result.stdout == marked(reply) + "\n"
    assert "[?." in result.stdout
    assert "not calibrated" not in result.stderr


def test_run_says_that_weights_are_not_fitted(asking: list[str]) -> None:
    result = invoke("run", *asking, "-p", QUESTION, "--evidence")
    assert "the evidence is not calibrated" in flat(result.stderr)
    assert result.exit_code == 0


def test_json_carries_words_and_tokens(vlm: GuidedVLM, asking: list[str]) -> None:
    reply = vlm.generate(
        QUESTION,
        [picture(0)],
        guidance=Guidance(alpha=0.0, beta=0.0),
        max_tokens=N,
        evidence=True,
    )
    result = invoke("run", *asking, "-p", QUESTION, "--evidence", "--json", "-q")
    block = json.loads(result.stdout)["cmg"]["evidence"]
    assert block["fitted_on"] == ""
    text = json.loads(result.stdout)["text"]
    assert [text[w["start"] : w["stop"]] for w in block["words"]] == [w.text for w in reply.words]
    assert [w["score"] for w in block["words"]] == pytest.approx(
        [w.evidence for w in reply.words], abs=1e-5
    )
    for said, token in zip(block["tokens"], reply.tokens, strict=True):
        assert token.evidence is not None
        assert said == pytest.approx({"token": token.text, **asdict(token.evidence)}, abs=1e-5)
    without = invoke("run", *asking, "-p", QUESTION, "--json", "-q")
    assert "evidence" not in json.loads(without.stdout)["cmg"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compare", "--alpha", "1"], "--compare marks"),
        (["--show-changes"], "--show-changes marks"),
    ],
)
def test_an_answer_is_marked_in_one_way(asking: list[str], flags: list[str], message: str) -> None:
    asking = [flag for flag in asking if flag != "--no-guidance"]
    result = invoke("run", *asking, "-p", QUESTION, "--evidence", *flags)
    assert result.exit_code == 2
    assert message in flat(result.stderr)


def test_compare_as_json_has_the_evidence_of_both(asking: list[str]) -> None:
    asking = [flag for flag in asking if flag != "--no-guidance"]
    result = invoke("run", *asking, "-p", QUESTION, "--evidence", "--compare", "--json", "-q")
    found = json.loads(result.stdout)
    assert found["plain"]["cmg"]["evidence"]["words"]
    assert found["guided"]["cmg"]["evidence"]["words"]


def test_run_without_a_picture_is_told_to_give_one(pair: TinyPair) -> None:
    model = ["-m", str(pair.llm), "--mmproj", str(pair.mmproj), "-c", "512"]
    result = invoke("run", *model, "-p", QUESTION, "--evidence")
    assert result.exit_code == 2
    assert "give --image" in flat(result.stderr)


def test_a_chat_marks_answers_about_pictures(pair: TinyPair, tmp_path: Path) -> None:
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    model = ["-m", str(pair.llm), "--mmproj", str(pair.mmproj), "-c", "2048", "-t", "1", "-n", "9"]
    lines = f"Hello\n/image {tmp_path / 'a.png'}\n{QUESTION}\n"
    result = invoke("chat", *model, "--evidence", "--no-guidance", input=lines)
    assert result.exit_code == 0, result.stderr
    assert flat(result.stderr).count("no image was shown yet") == 1
    first, second = result.stdout.splitlines()[:1], result.stdout.splitlines()[1:]
    assert "[?" not in "".join(first)
    assert "[?" in "".join(second)


def test_a_completion_and_its_last_chunk_have_evidence(vlm: GuidedVLM) -> None:
    whole: Any = vlm.create_chat_completion(asked(), evidence=True, **GREEDY)
    reply = vlm.generate(asked(), sampling=Sampling(), max_tokens=N, evidence=True)
    block = whole["cmg"]["evidence"]
    assert [word["text"] for word in block["words"]] == [word.text for word in reply.words]
    assert len(block["tokens"]) == len(reply.tokens) == N
    json.dumps(whole, allow_nan=False)
    chunks: list[Any] = list(
        vlm.create_chat_completion(asked(), evidence=True, stream=True, **GREEDY)
    )
    said = chunks[-1]["cmg"]["evidence"]["words"]
    assert [word["text"] for word in said] == [word["text"] for word in block["words"]]
    assert all("cmg" not in chunk for chunk in chunks[:-1])
    other: Any = vlm.create_chat_completion(
        asked(), evidence=replace(UNFITTED, fitted_on="scenes"), **GREEDY
    )
    assert other["cmg"]["evidence"]["fitted_on"] == "scenes"
    none: Any = vlm.create_chat_completion(asked(), **GREEDY)
    assert "evidence" not in none["cmg"]

"""The words of an answer: where they lie in its text, and which tokens they come from. No model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import pytest
from scripted import Run, asking

from cmg_gguf.answer.words import words_of
from cmg_gguf.reply import Evidence, Word
from cmg_gguf.sampling import Sampling


def said(*pieces: str | bytes, closing: str = "", **settings: Any) -> tuple[str, tuple[Word, ...]]:
    """An answer's text, and its words."""
    data = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    run = Run(data, request=asking(**settings), closing=closing)
    for _ in run.generator:
        pass
    for _ in run.generation.weigh(lambda tokens, take: iter(())):  # type: ignore[arg-type, return-value]
        pass
    return run.answer.text, run.answer.words


def spans(words: Sequence[Word]) -> list[tuple[str, int, int]]:
    return [(word.text, word.first, word.last) for word in words]


def test_words_are_letters_and_digits_and_what_joins_them() -> None:
    text, words = said(
        " It", "'s", " 3", " o", "'", "clock", ",", " T", "-shirt", "s", ": ", "(", "no", ")"
    )
    assert text == "It's 3 o'clock, T-shirts: (no)"
    assert spans(words) == [
        ("It's", 0, 1),
        ("3", 2, 2),
        ("o'clock", 3, 5),
        ("T-shirts", 7, 9),
        ("no", 12, 12),
    ]
    assert all(text[word.start : word.stop] == word.text for word in words)


def test_a_character_over_token_borders_belongs_to_all_of_them() -> None:
    data = "caf\u00e9 \u00e9t\u00e9".encode()
    text, words = said(data[:3], data[3:4], data[4:7], data[7:])
    assert text == "caf\u00e9 \u00e9t\u00e9"
    assert spans(words) == [("caf\u00e9", 0, 2), ("\u00e9t\u00e9", 2, 3)]


def test_scripts_without_spaces_are_told_by_characters() -> None:
    assert [word.text for word in said("\u4e00\u53ea\u732b", " cat")[1]] == [
        "\u4e00",
        "\u53ea",
        "\u732b",
        "cat",
    ]


def test_what_is_cut_at_a_stop_string_has_no_words() -> None:
    text, words = said("a cat", "<", "/s>", " dog", stop=["</s>"])
    assert (text, spans(words)) == ("a cat", [("a", 0, 0), ("cat", 0, 0)])
    text, words = said("a c", "at<", stop=["</s>"])
    assert (text, spans(words)) == ("a cat<", [("a", 0, 0), ("cat", 0, 1)])


def test_reasoning_has_no_words_and_those_behind_it_their_tokens() -> None:
    text, words = said("<thi", "nk>a cat", "?</think>", "\n\n a", " dog", sampling=Sampling())
    assert (text, spans(words)) == ("a dog", [("a", 3, 3), ("dog", 4, 4)])
    text, words = said("a cat</think>", " a cat", closing="</think>")
    assert (text, spans(words)) == ("a cat", [("a", 1, 1), ("cat", 1, 1)])
    assert said("a cat", closing="</think>") == ("", ())


def test_bytes_that_are_no_text_end_a_word() -> None:
    text, words = said(b"a\xff", b"b", b"\xf0")
    assert (text, spans(words)) == ("a\ufffdb\ufffd", [("a", 0, 0), ("b", 1, 1)])


def test_any_cut_into_tokens_gives_the_same_words_and_their_bytes() -> None:
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices("ab '-.\u00e9\u4e2d\U0001f642", k=rng.randint(0, 12)))
        stops = ["".join(rng.choices("ab .\u00e9", k=2)) for _ in range(rng.randint(0, 2))]
        data = text.encode()
        cuts = sorted(rng.choices(range(len(data) + 1), k=rng.randint(0, 6)))
        pieces = [data[i:j] for i, j in pairwise([0, *cuts, len(data)])]
        shown, words = said(*pieces, stop=stops)
        assert [(w.text, w.start, w.stop) for w in words] == [
            (w.text, w.start, w.stop) for w in said(text, stop=stops)[1]
        ]
        ends = list(accumulate(map(len, pieces)))
        front = len(text) - len(text.lstrip(" "))
        for word in words:
            assert shown[word.start : word.stop] == word.text
            begin = len(text[: front + word.start].encode())
            end = len(text[: front + word.stop].encode())
            assert word.first == next(i for i, stop in enumerate(ends) if begin < stop)
            assert word.last == next(i for i, stop in enumerate(ends) if end <= stop)


@pytest.mark.parametrize("n", [0, 3])
def test_a_word_has_the_score_of_the_token_in_which_it_begins(n: int) -> None:
    scores = [Evidence(0.0, 0.0, 0.0, 0.0, 0.0, score) for score in (0.1, 0.9, 0.5)][:n]
    words = words_of([b"a f", b"ork", b" x"], "a fork x", stop=8, evidence=scores)
    assert [word.evidence for word in words] == ([0.1, 0.1, 0.5] if n else [None] * 3)

"""Streaming text: how the input is cut never changes what comes out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest

from cmg_gguf.answer.text import StopStrings, Utf8Stream
from cmg_gguf.errors import CMGError, SamplingError

Cut = TypeVar("Cut", str, bytes)


def pieces_of(data: Cut, rng: random.Random) -> list[Cut]:
    """`data` cut at random places, empty pieces included."""
    cuts: list[int] = sorted(rng.randint(0, len(data)) for _ in range(rng.randint(0, 6)))
    return [data[a:b] for a, b in itertools.pairwise([0, *cuts, len(data)])]


def decode(pieces: Sequence[bytes]) -> str:
    stream = Utf8Stream()
    return "".join([stream.feed(piece) for piece in pieces] + [stream.flush()])


def stop(pieces: Sequence[str], stops: str | Sequence[str]) -> tuple[str, bool]:
    stream = StopStrings(stops)
    shown = ""
    for piece in pieces:
        text, stopped = stream.feed(piece)
        shown += text
        if stopped:
            return shown, True
    return shown + stream.flush(), False


def naive_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The definition, over the whole text: the stop that ends first, then the longer one."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@pytest.mark.parametrize(
    "data",
    [
        "plain, žluťoučký, 日本語, 👩‍👩‍👧".encode(),
        b"\xed\xa0\x80 surrogate",
        b"\xf0\x9f\x98 cut \xe6\x97",
        b"\xff\xc3\x28\x80\xf5\x80\x80\x80",
        b"\xc0\xaf overlong",
    ],
)
def test_any_split_of_bytes_decodes_like_the_whole(data: bytes) -> None:
    rng = random.Random(1)
    for _ in range(300):
        assert decode(pieces_of(data, rng)) == data.decode("utf-8", "replace")


def test_any_split_of_random_bytes_decodes_like_the_whole() -> None:
    rng = random.Random(2)
    alphabet = b"a\x80\xbf\xc3\xa9\xe6\x97\xa5\xf0\x9f\x98\x80\xff\xed"
    for _ in range(2000):
        data = bytes(rng.choice(alphabet) for _ in range(rng.randint(0, 12)))
        assert decode(pieces_of(data, rng)) == data.decode("utf-8", "replace")


def test_an_unfinished_code_point_is_held_back_until_it_is_whole() -> None:
    stream = Utf8Stream()
    assert [stream.feed(bytes([b])) for b in "😀".encode()] == ["", "", "", "😀"]


def test_a_byte_that_breaks_a_sequence_releases_both() -> None:
    stream = Utf8Stream()
    assert stream.feed(b"\xe6\x97") == ""
    assert stream.feed(b"x") == "\ufffdx"


def test_flush_gives_an_unfinished_code_point_once_and_starts_afresh() -> None:
    stream = Utf8Stream()
    stream.feed("日".encode()[:2])
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert stream.feed("日".encode()) == "日"


@pytest.mark.parametrize("stops", [["ab"], ["abcd", "bc"], ["aab", "ab", "ba"], ["aaaa", "bb"], []])
def test_any_split_of_text_stops_where_the_definition_says(stops: Any) -> None:
    rng = random.Random(3)
    for _ in range(2000):
        text = "".join(rng.choice("abcd") for _ in range(rng.randint(0, 12)))
        assert stop(pieces_of(text, rng), stops) == naive_stop(text, stops), text


def test_a_stop_string_across_piece_borders_is_never_shown() -> None:
    stream = StopStrings(["</s>"])
    assert stream.feed("Yes.<") == ("Yes.", False)
    assert stream.feed("/s") == ("", False)
    assert stream.feed("> more") == ("", True)
    assert stream.match == "</s>"


def test_text_that_only_began_like_a_stop_string_is_released() -> None:
    stream = StopStrings(["</s>"])
    assert stream.feed("a </") == ("a ", False)
    assert stream.feed("b> ok") == ("</b> ok", False)
    assert stream.match is None


def test_a_false_start_may_hold_a_true_one() -> None:
    stream = StopStrings(["aab"])
    assert stream.feed("aa") == ("", False)
    assert stream.feed("a") == ("a", False)
    assert stream.feed("b") == ("", True)


def test_the_stop_string_that_ends_first_wins() -> None:
    assert stop(["xabcd"], ["abcd", "bc"]) == ("xa", True)


def test_of_stop_strings_that_end_together_the_longer_is_cut() -> None:
    stream = StopStrings(["c", "bc", "abc"])
    assert stream.feed("xabc") == ("x", True)
    assert stream.match == "abc"


def test_of_two_occurrences_the_first_is_cut() -> None:
    assert stop(["a.b.c"], ["."]) == ("a", True)


def test_nothing_is_shown_after_the_stop() -> None:
    stream = StopStrings("END")
    assert stream.feed("one EN") == ("one ", False)
    assert stream.feed("D two") == ("", True)
    assert stream.feed("three") == ("", True)
    assert stream.flush() == ""


def test_flush_gives_what_was_held_back_once() -> None:
    stream = StopStrings(["\n\n"])
    assert stream.feed("line\n") == ("line", False)
    assert stream.flush() == "\n"
    assert stream.flush() == ""


def test_without_stop_strings_everything_passes_at_once() -> None:
    nothing: tuple[Any, ...] = (None, [], ())
    for stops in nothing:
        assert StopStrings(stops).feed("anything") == ("anything", False)


def test_one_string_is_one_stop_string_not_its_characters() -> None:
    assert stop(["ba", "ab"], "ab") == ("ba", True)


@pytest.mark.parametrize("stops", ["", [""], ["ok", ""], ["ok", None], [3]])
def test_an_empty_or_non_string_stop_is_refused_with_its_place(stops: Any) -> None:
    index = max(len(stops) - 1, 0)
    with pytest.raises(SamplingError, match=f"stop string {index} is .*at least 1 character"):
        StopStrings(stops)
    assert {CMGError, ValueError} < set(SamplingError.mro())

"""Model files that are not what they should be: one line that names the file and what it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from guided import QUESTION, ids, is_empty, open_vlm
from prompts import picture
from tiny_llava import TinyConfig, TinyPair

from cmg_gguf import GuidedVLM, ModelError, ProjectorError

FILES = ("llm", "mmproj")


@pytest.fixture(scope="module")
def working(pair: TinyPair) -> GuidedVLM:
    """A model that is open all the while: others' failures must not touch it."""
    return open_vlm(pair)


def refused(pair: TinyPair, working: GuidedVLM | None = None) -> str:
    """The message of a pair that cannot be opened; its type follows from the file that is wrong."""
    with pytest.raises(ModelError) as info:
        open_vlm(pair)
    line = str(info.value)
    assert "\n" not in line
    if working is not None:
        assert len(working.generate(QUESTION, [picture(0)], max_tokens=3).tokens) == 3
    return line


def with_file(pair: TinyPair, which: str, path: Path) -> TinyPair:
    return pair._replace(**{which: path})


def error_of(pair: TinyPair) -> type[ModelError]:
    with pytest.raises(ModelError) as info:
        open_vlm(pair)
    return type(info.value)


@pytest.mark.parametrize("which", FILES)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it begins with b''"),
        (b"GG", "it begins with b'GG'"),
        (b"GGML" + bytes(100), "it begins with b'GGML'"),
        (b"\x89PNG\r\n\x1a\n", "is no GGUF file"),
        (b"GGUF", "damaged or truncated"),
        (b"GGUF\x63\0\0\0" + bytes(100), "version"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 100, "damaged or truncated"),
    ],
)
def test_a_file_that_is_no_gguf_is_refused_by_what_it_begins_with(
    pair: TinyPair, working: GuidedVLM, tmp_path: Path, which: str, content: bytes, says: str
) -> None:
    path = tmp_path / "wrong.gguf"
    path.write_bytes(content)
    line = refused(with_file(pair, which, path), working)
    assert str(path) in line
    assert says in line


@pytest.mark.parametrize("which", FILES)
def test_a_missing_file_or_a_folder_is_refused_by_name(
    pair: TinyPair, tmp_path: Path, which: str
) -> None:
    missing = tmp_path / "missing.gguf"
    assert f"{missing} does not exist" in refused(with_file(pair, which, missing))
    assert f"{tmp_path} is a folder" in refused(with_file(pair, which, tmp_path))
    long = tmp_path / ("x" * 300)
    assert "cannot be read" in refused(with_file(pair, which, long))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("which", FILES)
def test_a_file_that_may_not_be_read_is_refused(pair: TinyPair, tmp_path: Path, which: str) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(b"GGUF")
    path.chmod(0)
    assert "cannot be read" in refused(with_file(pair, which, path))


def offsets(path: Path) -> list[int]:
    """Places to cut: in the header, in the metadata, in the tensor table and in the tensors."""
    reader = gguf.GGUFReader(path)
    tensors, first = reader.tensors, reader.data_offset
    metadata = max(int(field.offset) for field in reader.fields.values())
    size = path.stat().st_size
    return sorted(
        {
            *(5, 8, 20, 24, 40),
            *(metadata // 2, metadata, (metadata + first) // 2, first - 1, first),
            *(tensors[0].data_offset + 1, (first + size) // 2),
            *(tensors[-1].data_offset - 1, tensors[-1].data_offset, size - 40, size - 1),
        }
    )


@pytest.mark.parametrize("which", FILES)
def test_a_file_cut_anywhere_is_refused_and_another_model_goes_on(
    pair: TinyPair, working: GuidedVLM, tmp_path: Path, which: str
) -> None:
    whole: Path = getattr(pair, which)
    data, path = whole.read_bytes(), tmp_path / "cut.gguf"
    for size in offsets(whole):
        path.write_bytes(data[:size])
        line = refused(with_file(pair, which, path), working)
        assert str(path) in line
        assert "truncated" in line, size


@pytest.mark.parametrize("which", FILES)
def test_a_whole_file_with_something_behind_it_is_fine(
    pair: TinyPair, tmp_path: Path, which: str
) -> None:
    path = tmp_path / "longer.gguf"
    path.write_bytes(getattr(pair, which).read_bytes() + bytes(1000))
    open_vlm(with_file(pair, which, path)).close()


def test_swapped_files_are_told_apart(pair: TinyPair) -> None:
    assert "are the two files swapped?" in refused(TinyPair(pair.mmproj, pair.llm))
    line = refused(TinyPair(pair.llm, pair.llm))
    assert f"{pair.llm} is a language model (llama), not an image projector" in line
    assert "not a language model" in refused(TinyPair(pair.mmproj, pair.mmproj))


def test_the_error_says_which_of_the_two_is_wrong(pair: TinyPair, tmp_path: Path) -> None:
    assert error_of(with_file(pair, "llm", tmp_path)) is ModelError
    assert error_of(with_file(pair, "mmproj", tmp_path)) is ProjectorError
    assert error_of(TinyPair(pair.mmproj, pair.llm)) is ModelError
    assert error_of(TinyPair(pair.llm, pair.llm)) is ProjectorError


def test_a_projector_of_another_width_is_refused_with_both_widths(
    pair: TinyPair, written: Callable[[TinyConfig], TinyPair]
) -> None:
    narrow = written(TinyConfig(mmproj_n_embd=32))
    line = refused(with_file(pair, "mmproj", narrow.mmproj))
    assert "64" in line
    assert "32" in line
    assert str(narrow.mmproj) in line
    assert error_of(with_file(pair, "mmproj", narrow.mmproj)) is ProjectorError


def test_an_architecture_that_nobody_knows_is_refused_by_name(
    pair: TinyPair, tmp_path: Path
) -> None:
    path = tmp_path / "new.gguf"
    writer = gguf.GGUFWriter(path, "llama-of-the-future")
    writer.add_uint32("answer", 42)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "llama-of-the-future" in refused(with_file(pair, "llm", path))
    line = refused(with_file(pair, "mmproj", path))
    assert "(llama-of-the-future), not an image projector" in line


@pytest.mark.parametrize("which", FILES)
def test_names_that_are_no_ascii_or_no_utf8_are_opened(
    pair: TinyPair, tmp_path: Path, which: str
) -> None:
    names = [b"mod\xc3\xa8le \xf0\x9f\x99\x82.gguf", b"\xff\xfe.gguf"]
    for name in names:
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        try:
            path.write_bytes(getattr(pair, which).read_bytes())
        except OSError:
            continue  # this file system takes UTF-8 alone
        with open_vlm(with_file(pair, which, path)) as vlm:
            assert len(vlm.generate(QUESTION, [picture(0)], max_tokens=3).tokens) == 3


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"n_ctx": -1}, "n_ctx=-1"),
        ({"n_ubatch": 1}, "n_ubatch=1"),
        ({"type_k": "q3_7"}, "'q3_7'"),
        ({"pairing": "triple"}, "'triple'"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(
    pair: TinyPair, setting: dict[str, object], says: str
) -> None:
    with pytest.raises(Exception, match=says) as info:
        open_vlm(pair, **setting)
    assert type(info.value).__module__ == "cmg_gguf.errors"
    assert "\n" not in str(info.value)


def test_a_model_opened_among_all_this_answers_as_ever(pair: TinyPair, working: GuidedVLM) -> None:
    with open_vlm(pair) as fresh:
        replies = [v.generate(QUESTION, [picture(0)], max_tokens=20) for v in (fresh, working)]
    assert ids(replies[0]) == ids(replies[1])
    assert is_empty(working)

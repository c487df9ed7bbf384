"""`cmg-gguf caption`: what is written where, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from captioned import CORRUPT, draw_pictures, files_in
from commands import flat, invoke

from cmg_gguf.cli.caption import CaptionFlags

FLAGS = ("--parallel", "1", "-n", "24")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw_pictures(tmp_path, ["a.png", "in/b.jpg"])
    return tmp_path


def test_captions_go_into_files_and_the_same_command_again_does_nothing(folder: Path) -> None:
    first = invoke("caption", str(folder), "-r", *FLAGS)
    assert (first.exit_code, first.stdout) == (0, "")
    assert "2 captions in" in first.stderr
    assert "pictures/s" in first.stderr
    assert "the built-in tiny model answers" in flat(first.stderr)
    assert (folder / "in/b.txt").read_text().startswith("This is ")
    again = invoke("caption", str(folder), "-r", *FLAGS, "--quiet")
    assert (again.exit_code, again.stdout, again.stderr) == (0, "", "")
    assert "2 left alone that had one" in flat(invoke("caption", str(folder), "-r", *FLAGS).stderr)


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(folder: Path) -> None:
    (folder / "a.txt").write_text("mine")
    there = files_in(folder)
    told = invoke("caption", str(folder), "--recursive", "--dry-run")
    assert told.exit_code == 0
    assert told.stdout == f"{folder}/in/b.jpg -> {folder}/in/b.txt\n"
    assert "1 picture of" in told.stderr
    other = invoke("caption", str(folder), "--dry-run", "--existing", "overwrite", "--to", "jsonl")
    assert other.stdout == f"{folder}/a.png -> {folder}/captions.jsonl\n"
    assert files_in(folder) == there


def test_a_bad_picture_is_an_error_at_the_end(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / CORRUPT).write_bytes(b"\xff\xd8\xff\xe0 no more")
    told = invoke("caption", str(folder), "-r", *FLAGS, "--to", "kohya-json", "--prefix", "ohwx,")
    assert told.exit_code == 1
    assert "1 picture could not be captioned, all others were" in flat(told.stderr)
    assert f"caption-problems.jsonl says why. The first: {CORRUPT}: " in flat(told.stderr)
    captions = json.loads((folder / "meta_cap.json").read_text())
    assert set(captions) == {"a", "in/b"}
    assert captions["a"]["caption"].startswith("ohwx, This is ")


def test_limit_shard_and_max_words_are_heeded(folder: Path) -> None:
    draw_pictures(folder, ["c.png", "d.png"])
    told = invoke(
        *("caption", str(folder), *FLAGS, "--limit", "2", "--shard", "2/2"),
        *("--max-words", "6", "--temp", "1", "--seed", "1"),
    )
    assert told.exit_code == 0
    assert [name for name in files_in(folder) if name.endswith(".txt")] == ["c.txt"]
    assert 1 <= len((folder / "c.txt").read_text().split()) <= 6


def test_the_defaults_are_those_of_the_library() -> None:
    from cmg_gguf.captioning import Captions

    flags, captions = CaptionFlags(), Captions()
    for name in ("prompt", "to", "existing", "recursive", "prefix", "suffix", "max_words", "limit"):
        assert getattr(flags, name) == getattr(captions, name)
    assert flags.predict == captions.max_tokens
    assert flags.shard == str(captions.shard)


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--prompt", "{nmae}"], 1, "{nmae} in the prompt stands for nothing"),
        (["-p", "{tags}"], 1, "(--existing), or another layout (--to)"),
        (["--shard", "3/2"], 1, "shard 3/2 is out of range"),
        (["--to", "xml"], 2, "'xml' is not one of"),
        (["--dask", "x", "--jobs", "2"], 2, "leave one of the two out"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, flags: list[str], code: int, says: str) -> None:
    told = invoke("caption", str(folder), *flags)
    assert (told.exit_code, told.stdout) == (code, "")
    assert says in flat(told.stderr)


def test_help_names_every_flag_with_what_it_does() -> None:
    told = flat(invoke("caption", "--help").stdout)
    for words in ("photo.jpg gets photo.txt", "a trigger word", "goes on where it was stopped"):
        assert words in told

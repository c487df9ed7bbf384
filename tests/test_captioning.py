"""`cmg_gguf.caption`: which pictures, which files, and what is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from captioned import (
    CORRUPT,
    MODEL,
    NAMES,
    SIDECARS,
    Parrot,
    draw_odd,
    draw_pictures,
    files_in,
)

import cmg_gguf
from cmg_gguf.captioning import Captioned, Captions, caption, planned
from cmg_gguf.captioning.pictures import find_pictures
from cmg_gguf.captioning.texts import appended, caption_of, cut, dressed
from cmg_gguf.errors import CaptionError, CMGError, EvaluationError
from cmg_gguf.evaluation.executors import Processes
from cmg_gguf.evaluation.items import Shard
from cmg_gguf.evaluation.manifest import ModelFiles
from cmg_gguf.prompt.formats import image_suffixes
from cmg_gguf.tiny.pair import embedded_guidance
from cmg_gguf.vlm import GuidedVLM


def captioned(folder: Path, parrot: Parrot | None = None, **settings: Any) -> Captioned:
    return caption(folder, MODEL, executor=parrot or Parrot(), **settings)


def put_pictures(folder: Path, *names: str) -> Path:
    """Files that are called so: the parrot does not look."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def test_every_picture_gets_its_caption_and_nothing_else_is_written(tmp_path: Path) -> None:
    draw_odd(tmp_path)
    before = files_in(tmp_path)
    # One at a time, in one fixed way and from no kept prompt, so that answers repeat to the bit.
    fixed: dict[str, Any] = {"n_parallel": 1, "strategy": "exact", "prefix_cells": 0}
    with GuidedVLM(MODEL.model, MODEL.mmproj, **fixed) as vlm:
        made = cmg_gguf.caption(tmp_path, vlm, recursive=True, guidance=embedded_guidance())
        said = [
            vlm.generate(
                "Describe the image.",
                [tmp_path / name],
                guidance=embedded_guidance(),
                max_tokens=256,
            ).text
            for name in NAMES
        ]
    assert files_in(tmp_path) - before == {*SIDECARS, "caption-problems.jsonl"}
    assert [(tmp_path / name).read_text("utf-8") for name in SIDECARS] == said
    (line,) = (tmp_path / "caption-problems.jsonl").read_text().splitlines()
    assert json.loads(line)["image"] == CORRUPT
    assert "truncated" in json.loads(line)["problem"]
    assert (made.n_written, made.n_skipped) == (len(NAMES), 0)
    assert [problem.image for problem in made.problems] == [CORRUPT]


def test_every_suffix_that_is_read_is_looked_for(tmp_path: Path) -> None:
    names = [f"{i}{suffix.upper()}" for i, suffix in enumerate(sorted(image_suffixes()))]
    put_pictures(tmp_path, *names, "a.txt", "b.jpg.part", "c.pdf", ".d.jpg")
    found = [picture.name for picture in find_pictures(tmp_path, recursive=False)]
    assert sorted(found) == sorted(names)
    assert {".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".ppm", ".heic"} <= image_suffixes()


def test_folders_in_it_are_looked_into_only_if_that_is_wanted(tmp_path: Path) -> None:
    put_pictures(tmp_path, "b.jpg", "a/z.jpg", "a.jpg", ".hidden/c.jpg", "a b/c.jpg")
    (tmp_path / "loop").symlink_to(tmp_path)
    flat = [picture.name for picture in find_pictures(tmp_path, recursive=False)]
    deep = [picture.name for picture in find_pictures(tmp_path, recursive=True)]
    assert flat == ["a.jpg", "b.jpg"]
    assert deep == ["a/z.jpg", "a b/c.jpg", "a.jpg", "b.jpg"]


def test_no_two_pictures_have_one_text_file(tmp_path: Path) -> None:
    put_pictures(tmp_path, "a.jpg", "a.png", "A.gif", "a.jpg.gif", "b.jpg", "in/b.jpg", "b.c.jpg")
    found = find_pictures(tmp_path, recursive=True)
    sidecars = {p.name: p.sidecar.relative_to(tmp_path).as_posix() for p in found}
    assert sidecars == {
        "A.gif": "A.gif.txt",
        "a.jpg": "a.jpg.txt",
        "a.jpg.gif": "a.jpg.gif.txt",
        "a.png": "a.png.txt",
        "b.c.jpg": "b.c.txt",
        "b.jpg": "b.txt",
        "in/b.jpg": "in/b.txt",
    }


def test_a_picture_that_comes_later_never_gets_anothers_caption(tmp_path: Path) -> None:
    captioned(put_pictures(tmp_path, "photo.jpg"))
    captioned(put_pictures(tmp_path, "photo.bmp"), Parrot({"photo.bmp": "Another."}))
    assert (tmp_path / "photo.txt").read_text() == "A photo."
    assert (tmp_path / "photo.bmp.txt").read_text() == "Another."
    assert (tmp_path / "photo.jpg.txt").read_text() == "A photo."


@pytest.mark.parametrize(
    ("existing", "held"),
    [
        ("skip", "1girl, red hair"),
        ("overwrite", "ohwx, A cat. hd"),
        ("append", "1girl, red hair, ohwx, A cat. hd"),
    ],
)
def test_what_is_there_is_left_replaced_or_added_to(
    tmp_path: Path, existing: str, held: str
) -> None:
    put_pictures(tmp_path, "cat.jpg", "dog.jpg")
    (tmp_path / "cat.txt").write_text("\ufeff1girl, red hair\n", encoding="utf-8")
    (tmp_path / "dog.txt").write_text(" \n")  # white space alone is no caption
    parrot = Parrot()
    made = captioned(tmp_path, parrot, existing=existing, prefix="ohwx,", suffix="hd")
    assert (tmp_path / "cat.txt").read_bytes().removeprefix(
        b"\xef\xbb\xbf"
    ).strip() == held.encode()
    assert (tmp_path / "dog.txt").read_bytes() == b"ohwx, A dog. hd"
    assert (made.n_written, made.n_skipped) == ((1, 1) if existing == "skip" else (2, 0))
    assert len(parrot.asked) == made.n_written


def test_the_prompt_names_the_picture_its_folder_and_its_tags(tmp_path: Path) -> None:
    put_pictures(tmp_path, "cats/tom 1.jpg", "cats/ann.jpg")
    (tmp_path / "cats/ann.txt").write_text("grey,\n small")
    parrot = Parrot()
    captioned(
        tmp_path,
        parrot,
        prompt='{name} in {directory}: {tags}! As {"a": 1}.',
        existing="overwrite",
        recursive=True,
        max_words=9,
    )
    assert sorted(parrot.asked) == [
        ("cats/ann.jpg", 'ann in cats: grey, small! As {"a": 1}. Use at most 9 words.'),
        ("cats/tom 1.jpg", 'tom 1 in cats: ! As {"a": 1}. Use at most 9 words.'),
    ]


def test_a_sidecar_that_is_no_text_is_a_problem_of_that_picture_alone(tmp_path: Path) -> None:
    put_pictures(tmp_path, "cat.jpg", "dog.jpg")
    (tmp_path / "cat.txt").write_bytes(b"\xff\xfe\x00")
    made = captioned(tmp_path, existing="append")
    assert [problem.image for problem in made.problems] == ["cat.jpg"]
    assert "is no UTF-8 text" in made.problems[0].problem
    assert (tmp_path / "cat.txt").read_bytes() == b"\xff\xfe\x00"
    assert captioned(tmp_path).n_skipped == 2
    assert not (tmp_path / "caption-problems.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "n", "short"),
    [
        ("One two. Three four. Five.", 5, "One two. Three four. Five."),
        ("One two. Three four. Five.", 4, "One two. Three four."),
        ("One two. Three four. Five.", 3, "One two."),
        ("One, two three four.", 3, "One"),
        ("One two three four.", 3, "One two three"),
        ("It is 3.5 m. Dr. B. Who runs.", 6, "It is 3.5 m."),
        ('He says "no!" Then he goes on.', 5, 'He says "no!"'),
    ],
)
def test_a_caption_is_cut_at_the_end_of_a_sentence(line: str, n: int, short: str) -> None:
    assert cut(line, n) == short
    assert len(short.split()) <= n


def test_a_caption_is_one_line_and_ends_where_a_sentence_does() -> None:
    assert caption_of(" A cat.\n\nIt sits\n", max_words=None, is_whole=True) == "A cat. It sits"
    assert caption_of("A cat. It sits", max_words=None, is_whole=False) == "A cat."
    assert caption_of("A cat that", max_words=None, is_whole=False) == "A cat that"


def test_prefix_and_suffix_are_set_off_and_new_captions_go_behind_the_old() -> None:
    assert dressed("A cat.", "ohwx,", "") == "ohwx, A cat."
    assert dressed("A cat", "by me: ", ", hd") == "by me: A cat, hd"
    assert dressed("A cat", "", "#hd") == "A cat #hd"
    assert appended("red, tall", "A cat.") == "red, tall, A cat."
    assert appended("A dog.\n", "A cat.") == "A dog. A cat."


def test_json_lines_hold_a_line_for_each_picture_and_keep_what_is_there(tmp_path: Path) -> None:
    put_pictures(tmp_path, "b.jpg", "ü/a.png", "c.jpg")
    rows = '{"file_name": "b.jpg", "id": 7}\n\n{"file_name": "c.jpg", "text": "Mine."}\n'
    (tmp_path / "metadata.jsonl").write_text(rows)
    captioned(tmp_path, to="metadata.jsonl", recursive=True)
    assert (tmp_path / "metadata.jsonl").read_text("utf-8") == (
        '{"file_name": "b.jpg", "id": 7, "text": "A b."}\n'
        '{"file_name": "c.jpg", "text": "Mine."}\n'
        '{"file_name": "ü/a.png", "text": "A a."}\n'
    )
    captioned(tmp_path, to="jsonl")
    assert (tmp_path / "captions.jsonl").read_text("utf-8") == (
        '{"image": "b.jpg", "caption": "A b."}\n{"image": "c.jpg", "caption": "A c."}\n'
    )


def test_kohyas_json_has_a_key_by_which_its_trainers_find_each_picture(tmp_path: Path) -> None:
    put_pictures(tmp_path, "in/a.jpg", "b.v2.webp", "c.jpg", "c.png", "d.gif")
    (tmp_path / "meta_cap.json").write_text('{"in/a": {"tags": "red"}, "gone": {"caption": "x"}}')
    captioned(tmp_path, to="kohya-json", recursive=True)
    told = json.loads((tmp_path / "meta_cap.json").read_text("utf-8"))
    assert told == {
        "in/a": {"tags": "red", "caption": "A a."},
        "gone": {"caption": "x"},
        "b.v2": {"caption": "A b.v2."},
        str(tmp_path / "c.jpg"): {"caption": "A c."},
        str(tmp_path / "c.png"): {"caption": "A c."},
        str(tmp_path / "d.gif"): {"caption": "A d."},
    }
    assert captioned(tmp_path, to="kohya-json", recursive=True).n_skipped == 5


@pytest.mark.parametrize("to", ["txt", "jsonl", "kohya-json", "metadata.jsonl"])
def test_what_stops_a_run_leaves_every_caption_and_it_goes_on(tmp_path: Path, to: str) -> None:
    put_pictures(tmp_path, *(f"{i}.jpg" for i in range(5)))
    (tmp_path / "0.txt").write_text("tag")

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"to": to, "existing": "append"}
    first, second = Parrot(), Parrot()
    with pytest.raises(KeyboardInterrupt):
        caption(tmp_path, MODEL, executor=first, progress=stop, **settings)
    assert len(planned(tmp_path, MODEL, **settings)) == 3
    made = caption(tmp_path, MODEL, executor=second, **settings)
    assert (made.n_written, made.n_resumed) == (3, 2)
    asked = [name for name, _ in (*first.asked, *second.asked)]
    assert sorted(asked) == [f"{i}.jpg" for i in range(5)]
    assert not [name for name in files_in(tmp_path) if name.startswith(".")]
    if to == "txt":
        assert (tmp_path / "0.txt").read_text() == "tag, A 0."
    else:
        captioned(tmp_path, parrot := Parrot(), to=to)
        assert parrot.asked == []


def test_a_run_whose_problems_cannot_be_told_goes_on(tmp_path: Path) -> None:
    put_pictures(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "caption-problems.jsonl").mkdir()
    first, second = (Parrot(problems=("b.jpg",)) for _ in range(2))
    with pytest.raises(CaptionError, match="run again to go on"):
        captioned(tmp_path, first, existing="overwrite")
    (tmp_path / "caption-problems.jsonl").rmdir()
    made = captioned(tmp_path, second, existing="overwrite")
    assert [name for name, _ in second.asked] == ["b.jpg"]
    assert (made.n_resumed, len(made.problems)) == (1, 1)


def test_a_finished_run_is_done_again_where_that_is_wanted(tmp_path: Path) -> None:
    put_pictures(tmp_path, "a.jpg")
    for n in ("One.", "Two."):
        captioned(tmp_path, Parrot({"a.jpg": n}), existing="overwrite")
        assert (tmp_path / "a.txt").read_text() == n


def test_other_settings_ask_anew_and_lose_nothing(tmp_path: Path) -> None:
    put_pictures(tmp_path, "a.jpg", "b.jpg")

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caption(tmp_path, MODEL, executor=Parrot(), progress=stop, to="jsonl")
    parrot = Parrot()
    made = captioned(tmp_path, parrot, to="jsonl", prefix="ohwx")
    assert [name for name, _ in parrot.asked] == ["a.jpg"]
    assert (made.n_resumed, made.n_skipped) == (0, 1)
    assert (tmp_path / "captions.jsonl").read_text().splitlines() == [
        '{"image": "b.jpg", "caption": "A b."}',
        '{"image": "a.jpg", "caption": "ohwx A a."}',
    ]


def test_shards_are_disjoint_and_together_all(tmp_path: Path) -> None:
    put_pictures(tmp_path, *(f"{i}.jpg" for i in range(7)))
    parts = [Parrot(), Parrot(), Parrot()]
    for i, parrot in enumerate(parts, start=1):
        captioned(tmp_path, parrot, shard=Shard(i, 3), to="jsonl", limit=6)
    asked = [name for parrot in parts for name, _ in parrot.asked]
    assert sorted(asked) == [f"{i}.jpg" for i in range(6)]
    assert [len(parrot.asked) for parrot in parts] == [2, 2, 2]
    assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == 6


def test_an_answer_without_a_word_is_a_problem_and_no_empty_file(tmp_path: Path) -> None:
    put_pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    made = captioned(tmp_path, Parrot({"a.jpg": " \n"}, problems=("b.jpg",)), prefix="ohwx")
    assert [problem.image for problem in made.problems] == ["a.jpg", "b.jpg"]
    assert "the model said nothing" in made.problems[0].problem
    assert made.problems[1].problem == "it is torn"
    assert files_in(tmp_path) == {"a.jpg", "b.jpg", "c.jpg", "c.txt", "caption-problems.jsonl"}
    assert captioned(tmp_path).n_written == 2  # what could not be answered is tried again
    assert not (tmp_path / "caption-problems.jsonl").exists()


def test_processes_side_by_side_write_the_same_files(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(3)]
    for folder in ("one", "two"):
        draw_pictures(tmp_path / folder, names)
    options: dict[str, Any] = {"guidance": embedded_guidance(), "max_tokens": 24}
    model = ModelFiles(MODEL.model, MODEL.mmproj, {"n_parallel": 1})
    caption(tmp_path / "one", model, **options)
    caption(tmp_path / "two", model, executor=Processes(2), **options)
    for i in range(3):
        text = (tmp_path / "one" / f"{i}.txt").read_text()
        assert text.endswith(".")  # cut at a sentence's end
        assert (tmp_path / "two" / f"{i}.txt").read_text() == text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"to": "xml"}, "to='xml' is unknown: txt, jsonl, kohya-json, metadata.jsonl"),
        ({"existing": "keep"}, "existing='keep' is unknown: skip, overwrite, append"),
        ({"max_words": 0}, "max_words=0 is out of range: 1 and up"),
        ({"prompt": "{nmae}?"}, "{nmae} in the prompt stands for nothing: there are {name}"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "{tags}?"}, "{tags} in the prompt is always empty here"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(CaptionError) as told:
        Captions(**settings)
    assert says in str(told.value)


def test_what_is_no_folder_of_pictures_is_refused(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "none", "is no folder: give one that is there"),
        (put_pictures(tmp_path, "in/a.jpg") / "in/a.jpg", "cmg-gguf run --image"),
        (tmp_path, "look into the folders in it (--recursive)"),
    ):
        with pytest.raises(CaptionError) as told:
            captioned(path)
        assert says in str(told.value)
    with pytest.raises(CaptionError, match="shard 2/2 is empty: there are 1 pictures"):
        captioned(tmp_path / "in", shard=Shard(2, 2))


def test_a_file_that_is_not_of_its_layout_is_refused_before_anything_is_asked(
    tmp_path: Path,
) -> None:
    put_pictures(tmp_path, "a.jpg")
    (tmp_path / "captions.jsonl").write_text('{"image": "b.jpg"}\n[1]\n')
    (tmp_path / "meta_cap.json").write_text("[]")
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff")
    for to, says in (
        ("jsonl", "captions.jsonl:2 is no JSON object"),
        ("kohya-json", "is no object of objects"),
        ("metadata.jsonl", "no UTF-8 text"),
    ):
        with pytest.raises(CaptionError) as told:
            captioned(tmp_path, parrot := Parrot(), to=to)
        assert says in str(told.value)
        assert parrot.asked == []


def test_two_processes_never_caption_the_same_part(tmp_path: Path) -> None:
    put_pictures(tmp_path, "a.jpg", "b.jpg")

    def again(done: int, total: int) -> None:
        if done == 1:
            captioned(tmp_path)

    with pytest.raises(EvaluationError, match="another process writes to"):
        caption(tmp_path, MODEL, executor=Parrot(), progress=again)


def test_a_loaded_model_answers_in_its_own_process_alone(tmp_path: Path) -> None:
    put_pictures(tmp_path, "a.jpg")
    with GuidedVLM(MODEL.model, MODEL.mmproj) as vlm, pytest.raises(CMGError, match="ModelFiles"):
        caption(tmp_path, vlm, executor=Parrot())

"""Reading benchmark files: what is no item is told, with its place, and never skipped silently.

A file that cannot be read at all is an EvaluationError; a record in it that is wrong is a BadItem.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cmg_gguf.errors import EvaluationError, shown
from cmg_gguf.evaluation.answers import Label
from cmg_gguf.evaluation.task import BadItem, Item
from cmg_gguf.prompt.formats import image_suffixes

Record = dict[str, Any]


class RecordError(ValueError):
    """A record is no item; the message says why."""


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """("file:line", value) of each line that is not blank; a broken line's value is a RecordError.

    Raises EvaluationError if the file cannot be read.
    """
    for number, line in enumerate(_bytes(path).splitlines(), start=1):
        if line.strip():
            yield f"{path.name}:{number}", _parsed(line)


def json_lines_or_records(path: Path) -> Iterator[tuple[str, Any]]:
    """`json_records` of a file that begins as a list, `json_lines` of any other.

    Raises EvaluationError if the file cannot be read.
    """
    head = _bytes(path).removeprefix(b"\xef\xbb\xbf").lstrip()
    return json_records(path) if head.startswith(b"[") else json_lines(path)


def json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """("file[index]", value) of each element of the list in a JSON file.

    Raises EvaluationError if the file cannot be read or holds no list.
    """
    found = json_file(path)
    if not isinstance(found, list):
        raise EvaluationError(
            f"{shown(str(path))} holds a {type(found).__name__}: a list of records is expected"
        )
    for index, record in enumerate(found):
        yield f"{path.name}[{index}]", record


def json_file(path: Path) -> Any:
    """The value in a JSON file. Raises EvaluationError if it cannot be read or is broken."""
    found = _parsed(_bytes(path))
    if isinstance(found, RecordError):
        raise EvaluationError(f"{shown(str(path))} is {found}: download or save it anew")
    return found


def text_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file. Raises EvaluationError if it cannot be read."""
    return _bytes(path).decode("utf-8-sig", errors="replace").splitlines()


def folder(path: str | Path, what: str) -> Path:
    """The path of a folder that is there. Raises EvaluationError."""
    found = Path(path)
    if not found.is_dir():
        raise EvaluationError(f"{what} {shown(str(path))} is no folder: give one that is there")
    return found


def image_in(images: Path, name: str) -> Path:
    """The path of an image in a folder; a name without its suffix stands for the one file that has
    it. Raises RecordError."""
    path = images / name
    try:
        if path.is_file():
            return path
        found = _with_suffix(path)
    except (OSError, ValueError):  # a name that no file can have
        found = []
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise RecordError(
            f"image {shown(name)} may be any of {names} in the image folder; write its suffix"
        )
    if not found:
        raise RecordError(f"image {shown(name)} is not in the image folder")
    return found[0]


def _with_suffix(path: Path) -> list[Path]:
    """The files that are `path` and the suffix of an image."""
    suffixes = [
        spelled for suffix in sorted(image_suffixes()) for spelled in (suffix, suffix.upper())
    ]
    named = [path.with_name(path.name + suffix) for suffix in suffixes]
    # Where upper case does not count, two names are one file.
    found = {(one.stat().st_dev, one.stat().st_ino): one for one in named if one.is_file()}
    return list(found.values())


def items_of(
    records: Iterable[tuple[str, Any]], make: Callable[[Record], Item]
) -> Iterator[Item | BadItem]:
    """An item of each record. Bad: no JSON object, what `make` refuses by RecordError, an id again.

    records: (where, value) as the readers above give them.
    """
    seen: set[str] = set()
    for where, record in records:
        try:
            item = make(_object(record))
            if item.id in seen:
                raise RecordError(f"id {shown(item.id)} was there before")
            seen.add(item.id)
        except RecordError as exc:
            yield BadItem(where, str(exc))
        else:
            yield item


def field(record: Record, key: str) -> str:
    """The text or whole number under a key, as text. Raises RecordError."""
    if key not in record:
        raise RecordError(f"{shown(key)} is missing")
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise RecordError(f"{shown(key)} is {shown(value)}: text or a whole number is expected")
    return str(value)


_LABELS: dict[str, Label] = {
    **dict.fromkeys(("yes", "true", "1"), "yes"),
    **dict.fromkeys(("no", "false", "0"), "no"),
}


def yes_or_no(value: str, key: str = "label") -> Label:
    """The label in any case. Raises RecordError."""
    found = _LABELS.get(value.strip().lower())
    if found is None:
        raise RecordError(f"{shown(key)} is {shown(value)}: yes or no is expected")
    return found


def label_under(record: Record, key: str) -> Label:
    """The label under a key: yes or no, true or false, 1 or 0. Raises RecordError."""
    value = record.get(key)
    return yes_or_no(str(value) if isinstance(value, bool) else field(record, key), key)


def words_under(record: Record, key: str) -> list[str]:
    """The list of texts under a key. Raises RecordError."""
    value = record.get(key)
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise RecordError(f"{shown(key)} is {shown(value)}: a list of words is expected")
    return value


def _object(record: Any) -> Record:
    if isinstance(record, RecordError):
        raise record
    if not isinstance(record, dict):
        raise RecordError(f"{shown(record)} is no JSON object")
    return record


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        reason = exc.strerror or exc
        raise EvaluationError(
            f"file {shown(str(path))} cannot be read ({reason}): give a readable file"
        ) from exc


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as exc:
        return RecordError(f"no JSON ({' '.join(str(exc).split())})")

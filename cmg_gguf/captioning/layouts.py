"""Where captions are kept: a text file beside each picture, or one file for all.

    txt             photo.jpg -> photo.txt: the caption alone
    jsonl           captions.jsonl: {"image": "cats/photo.jpg", "caption": "..."} a line
    metadata.jsonl  {"file_name": "cats/photo.jpg", "text": "..."} a line, as imagefolder of Hugging
                    Face's datasets reads it
    kohya-json      meta_cap.json: {"cats/photo": {"caption": "..."}}, as kohya's trainers read it
                    (in_json); the picture's absolute path where they would not find it by that

What a file holds besides captions (other lines, other keys) stays. Files are written aside and put
in place at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from cmg_gguf.captioning.pictures import Picture
from cmg_gguf.captioning.settings import Layout
from cmg_gguf.errors import CaptionError, shown

with suppress(ImportError):
    import fcntl

_KOHYA_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class CaptionFiles(Protocol):
    """The captions of a folder in one layout."""

    def file(self, picture: Picture) -> Path:
        """The file for the picture's caption. Raises CaptionError for a name it cannot hold."""
        ...

    def held(self, picture: Picture) -> str | None:
        """The caption that is there; None = none, or white space alone. Raises CaptionError."""
        ...

    def put(self, picture: Picture, text: str) -> None:
        """Sets the caption. Raises CaptionError."""
        ...

    def save(self) -> None:
        """Makes sure that all that was put is in the files. Raises CaptionError."""
        ...


def captions_in(folder: Path, to: Layout, part: str) -> CaptionFiles:
    """The folder's captions in a layout. part: name of what is written aside.

    Raises CaptionError for a file that is not of that layout.
    """
    if to == "txt":
        return Sidecars(part)
    if to == "kohya-json":
        return KohyaJson(folder, part)
    names = ("captions.jsonl", "image", "caption")
    return JsonLines(
        folder, part, *(names if to == "jsonl" else ("metadata.jsonl", "file_name", "text"))
    )


def sidecar_text(picture: Picture) -> str:
    """What the text file beside a picture holds; "" for none. Raises CaptionError."""
    try:
        return picture.sidecar.read_bytes().decode("utf-8-sig").strip()
    except FileNotFoundError:
        return ""
    except OSError as exc:
        raise CaptionError(f"{picture.sidecar} cannot be read ({exc.strerror})") from exc
    except ValueError as exc:
        raise CaptionError(f"{picture.sidecar} is no UTF-8 text: save it as UTF-8") from exc


class Sidecars:
    """A text file beside each picture."""

    def __init__(self, part: str) -> None:
        self._part = part

    def file(self, picture: Picture) -> Path:
        return picture.sidecar

    def held(self, picture: Picture) -> str | None:
        return sidecar_text(picture) or None

    def put(self, picture: Picture, text: str) -> None:
        write_at_once(picture.sidecar, text, self._part)

    def save(self) -> None:
        pass


class _Table:
    """One file for all, which is read first, and written at the end with what came meanwhile."""

    def __init__(self, path: Path, part: str) -> None:
        self._path, self._part = path, part
        self._put: dict[str, str] = {}
        self._held = dict(self._captions(self._content()))

    def file(self, picture: Picture) -> Path:
        try:
            self._key(picture).encode()
        except UnicodeEncodeError as exc:
            raise CaptionError(
                f"the name {shown(picture.name)} is no UTF-8, which {self._path.name} is: rename "
                "it, or write text files beside the pictures (--to txt)"
            ) from exc
        return self._path

    def held(self, picture: Picture) -> str | None:
        key = self._key(picture)
        return self._put.get(key, self._held.get(key)) or None

    def put(self, picture: Picture, text: str) -> None:
        self._put[self._key(picture)] = text

    def save(self) -> None:
        if not self._put:
            return
        # Other shards may end in the same moment; each then writes what the other has written too.
        with _locked(self._path.parent):
            text = self._written(self._content(), dict(sorted(self._put.items())))
            write_at_once(self._path, text, self._part)

    def _content(self) -> str:
        try:
            return self._path.read_bytes().decode("utf-8-sig")
        except FileNotFoundError:
            return ""
        except (OSError, ValueError) as exc:
            reason = getattr(exc, "strerror", None) or "no UTF-8 text"
            raise CaptionError(
                f"{self._path} cannot be read ({reason}): move it away, or mend it"
            ) from exc

    def _damaged(self, where: str, why: str) -> CaptionError:
        return CaptionError(f"{where} {why}: mend it, or move {self._path.name} away")

    def _key(self, picture: Picture) -> str:
        raise NotImplementedError

    def _captions(self, content: str) -> Iterator[tuple[str, str]]:
        raise NotImplementedError

    def _written(self, content: str, put: dict[str, str]) -> str:
        raise NotImplementedError


class JsonLines(_Table):
    """A line of JSON for each picture. key, value: names of its fields."""

    def __init__(self, folder: Path, part: str, name: str, key: str, value: str) -> None:
        self._names = key, value
        super().__init__(folder / name, part)

    def _key(self, picture: Picture) -> str:
        return picture.name

    def _rows(self, content: str) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise self._damaged(f"{self._path}:{number}", "is no JSON object")
                yield row

    def _captions(self, content: str) -> Iterator[tuple[str, str]]:
        key, value = self._names
        for row in self._rows(content):
            if isinstance(row.get(key), str) and isinstance(row.get(value), str):
                yield row[key], row[value].strip()

    def _written(self, content: str, put: dict[str, str]) -> str:
        key, value = self._names
        rows = list(self._rows(content))
        left = dict(put)
        for row in rows:
            if (name := row.get(key)) in put:
                row[value] = put[name]
                left.pop(name, None)
        rows += [{key: name, value: text} for name, text in left.items()]
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class KohyaJson(_Table):
    """An object for each picture in one object."""

    def __init__(self, folder: Path, part: str) -> None:
        super().__init__(folder / "meta_cap.json", part)

    def _key(self, picture: Picture) -> str:
        if picture.shares_stem or picture.path.suffix.lower() not in _KOHYA_SUFFIXES:
            return str(picture.path.absolute())
        return str(Path(picture.name).with_suffix("").as_posix())

    def _entries(self, content: str) -> dict[str, Any]:
        if not content.strip():
            return {}
        try:
            entries = json.loads(content)
        except ValueError as exc:
            raise self._damaged(str(self._path), f"is no JSON ({exc})") from exc
        if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
            raise self._damaged(str(self._path), "is no object of objects")
        return entries

    def _captions(self, content: str) -> Iterator[tuple[str, str]]:
        for key, entry in self._entries(content).items():
            if isinstance(entry.get("caption"), str):
                yield key, entry["caption"].strip()

    def _written(self, content: str, put: dict[str, str]) -> str:
        entries = self._entries(content)
        for key, text in put.items():
            entries[key] = {**entries.get(key, {}), "caption": text}
        return json.dumps(entries, ensure_ascii=False, indent=2) + "\n"


def write_at_once(path: Path, text: str, part: str) -> None:
    """Writes a file so that it is never there half, by way of one called `part` beside it.

    Raises CaptionError.
    """
    aside = path.with_name(part)
    try:
        aside.write_text(text, encoding="utf-8", newline="\n")
        aside.replace(path)
    except OSError as exc:
        with suppress(OSError):
            aside.unlink()
        raise CaptionError(
            f"{path} cannot be written ({exc.strerror}): put that right and run again to go on"
        ) from exc


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among the processes that hold this; nothing where folders cannot be locked."""
    if "fcntl" not in globals():
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)

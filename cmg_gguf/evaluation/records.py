"""What a run has found out, one line of JSON an answer: a journal while it runs, results after.

The journal is only ever appended to, so a process that is killed leaves whole lines and at most one
torn one, which is cut off when the run goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cmg_gguf.errors import EvaluationError, shown

with suppress(ImportError):
    import fcntl

TIMING = ("encode", "seconds", "parallel")
"""Fields that differ between two runs of the same settings."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One answer of one method to one item, or the reason why there is none.

    tokens: of the answer. changed: those that the method chose otherwise than plain decoding on the
    same logits. reasoning: tokens ahead of the answer, which is without them. finish: "stop" or
    "length". changes: where guidance changed a token: the first character of each in the answer; -1
    = it ended the answer, or went on where plain decoding would have ended. encode: the item's
    share of the seconds in which its image was encoded, once for all methods; seconds: prompt and
    answer, and what the method encodes besides, by the clock.
    parallel: answers that the model made at once, at most; above 1, seconds count waiting for
    others and are nobody's cost. problem: why there is no answer; the fields above are then empty.
    Of yes/no items, by the method's own scores at the first token before the cut: yes_margin,
    log p(yes) - log p(no); yes_lead, the best score of a yes token minus the best of all others.
    says_yes: whether the first token is a yes token. None of the three where that is reasoning.
    words: where evidence was asked for, of each word of the answer where it starts and stops, what
    `Evidence` holds of it (log_p_o, log_p_d, divergence, entropy_o, entropy_d, score), and its
    `cmg_gguf.evaluation.grounding.Attention` (image, first_text).
    """

    item: str
    method: str
    answer: str = ""
    tokens: int = 0
    changed: int = 0
    reasoning: int = 0
    finish: str = ""
    changes: tuple[int, ...] = ()
    encode: float = 0.0
    seconds: float = 0.0
    parallel: int = 1
    yes_margin: float | None = None
    yes_lead: float | None = None
    says_yes: bool | None = None
    problem: str | None = None
    words: list[list[float]] | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What it is about: item and method."""
        return self.item, self.method

    def line(self) -> str:
        """One line of JSON, without the newline."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def parse(cls, value: object) -> Record:
        """The record of a parsed line. Raises ValueError."""
        if not isinstance(value, dict) or not {"item", "method"} <= set(value):
            raise ValueError("no item and method")
        if unknown := set(value) - {f.name for f in fields(cls)}:
            raise ValueError(f"unknown fields {', '.join(sorted(unknown))}")
        return cls(**{**value, "changes": tuple(value.get("changes", ()))})


class Journal:
    """The answers of a run so far, and a place for more. Use it as a context.

    Only one process writes to a journal. Raises EvaluationError if another one does, or if a line
    but the last is no record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = open(path, "a+b")  # noqa: SIM115  (open until `close`)
        except OSError as exc:
            raise EvaluationError(f"{path} cannot be written ({exc.strerror})") from exc
        try:
            self._lock()
            self.records = self._recovered()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def add(self, record: Record) -> None:
        """Appends a record; once this returns it survives the end of the process."""
        self.records[record.key] = record
        self._file.write(record.line().encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Lets others write."""
        self._file.close()

    def _lock(self) -> None:
        if "fcntl" not in globals():
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise EvaluationError(
                f"another process writes to {self._path}; wait for it or choose another folder"
            ) from exc

    def _recovered(self) -> dict[tuple[str, str], Record]:
        """Every record by its key, the last one of each; a torn last line is cut off."""
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self._path, whole)
        records = _parsed(content[:whole].splitlines(), self._path)
        return {record.key: record for record in records}


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Writes the file as a whole: it is never there half."""
    write_whole(path, "".join(record.line() + "\n" for record in records))


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that it is never there half. Raises EvaluationError."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8", errors="surrogatepass")
        part.replace(path)
    except OSError as exc:
        raise EvaluationError(f"{path} cannot be written ({exc.strerror})") from exc


def read_records(path: Path) -> list[Record]:
    """The records of a file, but for a torn last line. Raises EvaluationError."""
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise EvaluationError(
            f"{path} cannot be read ({exc.strerror}); finish the run first, or name its folder"
        ) from exc
    return list(_parsed(content[: content.rfind(b"\n") + 1].splitlines(), path))


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises EvaluationError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise EvaluationError(
            f"{path} cannot be read ({exc.strerror}); name the folder of a run"
        ) from exc
    except ValueError as exc:
        raise EvaluationError(f"{path} is damaged ({exc}); start the run anew") from exc
    if not isinstance(value, dict):
        raise EvaluationError(f"{path} is damaged: {shown(value)} is no object")
    return value


def first_difference(
    a: Mapping[str, Any], b: Mapping[str, Any], path: str = ""
) -> tuple[str, Any, Any] | None:
    """(name, value in a, value in b) where two nested objects first differ; None if they do not."""
    for key in dict.fromkeys([*a, *b]):
        name = f"{path}.{key}" if path else str(key)
        one, other = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            if found := first_difference(one, other, name):
                return found
        elif one != other:
            return name, one, other
    return None


def _parsed(lines: Iterable[bytes], path: Path) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        try:
            yield Record.parse(json.loads(line.decode("utf-8", "surrogatepass")))
        except (ValueError, TypeError) as exc:
            raise EvaluationError(
                f"line {number} of {path} is no record ({exc}); delete that line to have it "
                "answered again"
            ) from exc

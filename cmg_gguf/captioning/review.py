"""Captions to look at again, the one with the least supported word first: as lines, and as a page.

    review.jsonl    {"image": "cats/a.jpg", "caption": "...", "least": "hat", "score": 0.12,
                     "words": [{"text": "A", "start": 0, "stop": 1, "score": 0.9}, ...]}
    review.html     the same with small pictures, doubtful words marked; one file, nothing is loaded

Scores: see `cmg_gguf.evidence`. A caption's is that of its least supported word that names
something; null where it has none.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from cmg_gguf.captioning.layouts import write_at_once
from cmg_gguf.errors import CaptionError, ImageError, shown
from cmg_gguf.evaluation.grounding import WordsTold
from cmg_gguf.evidence import FUNCTION_WORDS, EvidenceModel, is_doubtful
from cmg_gguf.prompt.images import load_image

LINES, PAGE = "review{}.jsonl", "review{}.html"
MOST_SHOWN = 1000
"""Captions on the page; the lines have all."""
THUMBNAIL = 192
"""Pixels of a small picture's longer side."""


@dataclass(frozen=True)
class Reviewed:
    """A caption. words: as in `Record.words`, placed in `caption`."""

    image: str
    caption: str
    words: WordsTold

    @property
    def least(self) -> tuple[str, float] | None:
        """The least supported word that names something, and its score."""
        said = [(self.caption[int(w[0]) : int(w[1])], w[-1]) for w in self.words]
        named = [(word, score) for word, score in said if word.lower() not in FUNCTION_WORDS]
        return min(named, key=lambda one: one[1], default=None)

    def line(self) -> dict[str, Any]:
        """JSON-ready."""
        least = self.least
        words = [
            {"text": self.caption[int(w[0]) : int(w[1])], "start": int(w[0]), "stop": int(w[1])}
            | {"score": w[-1]}
            for w in self.words
        ]
        return {
            "image": self.image,
            "caption": self.caption,
            "least": least and least[0],
            "score": least and least[1],
            "words": words,
        }


def placed(words: WordsTold, answer: str, text: str, start: int, stop: int) -> WordsTold:
    """The words of an answer as far as `text[start:stop]` has them, which says the same, in order,
    with other spaces or less of it."""
    found, at = [], start
    for first, last, *measured in words:
        word = answer[int(first) : int(last)]
        place = text.find(word, at, stop)
        if place < 0:
            break
        at = place + len(word)
        found.append([place, at, *measured])
    return found


def write_review(
    folder: Path, part: str, new: Iterable[Reviewed], weights: EvidenceModel
) -> tuple[Path, Path]:
    """Writes both files, with what they hold of other pictures that are still there; their paths.

    part: in their names, for a shard. Raises CaptionError.
    """
    lines, page = folder / LINES.format(part), folder / PAGE.format(part)
    told = {one.image: one.line() for one in new}
    kept = [line for line in _held(lines) if line["image"] not in told]
    every = [*told.values(), *(line for line in kept if (folder / line["image"]).exists())]
    every.sort(key=lambda line: (line["score"] is None, line["score"], line["image"]))
    written = "".join(json.dumps(line) + "\n" for line in every)
    write_at_once(lines, written, ".cmg-review.part")
    write_at_once(page, _page(folder, every, weights), ".cmg-review.part")
    return lines, page


def _held(path: Path) -> list[dict[str, Any]]:
    try:
        content = path.read_text("utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as exc:
        raise CaptionError(f"{path} cannot be read ({exc}); move it away") from exc
    found = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            told = json.loads(line)
            found.append(
                {key: told[key] for key in ("image", "caption", "least", "score", "words")}
            )
        except (ValueError, TypeError, KeyError) as exc:
            raise CaptionError(
                f"line {number} of {path} is {shown(line)}, no reviewed caption: move the file away"
            ) from exc
    return found


def _page(folder: Path, lines: Sequence[dict[str, Any]], weights: EvidenceModel) -> str:
    fitted = (
        f"Scores are fitted on {escape(weights.fitted_on)}."
        if weights.is_fitted
        else "Scores are not fitted to this model: they put words in an order, and are no "
        "probabilities."
    )
    more = len(lines) - MOST_SHOWN
    rest = (
        f"<p>{more} captions more are in the .jsonl file beside this page.</p>" if more > 0 else ""
    )
    rows = "".join(_row(folder, line) for line in lines[:MOST_SHOWN])
    return _TEMPLATE.format(fitted=fitted, rows=rows, rest=rest, n=len(lines))


def _row(folder: Path, line: dict[str, Any]) -> str:
    name = str(line["image"]).encode("utf-8", "replace").decode()
    score = "" if line["score"] is None else f"{line['score']:.2f}"
    least = "" if line["least"] is None else escape(line["least"])
    picture = f'<img src="{_thumbnail(folder / line["image"])}" alt="">'
    return (
        f'<tr><td><a href="{escape(quote(name))}">{picture}</a></td>'
        f'<td class="score">{score}<br>{least}</td>'
        f"<td>{_marked(line)}<br><small>{escape(name)}</small></td></tr>\n"
    )


def _marked(line: dict[str, Any]) -> str:
    text, end, parts = str(line["caption"]), 0, []
    for word in line["words"]:
        if is_doubtful(word["text"], word["score"]):
            parts.append(escape(text[end : word["start"]]))
            said = escape(text[word["start"] : word["stop"]])
            parts.append(f'<mark title="{word["score"]:.2f}">{said}</mark>')
            end = word["stop"]
    return "".join([*parts, escape(text[end:])])


def _thumbnail(path: Path) -> str:
    """A `data:` URL; an empty one where the picture cannot be read any more."""
    with suppress(ImageError):
        small = Image.fromarray(load_image(path))
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return "data:,"


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Captions to review</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<style>
body {{ font: 16px/1.5 sans-serif; margin: 2em auto; max-width: 60em; }}
td {{ padding: .5em; vertical-align: top; border-top: 1px solid #ccc; }}
.score {{ font-variant-numeric: tabular-nums; }}
mark {{ background: #ffd54d; text-decoration: underline wavy #a33; }}
small {{ color: #555; }}
</style></head><body>
<h1>{n} captions, the least supported word first</h1>
<p>{fitted} A low score says that the model would hardly have said less of it without the picture,
or was not sure; it is no proof that something is not there, and a high one none that it is.</p>
<table>
{rows}</table>
{rest}
</body></html>
"""

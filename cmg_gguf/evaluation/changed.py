"""Which tokens guidance changes, by what they say: what a method really does to captions.

object: a token of an object's name, as the task finds it in the answer. article: a, an or the.
ending: the answer ends there, or goes on where plain decoding would have ended. other: the rest.
The class is that of what is said; what plain decoding would have said is one token, and no word.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from typing import Literal, Protocol, get_args

from cmg_gguf.evaluation.records import Record
from cmg_gguf.evaluation.task import Item, NamesObjects
from cmg_gguf.evaluation.words import word_at
from cmg_gguf.reply import Reply

TokenClass = Literal["object", "article", "ending", "other"]
CLASSES: tuple[TokenClass, ...] = get_args(TokenClass)
ENDING = -1
"""In place of a character: see `Record.changes`."""

_ARTICLES = frozenset({"a", "an", "the"})


class Vocabulary(Protocol):
    """What is needed of a model."""

    def token_bytes(self, token: int) -> bytes: ...
    def is_end(self, token: int) -> bool: ...


def changes_of(reply: Reply, vocabulary: Vocabulary) -> tuple[int, ...]:
    """What `Record.changes` says of a reply; reasoning is left out."""
    said = reply.tokens[reply.n_reasoning_tokens :]
    data = [vocabulary.token_bytes(token.id) for token in said]
    whole = b"".join(data).decode("utf-8", "replace")
    lead = max(whole.find(reply.text), 0)
    found: list[int] = []
    n_bytes = 0
    for token, own in zip(said, data, strict=True):
        if token.changed:
            start = n_bytes + len(own) - len(own.lstrip())
            place = len(b"".join(data)[:start].decode("utf-8", "ignore")) - lead
            ends = vocabulary.is_end(token.plain)
            found.append(ENDING if ends else min(max(place, 0), max(len(reply.text) - 1, 0)))
        n_bytes += len(own)
    if reply.end is not None and reply.end.changed:
        found.append(ENDING)
    return tuple(found)


def changed_by_class(
    task: NamesObjects, items: Sequence[Item], records: Sequence[Record]
) -> Counter[TokenClass]:
    """How many tokens were changed, by class. records: one of each item."""
    found = Counter[TokenClass]()
    for item, record in zip(items, records, strict=True):
        if record.changes:
            mentions = task.mentions(item, record.answer)
            starts = [mention.start for mention in mentions]
            for place in record.changes:
                i = bisect.bisect_right(starts, place) - 1
                if place == ENDING:
                    found["ending"] += 1
                elif i >= 0 and place < mentions[i].end:
                    found["object"] += 1
                else:
                    is_article = word_at(record.answer, place) in _ARTICLES
                    found["article" if is_article else "other"] += 1
    return found

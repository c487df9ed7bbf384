"""CHAIR: how many of the objects that a caption names are not there.

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018.

chair_i: hallucinated mentions, of all mentions (pooled over captions). chair_s: captions with at
least one, of all captions. recall: distinct true objects that are named, of all true objects
(pooled). distinct_1: different words of a caption, of its words (pooled; Li et al., "A
Diversity-Promoting Objective Function for Neural Conversation Models", 2016): who repeats himself
has little. These are in percent; words and mentions are means a caption. A caption that says less
hallucinates less, so read the first two together with the others.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cmg_gguf.evaluation.statistics import Floats, column, percent, ratio
from cmg_gguf.evaluation.task import Mention, Sums
from cmg_gguf.evaluation.words import Lexicon, tokens


def mentions_in(caption: str, lexicon: Lexicon, present: Collection[str]) -> list[Mention]:
    """The objects of a lexicon that a caption names. present: objects that are there."""
    return [
        Mention(named.name, named.start, named.end, named.name in present)
        for named in lexicon.spans(caption)
    ]


def caption_counts(
    caption: str, mentions: Sequence[str], present: Collection[str]
) -> dict[str, float]:
    """What one caption adds. mentions: objects it names; present: objects that are there."""
    hallucinated = sum(name not in present for name in mentions)
    words = tokens(caption)
    return {
        "captions": 1.0,
        "mentions": float(len(mentions)),
        "hallucinated": float(hallucinated),
        "captions_hallucinated": float(hallucinated > 0),
        "named": float(len(set(mentions) & set(present))),
        "present": float(len(set(present))),
        "words": float(len(caption.split())),
        "tokens": float(len(words)),
        "tokens_distinct": float(len(set(words))),
    }


def caption_figures(sums: Sums) -> dict[str, Floats]:
    """The figures above, from sums of `caption_counts`; nan where nothing is to divide by."""
    captions, mentions = column(sums, "captions"), column(sums, "mentions")
    return {
        "chair_i": percent(column(sums, "hallucinated"), mentions),
        "chair_s": percent(column(sums, "captions_hallucinated"), captions),
        "recall": percent(column(sums, "named"), column(sums, "present")),
        "distinct_1": percent(column(sums, "tokens_distinct"), column(sums, "tokens")),
        "words": ratio(column(sums, "words"), captions),
        "mentions": ratio(mentions, captions),
    }

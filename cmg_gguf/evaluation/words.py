"""Which objects a text names: whole words and phrases, singular or plural, longest phrase first.

    lexicon = Lexicon(with_plurals({"dog": "dog", "puppy": "dog", "hot dog": "hot dog"}))
    lexicon.find("Two puppies eat a hot dog.")  # ["dog", "hot dog"]

The words of a lexicon are known, so their plurals are made from them. The other way round, a rule
that makes singulars of the words of any text has to guess ("bus", "lens", "tennis").
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

_WORD = re.compile(r"[^\W_]+")
_DETERMINER = re.compile(
    r"an?|the|this|that|these|those|his|her|its|their|my|your|our|one|two|three|four|five|several|"
    r"some|many|few|each|every|another|both|no"
)
_SAME = re.compile(r"sheep|deer|fish|moose|elk|bison|shrimp|luggage|baggage|aircraft|police")
_IRREGULAR = {
    "person": ("people", "persons"),
    "child": ("children",),
    "grandchild": ("grandchildren",),
    "mouse": ("mice",),
    "goose": ("geese",),
    "ox": ("oxen",),
    "foot": ("feet",),
    "tooth": ("teeth",),
    "leave": ("leaves",),
    "hoof": ("hooves", "hoofs"),
    "scarf": ("scarves", "scarfs"),
    "calf": ("calves",),
    "bus": ("buses", "busses"),
    "human": ("humans",),
}
_F_TO_VES = re.compile(r"(kni|wi|li|loa|lea|shel|hal|wol|el|thie|sel)fe?$")
_O_TO_OES = re.compile(r"(potat|tomat|ech|her|torped|mosquit|buffal|mang|volcan)o$")


def tokens(text: str) -> list[str]:
    """The words of a text in lower case; hyphens and apostrophes part them."""
    return _WORD.findall(text.lower())


def word_at(text: str, place: int) -> str:
    """The word that character `place` belongs to, in lower case; "" where it belongs to none."""
    for match in _WORD.finditer(text):
        if match.start() <= place < match.end():
            return match[0].lower()
    return ""


def plurals(phrase: str) -> tuple[str, ...]:
    """The plural forms of an English noun in lower case; of a phrase, its last word is inflected.

    A noun without a plural of its own is its own plural.
    """
    head, space, word = phrase.rpartition(" ")
    return tuple(f"{head}{space}{form}" for form in _plurals(word))


def _plurals(word: str) -> tuple[str, ...]:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if _SAME.fullmatch(word):
        return (word,)
    if word.endswith("man"):
        return (f"{word[:-3]}men",)
    if _F_TO_VES.search(word):
        return (f"{word.removesuffix('e').removesuffix('f')}ves",)
    if re.search(r"(s|x|z|ch|sh)$", word):
        return (f"{word}es",)
    if _O_TO_OES.search(word):
        return (f"{word}es", f"{word}s")
    if re.search(r"[^aeiou]y$", word):
        return (f"{word[:-1]}ies",)
    return (f"{word}s",)


def with_plurals(names: Mapping[str, str | None]) -> dict[str, str | None]:
    """The same mapping with the plural forms of every phrase added.

    A phrase that is itself in `names` keeps what it stands for.
    """
    forms = {form: node for phrase, node in names.items() for form in plurals(phrase)}
    return {**forms, **names}


class Named(NamedTuple):
    """What a text names, and where: characters `start` to `end` - 1."""

    name: str
    start: int
    end: int


class Lexicon:
    """Phrases and what they stand for.

    forms: phrase (singular or plural, in any case) to the object's name; None = this phrase is no
    object, and neither is what stands in it ("train track" is no train). guarded: forms that are
    often no nouns and count only behind an article, a number or the like ("a can", not "it can").
    """

    def __init__(self, forms: Mapping[str, str | None], guarded: Collection[str] = ()) -> None:
        self._forms = {tuple(tokens(phrase)): node for phrase, node in forms.items()}
        self._longest = max(map(len, self._forms), default=0)
        self._guarded = frozenset(guarded)

    def find(self, text: str) -> list[str]:
        """What the text names, in order, each as often as it is named."""
        return [named.name for named in self.spans(text)]

    def spans(self, text: str) -> list[Named]:
        """The same, with the place of each."""
        # In lower case a text can be longer: each word has the place that it has in the text.
        places = [match.span() for match in _WORD.finditer(text)]
        words = [text[start:end].lower() for start, end in places]
        found: list[Named] = []
        start = 0
        while start < len(words):
            length = self._match(words, start)
            node = self._forms[tuple(words[start : start + length])] if length else None
            if node is not None:
                found.append(Named(node, places[start][0], places[start + length - 1][1]))
            start += max(length, 1)
        return found

    def _match(self, words: list[str], start: int) -> int:
        """The length of the longest form that begins there, in words; 0 = none."""
        for length in range(min(self._longest, len(words) - start), 0, -1):
            form = tuple(words[start : start + length])
            if form in self._forms and not self._is_barred(words, start, length):
                return length
        return 0

    def _is_barred(self, words: list[str], start: int, length: int) -> bool:
        if " ".join(words[start : start + length]) not in self._guarded:
            return False
        return start == 0 or not _DETERMINER.fullmatch(words[start - 1])

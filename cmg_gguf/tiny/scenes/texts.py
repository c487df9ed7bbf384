"""What is said about scenes: captions, questions and answers, all true.

    rng = np.random.default_rng(0)
    caption(scene, "plain", rng)
    # "This is a kitchen. There is a knife on the left. There is a fork in the middle."
    conversations(scene, rng, 6)  # one caption and six more, each of one or two turns

Every sentence of a "plain" or "detailed" caption but the first is about one object.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from cmg_gguf.tiny.scenes.catalogue import COLOURS, KINDS, OBJECTS, PLACES, article
from cmg_gguf.tiny.scenes.world import Scene, Thing

CaptionStyle = Literal["brief", "plain", "detailed"]

CAPTION_PROMPTS: dict[CaptionStyle, str] = {
    "brief": "What is in the image?",
    "plain": "Describe the image.",
    "detailed": "Please describe this image in detail.",
}
NUMBERS = ("none", "one", "two", "three")

P_STYLE: dict[CaptionStyle, float] = {"brief": 0.25, "plain": 0.45, "detailed": 0.3}
P_PRESENT, P_OWN = 0.55, 0.2
"""Share of yes/no questions about something present; about something absent that belongs here."""
P_NAMED_PLACE = 0.4
"""Share of yes/no questions that say "in the kitchen" instead of "in the image"."""
P_DIALOGUE = 0.15


class Turn(NamedTuple):
    """A question and its true answer."""

    question: str
    answer: str


Conversation = tuple[Turn, ...]


def caption(scene: Scene, style: CaptionStyle, rng: np.random.Generator) -> str:
    """What is there: pairs together, anchor first; what belongs to the place before strangers."""
    things = _told_order(scene, rng)
    if style == "brief":
        names = list(dict.fromkeys(thing.name for thing in things))
        return f"{article(scene.place).capitalize()} with {_joined([article(n) for n in names])}."
    sentences = [f"This is {article(scene.place)}."]
    seen: set[str] = set()
    for thing in things:
        what = f"another {thing.name}" if thing.name in seen else article(thing.name)
        colour = f", and it is {thing.colour}" if style == "detailed" else ""
        sentences.append(f"There is {what} {thing.side}{colour}.")
        seen.add(thing.name)
    return " ".join(sentences)


def existence_question(name: str, place: str | None = None) -> str:
    """POPE's question; with a place, "in the kitchen" instead of "in the image"."""
    return f"Is there {article(name)} in the {place or 'image'}?"


def colour_question(name: str) -> str:
    return f"What colour is the {name}?"


def side_question(name: str) -> str:
    return f"Where is the {name}?"


def count_question(name: str) -> str:
    return f"How many {KINDS[name].plural} are there?"


def ask_existence(scene: Scene, rng: np.random.Generator) -> Turn:
    """Is there a ...? Yes more often than not, and no more often where no is a surprise."""
    chance = rng.random()
    absent = [name for name in OBJECTS if name not in scene.names]
    own = [name for name in PLACES[scene.place].objects if name not in scene.names]
    if chance < P_PRESENT:
        name = _pick(rng, sorted(scene.names))
    else:
        name = _pick(rng, own if own and chance < P_PRESENT + P_OWN else absent)
    place = scene.place if rng.random() < P_NAMED_PLACE else None
    return Turn(existence_question(name, place), "Yes" if name in scene.names else "No")


def ask_colour(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """What colour is the ...? None where no class has exactly one object."""
    thing = _single(scene, rng)
    return Turn(colour_question(thing.name), f"It is {thing.colour}.") if thing else None


def ask_side(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """Where is the ...? None where no class has exactly one object."""
    thing = _single(scene, rng)
    return Turn(side_question(thing.name), f"It is {thing.side}.") if thing else None


def ask_count(scene: Scene, rng: np.random.Generator) -> Turn:
    """How many ... are there?"""
    counts = scene.counts
    if rng.random() < 0.2:
        name = _pick(rng, [name for name in OBJECTS if name not in counts])
    else:
        name = _pick(rng, sorted(counts, key=lambda n: (-counts[n], n))[:2])
    return Turn(
        count_question(name),
        f"There {'is' if counts[name] == 1 else 'are'} {NUMBERS[counts[name]]}.",
    )


def ask(scene: Scene, rng: np.random.Generator) -> Turn:
    """Any of the questions."""
    chance = rng.random()
    turn: Turn | None = None
    if chance < 0.22:
        turn = ask_colour(scene, rng)
    elif chance < 0.36:
        turn = ask_side(scene, rng)
    elif chance < 0.46:
        turn = ask_count(scene, rng)
    return turn or ask_existence(scene, rng)


def ask_caption(scene: Scene, rng: np.random.Generator) -> Turn:
    """Any of the captions."""
    styles = list(P_STYLE)
    style = styles[int(rng.choice(len(styles), p=list(P_STYLE.values())))]
    return Turn(CAPTION_PROMPTS[style], caption(scene, style, rng))


def conversations(scene: Scene, rng: np.random.Generator, n_questions: int) -> list[Conversation]:
    """A caption and `n_questions` questions, now and then followed by a second question."""
    found: list[Conversation] = []
    for i in range(n_questions + 1):
        first = ask_caption(scene, rng) if i == 0 else ask(scene, rng)
        follows = rng.random() < P_DIALOGUE
        found.append((first, ask(scene, rng)) if follows else (first,))
    return found


def vocabulary_lines() -> list[str]:
    """Lines that have every word in them: what a tokenizer should know besides conversations."""
    names = [text for name in OBJECTS for text in (article(name), KINDS[name].plural)]
    return [*names, *PLACES, *COLOURS, *NUMBERS]


def _told_order(scene: Scene, rng: np.random.Generator) -> list[Thing]:
    own: list[list[Thing]] = []
    for pair in PLACES[scene.place].pairs:
        group = [thing for name in pair for thing in scene.things if thing.name == name]
        if group:
            own.append(group)
    belonging = PLACES[scene.place].objects
    strange = [
        [thing for thing in scene.things if thing.name == name]
        for name in sorted(scene.names - set(belonging))
    ]
    told = [own[i] for i in rng.permutation(len(own))]
    told += [strange[i] for i in rng.permutation(len(strange))]
    return [thing for group in told for thing in group]


def _single(scene: Scene, rng: np.random.Generator) -> Thing | None:
    single = [thing for thing in scene.things if scene.counts[thing.name] == 1]
    return single[int(rng.integers(len(single)))] if single else None


def _pick(rng: np.random.Generator, names: list[str]) -> str:
    return names[int(rng.integers(len(names)))]


def _joined(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"

"""Where an answer looked: the attention of its tokens on the pictures.

    reply = vlm.generate("Describe it.", ["kitchen.jpg"], heat=True)
    reply.heat.weights                            # (n_tokens, n_layers, n_image_tokens)
    fork = tokens_of(reply, "fork")[0]            # where the answer first says it
    reply.heat.of(fork)                           # (n_image_tokens,), relative
    reply.heat.map(0, fork)                       # (height, width) of the picture

Attention tells what a row reads, not why the model said a word: a map is no proof that a word is
grounded in what it shows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from cmg_gguf.arrays import FloatArray
from cmg_gguf.errors import ImageError, PromptError, shown
from cmg_gguf.heat.geometry import Boxes, Picture

Layers: TypeAlias = int | Literal["mean", "masked"]
"""One layer by its number in the model, the mean of all that attend, or of those that guidance
masks."""
Values: TypeAlias = npt.NDArray[np.float64]


class Word(Protocol):
    """A word of an answer: see `cmg_gguf.reply.Word`."""

    @property
    def text(self) -> str: ...

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...

    @property
    def first(self) -> int: ...

    @property
    def last(self) -> int: ...


class Answer(Protocol):
    """A text and its words: see `cmg_gguf.reply.Reply`."""

    @property
    def text(self) -> str: ...

    @property
    def words(self) -> Sequence[Word]: ...


@dataclass(frozen=True, eq=False)
class Heat:
    """The attention of an answer's tokens on the image tokens of all its pictures.

    weights: (n_tokens, n_layers, n_image_tokens) float32, 0 to 1: attention weights after the
    softmax, the mean over the heads, by the original branch. The row of a token is the one that it
    was drawn from: the query of the token before it, for the first the prompt's last. That is the
    row that decided for the token, there is one for every token of the answer, and guidance masks
    it; the token's own row, which reads on from it, is the next one. What is missing to 1 went to
    text. 0 where a sliding window hides the image token, NaN where its cell was given away. Takes 4
    bytes each: 512 tokens of an answer about 576 image tokens with 32 layers are 38 MB.
    layers: numbers of the n_layers layers, ascending: those that attend. masked: those that
    guidance masks in the degraded branch; () without. images: where the image tokens lie.
    """

    weights: FloatArray = field(repr=False)
    layers: tuple[int, ...]
    masked: tuple[int, ...]
    images: tuple[Picture, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer."""
        return len(self.weights)

    def of(self, tokens: Sequence[int], *, layer: Layers = "mean", relative: bool = True) -> Values:
        """(n_image_tokens,) float64: what some tokens of the answer attend to, their mean.

        relative: divided by the mean of all the answer's tokens, so that 1 is as usual and image
        tokens that every row attends to (attention sinks) do not stand out; else weights, 0 to 1.
        Of an answer of one token everything is as usual. Raises PromptError for a token or layer
        that there is not.
        """
        if not len(tokens):
            raise PromptError("no token is named; give the numbers of some of the answer's tokens")
        for token in tokens:
            if not 0 <= token < self.n_tokens:
                raise PromptError(
                    f"token {shown(token)} is out of range: the answer has {self.n_tokens}, "
                    "counted from 0"
                )
        weights = self._in_layers(layer)
        found = weights[list(tokens)].mean(axis=0)
        return ratio(found, weights.mean(axis=0)) if relative else found

    def map(
        self,
        image: int,
        tokens: Sequence[int],
        *,
        layer: Layers = "mean",
        relative: bool = True,
    ) -> Values:
        """(height, width) float64 of a picture: the same, pixel by pixel.

        image: its number, from 0. Each image token's attention is spread evenly over its box; views
        that overlap, as a tile and the whole, add up. relative: how often the usual attention a
        pixel gets, 1 = as usual; else attention per pixel: the sum over the pixels is what the
        picture's tokens got. 0 where no image token shows a pixel. Raises what `of` raises, and
        ImageError where the boxes are not known.
        """
        found = self.picture(image)
        boxes, part = self.boxes(image), slice(found.first, found.first + found.n_tokens)
        shape = found.height, found.width
        values = spread(self.of(tokens, layer=layer, relative=False)[part], boxes, shape)
        if not relative:
            return values
        usual = self.of(range(self.n_tokens), layer=layer, relative=False)[part]
        return ratio(values, spread(usual, boxes, shape))

    def picture(self, image: int) -> Picture:
        """A picture by its number. Raises PromptError if there is none."""
        if not 0 <= image < len(self.images):
            n = len(self.images)
            raise PromptError(f"image {shown(image)} is out of range: there are {n}, from 0")
        return self.images[image]

    def boxes(self, image: int) -> Boxes:
        """(n, 4) float64, the boxes of a picture's image tokens. Raises ImageError where they are
        not known."""
        found = self.picture(image)
        boxes = found.boxes
        if boxes is None:
            raise ImageError(
                f"where the image tokens of image {image} lie is not known ({found.unknown}); "
                "their attention is in Heat.weights"
            )
        return boxes

    def _in_layers(self, layer: Layers) -> Values:
        """(n_tokens, n_image_tokens): the mean over some layers."""
        if layer == "mean":
            wanted = self.layers
        elif layer == "masked":
            wanted = self.masked
            if not wanted:
                raise PromptError(
                    'layer="masked" needs guidance, and this answer was drawn without: '
                    'name a layer, or "mean"'
                )
        elif layer in self.layers:
            wanted = (layer,)
        else:
            raise PromptError(
                f"layer {shown(layer)} does not attend: of this model's layers those that do are "
                f"{', '.join(map(str, self.layers))}"
            )
        places = [self.layers.index(il) for il in wanted]
        return np.asarray(self.weights[:, places].mean(axis=1, dtype=np.float64))


def ratio(values: Values, usual: Values) -> Values:
    """values / usual; 0 where both are 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((values == 0) & (usual == 0), 0.0, values / usual)


def spread(values: Values, boxes: Boxes, shape: tuple[int, int]) -> Values:
    """(height, width): each value, spread evenly over its box; they add up. Exact where a box ends
    within a pixel. values without a box are left out."""
    height, width = shape
    found = np.zeros(shape)
    for value, (left, top, right, bottom) in zip(values, boxes, strict=True):
        if not right > left or not bottom > top:
            continue
        rows, down = _overlap(top, bottom, height)
        columns, across = _overlap(left, right, width)
        density = value / (right - left) / (bottom - top)
        found[rows, columns] += density * np.outer(down, across)
    return found


def _overlap(start: float, stop: float, size: int) -> tuple[slice, Values]:
    """The pixels that an interval touches, and how much of each it covers."""
    first, last = max(0, int(np.floor(start))), min(size, int(np.ceil(stop)))
    pixels = np.arange(first, last)
    covered = np.minimum(pixels + 1, stop) - np.maximum(pixels, start)
    return slice(first, last), np.clip(covered, 0.0, 1.0)


def tokens_of(answer: Answer, phrase: str) -> tuple[tuple[int, ...], ...]:
    """The tokens of each time that an answer's text says a phrase: their numbers, in order.

    answer: a `Reply`. phrase: one of its words or several, as they are written or in other case;
    not as a part of a longer word. Tokens that hold a part of it count. Raises PromptError where
    the text does not say it.
    """
    starts = {word.start: word for word in answer.words}
    stops = {word.stop: word for word in answer.words}
    found = [
        tuple(range(starts[m.start()].first, stops[m.end()].last + 1))
        for m in re.finditer(re.escape(phrase.strip()), answer.text, re.IGNORECASE)
        if m.start() in starts and m.end() in stops
    ]
    if not found:
        raise PromptError(f"the answer does not say {shown(phrase)}: it says {shown(answer.text)}")
    return tuple(found)

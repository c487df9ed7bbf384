"""Whether the built-in pair computes what it computed where `selftest.npz` was made.

That file (`scripts/store_selftest.py` makes it) holds a picture, both branches' logits along the
first tokens of its guided caption, those of each layer masked alone, which image tokens are looked
at most, and the caption's tokens by each way of decoding. Of the degraded branch, what masking
changes is compared, l_d - l_o. Other kernels round otherwise: off by up to a third of that; a
branch that is not masked is off by all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmg_gguf.arrays import FloatArray, IntArray
from cmg_gguf.doctor.branches import both, chosen
from cmg_gguf.doctor.finding import Finding
from cmg_gguf.errors import ModelError
from cmg_gguf.guidance import Guidance, LayerRange, LayerSet, TopRatio
from cmg_gguf.tiny.pair import embedded_pair
from cmg_gguf.vlm import GuidedVLM

FILE = Path(__file__).parent / "selftest.npz"
TOLERANCE, MASKING_TOLERANCE = 0.1, 0.5
"""Share of its own length by which logits may be off, and what masking changes in them."""
SHARED = 0.75
"""Share of the image tokens that are looked at most which must be the stored ones."""
PROMPT = "Describe the image."
GUIDANCE = Guidance(alpha=0.5, beta=0.05, tokens=TopRatio(1.0))
LOOKED = Guidance(tokens=TopRatio(0.25), layers=LayerRange(0, 1), scope="decode")
"""Shows what the last row looks at, in every layer."""
EVERY = 8
"""Of the vocabulary, each so many-th token's logits are stored."""
N_FORCED, N_SAID = 8, 16
WAYS: Mapping[str, Mapping[str, Any]] = {
    "exact": {"strategy": "exact"},
    "auto": {"strategy": "auto"},
    "approximate": {"strategy": "approximate"},
    "contexts": {"pairing": "contexts"},
}
"""Ways of decoding, as options of `GuidedVLM`."""

PLAIN_REMEDY = (
    "plain decoding is wrong already, without anything of cmg-gguf: try -ngl 0, and reinstall "
    "llama-cpp-python"
)
GUIDED_REMEDY = (
    "answers are not guided as they should be: pip install --force-reinstall cmg-gguf and "
    "llama-cpp-python; where that does not help, report it with all of this page"
)


@dataclass(frozen=True, eq=False)
class Computed:
    """What a build computes; V = ceil(n_vocab / EVERY).

    l_o, l_d: (N_FORCED, V) float32, of both branches ahead of each forced token. alone: (n_layer,
    N_FORCED, V) float32, l_d where one layer alone is masked. looked: (n_layer, n) int32, the image
    tokens that the prompt's last row looks at most. said: by way of decoding, (N_SAID,) int32.
    """

    l_o: FloatArray
    l_d: FloatArray
    alone: FloatArray
    looked: IntArray
    said: Mapping[str, IntArray]

    @property
    def masking(self) -> FloatArray:
        """(N_FORCED, V) float32: what masking changes."""
        return self.l_d - self.l_o

    @property
    def masking_alone(self) -> FloatArray:
        """(n_layer, N_FORCED, V) float32: what masking one layer alone changes."""
        return self.alone - self.l_o


@dataclass(frozen=True, eq=False)
class Stored:
    """The file: pixels (112, 112, 3) uint8, the tokens that are forced, what was computed."""

    pixels: NDArray[np.uint8]
    tokens: IntArray
    computed: Computed


def look(**options: Any) -> Iterator[Finding]:
    """Findings of the self-test. options: of `GuidedVLM`. Raises ModelError, BackendError."""
    stored = load()
    right, found = stored.computed, compute(stored.pixels, stored.tokens, **options)
    yield _plain(off(found.l_o, right.l_o))
    yield _masked(off(found.masking, right.masking))
    layers = zip(found.masking_alone, right.masking_alone, strict=True)
    yield _alone([off(*pair) for pair in layers])
    yield _looked(found.looked, right.looked)
    yield _ways(found.said, right.said)


def off(found: FloatArray, right: FloatArray) -> float:
    """Length of the difference, as a share of the length of what is right."""
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def compute(pixels: NDArray[np.uint8], tokens: IntArray | None, **options: Any) -> Computed:
    """What this build computes. tokens: forced ones; None = the first that are said.

    Raises ModelError, BackendError.
    """
    said: dict[str, IntArray] = {}
    for way, chosen_way in WAYS.items():
        with GuidedVLM(*embedded_pair(), **{"n_ctx": 512, **options, **chosen_way}) as vlm:
            reply = vlm.generate(PROMPT, [pixels], guidance=GUIDANCE, max_tokens=N_SAID)
            said[way] = np.array([token.id for token in reply.tokens], np.int32)
            if way == "exact":
                forced = (said[way] if tokens is None else tokens)[: N_FORCED - 1].tolist()
                prompt = vlm.projector.encode(vlm.tokenize(PROMPT, [pixels]))
                rows = both(vlm, prompt, GUIDANCE, forced)
                alone = [
                    both(vlm, prompt, replace(GUIDANCE, layers=LayerSet((il,))), forced).l_d
                    for il in range(vlm.model.n_layer)
                ]
                looked = np.sort(chosen(vlm, prompt, LOOKED))
    l_o, l_d, each = (np.array(x)[..., ::EVERY] for x in (rows.l_o, rows.l_d, alone))
    return Computed(l_o, l_d, each, looked, said)


def load() -> Stored:
    """The file. Raises ModelError if it is not there."""
    try:
        with np.load(FILE) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as exc:
        raise ModelError(
            f"{FILE.name} cannot be read ({exc}), so there is nothing to compare with; reinstall "
            "cmg-gguf"
        ) from exc
    l_o, l_d, alone = (arrays[name].astype(np.float32) for name in ("l_o", "l_d", "alone"))
    said = {way: arrays[f"said_{way}"] for way in WAYS}
    computed = Computed(l_o, l_d, alone, arrays["looked"], said)
    return Stored(arrays["pixels"], arrays["tokens"], computed)


def store(pixels: NDArray[np.uint8], computed: Computed, path: Path) -> None:
    """Writes the file, logits in half precision."""
    arrays: dict[str, NDArray[Any]] = {
        "pixels": pixels,
        "tokens": computed.said["exact"][:N_FORCED],
        "looked": computed.looked,
        "l_o": computed.l_o.astype(np.float16),
        "l_d": computed.l_d.astype(np.float16),
        "alone": computed.alone.astype(np.float16),
        **{f"said_{way}": tokens for way, tokens in computed.said.items()},
    }
    np.savez_compressed(path, allow_pickle=False, **arrays)


def _plain(share: float) -> Finding:
    told = f"logits are off by {_percent(share)}, {_percent(TOLERANCE)} are allowed"
    return _told("plain branch", share <= TOLERANCE, told, PLAIN_REMEDY)


def _masked(share: float) -> Finding:
    told = f"what masking changes is off by {_percent(share)}, {_ALLOWED}"
    return _told("guided branch", share <= MASKING_TOLERANCE, told, GUIDED_REMEDY)


def _alone(shares: Sequence[float]) -> Finding:
    wrong = [str(il) for il, share in enumerate(shares) if not share <= MASKING_TOLERANCE]
    told = f"of {len(shares)} layers masked alone each is off by up to {_percent(max(shares))}"
    if wrong:
        told = f"of {len(shares)} layers masked alone these are wrong: {', '.join(wrong)}"
    return _told("each layer alone", not wrong, f"{told}, {_ALLOWED}", GUIDED_REMEDY)


def _looked(found: IntArray, right: IntArray) -> Finding:
    n = right.shape[1]
    least = min(len(np.intersect1d(*pair)) for pair in zip(found, right, strict=True))
    told = f"of the {n} image tokens that a layer looks at most, {least} or more are right"
    return _told("attention on the image", least >= SHARED * n, told, GUIDED_REMEDY)


def _ways(found: Mapping[str, IntArray], right: Mapping[str, IntArray]) -> Finding:
    wrong = [way for way in right if not np.array_equal(found[way], right[way])]
    told = f"{', '.join(right)}: each says the {N_SAID} tokens that it should"
    if wrong:
        told = f"other tokens than they should are said by: {', '.join(wrong)}"
    return _told("ways of decoding", not wrong, told, GUIDED_REMEDY)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


_ALLOWED = f"{_percent(MASKING_TOLERANCE)} are allowed"


def _told(what: str, right: bool, found: str, remedy: str) -> Finding:
    name = f"self-test: {what}"
    return Finding(name, "ok", found) if right else Finding(name, "failed", found, remedy)

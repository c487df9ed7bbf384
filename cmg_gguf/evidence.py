"""How much the picture supports a word: one number from what both branches say of its token.

    z     = intercept + w1 log p_o + w2 (log p_o - log p_d) + w3 JSD + w4 H
    score = 1 / (1 + exp(-z))

p_o is the model's own distribution (n_vocab,), before guidance and samplers; p_d the same model's
where every image token is hidden from every text row behind the first image, in every layer that
attends. JSD is their Jensen-Shannon divergence in nats, H the entropy of p_o in nats.

Neither part does alone: where a picture shows what nobody expects, the probability of an object's
name says nothing of whether it is there, and the difference does; where it shows what everybody
expects, it is the other way round. So the weights are fitted, for one model, on names of objects
that are there or not (`scripts/fit_evidence`), and then the score is the share of such names that
are there. `UNFITTED` is for models without: it puts words in an order, and is no probability.

What the score is not: proof. It compares what a model says with and without the picture, and not
with what the picture shows; a model that misreads a picture with conviction scores high. It is
fitted on names of objects: numbers, colours, places, negations were not judged. And it is not how
much attention a word pays to the image: that is about equal for real and invented words.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from numbers import Real

from cmg_gguf.errors import GuidanceError


@dataclass(frozen=True, kw_only=True)
class EvidenceModel:
    """Weights of the formula above, each finite.

    intercept; log_p_o, difference, divergence, entropy: one for each term, in this order.
    fitted_on: what they were fitted on, in words; "" = they were not.

    Raises GuidanceError for a weight that is no finite number.
    """

    intercept: float = 1.0
    log_p_o: float = 1.0
    difference: float = 1.0
    divergence: float = 0.0
    entropy: float = 0.0
    fitted_on: str = ""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "fitted_on":
                if not isinstance(value, str):
                    raise GuidanceError(f"fitted_on={value!r} is no text; say what it was")
            elif not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
                raise GuidanceError(f"evidence: {name}={value!r} is no finite number")

    @property
    def is_fitted(self) -> bool:
        """Whether a score is meant as a probability."""
        return bool(self.fitted_on)

    def score(self, *, log_p_o: float, log_p_d: float, divergence: float, entropy: float) -> float:
        """0 (nothing speaks for the word but habit) to 1; log-probabilities, JSD and H in nats.

        A probability of 0 counts as e^-50.
        """
        log_p_o, log_p_d = max(log_p_o, LEAST), max(log_p_d, LEAST)
        z = (
            self.intercept
            + self.log_p_o * log_p_o
            + self.difference * (log_p_o - log_p_d)
            + self.divergence * divergence
            + self.entropy * entropy
        )
        return 1 / (1 + math.exp(min(-z, 700.0)))


LEAST = -50.0
"""What a log-probability counts as at least, in nats."""

UNFITTED = EvidenceModel()
"""sigmoid(1 + 2 log p_o - log p_d), uncalibrated: 0.73 for a word that is certain with the picture
and without, more for what the picture makes likelier, less for what it does not make certain."""

DOUBTFUL = 0.5
"""Words of a lower score are marked as doubtful, but for `FUNCTION_WORDS`."""
_FUNCTION_WORDS = """
a about all also an and another any are as at be been both but by can could does each for from had
has have he her here his i image in into is it its may near next no not of on one or other picture
scene she so some that the their them there these they this those to two was we were what when where
which while who will with would you
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""Words of English that name nothing to see: whether the picture supports them asks nothing. Other
languages' are not known here, and can be marked."""


def is_doubtful(word: str, score: float | None) -> bool:
    """Whether a word is to be marked. score: None = it has none."""
    return score is not None and score < DOUBTFUL and word.lower() not in FUNCTION_WORDS


def checked_evidence(value: object) -> EvidenceModel | None:
    """The weights that `Request.evidence` means: True = `UNFITTED`, False = none. Raises
    GuidanceError for what is neither of them nor weights."""
    if isinstance(value, EvidenceModel):
        return value
    if isinstance(value, bool):
        return UNFITTED if value else None
    raise GuidanceError(
        f"evidence={value!r} is neither True nor False nor an EvidenceModel; write evidence=True, "
        "or evidence=load_settings(path).evidence for weights that were fitted"
    )

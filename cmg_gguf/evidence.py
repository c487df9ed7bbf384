"""How much the picture supports a word: one number from what both branches say of its token.

    z     = intercept + w1 log p_o + w2 (log p_o - log p_d) + w3 JSD + w4 H_o + w5 H_d
                      + w6 p_o H_o + w7 p_o p_d
    score = 1 / (1 + exp(-z))

p_o is the model's own distribution (n_vocab,), before guidance and samplers; p_d the same model's
where every image token is hidden from every text row behind the first image, in every layer that
attends. JSD is their Jensen-Shannon divergence, H_o and H_d are their entropies, all in nats.

No part does alone: where a picture shows what nobody expects, the probability of an object's name
says nothing of whether it is there, and the difference does; where it shows what everybody
expects, it is the other way round. How sure the model is without the picture tells which of the
two it is, and so do the products: what it is sure of counts otherwise than what it is torn about,
and otherwise again if it had said it blind. The products are those of two terms, p_o and p_d that
helped most in turn, on scenes that nobody reports on, by cross-validation. The weights are fitted,
for one model, on names of objects that are there or not (`scripts/fit_evidence`), and then the
score is the share of such names that are there. `UNFITTED` is for models without: it puts words in
an order, and is no probability.

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

    intercept; then one for each of `TERMS`. fitted_on: what they were fitted on, in words; "" =
    they were not.

    Raises GuidanceError for a weight that is no finite number.
    """

    intercept: float = 1.0
    log_p_o: float = 1.0
    difference: float = 1.0
    divergence: float = 0.0
    entropy_o: float = 0.0
    entropy_d: float = 0.0
    p_o_entropy_o: float = 0.0
    p_o_p_d: float = 0.0
    fitted_on: str = ""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "fitted_on":
                if not isinstance(value, str):
                    raise GuidanceError(f"fitted_on={value!r} is no text; say what it was")
            elif not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
                raise GuidanceError(f"evidence: {name}={value!r} is no finite number")
            else:
                object.__setattr__(self, name, float(value))

    @property
    def is_fitted(self) -> bool:
        """Whether a score is meant as a probability."""
        return bool(self.fitted_on)

    def score(
        self,
        *,
        log_p_o: float,
        log_p_d: float,
        divergence: float,
        entropy_o: float,
        entropy_d: float,
    ) -> float:
        """0 (nothing speaks for the word but habit) to 1; log-probabilities, JSD and H in nats."""
        found = terms(log_p_o, log_p_d, divergence, entropy_o, entropy_d)
        z = self.intercept + sum(getattr(self, name) * value for name, value in found.items())
        return 1 / (1 + math.exp(min(-z, 700.0)))


def terms(
    log_p_o: float, log_p_d: float, divergence: float, entropy_o: float, entropy_d: float
) -> dict[str, float]:
    """What weights are of, by name, in the formula's order; log-probabilities, JSD, H in nats.

    A probability of 0 counts as e^-50.
    """
    log_p_o, log_p_d = max(log_p_o, LEAST), max(log_p_d, LEAST)
    p_o, p_d = math.exp(log_p_o), math.exp(log_p_d)
    return {
        "log_p_o": log_p_o,
        "difference": log_p_o - log_p_d,
        "divergence": divergence,
        "entropy_o": entropy_o,
        "entropy_d": entropy_d,
        "p_o_entropy_o": p_o * entropy_o,
        "p_o_p_d": p_o * p_d,
    }


LEAST = -50.0
"""What a log-probability counts as at least, in nats."""

TERMS = tuple(terms(0.0, 0.0, 0.0, 0.0, 0.0))
"""Their names, in order."""
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

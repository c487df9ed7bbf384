"""What tells objects that are there from those that are not, at the words that name them.

    mentions = with_evidence(words_told(reply), task.mentions(item, reply.text), item.cluster)
    areas(mentions)["evidence"].own          # AUROC in percent, with its interval
    calibration(mentions)                    # expected calibration error, in percent
    left(mentions, 0.2)                      # CHAIR_i without the least supported 20 %
    fitted(mentions, "what they are")        # weights for `cmg_gguf.evidence`

A mention is a word or phrase that names an object (`cmg_gguf.evaluation.words`); what is measured
of it is measured at the token in which its first word begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, replace

import numpy as np

from cmg_gguf.errors import EvaluationError
from cmg_gguf.evaluation.statistics import Floats, Result, bootstrap_auc
from cmg_gguf.evaluation.task import Mention
from cmg_gguf.evidence import TERMS, EvidenceModel, terms
from cmg_gguf.reply import Evidence, Reply

BASELINE = "probability"
N_BINS = 10
"""Of equal width, in which score and share of objects that are there are compared."""
N_SAMPLES = 2000
_RIDGE = 1e-4
_STEPS = 100


@dataclass(frozen=True)
class Attention:
    """Where the row looked that a word is drawn from; the mean over the heads, 0 to 1.

    image: on all image tokens, the mean over the layers that attend. first_text: on all else, in
    the first of them.
    """

    image: float
    first_text: float


@dataclass(frozen=True)
class ScoredMention:
    """An object that an answer names, its evidence, and the attention at its name.

    present: whether it is there. cluster: mentions with the same one are resampled together.
    """

    name: str
    present: bool
    cluster: str
    evidence: Evidence
    attention: Attention


WordsTold = list[list[float]]
"""As in `Record.words`."""
_N_TOLD = 10


def words_told(reply: Reply) -> WordsTold | None:
    """What a record says of an answer's words; None without evidence, which comes with heat."""
    if reply.evidence is None:
        return None
    assert reply.heat is not None
    on_image = reply.heat.weights.sum(axis=2, dtype=np.float64)
    told = []
    for word in reply.words:
        evidence = reply.tokens[word.first].evidence
        assert evidence is not None
        looked = on_image[word.first]
        attention = Attention(float(looked.mean()), float(1 - looked[0]))
        told.append([word.start, word.stop, *astuple(evidence), *astuple(attention)])
    return told


def with_evidence(
    words: WordsTold, mentions: Iterable[Mention], cluster: str
) -> list[ScoredMention]:
    """The mentions of an answer, with what is said of its words. Raises EvaluationError for words
    of which something else is said."""
    found = []
    for named in mentions:
        told = next(told for told in words if told[0] <= named.start < told[1])
        if len(told) != _N_TOLD:
            raise EvaluationError(
                f"a record says {len(told)} numbers of a word, not {_N_TOLD}: another version made "
                "this run; run it again into a new folder"
            )
        evidence, attention = Evidence(*told[2:8]), Attention(*told[8:])
        found.append(ScoredMention(named.name, named.present, cluster, evidence, attention))
    return found


def scores(mentions: Sequence[ScoredMention]) -> dict[str, Floats]:
    """(n,) float64 of each way to tell them apart; higher = rather there.

    The two of attention are what others have proposed: much of it on the image speaks for a word,
    much on text in the first layer against it.
    """
    found = _terms(mentions)
    looked = np.array([astuple(mention.attention) for mention in mentions], np.float64)
    image, first_text = looked.reshape(len(mentions), 2).T
    return {
        "probability": found["log_p_o"],
        "entropy": -found["entropy_o"],
        "difference": found["difference"],
        "divergence": found["divergence"],
        "image attention": image,
        "text attention": -first_text,
        "evidence": np.array([mention.evidence.score for mention in mentions], np.float64),
    }


def areas(
    mentions: Sequence[ScoredMention],
    *,
    baseline: str = BASELINE,
    n_samples: int = N_SAMPLES,
    seed: int = 0,
) -> dict[str, Result]:
    """The AUROC of each in percent: of a mention that is there and one that is not, how often the
    first has the higher score; with a bootstrap over clusters, and the difference to one of them.
    {} where all mentions are there, or none."""
    labels = _labels(mentions)
    if not len(labels) or labels.all() or not labels.any():
        return {}
    clusters = [mention.cluster for mention in mentions]
    return bootstrap_auc(
        scores(mentions), labels, clusters, baseline=baseline, n=n_samples, seed=seed
    )


def calibration(mentions: Sequence[ScoredMention]) -> float:
    """Expected calibration error of the evidence in percent: over bins of the score, how far its
    mean is from the share of mentions that are there, weighted by mentions; nan without any.

    Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015.
    """
    if not mentions:
        return float("nan")
    score, labels = scores(mentions)["evidence"], _labels(mentions)
    bins = np.minimum((score * N_BINS).astype(int), N_BINS - 1)
    gaps = np.bincount(bins, score - labels, N_BINS)
    return float(100 * np.abs(gaps).sum() / len(score))


def left(mentions: Sequence[ScoredMention], dropped: float, by: str = "evidence") -> float:
    """CHAIR_i in percent of the mentions that are left where a share of them is dropped, those of
    the lowest score first; nan where none is left. by: a name of `scores`."""
    order = np.argsort(scores(mentions)[by], kind="stable")
    kept = _labels(mentions)[order][round(dropped * len(order)) :]
    return float(100 * (1 - kept.mean())) if len(kept) else float("nan")


def fitted(mentions: Sequence[ScoredMention], fitted_on: str) -> EvidenceModel:
    """The weights with which the score is likeliest to be the share of mentions that are there:
    logistic regression, by Newton's method. Raises EvaluationError where all are there, or none."""
    labels = _labels(mentions).astype(np.float64)
    if not len(labels) or labels.min() == labels.max():
        raise EvaluationError("all of these mentions are there, or none: weights need both")
    found = _terms(mentions)
    measured = np.column_stack(list(found.values()))
    mean, scale = measured.mean(axis=0), measured.std(axis=0) + 1e-12
    x = np.column_stack([np.ones(len(measured)), (measured - mean) / scale])
    w = np.zeros(x.shape[1])
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -500, 500)))
        slope = x.T @ (p - labels) + _RIDGE * w
        curvature = (x * (p * (1 - p))[:, None]).T @ x + _RIDGE * np.eye(len(w))
        step = np.linalg.solve(curvature, slope)
        w -= step
        if np.abs(step).max() < 1e-10:
            break
    weights = w[1:] / scale
    intercept = float(w[0] - weights @ mean)
    named = dict(zip(found, map(float, weights), strict=True))
    return EvidenceModel(intercept=intercept, fitted_on=fitted_on, **named)


def rescored(mentions: Sequence[ScoredMention], model: EvidenceModel) -> list[ScoredMention]:
    """The same mentions, by other weights."""
    return [replace(m, evidence=_scored(m.evidence, model)) for m in mentions]


def _terms(mentions: Sequence[ScoredMention]) -> dict[str, Floats]:
    """(n,) float64 of each term that weights are of, by name."""
    rows = [terms(**_measured(mention.evidence)) for mention in mentions]
    return {name: np.array([row[name] for row in rows], np.float64) for name in TERMS}


def _labels(mentions: Sequence[ScoredMention]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.array([mention.present for mention in mentions], bool)


def _scored(evidence: Evidence, model: EvidenceModel) -> Evidence:
    return replace(evidence, score=model.score(**_measured(evidence)))


def _measured(evidence: Evidence) -> dict[str, float]:
    return {name: value for name, value in asdict(evidence).items() if name != "score"}

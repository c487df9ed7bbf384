"""Ways to answer the same question: guidance, and the controls that it is compared with.

A new one is a small class and a line in `METHODS`:

    @dataclass(frozen=True)
    class Warm(Method):
        \"""Sampling at temperature 0.5.\"""

        name: str = "warm"

        def request(self, question: Question) -> Request:
            return question.ask(sampling=Sampling(temperature=0.5, seed=question.seed))

    METHODS["warm"] = lambda guidance: Warm()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from cmg_gguf.arrays import FloatArray, IntArray
from cmg_gguf.errors import EvaluationError
from cmg_gguf.evaluation.earlier import FirstLogit, Residual
from cmg_gguf.evaluation.method import Method, Question, point_name
from cmg_gguf.evaluation.relatives import Icd, M3id, NoImage, Vcd
from cmg_gguf.evaluation.task import Task
from cmg_gguf.evaluation.yes_no import YesNoTokens
from cmg_gguf.guidance import Guidance
from cmg_gguf.request import Request, check_guidance
from cmg_gguf.sampling import Sampling


@dataclass(frozen=True)
class Greedy(Method):
    """Plain decoding: always the likeliest token. What all others are compared with."""

    name: str = "greedy"

    def request(self, question: Question) -> Request:
        return question.ask()


@dataclass(frozen=True)
class Sample(Method):
    """Plain sampling at temperature 1 from the whole distribution, seeded by item."""

    name: str = "sample"

    def request(self, question: Question) -> Request:
        return question.ask(sampling=_drawn(question))


@dataclass(frozen=True)
class Cut(Method):
    """The plausibility cut alone: alpha 0, sampling at temperature 1.

    The control for what the cut does to sampling: much of what contrastive decoding gains over
    sampling is that the cut makes it nearly greedy (arXiv 2504.10020). Under greedy decoding it
    would be greedy itself, for the likeliest token is always plausible.
    """

    beta: float = 0.1
    name: str = "cut"

    def request(self, question: Question) -> Request:
        return question.ask(guidance=Guidance(alpha=0.0, beta=self.beta), sampling=_drawn(question))


@dataclass(frozen=True)
class Cmg(Method):
    """Cross-Modal Guidance, greedy."""

    guidance: Guidance = field(default_factory=Guidance)
    name: str = "cmg"

    def request(self, question: Question) -> Request:
        return question.ask(guidance=self.guidance)

    def at(self, strength: float) -> Cmg:
        guidance = replace(self.guidance, alpha=strength)
        return Cmg(guidance, point_name(self.name, strength))


@dataclass(frozen=True)
class YesBias(Method):
    """A constant added to the logits of yes at the first token, so that yes is said as often.

    The control for a shift towards yes (or no): the constant is chosen so that the share of yes is
    that of `cmg`, on the half of the images that the item at hand is not in. No label enters it.

    The run asks for the one answer that a constant can change greedy's into: the best that begins
    with yes if greedy's does not, and the reverse. Which of the two is said is settled when all
    items are there, by `cmg_gguf.evaluation.yes_bias`.
    """

    name: str = "yes-bias"

    yes_no: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("greedy", "cmg")

    def request(self, question: Question) -> Request:
        return question.ask(logits_processors=(_Turned(question.words),))


@dataclass(frozen=True, eq=False)
class _Turned:
    """Forbids yes at the first token where yes is the best, and everything else where not."""

    words: YesNoTokens

    def __call__(self, tokens: IntArray, logits: FloatArray) -> FloatArray:
        if len(tokens):
            return logits
        yes = np.isin(np.arange(len(logits)), self.words.yes)
        forbidden = yes if self.words.lead(logits) > 0 else ~yes
        turned: FloatArray = np.where(forbidden, np.float32(-np.inf), logits)
        return turned


def _drawn(question: Question) -> Sampling:
    return Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=question.seed)


def chosen(names: Sequence[str], guidance: Guidance) -> tuple[Method, ...]:
    """The methods of these names, in order. guidance: for `cmg`; its beta is that of all cuts.

    Raises EvaluationError for a name that is unknown, GuidanceError for guidance that is none.
    """
    for name in names:
        if name not in METHODS:
            raise EvaluationError(f"method {name!r} is unknown: one of {', '.join(METHODS)}")
    check_guidance(guidance)
    return tuple(METHODS[name](guidance) for name in names)


def check_methods(methods: Sequence[Method], task: Task) -> None:
    """Raises EvaluationError for methods that cannot be run together on this task."""
    names = [method.name for method in methods]
    if not names:
        raise EvaluationError("there are no methods: name at least one, such as greedy")
    if len(set(names)) < len(names):
        raise EvaluationError(f"methods {', '.join(names)}: a name is there twice; name it once")
    for method in methods:
        if method.yes_no and not task.yes_no:
            raise EvaluationError(
                f"method {method.name} is for yes/no questions and {task.name} asks others too; "
                "leave it out"
            )
        if missing := [need for need in method.needs if need not in names]:
            raise EvaluationError(
                f"method {method.name} is matched to {' and '.join(method.needs)}; "
                f"add {' and '.join(missing)} to the methods"
            )


METHODS: dict[str, Callable[[Guidance], Method]] = {
    "greedy": lambda guidance: Greedy(),
    "sample": lambda guidance: Sample(),
    "cut": lambda guidance: Cut(beta=guidance.beta),
    "yes-bias": lambda guidance: YesBias(),
    "cmg": lambda guidance: Cmg(guidance),
    "vcd": lambda guidance: Vcd(beta=guidance.beta),
    "no-image": lambda guidance: NoImage(beta=guidance.beta),
    "m3id": lambda guidance: M3id(beta=guidance.beta),
    "icd": lambda guidance: Icd(beta=guidance.beta),
    "first-logit": lambda guidance: FirstLogit(beta=guidance.beta),
    "residual": lambda guidance: Residual(beta=guidance.beta),
}
"""Every method by its name, made from the run's guidance settings."""

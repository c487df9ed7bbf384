"""How a token is drawn from guided logits. Values; llama.cpp's own samplers do the work.

The order of the chain, as built by `cmg_gguf.llama.sampler`:

    logit bias, grammar        what may be said at all
    guidance                   score = l_o + alpha * (l_o - l_d) over the plausible tokens
    penalties, then            temperature 0: the best token
    top-k, typical, top-p, min-p, temperature, draw     or     temperature, mirostat
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from cmg_gguf.arrays import FloatArray, IntArray
from cmg_gguf.errors import SamplingError, shown

LogitsProcessor = Callable[[IntArray, FloatArray], FloatArray]
"""(tokens so far (n,) int32, logits (n_vocab,) float32) -> logits (n_vocab,) float32."""

MAX_SEED = 2**32 - 2
RANDOM_SEEDS = (-1, 2**32 - 1)
"""Seeds that llama.cpp takes for "a new one each time": LLAMA_DEFAULT_SEED, and as its tools write
it."""

MAX_BIAS = 1e9
MAX_GRAMMAR = 250_000
"""Characters of a grammar. llama.cpp's parser recurses; far above this it overflows the stack."""
MAX_NESTING = 2000
"""Parentheses of a grammar that may be open at once; for the same reason."""
MAX_SCHEMA_DEPTH = 200
"""Objects and lists of a JSON schema within each other."""
MAX_REPEAT = 2000
"""Largest bound in a JSON schema, as in a grammar: each repetition is written out in its text."""

_RANGES = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 2**31 - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "repeat_penalty": (1e-6, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "penalty_last_n": (-1, 2**31 - 1),
    "mirostat_mode": (0, 2),
    "mirostat_tau": (0.0, 1000.0),
    "mirostat_eta": (0.0, 1000.0),
}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of llama.cpp's sampler chain. The default is greedy: the best guided token.

    temperature: 0 = greedy; the others then have no effect but penalties, bias and grammar.
    top_k: 0 = all. top_p, typical_p: 1 = off. min_p: 0 = off. repeat_penalty: 1 = off.
    frequency_penalty, presence_penalty: 0 = off. penalty_last_n: tokens of the answer that
    penalties look back on; -1 = all, 0 = none. mirostat_mode: 0 = off, 1 or 2.
    logit_bias: token -> added to its logit. grammar: GBNF text, its root rule named `root`.
    response_format: OpenAI's, for an answer in JSON: {"type": "text"}, {"type": "json_object"},
    {"type": "json_object", "schema": {...}} or {"type": "json_schema", "json_schema": {"schema":
    {...}}}; not together with a grammar.
    seed: 0 to 2**32 - 2; None = a new one each time, reported in the result, and so do -1 and
    2**32 - 1, as everywhere in llama.cpp: they become None. None for any other setting is its
    default.

    Raises SamplingError for anything out of range or of another type; a bool is no number.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    mirostat_mode: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: str | None = None
    response_format: Mapping[str, Any] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        self._fill_inplace()
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            whole = isinstance(high, int)
            if not _is_number(value, whole=whole) or not low <= value <= high:
                numbers = "whole numbers from " if whole else ""
                raise SamplingError(
                    f"{name}={shown(value)} is out of range: {numbers}{low:.10g} to {high:.10g}"
                )
            object.__setattr__(self, name, int(value) if whole else float(value))
        if self.seed is not None:
            object.__setattr__(self, "seed", _checked_seed(self.seed))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        if self.grammar is not None:
            check_grammar(self.grammar)
        if self.response_format is not None:
            schema_of(self.response_format)
            if self.grammar is not None and self.response_format.get("type") != "text":
                raise SamplingError("give either a grammar or a response_format, not both")

    def _fill_inplace(self) -> None:
        """Puts the default where a setting is None."""
        for one in fields(self):
            if getattr(self, one.name) is None and one.name in (*_RANGES, "logit_bias"):
                default = {} if one.name == "logit_bias" else one.default
                object.__setattr__(self, one.name, default)

    @property
    def penalizes(self) -> bool:
        """Whether what has been said changes the logits."""
        penalties = self.repeat_penalty, self.frequency_penalty, self.presence_penalty
        return penalties != (1.0, 0.0, 0.0)

    @property
    def takes_best(self) -> bool:
        """Whether the token with the highest logit is taken, as it is behind bias and grammar."""
        return self.temperature == 0 and not self.penalizes


def schema_of(response_format: Mapping[str, Any]) -> Any:
    """The JSON schema of an OpenAI `response_format`; None = it names none.

    Raises SamplingError for what is none, a type that is unknown, or a schema that repeats too
    often.
    """
    if not isinstance(response_format, Mapping):
        raise SamplingError(
            f"response_format={shown(response_format)} is no mapping; write "
            '{"type": "json_object"}'
        )
    kind, schema = response_format.get("type"), response_format.get("schema")
    if kind == "json_schema":
        named = response_format.get("json_schema")
        schema = named.get("schema") if isinstance(named, Mapping) else None
        if schema is None:
            raise SamplingError("response_format json_schema has no json_schema.schema; give one")
    elif kind not in ("json_object", "text"):
        raise SamplingError(
            f"response_format type {kind!r} is unknown: text, json_object or json_schema"
        )
    _check_schema(schema)
    return schema


def _checked_bias(logit_bias: object) -> dict[int, float]:
    """A copy in Python's own numbers. Raises SamplingError."""
    if not isinstance(logit_bias, Mapping):
        raise SamplingError(
            f"logit_bias={shown(logit_bias)} does not map token numbers to numbers; write "
            "{5: -1.0}, or {} for none"
        )
    for token, bias in logit_bias.items():
        if not _is_number(token, whole=True):
            raise SamplingError(f"logit_bias names token {shown(token)}: write a whole number")
        if not _is_number(bias, whole=False) or not (abs(bias) <= MAX_BIAS or bias == -math.inf):
            raise SamplingError(
                f"logit_bias of token {token} is {shown(bias)}: it must be a number of at most "
                f"{MAX_BIAS:g} either way, or -inf to forbid the token"
            )
    return {int(token): float(bias) for token, bias in logit_bias.items()}


def _checked_seed(seed: Any) -> int | None:
    """The seed as a whole number, None for a random one. Raises SamplingError."""
    if not _is_number(seed, whole=True) or not -1 <= seed <= 2**32 - 1:
        raise SamplingError(
            f"seed={shown(seed)} is out of range: whole numbers from 0 to {MAX_SEED}, or None for "
            "a new one each time"
        )
    return None if seed in RANDOM_SEEDS else int(seed)


def _is_number(value: object, *, whole: bool) -> bool:
    return isinstance(value, Integral if whole else Real) and not isinstance(value, bool)


_REPEATS = ("minItems", "maxItems", "minLength", "maxLength")
_BRACES = re.compile(r"\{(\d*)(?:,(\d*))?\}")


def _check_schema(schema: object, depth: int = 0) -> None:
    if not isinstance(schema, Mapping | list):
        return
    if depth > MAX_SCHEMA_DEPTH:
        raise SamplingError(
            f"the JSON schema nests deeper than {MAX_SCHEMA_DEPTH}, which is the limit; flatten it"
        )
    if isinstance(schema, Mapping):
        _check_bounds(schema)
        ref = schema.get("$ref")
        if isinstance(ref, str) and not ref.startswith("#"):
            raise SamplingError(
                f"the JSON schema refers to {shown(ref)} and nothing is fetched: write it into the "
                'schema itself, as "$defs", and refer to "#/$defs/..."'
            )
    for part in schema.values() if isinstance(schema, Mapping) else schema:
        _check_schema(part, depth + 1)


def _check_bounds(schema: Mapping[str, Any]) -> None:
    bounds = [(key, schema[key]) for key in _REPEATS if isinstance(schema.get(key), int)]
    pattern = schema.get("pattern")
    braces = _BRACES.findall(pattern) if isinstance(pattern, str) else []
    bounds += [("pattern", int(n[:9])) for pair in braces for n in pair if n]
    for key, bound in bounds:
        if bound > MAX_REPEAT:
            raise SamplingError(
                f"the JSON schema has {key} {bound} and the limit is {MAX_REPEAT}; lower it"
            )


# What is not closed goes on to the end: so each character is looked at once.
_LITERALS = re.compile(r'"(?:\\.?|[^"\\])*(?:"|\Z)|\[(?:\\.?|[^\]\\])*(?:\]|\Z)|#[^\n]*', re.DOTALL)


def check_grammar(grammar: object) -> None:
    """Raises SamplingError for what llama.cpp's parser must not be given."""
    if not isinstance(grammar, str) or "\0" in grammar:
        raise SamplingError(f"the grammar is {shown(grammar)}: give GBNF text without NUL")
    if len(grammar) > MAX_GRAMMAR:
        raise SamplingError(
            f"the grammar has {len(grammar)} characters and the limit is {MAX_GRAMMAR}; simplify it"
        )
    steps = (1 if c == "(" else -1 for c in _LITERALS.sub("", grammar) if c in "()")
    if (deepest := max(itertools.accumulate(steps), default=0)) > MAX_NESTING:
        raise SamplingError(
            f"the grammar nests {deepest} parentheses and the limit is {MAX_NESTING}; simplify it"
        )

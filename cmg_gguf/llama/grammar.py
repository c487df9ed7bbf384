"""What may be said at all: an OpenAI `response_format` as a GBNF grammar, by llama-cpp-python."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llama_cpp import llama_grammar

from cmg_gguf.errors import SamplingError
from cmg_gguf.sampling import check_grammar, schema_of


def grammar_for(response_format: Mapping[str, Any] | None) -> str | None:
    """GBNF grammar of a `response_format`, see `Sampling`; None for free text.

    Raises SamplingError for a schema that cannot be turned into a grammar.
    """
    if response_format is None or response_format.get("type") == "text":
        return None
    schema = schema_of(response_format)
    if schema is None:
        return str(llama_grammar.JSON_GBNF)
    try:
        grammar = str(llama_grammar.json_schema_to_gbnf(json.dumps(schema)))
    except Exception as exc:
        raise SamplingError(f"the JSON schema cannot be turned into a grammar: {exc!r}") from exc
    check_grammar(grammar)
    return grammar

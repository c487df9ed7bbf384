"""Many requests of a `GuidedVLM` at once: each gets the answer that it gets alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guided import QUESTION, ids, open_vlm
from prompts import picture
from tiny_llava import TinyConfig, TinyPair

from cmg_gguf import Guidance, Request

PLAIN = Guidance(alpha=0.0, beta=0.0)


# --- models that fork in one way only ------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["auto", "exact", "approximate"])
def test_experts_answer_many_at_once_as_they_do_alone(
    written: Callable[[TinyConfig], TinyPair], strategy: str
) -> None:
    """Experts let rows enter a fork in a decode of their own, and not behind others."""
    files = written(TinyConfig(n_expert=4))
    requests = [
        Request(QUESTION, [picture(seed)], guidance=guidance, max_tokens=8)
        for seed in range(4)
        for guidance in (Guidance(), PLAIN)
    ]
    with open_vlm(files, n_parallel=1, strategy="exact", prefix_cells=0) as alone:
        expected = [ids(alone.generate(request)) for request in requests]
    with open_vlm(files, n_ctx=1024, n_parallel=8, strategy=strategy) as vlm:
        said = {o.index: ids(o.unwrap()) for o in vlm.generate_many(requests)}
    if strategy == "approximate":  # another method, but for plain answers
        requests, expected = requests[1::2], expected[1::2]
        said = {i: said[2 * i + 1] for i in range(len(requests))}
    assert [said[i] for i in range(len(requests))] == expected

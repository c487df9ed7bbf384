"""Recordings in the graph patch: which row of a part is recorded, and what a plan may not ask."""

from __future__ import annotations

import numpy as np
import pytest
from plans import N_IMAGE, N_LAYER, NONE, Row, decode
from support import ALL_TOKENS, EXACT, Tiny

from cmg_gguf import _core
from cmg_gguf.llama.context import LlamaContext

IMAGE_ROWS = [(300 + i, i, 0) for i in range(N_IMAGE)]
NOTED = [Row(0, 0, i) for i in range(N_IMAGE)]


def part(recording: _core.Recording | None, record: int, *, mask: bool = False) -> _core.Part:
    return _core.Part(
        selections=_core.Selections(N_LAYER),
        policy=ALL_TOKENS,
        n_image_tokens=N_IMAGE,
        mask_layers=list(range(N_LAYER)) if mask else [],
        recording=recording,
        record=record,
    )


def planned(rows: list[Row], *parts: _core.Part) -> _core.Plan:
    return _core.Plan(np.array(rows, np.int32).reshape(-1, 6), list(parts))


def test_the_last_row_that_hides_nothing_is_recorded(llama: Tiny) -> None:
    context = LlamaContext(llama.model, EXACT, n_seq_max=2)
    wanted, other = _core.Recording([0, 3], N_IMAGE), _core.Recording([3], N_IMAGE)
    decode(context, IMAGE_ROWS, planned(NOTED, part(None, NONE)))
    tokens = [(400, N_IMAGE, 0), (401, N_IMAGE + 1, 0)]
    decode(context, tokens, planned([Row(0, 0), Row(0, 1)], part(wanted, 2), part(other, 0)))
    assert (len(wanted), len(other)) == (3, 1)
    weights = wanted.weights()
    assert weights.shape == (3, 2, N_IMAGE)
    assert np.isnan(weights[:2]).all()
    assert (weights[2] > 0).all()
    assert not np.allclose(weights[2, 1], other.weights()[0, 0])  # of another row


def test_a_token_whose_cell_was_given_away_is_not_known(llama: Tiny) -> None:
    context = LlamaContext(llama.model, EXACT, n_seq_max=2)
    recording = _core.Recording([1], N_IMAGE)
    decode(context, IMAGE_ROWS[:-2], planned(NOTED[:-2], part(None, NONE)))
    row = [(400, N_IMAGE - 2, 0)]
    decode(context, row, planned([Row(0, 0)], part(recording, 0)))
    found = recording.weights()[0, 0]
    assert np.isnan(found).tolist() == [False] * (N_IMAGE - 2) + [True, True]


def test_a_recording_is_of_layers_and_slots_that_there_are(llama: Tiny) -> None:
    for layers in ([-1], [2, 2]):
        with pytest.raises(ValueError, match="named once"):
            _core.Recording(layers, N_IMAGE)
    with pytest.raises(ValueError, match="-1 image tokens"):
        _core.Recording([0], -1)
    recording = _core.Recording([N_LAYER], N_IMAGE)
    with pytest.raises(ValueError, match=f"records layer {N_LAYER} of {N_LAYER}"):
        planned([Row(0, 0)], part(recording, 0))
    with pytest.raises(ValueError, match="has no recording"):
        planned([Row(0, 0)], part(None, 0))


def test_a_part_whose_rows_all_hide_something_has_none_to_record() -> None:
    recording = _core.Recording([0], N_IMAGE)
    hiding = part(recording, 0, mask=True)
    with pytest.raises(ValueError, match="no row that could be recorded"):
        planned([Row(0, 0, mask=0)], hiding)
    planned([Row(0, 0), Row(1, 0, mask=0)], hiding)

"""The benchmark of captioning runs, and tells what it says it tells."""

from __future__ import annotations

import json

import bench_caption
import pytest


def test_quarters_are_means_of_all_values_in_order() -> None:
    assert bench_caption.quarters([1, 3, 5, 7, 9, 11, 13, 15]) == [2, 6, 10, 14]
    assert bench_caption.quarters([1, 2, 3, 4, 6]) == [1, 2, 3, 5]


@pytest.mark.slow
def test_one_json_object_comes_last_with_the_ratio_of_each_turn(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = ["--pictures", "4", "--chunk", "2", "--rounds", "2", "--threads", "1"]
    assert bench_caption.main([*few, "--max-tokens", "4", "--n-ctx", "1024"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    rates = told["tokens_per_second"]
    assert {name: len(values) for name, values in rates.items()} == {
        "caption": 4,
        "generate_many": 4,
    }
    ratios = sorted(a / b for a, b in zip(rates["caption"], rates["generate_many"], strict=True))
    assert told["ratio"]["low"] == ratios[0]
    assert told["ratio"]["median"] == pytest.approx((ratios[1] + ratios[2]) / 2)
    assert len(told["resident_mib"]) == 4
    assert any("caption / generate_many" in line for line in lines)

"""Searching for settings: what is tried, what is chosen, and that it is kept apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evals import GUIDANCE, Squares, files, methods, squares
from numpy.typing import NDArray
from tiny_llava import TinyPair

from cmg_gguf.errors import EvaluationError
from cmg_gguf.evaluation.items import in_part, item_hash, read_items
from cmg_gguf.evaluation.run import evaluate
from cmg_gguf.evaluation.task import Item
from cmg_gguf.evaluation.tuning import Goal, better, drawn, grid, tune
from cmg_gguf.guidance import Guidance, LayerRange, MeanStd, TopRatio
from cmg_gguf.settings import load_settings, save_settings


class Lettered(Squares):
    """More letters are more accurate."""

    def figures(self, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        found = super().figures(sums)
        return {"accuracy": found["letters"], "recall": -found["letters"]}


@pytest.fixture
def task(tmp_path: Path) -> Squares:
    return Lettered(squares(tmp_path / "pictures", n=10).folder, 10)


CANDIDATES = grid(GUIDANCE, alpha=[0.5, 4.0], tokens=[TopRatio(0.25), TopRatio(1.0)])


def search(task: Squares, pair: TinyPair, folder: Path, **settings: Any) -> Any:
    return tune(task, files(pair), CANDIDATES, folder, **{"seed": 3, **settings})


def test_a_grid_is_every_combination_over_a_base() -> None:
    base = Guidance(scope="all", beta=0.3)
    found = grid(base, alpha=[1, 2], layers=[LayerRange(0.5, 1)], tokens=[TopRatio(), MeanStd()])
    assert [(g.alpha, type(g.tokens)) for g in found] == [
        (1, TopRatio),
        (1, MeanStd),
        (2, TopRatio),
        (2, MeanStd),
    ]
    assert {(g.scope, g.beta, g.layers) for g in found} == {("all", 0.3, LayerRange(0.5, 1))}
    assert grid(base) == [base]


def test_a_random_search_is_a_seeded_part_of_the_grid() -> None:
    found = grid(Guidance(), alpha=[0.1 * i for i in range(10)])
    assert drawn(found, 4, 1) == drawn(found, 4, 1)
    assert len(drawn(found, 4, 1)) == 4
    assert {g.alpha for g in drawn(found, 4, 1)} != {g.alpha for g in drawn(found, 4, 2)}
    assert drawn(found, 99, 0) == found
    with pytest.raises(EvaluationError, match="0 trials"):
        drawn(found, 0, 0)


def test_the_best_candidate_on_the_part_is_chosen(
    task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    tuned = search(task, pair, tmp_path / "tune")
    values = {row.method: row.figures["accuracy"].own.value for row in tuned.report.parts[0].rows}
    greedy = values.pop("greedy")
    name = max(values, key=lambda name: values[name])
    assert tuned.settings.guidance == tuned.candidates[name]
    assert tuned.settings.tuned["value"] == values[name]
    assert tuned.settings.tuned["greedy"] == greedy
    assert better(tuned, lower=False) == (values[name] > greedy)
    assert tuned.settings.tuned["search"]["kind"] == "grid"
    lowest = search(task, pair, tmp_path / "tune", goal=Goal("accuracy", lower=True))
    assert lowest.settings.guidance == tuned.candidates[min(values, key=lambda n: values[n])]


def test_what_is_to_be_kept_limits_the_choice(
    task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    tuned = search(task, pair, tmp_path / "tune")
    values = {row.method: row.figures["accuracy"].own.value for row in tuned.report.parts[0].rows}
    greedy = values.pop("greedy")
    kept = {name: value for name, value in values.items() if value <= greedy + 1}
    if kept:
        found = search(task, pair, tmp_path / "tune", goal=Goal(keep="recall"))
        assert found.settings.tuned["value"] == max(kept.values())
    else:
        with pytest.raises(EvaluationError, match="fall more than 1 below greedy in recall"):
            search(task, pair, tmp_path / "tune", goal=Goal(keep="recall"))


def test_settings_refuse_the_items_they_were_tuned_on(
    task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    tuned = search(task, pair, tmp_path / "tune")
    save_settings(tmp_path / "s.json", tuned.settings)
    settings = load_settings(tmp_path / "s.json")
    items = read_items(task).items
    part = [item for item in items if in_part(3, item, 0.5)]
    assert 0 < len(part) < len(items)
    assert settings.tuned_on == {item_hash("squares", item) for item in part}
    with pytest.raises(EvaluationError, match=rf"tuned on {len(part)} of these 31 items"):
        evaluate(task, files(pair), methods("greedy"), tmp_path / "run", tuned_on=settings.tuned_on)
    run = evaluate(
        task,
        files(pair),
        methods("greedy"),
        tmp_path / "run",
        tuned_on=settings.tuned_on,
        leave_out=settings.tuned_on,
    )
    assert {item.id for item in run.items} == {item.id for item in items} - {i.id for i in part}


def test_a_part_takes_whole_images_and_about_its_share() -> None:
    items = [Item(f"{c}/{q}", f"{c}.png", "?", cluster=str(c)) for c in range(400) for q in "ab"]
    part = [item for item in items if in_part(0, item, 0.3)]
    assert 0.2 < len(part) / len(items) < 0.4
    clusters = {item.cluster for item in part}
    assert len(part) == 2 * len(clusters)
    assert all(in_part(0, item, 1.0) for item in items)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"goal": Goal("chair_i")}, "has no figure chair_i; name one of accuracy, recall"),
        ({"goal": Goal(keep="cover")}, "has no figure cover"),
        ({"share": 0.0}, "share=0.0 is out of range"),
        ({"share": 1e-9}, "no items to ask about"),
    ],
)
def test_a_search_that_cannot_be_is_told(
    settings: dict[str, Any], message: str, task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match=message):
        search(task, pair, tmp_path / "tune", limit=4, **settings)

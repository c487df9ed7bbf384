"""Evidence on scenes: gathers what both branches say of every object that captions name, fits the
weights on one split, and reports on another.

    scripts/fit_evidence                 # tune split; writes the weights into the settings file
    scripts/measure_evidence             # test split; prints tables

Captions are plain ones and guided ones by the settings file, of both kinds of scenes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cmg_gguf import Evidence, GuidedVLM, Request
from cmg_gguf.evaluation.grounding import (
    Attention,
    ScoredMention,
    areas,
    calibration,
    fitted,
    left,
    rescored,
    scores,
    with_evidence,
    words_told,
)
from cmg_gguf.evaluation.statistics import Result
from cmg_gguf.evaluation.tasks.scenes import SceneCaptions
from cmg_gguf.guidance import PLAIN
from cmg_gguf.settings import load_settings, save_settings
from cmg_gguf.tiny.scenes import SceneKind, Split

KINDS: tuple[SceneKind, SceneKind] = ("counter", "typical")
DROPPED = (0.0, 0.1, 0.2, 0.3, 0.5)
CHUNK = 50


@dataclasses.dataclass(frozen=True)
class Job:
    """Captions of some scenes of a kind."""

    models: Path
    split: Split
    kind: SceneKind
    guided: bool
    first: int
    stop: int


@functools.cache
def _vlm(models: Path) -> GuidedVLM:
    (llm,), (mmproj,) = models.glob("*.Q8_0.gguf"), models.glob("*mmproj*.gguf")
    return GuidedVLM(llm, mmproj, n_ctx=4096, n_threads=1)


def gathered(job: Job) -> list[dict[str, Any]]:
    """A row for each mention: condition, object, whether it is there, its evidence."""
    task = SceneCaptions(job.split, job.kind, job.stop)
    guidance = load_settings(_settings(job.models)).guidance if job.guided else PLAIN
    items = list(task.items())[job.first :]
    requests = (
        Request(
            item.prompt,
            [task.load(item)],
            guidance=guidance,
            max_tokens=item.max_tokens,
            evidence=True,
            heat=True,
        )
        for item in items
    )
    rows = []
    for outcome in _vlm(job.models).generate_many(requests):
        item, reply = items[outcome.index], outcome.unwrap()
        told = words_told(reply)
        assert told is not None
        found = with_evidence(told, task.mentions(item, reply.text), item.cluster)
        condition = {"kind": job.kind, "guided": job.guided}
        rows += [{**condition, **dataclasses.asdict(mention)} for mention in found]
    return rows


def gather(models: Path, split: Split, scenes: range, jobs: int, path: Path) -> None:
    """Writes the rows of such scenes of each kind."""
    wanted = [
        Job(models, split, kind, guided, first, min(first + CHUNK, scenes.stop))
        for first in range(scenes.start, scenes.stop, CHUNK)
        for kind in KINDS
        for guided in (False, True)
    ]
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool, path.open("w") as file:
        for rows in pool.map(gathered, wanted):
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def mentions_of(rows: Sequence[dict[str, Any]]) -> list[ScoredMention]:
    """What rows say."""
    return [
        ScoredMention(
            row["name"],
            row["present"],
            row["cluster"],
            Evidence(**row["evidence"]),
            Attention(**row["attention"]),
        )
        for row in rows
    ]


def told(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Tables in Markdown: of each condition AUROC, calibration, and what is left."""
    names = list(scores([]))
    yield "| captions | mentions | invented | " + " | ".join(names) + " | ECE |"
    yield "| --- |" + " --- |" * (len(names) + 3)
    for label, part in _parts(rows):
        found = mentions_of(part)
        area = areas(found)
        cells = [f"{area[name].own.value:.1f}" for name in names]
        cells[-1] += _interval(area["evidence"])
        invented = sum(not mention.present for mention in found)
        yield (
            f"| {label} | {len(found)} | {invented} | "
            + " | ".join([*cells, f"{calibration(found):.1f}"])
            + " |"
        )
    yield ""
    yield "| captions | evidence - probability | evidence - entropy |"
    yield "| --- | --- | --- |"
    for label, part in _parts(rows):
        gaps = [_gap(mentions_of(part), other) for other in ("probability", "entropy")]
        yield f"| {label} | " + " | ".join(gaps) + " |"
    yield ""
    yield (
        "| CHAIR_i, least supported share dropped | "
        + " | ".join(f"{share:.0%}" for share in DROPPED)
        + " |"
    )
    yield "| --- |" + " --- |" * len(DROPPED)
    for label, part in _parts(rows):
        found = mentions_of(part)
        yield f"| {label} | " + " | ".join(f"{left(found, share):.1f}" for share in DROPPED) + " |"


def _parts(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for guided, word in ((False, "plain"), (True, "guided")):
        own = [row for row in rows if row["guided"] == guided]
        for kind in KINDS:
            yield f"{word}, {kind}", [row for row in own if row["kind"] == kind]
        yield f"{word}, pooled", own


def _gap(mentions: Sequence[ScoredMention], other: str) -> str:
    result = areas(mentions, baseline=other)["evidence"].difference
    assert result is not None
    return f"{result.value:+.1f} [{result.low:+.1f}, {result.high:+.1f}]"


def _interval(result: Result) -> str:
    return f" [{result.own.low:.1f}, {result.own.high:.1f}]"


def _settings(models: Path) -> Path:
    (path,) = models.glob("*.settings.json")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="what is gathered; kept")
    parser.add_argument("--split", choices=("tune", "test"), required=True)
    parser.add_argument("-n", type=int, default=300, help="scenes of each kind")
    parser.add_argument("--first", type=int, default=0, help="scenes before it are left alone")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fit", action="store_true", help="write weights into the settings file")
    options = parser.parse_args()
    if not options.rows.exists():
        options.rows.parent.mkdir(parents=True, exist_ok=True)
        scenes = range(options.first, options.first + options.n)
        gather(options.models, options.split, scenes, options.jobs, options.rows)
    rows = read(options.rows)
    path = _settings(options.models)
    settings = load_settings(path)
    if options.fit:
        words = (
            f"objects in plain and guided captions of {options.n} {options.split} scenes of each "
            "kind, built-in model"
        )
        model = fitted(mentions_of(rows), words)
        settings = dataclasses.replace(settings, evidence=model)
        save_settings(path, settings)
        print(model)
    found = rescored(mentions_of(rows), settings.evidence)
    rows = [
        {**row, "evidence": dataclasses.asdict(mention.evidence)}
        for row, mention in zip(rows, found, strict=True)
    ]
    print("\n".join(told(rows)))


if __name__ == "__main__":
    main()

"""Runs with evidence: what records hold, what the report says of it, and that runs differ in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import flat, invoke

from cmg_gguf import EvidenceModel, Guidance, GuidedVLM
from cmg_gguf.errors import EvaluationError
from cmg_gguf.evaluation.grounding import areas, fitted, with_evidence
from cmg_gguf.evaluation.grounding_report import mentions_of
from cmg_gguf.evaluation.items import item_hash
from cmg_gguf.evaluation.manifest import ModelFiles
from cmg_gguf.evaluation.methods import chosen
from cmg_gguf.evaluation.report import make_report
from cmg_gguf.evaluation.report_text import markdown
from cmg_gguf.evaluation.run import Run, evaluate, read_run
from cmg_gguf.evaluation.tasks.scenes import SceneCaptions, ScenePope
from cmg_gguf.settings import Settings, load_settings, save_settings
from cmg_gguf.tiny.pair import embedded_pair

N = 8
TASK = SceneCaptions("tune", "counter", N)
WEIGHTS = EvidenceModel(difference=2.0, fitted_on="nothing")
MODEL = ModelFiles(*embedded_pair(), {"n_ctx": 2048, "n_threads": 1, "n_parallel": 1})
METHODS = chosen(["greedy", "cmg", "no-image"], Guidance(alpha=0.5))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    return evaluate(TASK, MODEL, METHODS, folder, evidence=WEIGHTS)


def test_a_record_holds_the_evidence_of_its_words(run: Run) -> None:
    with GuidedVLM(MODEL.model, MODEL.mmproj, **{**MODEL.options, "strategy": "exact"}) as vlm:
        item = run.items[0]
        reply = vlm.generate(
            item.prompt,
            [TASK.load(item)],
            guidance=Guidance(alpha=0.0, beta=0.0),
            max_tokens=item.max_tokens,
            evidence=WEIGHTS,
            heat=True,
        )
    record = next(r for r in run.records if (r.item, r.method) == (item.id, "greedy"))
    assert record.answer == reply.text
    assert record.words is not None
    assert [record.answer[int(w[0]) : int(w[1])] for w in record.words] == [
        word.text for word in reply.words
    ]
    assert [w[7] for w in record.words] == pytest.approx([w.evidence for w in reply.words])
    assert reply.heat is not None
    firsts = [word.first for word in reply.words]
    share = reply.heat.weights.sum(axis=2)[firsts]
    assert [w[8] for w in record.words] == pytest.approx(share.mean(axis=1), abs=1e-6)
    assert [w[9] for w in record.words] == pytest.approx(1 - share[:, 0], abs=1e-6)


def test_methods_with_another_prompt_have_none(run: Run) -> None:
    for record in run.records:
        assert (record.words is None) == (record.method == "no-image")


def test_the_report_is_of_all_mentions(run: Run) -> None:
    read = read_run(run.folder)
    assert read.records == run.records
    report = make_report(read, n_samples=50)
    (part,) = report.parts
    assert set(part.groundings) == {"greedy", "cmg"}
    mentions = [
        mention
        for item, record in zip(run.items, run.records[::3], strict=True)
        for mention in with_evidence(
            record.words or [], TASK.mentions(item, record.answer), item.cluster
        )
    ]
    found = part.groundings["greedy"]
    figures = part.rows[0].figures
    assert found.n == len(mentions) == pytest.approx(N * figures["mentions"].own.value)
    assert found.left[0.0] == pytest.approx(figures["chair_i"].own.value)
    assert found.areas == areas(mentions, n_samples=50)
    page = markdown(report)
    assert "AUROC of objects that are there against invented ones" in page
    assert "CHAIR_i where the least supported mentions are dropped" in page


def test_a_run_with_evidence_is_another_run(run: Run, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="evidence"):
        evaluate(TASK, MODEL, METHODS, run.folder)
    task = ScenePope("tune", "counter", 1)
    other = evaluate(task, MODEL, chosen(["greedy"], Guidance()), tmp_path / "pope")
    assert all(record.words is None for record in other.records)
    assert "AUROC" not in markdown(make_report(other, n_samples=10))


def test_weights_are_fitted_to_runs_and_their_items_remembered(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    save_settings(path, Settings(Guidance(alpha=2.0), {"by": "me", "items": ["x"]}))
    result = invoke("eval", "weights", str(run.folder), "--settings", str(path))
    assert result.exit_code == 0, result.stderr
    found = load_settings(path)
    mentions = mentions_of(run)
    assert found.evidence == fitted(mentions, found.evidence.fitted_on)
    assert f"{len(mentions)} mentions" in found.evidence.fitted_on
    assert found.guidance == Guidance(alpha=2.0)
    assert found.tuned["by"] == "me"
    hashes = {item_hash(TASK.name, item) for item in run.items}
    assert found.tuned_on == hashes | {"x"}
    with pytest.raises(EvaluationError, match="tuned on 8 of these 8 items"):
        evaluate(TASK, MODEL, METHODS, tmp_path / "again", tuned_on=found.tuned_on)


def test_weights_need_a_run_with_evidence(tmp_path: Path) -> None:
    task = ScenePope("tune", "counter", 1)
    evaluate(task, MODEL, chosen(["greedy"], Guidance()), tmp_path / "pope", evidence=WEIGHTS)
    result = invoke("eval", "weights", str(tmp_path / "pope"), "--settings", str(tmp_path / "s"))
    assert result.exit_code == 1
    assert "has no objects with evidence" in flat(result.stderr)
    assert not (tmp_path / "s").exists()

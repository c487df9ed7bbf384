"""The benchmark of questions runs, and tells what it says it tells."""

from __future__ import annotations

import json

import bench_questions
import pytest


@pytest.mark.slow
def test_one_json_object_comes_last_with_both_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--images", "2", "--rounds", "1", "--threads", "2", "--max-tokens", "2"]
    assert bench_questions.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    assert [bound["name"] for bound in told["bounds"]] == ["cmg / greedy", "cmg / chat handler"]
    assert set(told["seconds"]) == {"greedy", "cmg", "chat handler"}
    assert told["about"]["questions"] == 12
    assert told["about"]["load_average"] is not None
    assert any("ms a question" in line for line in lines)


@pytest.mark.slow
def test_plain_answers_are_those_of_the_chat_handler(capsys: pytest.CaptureFixture[str]) -> None:
    bench_questions.main(["--images", "2", "--rounds", "1", "--threads", "2"])
    about = json.loads(capsys.readouterr().out.splitlines()[-1])["about"]
    assert about["same_plain_answers"] == about["questions"]

"""Reasoning: what a prompt opens, what is told apart, what reaches the template."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_vocabulary
from commands import flat, invoke
from evals import OPTIONS, squares
from guided import open_vlm
from PIL import Image
from prompts import picture
from scripted import Run, asking, told
from tiny_llava import TinyConfig, TinyPair, write_pair

from cmg_gguf.answer.reasoning import Reasoning
from cmg_gguf.arrays import FloatArray, IntArray
from cmg_gguf.chat.completion import chunks_of, completion_of, request_of
from cmg_gguf.errors import PromptError
from cmg_gguf.evaluation.manifest import ModelFiles
from cmg_gguf.evaluation.methods import chosen
from cmg_gguf.evaluation.run import evaluate
from cmg_gguf.guidance import Guidance
from cmg_gguf.prompt.messages import render_messages
from cmg_gguf.prompt.reasoning import MARKS, closing_mark
from cmg_gguf.prompt.templates import OWN_VARIABLES, ChatTemplate
from cmg_gguf.reply import Reply, Seconds
from cmg_gguf.request import Request
from cmg_gguf.sampling import Sampling
from cmg_gguf.vlm import GuidedVLM

# Of Qwen3.5's shape: it thinks unless told not to, and then shows an empty thought.
THINKING = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- else %}{{- '<think>\n' }}{%- endif %}{%- endif %}"
)
ASKED = [{"role": "user", "content": "Why?"}]
OFF = {"enable_thinking": False}

# --- what a prompt opens ------------------------------------------------------------------------


def rendered(**variables: Any) -> str:
    template = ChatTemplate.from_jinja(THINKING)
    return render_messages(ASKED, template, marker="<m>", variables=variables).text


def test_a_template_that_thinks_opens_it_and_one_that_is_told_not_to_does_not() -> None:
    assert rendered().endswith("assistant\n<think>\n")
    assert closing_mark(rendered()) == closing_mark(rendered(enable_thinking=True)) == "</think>"
    assert rendered(**OFF).endswith("assistant\n<think>\n\n</think>\n\n")
    assert closing_mark(rendered(**OFF)) == ""


@pytest.mark.parametrize("mark", MARKS)
def test_a_prompt_ends_within_reasoning_where_only_white_space_follows_its_mark(mark: str) -> None:
    for behind, closing in {"": MARKS[mark], "\n ": MARKS[mark], "a": "", MARKS[mark]: ""}.items():
        assert closing_mark(f"USER: {mark}{behind}") == closing


# --- what reaches the template ------------------------------------------------------------------


def test_a_templates_own_variables_give_way_to_those_of_a_request() -> None:
    template = replace(ChatTemplate.from_jinja("{{ a }}{{ b }}"), variables={"a": 1, "b": 2})
    assert template.render(ASKED) == "12"
    assert template.render(ASKED, variables={"b": 3}) == "13"
    assert [template.reads(name) for name in ("a", "b", "c")] == [True, True, False]


@pytest.mark.parametrize("name", OWN_VARIABLES)
def test_variables_that_the_product_sets_are_refused_by_name(name: str) -> None:
    for refuse in (
        lambda: Request("Why?", chat_template_kwargs={name: "x"}),
        lambda: request_of(ASKED, chat_template_kwargs={name: "x"}),
        lambda: ChatTemplate.from_jinja("a").render(ASKED, variables={name: "x"}),
    ):
        with pytest.raises(PromptError, match=f"the name '{name}'.*leave it out"):
            refuse()


@pytest.mark.parametrize(
    ("given", "says"),
    [([1], "no mapping"), ("x", "no mapping"), ({3: 1}, "the name 3"), ({"a b": 1}, "'a b'")],
)
def test_what_are_no_variables_are_refused(given: Any, says: str) -> None:
    with pytest.raises(PromptError, match=says):
        Request("Why?", chat_template_kwargs=given)


def test_variables_beside_a_raw_prompt_are_refused() -> None:
    with pytest.raises(PromptError, match="no template with raw=True"):
        Request("Why?", raw=True, chat_template_kwargs=OFF)


def test_an_image_marker_in_a_variable_is_refused() -> None:
    template = ChatTemplate.from_jinja("{{ messages[0].content }}{{ a }}")
    with pytest.raises(PromptError, match="contains the image marker"):
        render_messages(ASKED, template, marker="<m>", variables={"a": "<m>"})


# --- told apart ---------------------------------------------------------------------------------


def split(pieces: list[str], closing: str = "", **sampling: Any) -> list[tuple[str, bool]]:
    apart = Reasoning(closing, Sampling(**sampling))
    return [part for piece in pieces for part in apart.feed(piece)] + apart.flush()


def joined(parts: list[tuple[str, bool]]) -> tuple[str, str]:
    return tuple("".join(t for t, b in parts if b is kind) for kind in (True, False))  # type: ignore[return-value]


def definition(text: str, closing: str) -> tuple[str, str]:
    """(reasoning, text) of the whole."""
    if not closing:
        opened = [m for m in MARKS if text.lstrip().startswith(m)]
        if not opened:
            return "", text
        text, closing = text.lstrip().removeprefix(opened[0]), MARKS[opened[0]]
    thought, mark, rest = text.partition(closing)
    return thought.strip(), rest.lstrip() if mark else ""


def test_any_cut_into_pieces_tells_the_same_apart_and_shows_no_half_mark() -> None:
    rng = random.Random(0)
    bits = ["<think>", "</think>", "[THINK]", "[/THINK]", "<", "</thi", "a", " ", "\n", "b c"]
    for _ in range(3000):
        closing = rng.choice(["", "</think>", "[/THINK]"])
        text = "".join(rng.choices(bits, k=rng.randint(0, 7)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 8)))
        parts = split([text[i:j] for i, j in pairwise([0, *cuts, len(text)])], closing)
        assert joined(parts) == definition(text, closing)
        assert all(shown for shown, _ in parts)


def test_no_character_of_a_mark_is_shown_however_it_comes() -> None:
    for mark, close in MARKS.items():
        parts = split(list(f" {mark}\nA fork?{close}\n\nYes."))
        assert joined(parts) == ("A fork?", "Yes.")
        assert parts == [*((c, True) for c in "A"), (" f", True), *((c, True) for c in "ork?")] + [
            (c, False) for c in "Yes."
        ]


def test_under_a_schema_all_is_text_and_under_a_grammar_what_has_no_closing_mark() -> None:
    text = ["<think>a</think>b"]
    assert joined(split(text, response_format={"type": "json_object"})) == ("", text[0])
    assert joined(split(["a"], "</think>", grammar='root ::= "a"')) == ("", "a")
    thinks = 'root ::= [^<]* "</think>" "b"'
    assert joined(split(["a</think>b"], "</think>", grammar=thinks)) == ("a", "b")


# --- answers ------------------------------------------------------------------------------------


def thinking(*words: str, **settings: Any) -> Run:
    return told(*words, **settings, closing="</think>")


def test_an_answer_says_what_was_thought_and_which_pieces_and_tokens_it_was() -> None:
    run = thinking("A", " fork?", "</", "think>", "\n\n", "Yes", ".")
    answer = run.answer
    assert (answer.reasoning, answer.text, answer.n_reasoning_tokens) == ("A fork?", "Yes.", 4)
    assert [(p.text, p.reasoning) for p in run.pieces] == [
        ("A", True),
        (" fork?", True),
        ("Yes", False),
        (".", False),
    ]
    assert [t for p in run.pieces for t in p.tokens] == answer.tokens


def test_an_answer_that_opens_its_reasoning_itself_is_the_same() -> None:
    answer = told("<think>", "A", " fork?", "</think>", "Yes").answer
    assert (answer.reasoning, answer.text, answer.n_reasoning_tokens) == ("A fork?", "Yes", 4)


@pytest.mark.parametrize("words", [["Yes", "<think>", "a"], ["<thin", "gs>"], ["<"], [" a", "b"]])
def test_an_answer_that_does_not_begin_with_reasoning_has_none(words: list[str]) -> None:
    answer = told(*words).answer
    assert (answer.reasoning, answer.n_reasoning_tokens) == ("", 0)
    assert answer.text == "".join(words).lstrip(" ")


@pytest.mark.parametrize("n", [1, 2])
def test_an_answer_cut_off_within_its_reasoning_has_no_text(n: int) -> None:
    answer = thinking("A", " fork", "</think>", "Yes", max_tokens=n).answer
    assert (answer.text, answer.finish_reason, answer.n_reasoning_tokens) == ("", "length", n)
    assert answer.reasoning == "A fork"[: 1 if n == 1 else 6]


def test_a_stop_string_ends_the_reasoning_too() -> None:
    answer = thinking("A", "\n", "B", "</think>", "Yes", stop=["\n"]).answer
    assert (answer.reasoning, answer.text, answer.finish_reason) == ("A", "", "stop")


def test_empty_reasoning_is_none_but_its_mark_is_no_text() -> None:
    answer = thinking("</think>", "\n", "Yes").answer
    assert (answer.reasoning, answer.text, answer.n_reasoning_tokens) == ("", "Yes", 1)


# --- chat completions ---------------------------------------------------------------------------


class Said:
    """Pieces and reply of a finished run, as `Stream` gives them."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __iter__(self) -> Iterator[Any]:
        return iter(self._run.pieces)

    def close(self) -> None: ...

    @property
    def reply(self) -> Reply:
        answer = self._run.answer
        return Reply(
            text=answer.text,
            tokens=tuple(answer.tokens),
            finish_reason=answer.finish_reason,
            n_prompt_tokens=3,
            n_image_tokens=0,
            guidance=asking().guidance,
            layers=(),
            seed=0,
            seconds=Seconds(),
            reasoning=answer.reasoning,
            n_reasoning_tokens=answer.n_reasoning_tokens,
        )


def test_a_completion_has_reasoning_content_as_llama_server_has_it() -> None:
    said = Said(thinking("A", " fork?", "</think>", "Yes", "."))
    whole = completion_of(said.reply, "m", lambda token: b"?")
    assert whole["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "A fork?",
    }
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}
    deltas = [c["choices"][0]["delta"] for c in chunks_of(said, "m", lambda token: b"?")]
    assert deltas == [
        {"role": "assistant"},
        {"reasoning_content": "A"},
        {"reasoning_content": " fork?"},
        {"content": "Yes"},
        {"content": "."},
        {},
    ]


def test_a_completion_without_reasoning_has_no_word_of_it() -> None:
    whole = completion_of(Said(told("Yes")).reply, "m", lambda token: b"?")
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "Yes"}
    assert "completion_tokens_details" not in whole["usage"]


# --- a model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vlm(pair: TinyPair) -> Iterator[GuidedVLM]:
    with open_vlm(pair, chat_template=THINKING) as opened:
        yield opened


def test_a_request_reaches_the_template_and_its_answer_is_told_apart(vlm: GuidedVLM) -> None:
    image = [picture(0)]
    thought = vlm.generate("What is there?", image, max_tokens=6)
    assert (thought.text, thought.finish_reason) == ("", "length")
    assert thought.reasoning
    assert thought.n_reasoning_tokens == 6
    answered = vlm.generate("What is there?", image, max_tokens=6, chat_template_kwargs=OFF)
    assert answered.text
    assert (answered.reasoning, answered.n_reasoning_tokens) == ("", 0)
    assert answered.n_prompt_tokens > thought.n_prompt_tokens


def test_reasoning_streams_as_such_and_is_not_the_text_of_a_stream(vlm: GuidedVLM) -> None:
    stream = vlm.stream("What is there?", [picture(0)], max_tokens=6)
    pieces = list(stream)
    assert pieces
    assert all(piece.reasoning for piece in pieces)
    assert (stream.text, stream.reply.reasoning) == ("", "".join(p.text for p in pieces))


def test_both_prompts_of_a_contrast_get_the_variables(vlm: GuidedVLM) -> None:
    for variables in ({}, OFF):
        tokens = vlm.tokenize("Why?", chat_template_kwargs=variables)
        assert tokens.closing == ("" if variables else "</think>")


def test_a_model_can_be_told_once_and_a_request_has_the_last_word(pair: TinyPair) -> None:
    with open_vlm(pair, chat_template=THINKING, chat_template_kwargs=OFF) as told_once:
        assert told_once.generate("Why?", max_tokens=2).n_reasoning_tokens == 0
        on = {"enable_thinking": True}
        assert told_once.generate("Why?", max_tokens=2, chat_template_kwargs=on).text == ""


def test_under_a_schema_a_model_that_would_think_answers(vlm: GuidedVLM) -> None:
    reply = vlm.generate("Why?", sampling=Sampling(grammar='root ::= "cat"'), max_tokens=9)
    assert (reply.text, reply.reasoning, reply.n_reasoning_tokens) == ("cat", "", 0)


def test_marks_that_are_control_tokens_tell_reasoning_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = *tiny_vocabulary.TILE_MARKS, "<think>", "</think>"
    monkeypatch.setattr(tiny_vocabulary, "TILE_MARKS", marks)
    with open_vlm(write_pair(tmp_path, TinyConfig(longest_edge=112))) as vlm:
        model = vlm.model
        opening, closing = model.n_vocab - 2, model.n_vocab - 1
        assert (model.token_bytes(opening), model.token_bytes(closing)) == (b"<think>", b"</think>")
        assert model.token_bytes(opening - 1) == b""  # a tile's mark: a control token like others
        dog, cat = (int(model.tokenize(word)[0]) for word in ("dog", "cat"))
        said = [opening, dog, closing, cat]

        def only(before: IntArray, logits: FloatArray) -> FloatArray:
            row = np.full_like(logits, -np.inf)
            row[said[len(before)]] = 0
            return row

        reply = vlm.generate("Why?", max_tokens=4, logits_processors=[only])
        assert [token.id for token in reply.tokens] == said
        assert (reply.reasoning, reply.text, reply.n_reasoning_tokens) == ("dog", "cat", 3)
        # What a user writes is no mark.
        assert opening not in vlm.tokenize("<think>").segments[0].tokens  # type: ignore[union-attr]


# --- the command line and evaluation ------------------------------------------------------------


def test_the_answer_goes_to_stdout_and_its_reasoning_elsewhere(pair: TinyPair) -> None:
    asked = [*("run", "-m", str(pair.llm), "--mmproj", str(pair.mmproj), "-c", "512", "-t", "1")]
    asked += ["--chat-template", THINKING, "-n", "6", "-p", "Why?"]
    thought = invoke(*asked, "--json", "-q")
    said = json.loads(thought.stdout)
    assert said["text"] == ""
    assert said["reasoning"]
    shown = invoke(*asked)
    assert shown.stdout.strip() == ""
    assert said["reasoning"] in shown.stderr
    assert said["reasoning"] not in invoke(*asked, "-q").stderr
    for off in (["--no-think"], ["--template-kwargs", '{"enable_thinking": false}']):
        said = json.loads(invoke(*asked, *off, "--json", "-q").stdout)
        assert said["text"]
        assert said["reasoning"] == ""


def test_a_variable_that_the_template_does_not_read_is_noted(
    pair: TinyPair, tmp_path: Path
) -> None:
    files = ["-m", str(pair.llm), "--mmproj", str(pair.mmproj), "-c", "512", "-t", "1"]
    asked = ["run", *files, "-n", "1", "-p", "Why?"]
    note = "note: --no-think without effect: the chat template does not read enable_thinking"
    assert note in invoke(*asked, "--no-think").stderr
    assert "effect" not in invoke(*asked, "--no-think", "--chat-template", THINKING).stderr
    assert "effect" not in invoke(*asked, "--no-think", "-q").stderr
    told = invoke(*asked, "--template-kwargs", '{"mood": 1}', "--chat-template", THINKING).stderr
    assert "note: --template-kwargs without effect: the chat template does not read mood" in told
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    assert note in invoke("caption", str(tmp_path), *files, "-n", "4", "--no-think").stderr


@pytest.mark.parametrize("text", ["x", "[1]", "{"])
def test_template_variables_that_are_no_object_are_refused(text: str) -> None:
    result = invoke("run", "-p", "Why?", "--template-kwargs", text)
    assert result.exit_code == 2
    assert "is no JSON object" in flat(result.stderr)


def test_an_evaluation_of_which_answers_end_within_reasoning_says_how_many(
    pair: TinyPair, tmp_path: Path
) -> None:
    files = ["-m", str(pair.llm), "--mmproj", str(pair.mmproj), "-c", "512", "-t", "1"]
    asked = ["eval", "scenes", *files, "--pictures", "1", "--methods", "greedy"]
    asked += ["--chat-template", THINKING, "--parallel", "1", "-o"]
    ended = invoke(*asked, str(tmp_path / "a"))
    n = sum(len(line) > 0 for line in (tmp_path / "a/results.jsonl").read_text().splitlines())
    note = f"note: {n} of {n} answers ended within the model's reasoning, so they are scored as"
    assert ended.exit_code == 0
    assert note in flat(ended.stderr)
    assert "(--no-think)" in ended.stderr
    assert note in flat(invoke("eval", "report", str(tmp_path / "a"), "--no-plots").stderr)
    at_once = invoke(*asked, str(tmp_path / "b"), "--no-think")
    assert "reasoning" not in at_once.stderr


def test_an_evaluation_scores_what_is_behind_the_reasoning_and_counts_it(
    pair: TinyPair, tmp_path: Path
) -> None:
    task = squares(tmp_path, n=1)
    for variables in ({}, OFF):
        options = {**OPTIONS, "chat_template": THINKING, "chat_template_kwargs": variables}
        model = ModelFiles(pair.llm, pair.mmproj, options)
        out = tmp_path / f"out{len(variables)}"
        run = evaluate(task, model, chosen(["greedy"], Guidance()), out)
        for record in (r for r in run.records if r.problem is None):
            assert (record.answer == "") == (record.yes_margin is None) == (not variables)
            assert record.reasoning == (0 if variables else record.tokens)

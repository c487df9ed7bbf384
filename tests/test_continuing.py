"""An assistant's message that is the last: the answer goes on from it, and is what is new."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from guided import QUESTION, ids, open_vlm, user
from prompts import picture
from scripted import told
from tiny_llava import TinyPair

from cmg_gguf import GuidedVLM
from cmg_gguf.answer.reasoning import Reasoning
from cmg_gguf.errors import PromptError
from cmg_gguf.prompt.messages import render_messages
from cmg_gguf.prompt.reasoning import closing_mark
from cmg_gguf.prompt.specials import Specials
from cmg_gguf.prompt.templates import NAMES, ChatTemplate

M = "<image-5f0c>"
ASKED = {"role": "user", "content": "What is this?"}
HEADS = {"vicuna": "ASSISTANT: ", "mistral": "[/INST] ", "chatml": "<|im_start|>assistant\n"}

STRIPPING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As Qwen3's: reasoning is taken out of what was said, and shown for the last turn alone.
APART = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{% if loop.last %}<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}"
    "\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def text(template: ChatTemplate | str, *messages: dict[str, Any], **settings: Any) -> str:
    if isinstance(template, str):
        template = ChatTemplate.from_jinja(template)
    return render_messages(messages, template, marker=M, **settings).text


def refused(template: str, *messages: dict[str, Any]) -> str:
    with pytest.raises(PromptError) as info:
        text(template, *messages)
    return str(info.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("begun", ["The cat", "The cat ", " The\n\n", "x"])
def test_the_prompt_ends_with_what_was_said(name: str, begun: str) -> None:
    template = ChatTemplate.named(name)
    assert text(template, ASKED, said(begun)).endswith(f"What is this?{_between(name)}{begun}")
    parts = [{"type": "text", "text": char} for char in begun]
    assert text(template, ASKED, said(parts)) == text(template, ASKED, said(begun))


def _between(name: str) -> str:
    ends = {"vicuna": "\n", "mistral": " ", "chatml": "<|im_end|>\n"}
    return ends[name] + HEADS[name]


def test_a_template_that_strips_keeps_the_space_behind_what_was_said() -> None:
    assert text(STRIPPING, ASKED, said(" The cat ")).endswith("<assistant>The cat ")
    earlier = text(STRIPPING, ASKED, said(" A cat. "), ASKED, said("It "))
    assert earlier.endswith("<assistant>A cat.</s><user>What is this?</s><assistant>It ")


def test_a_turn_that_is_not_the_last_is_closed() -> None:
    assert text(STRIPPING, ASKED, said("A cat."), ASKED).endswith("</s><assistant>")


def test_without_generation_prompt_it_is_closed() -> None:
    closed = text(STRIPPING, ASKED, said("A cat."), add_generation_prompt=False)
    assert closed.endswith("A cat.</s>")


@pytest.mark.parametrize("nothing", ["", None, []])
def test_nothing_said_is_as_if_there_were_no_such_message(nothing: Any) -> None:
    for name in NAMES:
        template = ChatTemplate.named(name)
        assert text(template, ASKED, said(nothing)) == text(template, ASKED)


def test_a_special_token_in_it_is_text() -> None:
    specials = Specials(("</s>",))
    messages = [ASKED, said("A </s>")]
    prompt = render_messages(
        messages, ChatTemplate.from_jinja(STRIPPING), marker=M, specials=specials
    )
    assert prompt.text.endswith("<assistant>A </s>")
    assert prompt.seams == (len(prompt.text) - 3,)


def test_a_picture_in_it_stands_where_it_was_shown() -> None:
    messages = [ASKED, said([{"type": "image", "image": b"a"}, {"type": "text", "text": "This"}])]
    prompt = render_messages(messages, ChatTemplate.named("vicuna"), marker=M)
    assert prompt.images == [b"a"]
    assert prompt.text.endswith(f"ASSISTANT: {M}\nThis")


def test_reasoning_that_a_template_takes_apart_may_be_continued() -> None:
    thought = "<think>\nHm.\n</think>\n\nIt is "
    assert text(APART, ASKED, said(thought)).endswith("assistant\n" + thought)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "0 times"),
        ("{{ messages[0].content }}", "0 times"),
        ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}", "2 times"),
        ("{% for m in messages %}{{ m.content[-25:] }}{% endfor %}", "changes"),
        ("{% for m in messages %}{{ m.content | replace('cat', 'dog') }}{% endfor %}", "changes"),
    ],
)
def test_a_template_that_does_not_write_it_once_as_it_is_is_refused(
    template: str, says: str
) -> None:
    line = refused(template, ASKED, said("The cat is a cat, and not a cat."))
    assert says in line
    assert "cannot be continued" in line


def test_what_nothing_goes_on_from_is_refused() -> None:
    assert "calls tools" in refused(STRIPPING, ASKED, said(None, tool_calls=[{"id": "1"}]))
    assert "reasoning_content" in refused(STRIPPING, ASKED, said("", reasoning_content="Hm."))
    assert "only message" in refused(STRIPPING, said(""))


# --- the answer ---------------------------------------------------------------------------------


def test_what_was_said_tells_whether_reasoning_is_open() -> None:
    assert closing_mark("...<think>\nHm", "<think>\nHm") == "</think>"
    assert closing_mark("...<think>Hm</think>Yes", "<think>Hm</think>Yes") == ""
    assert closing_mark("...write <think>", "write <think>") == ""
    assert closing_mark("...<think>", "") == "</think>"


def _apart(*pieces: str, **settings: Any) -> list[tuple[str, bool]]:
    reasoning = Reasoning(**settings)
    found = [part for piece in pieces for part in reasoning.feed(piece)]
    return [*found, *reasoning.flush()]


def test_an_answer_that_goes_on_is_text_as_it_comes() -> None:
    assert _apart(" is", " <think>", is_begun=True) == [(" is", False), (" <think>", False)]
    assert _apart("<think>", is_begun=True) == [("<think>", False)]


def test_reasoning_that_goes_on_keeps_its_space_and_ends_at_its_mark() -> None:
    parts = _apart(" so.", "</think>", "\n\nYes", closing="</think>", is_begun=True)
    assert parts == [(" so.", True), ("Yes", False)]


def test_a_new_answer_loses_the_space_in_front_and_one_that_goes_on_does_not() -> None:
    assert told(" is", " it").answer.text == "is it"
    assert told(" is", " it", is_begun=True).answer.text == " is it"


@pytest.fixture(scope="module")
def vlm(pair: TinyPair) -> Iterator[GuidedVLM]:
    with open_vlm(pair) as opened:
        yield opened


def test_the_reply_is_what_is_new(vlm: GuidedVLM) -> None:
    asked = [user(picture(1), QUESTION)]
    begun = vlm.generate([*asked, said("A cat is")], max_tokens=12)
    raw = text(vlm.template, *asked, said("A cat is")).replace(M, "<__media__>")
    by_hand = vlm.generate(raw, [picture(1)], raw=True, max_tokens=12)
    assert ids(begun) == ids(by_hand)
    said_bytes = b"".join(vlm.model.token_bytes(token) for token in ids(begun))
    assert begun.text == said_bytes.decode("utf-8", "replace")
    assert ids(begun) != ids(vlm.generate(asked, max_tokens=12))
    completion: Any = vlm.create_chat_completion(
        [*asked, said("A cat is")], temperature=0.0, max_tokens=12
    )
    assert completion["choices"][0]["message"]["content"] == begun.text

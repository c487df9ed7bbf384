"""An assistant's message that is the last: the answer goes on from there.

    if is_continued(messages, True):
        text = continued(template.render, messages, end)

What it says is rendered with the mark `end` behind it: that keeps a template from stripping white
space there, and shows where it goes on by itself, as with an end token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cmg_gguf.errors import PromptError, shown
from cmg_gguf.prompt.reasoning import MARKS

_USUAL = ("role", "content", "name")


def is_continued(messages: list[dict[str, Any]], asks: bool) -> bool:
    """Return whether an answer is asked for that the last message begins.

    One that says nothing begins nothing: it is taken off the list.

    Raises:
        PromptError: it calls tools, says nothing but has more to it, or is the only one and says
            nothing.
    """
    last = messages[-1]
    if not asks or last["role"] != "assistant":
        return False
    if last.get("tool_calls"):
        raise PromptError(
            "the last message is the assistant's and calls tools: give what they returned behind it"
        )
    if last["content"]:
        return True
    more = [name for name, value in last.items() if name not in _USUAL and value]
    if more:
        raise PromptError(
            f"the last message is the assistant's, to be continued, and has {shown(more[0])} but "
            "no content: give the content that it goes on from, or leave it out"
        )
    if len(messages) == 1:
        raise PromptError("the only message is the assistant's and says nothing: give a user's")
    messages.pop()
    return False


def continued(
    render: Callable[[list[dict[str, Any]], bool], str], messages: list[dict[str, Any]], end: str
) -> str:
    """Return the text of the messages up to what the last one says, to its last character.

    render: of messages, and whether to open an answer. end: a mark that no text contains.

    Raises:
        PromptError: the template does not write what it says once and as it is, but for white space
            ahead of it, and reasoning that is taken apart from it.
    """
    said = messages[-1]["content"]
    text = render([*messages[:-1], {**messages[-1], "content": said + end}], False)
    pieces = text.split(end)
    if len(pieces) != 2:
        raise PromptError(
            f"the chat template writes the assistant's last message {len(pieces) - 1} times, so it "
            "cannot be continued: end with a user's message, or give another template"
        )
    answers = [said, *(said.rpartition(close)[2] for close in MARKS.values() if close in said)]
    if not any(pieces[0].endswith(answer.lstrip()) for answer in answers):
        raise PromptError(
            "the chat template changes the assistant's last message, so it cannot be continued: "
            "end with a user's message, or give another template"
        )
    return pieces[0]

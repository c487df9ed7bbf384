"""The marks between which a model thinks before it answers, and whether a prompt opens them.

closing_mark("...<|im_start|>assistant\\n<think>\\n")  # "</think>": the answer begins within
closing_mark("...<|im_start|>assistant\\n")  # "": if the model thinks, it writes both marks
closing_mark("...<think>I see", said="<think>I see")  # "</think>": it was begun for the model
"""

from __future__ import annotations

MARKS = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "\u25c1think\u25b7": "\u25c1/think\u25b7",
}
"""What opens reasoning, and what closes it: of Qwen, DeepSeek, GLM and others; of Mistral; of
Kimi-VL. In some vocabularies they are special tokens, in others text."""


def closing_mark(prompt: str, said: str = "") -> str:
    """The mark that closes the reasoning within which the prompt ends; "" where it ends outside.

    It ends within where nothing but white space follows a mark that opens. said: what the prompt
    ends with of the answer itself; then that decides, by the mark that it begins with.
    """
    if said:
        opened = (close for mark, close in MARKS.items() if said.lstrip().startswith(mark))
        return next((close for close in opened if close not in said), "")
    end = prompt.rstrip()
    return next((close for mark, close in MARKS.items() if end.endswith(mark)), "")

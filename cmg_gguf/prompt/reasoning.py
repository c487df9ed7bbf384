"""The marks between which a model thinks before it answers, and whether a prompt opens them.

closing_mark("...<|im_start|>assistant\\n<think>\\n")  # "</think>": the answer begins within
closing_mark("...<|im_start|>assistant\\n")  # "": if the model thinks, it writes both marks
"""

from __future__ import annotations

MARKS = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "\u25c1think\u25b7": "\u25c1/think\u25b7",
}
"""What opens reasoning, and what closes it: of Qwen, DeepSeek, GLM and others; of Mistral; of
Kimi-VL. In some vocabularies they are special tokens, in others text."""


def closing_mark(prompt: str) -> str:
    """The mark that closes the reasoning within which the prompt ends; "" where it ends outside.

    It ends within where nothing but white space follows a mark that opens.
    """
    end = prompt.rstrip()
    return next((close for mark, close in MARKS.items() if end.endswith(mark)), "")

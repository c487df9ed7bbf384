"""Jinja chat templates: the built-in ones, and those that models bring along.

    template = ChatTemplate.named("vicuna")
    template.render([{"role": "user", "content": "What is this?"}])

How images and what the user wrote pass through one: `cmg_gguf.prompt.messages`.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cmg_gguf.errors import PromptError, shown

Message = Mapping[str, Any]
"""`{"role": ..., "content": ...}`, as in OpenAI's chat API; other keys go to the template as is."""

NAMES = ("chatml", "mistral", "vicuna")
"""The built-in templates, each a file in the folder `jinja`."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template, run in a sandbox with the variables that Transformers gives it.

    Args:
        source: the template. It sees `messages` (content is a string), `add_generation_prompt`,
            `bos_token`, `eos_token`, `tools`, `raise_exception` and `strftime_now`.
        bos: what `{{ bos_token }}` writes; "" where the tokenizer adds that token itself.
        eos: what `{{ eos_token }}` writes.

    Attributes:
        typed_content: found by a trial: this template overlooks content that is a string, as
            LLaVA's own does, so it gets a list of one text part instead.

    Raises:
        PromptError: the source is no valid Jinja template.
    """

    source: str
    bos: str = field(default="", kw_only=True)
    eos: str = field(default="", kw_only=True)
    typed_content: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        _compile(self.source)
        typed = not self._writes("cmgprobe") and self._writes([text_part("cmgprobe")])
        object.__setattr__(self, "typed_content", typed)

    @classmethod
    def named(cls, name: str, *, bos: str = "", eos: str = "</s>") -> ChatTemplate:
        """Return a built-in template: "vicuna", "mistral" or "chatml".

        "vicuna" is LLaVA-1.5's, with its system message where the messages have none. "mistral" is
        that of LLaVA-1.6-Mistral. "chatml" ends turns with <|im_end|> whatever `eos` is.

        Raises:
            PromptError: no template has this name.
        """
        if name not in NAMES:
            raise PromptError(
                f"no chat template is named {shown(name)}: "
                f"use one of {', '.join(NAMES)}, or ChatTemplate.from_jinja"
            )
        return cls(_named_source(name), bos=bos, eos=eos)

    @classmethod
    def from_jinja(cls, source: str, *, bos: str = "", eos: str = "") -> ChatTemplate:
        """Return a template from Jinja source, as in a GGUF's `tokenizer.chat_template`.

        Raises:
            PromptError: the source is no valid Jinja template.
        """
        return cls(source, bos=bos, eos=eos)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the text of `messages`, whose contents are strings.

        Raises:
            PromptError: the template fails or calls `raise_exception`.
        """
        if self.typed_content:
            messages = [{**m, "content": [text_part(m.get("content") or "")]} for m in messages]
        return self._run(messages, add_generation_prompt, tools)

    def _writes(self, content: object) -> bool:
        try:
            return "cmgprobe" in self._run([{"role": "user", "content": content}], True, None)
        except PromptError:
            return False

    def _run(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> str:
        try:
            return _compile(self.source).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos,
                eos_token=self.eos,
                tools=tools,
                documents=None,
                raise_exception=_raise_exception,
                strftime_now=_strftime_now,
            )
        # A template is a program that came with the model: it can fail in any way.
        except Exception as exc:
            reason = " ".join(str(exc).split()) or type(exc).__name__
            raise PromptError(
                f"the chat template refuses these messages: {reason}; change the messages or give "
                "another template"
            ) from exc


def text_part(text: str) -> dict[str, str]:
    """The part of a content that is this text."""
    return {"type": "text", "text": text}


class _GenerationBlock(jinja2.ext.Extension):
    """Lets Transformers' `{% generation %}` block pass."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as exc:
        raise PromptError(
            f"the chat template {shown(source)} is not valid Jinja: {exc}; correct it or use a "
            "named template"
        ) from exc


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own escapes <, > and & for HTML, which a model has never seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _named_source(name: str) -> str:
    # vicuna.jinja is llama-cpp-python's Llava15ChatHandler.CHAT_FORMAT as that is written, plus
    # eos: the handler itself loses the newlines before USER and ASSISTANT to trim_blocks.
    folder = importlib.resources.files("cmg_gguf.prompt") / "jinja"
    return (folder / f"{name}.jinja").read_bytes().decode()

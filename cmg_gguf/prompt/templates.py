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
import jinja2.meta
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cmg_gguf.errors import PromptError, shown

Message = Mapping[str, Any]
"""`{"role": ..., "content": ...}`, as in OpenAI's chat API; other keys go to the template as is."""

OWN_VARIABLES = (
    *("messages", "tools", "add_generation_prompt", "bos_token", "eos_token"),
    *("raise_exception", "strftime_now"),
)
"""Variables of a template that nobody else sets."""

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
        variables: more that it sees, as `enable_thinking`, unless `render` says otherwise.

    Attributes:
        typed_content: found by a trial: this template overlooks content that is a string, as
            LLaVA's own does, so it gets a list of one text part instead.

    Raises:
        PromptError: the source is no valid Jinja template, or see `checked_variables`.
    """

    source: str
    bos: str = field(default="", kw_only=True)
    eos: str = field(default="", kw_only=True)
    variables: Mapping[str, Any] = field(default_factory=dict, kw_only=True, hash=False)
    typed_content: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        _compile(self.source)
        object.__setattr__(self, "variables", checked_variables(self.variables))
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
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of `messages`, whose contents are strings.

        variables: take the place of its own of the same name; one that the template does not read
        changes nothing.

        Raises:
            PromptError: the template fails or calls `raise_exception`, or see `checked_variables`.
        """
        if self.typed_content:
            messages = [{**m, "content": [text_part(m.get("content") or "")]} for m in messages]
        return self._run(messages, add_generation_prompt, tools, checked_variables(variables or {}))

    def reads(self, variable: str) -> bool:
        """Return whether the template looks at a variable of this name, and has not set it."""
        syntax = _environment().parse(self.source)
        return variable in jinja2.meta.find_undeclared_variables(syntax)

    def _writes(self, content: object) -> bool:
        try:
            return "cmgprobe" in self._run([{"role": "user", "content": content}], True, None, {})
        except PromptError:
            return False

    def _run(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        own = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos,
            "eos_token": self.eos,
            "tools": tools,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        assert own.keys() == set(OWN_VARIABLES)
        try:
            return _compile(self.source).render(
                {"documents": None, **self.variables, **variables, **own}
            )
        # A template is a program that came with the model: it can fail in any way.
        except Exception as exc:
            reason = " ".join(str(exc).split()) or type(exc).__name__
            raise PromptError(
                f"the chat template refuses these messages: {reason}; change the messages or give "
                "another template"
            ) from exc


def checked_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the variables that a template is given besides its own.

    Raises:
        PromptError: they are no mapping, or a name is no name or one of `OWN_VARIABLES`.
    """
    if not isinstance(variables, Mapping):
        raise PromptError(
            f"chat_template_kwargs={shown(variables)} is no mapping of names to values; write "
            '{"enable_thinking": False}'
        )
    for name in variables:
        if not isinstance(name, str) or not name.isidentifier():
            raise PromptError(
                f"chat_template_kwargs has the name {shown(name)}: a template's variable has a "
                'name like "enable_thinking"'
            )
        if name in OWN_VARIABLES:
            raise PromptError(
                f"chat_template_kwargs has the name {name!r}, which is set from the request and "
                f"the model, as are {', '.join(OWN_VARIABLES)}; leave it out"
            )
    return dict(variables)


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


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson
    return environment


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
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

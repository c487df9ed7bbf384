"""From messages to one prompt text with a marker for each image, and the images in order.

    template = ChatTemplate.named("vicuna")
    prompt = render_messages(messages, template, marker="<image-5f0c...>")
    prompt.text      # "... USER: <image-5f0c...>\\nWhat is this?\\nASSISTANT: "
    prompt.images    # one source for each marker

Text never becomes an image: the marker is the caller's secret, and images are told apart while
the template runs, so one that drops, repeats or swaps them is found out.
"""

from __future__ import annotations

import functools
import json
import re
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
from cmg_gguf.prompt.images import ImageSource

Message = Mapping[str, Any]
"""`{"role": ..., "content": ...}`, as in OpenAI's chat API; other keys go to the template as is."""

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Rendered:
    """A prompt: its text with one marker an image, and the image sources in that order."""

    text: str
    images: list[ImageSource]


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
        typed = not self._writes("cmgprobe") and self._writes([_text_part("cmgprobe")])
        object.__setattr__(self, "typed_content", typed)

    @classmethod
    def named(cls, name: str, *, bos: str = "", eos: str = "</s>") -> ChatTemplate:
        """Return a built-in template: "vicuna", "mistral" or "chatml".

        "vicuna" is LLaVA-1.5's, with its system message where the messages have none. "mistral" is
        that of LLaVA-1.6-Mistral. "chatml" ends turns with <|im_end|> whatever `eos` is.

        Raises:
            PromptError: no template has this name.
        """
        if name not in _NAMED:
            raise PromptError(
                f"no chat template is named {shown(name)}: "
                f"use one of {', '.join(sorted(_NAMED))}, or ChatTemplate.from_jinja"
            )
        return cls(_NAMED[name], bos=bos, eos=eos)

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
            messages = [{**m, "content": [_text_part(m.get("content") or "")]} for m in messages]
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


def render_messages(
    messages: Sequence[Message],
    template: ChatTemplate,
    *,
    marker: str,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Rendered:
    """Return the prompt of `messages`: their text with `marker` where each image stands.

    A content is a string, or a list of parts that are joined without anything between, except
    that an image is followed by a newline if more follows:

        {"type": "text", "text": str}
        {"type": "image_url", "image_url": str | {"url": str}}
        {"type": "image", "image": any ImageSource}

    Args:
        marker: a random string, so that no text can contain it.

    Raises:
        PromptError: there is no message, a message has another form or role, a text contains the
            marker, the template fails, writes nothing, or does not write each image exactly once
            and in order.
    """
    if not marker:
        raise PromptError("the image marker is empty: give a random string")
    if not messages:
        raise PromptError("there are 0 messages: give at least 1")
    images: list[ImageSource] = []
    flat = [_flat(message, i, marker, images) for i, message in enumerate(messages)]
    text = template.render(flat, add_generation_prompt, tools=tools)
    if not text.strip():
        raise PromptError(
            f"the chat template made an empty prompt of {len(flat)} messages: give messages with "
            "text, or another template"
        )
    return Rendered(_with_markers(text, marker, len(images)), images)


def _flat(message: Message, i: int, marker: str, images: list[ImageSource]) -> dict[str, Any]:
    """Return the message with its content as a string, and append its images to `images`."""
    if not isinstance(message, Mapping):
        raise PromptError(f'message {i} is {shown(message)}: it must be {{"role":, "content":}}')
    role = message.get("role")
    if role not in ROLES:
        raise PromptError(
            f"message {i} has the role {shown(role)}: it must be one of {', '.join(ROLES)}"
        )
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""  # a turn that only calls tools
    if isinstance(content, str):
        content = [_text_part(content)]
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray, memoryview)):
        raise PromptError(
            f"message {i} has the content {shown(content)}: it must be a string or a list of parts"
        )
    before = len(images)
    pieces = [_piece(part, f"message {i}, part {j}", images) for j, part in enumerate(content)]
    text = "".join(piece for piece in pieces if piece is not None)
    if marker in text:
        raise PromptError(
            f"message {i} contains the image marker {shown(marker)}: draw another random marker"
        )
    return {**message, "content": _joined(pieces, marker, before)}


def _piece(part: object, where: str, images: list[ImageSource]) -> str | None:
    """Return the text of a part; None for an image, which is appended to `images`."""
    if not isinstance(part, Mapping):
        raise PromptError(f'{where} is {shown(part)}: it must be {{"type": ...}}')
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise PromptError(f"{where} has the text {shown(part.get('text'))}: give a string")
        return str(part["text"])
    if kind == "image_url":
        url = part.get("image_url")
        if isinstance(url, Mapping):
            url = url.get("url")
        if not isinstance(url, str) or not url:
            raise PromptError(
                f"{where} has the image_url {shown(part.get('image_url'))}: give a string or "
                '{"url": string}'
            )
        images.append(url)
        return None
    if kind == "image":
        if part.get("image") is None:
            raise PromptError(f"{where} has no image: give a path, bytes, a PIL image or an array")
        images.append(part["image"])
        return None
    raise PromptError(
        f"{where} has the type {shown(kind)}: it must be one of text, image_url, image"
    )


def _joined(pieces: Sequence[str | None], marker: str, i_image: int) -> str:
    """Return the pieces as one text; each None becomes the next image's own mark."""
    text = ""
    after_image = False
    for piece in pieces:
        if piece == "":
            continue
        if after_image:
            text += "\n"
        after_image = piece is None
        if piece is None:
            piece = _mark(marker, i_image)
            i_image += 1
        text += piece
    return text


def _mark(marker: str, i_image: int | str) -> str:
    return f"{marker}#{i_image}#"


def _with_markers(text: str, marker: str, n_images: int) -> str:
    """Return `text` with the plain marker for each image's own mark, once all are in place."""
    pieces = re.split(_mark(re.escape(marker), r"(\d+)"), text)
    found = [int(i) for i in pieces[1::2]]
    if found != list(range(n_images)):
        raise PromptError(
            f"the chat template wrote the images {found} instead of {list(range(n_images))}: use "
            "one that writes the content of each message exactly once and in order"
        )
    between = pieces[0::2]
    marked = marker.join(between)
    # A marker can also arise elsewhere: in a message's name, or across the edge of two texts.
    if marked.split(marker) != between:
        raise PromptError(
            f"the prompt contains the image marker {shown(marker)} outside of its {n_images} "
            "images: draw another random marker"
        )
    return marked


def _text_part(text: str) -> dict[str, str]:
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


# The text of llama-cpp-python's Llava15ChatHandler.CHAT_FORMAT as that is written, plus eos: the
# handler itself loses the newlines before USER and ASSISTANT to trim_blocks.
_VICUNA = """\
{{ bos_token -}}
{% set asked = messages | selectattr('role', 'equalto', 'system') | list %}
{% if not (asked and asked[0].content) %}
{{ 'A chat between a curious human and an artificial intelligence assistant. ' -}}
{{ "The assistant gives helpful, detailed, and polite answers to the human's questions." -}}
{% endif %}
{% for message in messages %}
{% if message.role == 'system' %}{{ message.content }}
{%- elif message.role == 'user' %}{{ '\\nUSER: ' + message.content }}
{%- elif message.role == 'assistant' %}{{ '\\nASSISTANT: ' + message.content + eos_token }}
{%- else %}{{ raise_exception('vicuna has no turns of the role ' + message.role) }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '\\nASSISTANT: ' }}{% endif %}"""

_MISTRAL = """\
{{ bos_token -}}
{% set turn = namespace(is_open=false) %}
{% for message in messages %}
{% if message.role in ('system', 'user') %}
{{ '' if turn.is_open else '[INST] ' }}{{ message.content -}}
{% set turn.is_open = message.role == 'system' %}
{{ '\\n\\n' if turn.is_open else ' [/INST]' -}}
{% elif message.role == 'assistant' %}
{% if turn.is_open %}{{ raise_exception('mistral has a system message only before a user turn') }}
{%- endif %}
{{ ' ' + message.content + eos_token -}}
{% else %}{{ raise_exception('mistral has no turns of the role ' + message.role) }}
{%- endif %}
{% endfor %}
{% if turn.is_open %}{{ raise_exception('mistral has a system message only before a user turn') }}
{%- endif %}"""

_CHATML = """\
{{ bos_token -}}
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_NAMED = {"vicuna": _VICUNA, "mistral": _MISTRAL, "chatml": _CHATML}

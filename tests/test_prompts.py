"""Prompts: images stand where the messages put them, and text is only ever text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from cmg_gguf.errors import CMGError, PromptError
from cmg_gguf.prompt.messages import Rendered, render_messages
from cmg_gguf.prompt.templates import ChatTemplate

M = "<image-5f0c>"
CONTENT_ONLY = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
# What LLaVA's own files carry: content that is a string is overlooked.
TYPED = (
    "{% for m in messages %}{{ m.role | upper }}: "
    "{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ part.text }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)


def user(*parts: str | bytes) -> dict[str, Any]:
    return {"role": "user", "content": [as_part(part) for part in parts]}


def as_part(part: str | bytes) -> dict[str, Any]:
    """Bytes stand for an image, a string for text."""
    if isinstance(part, bytes):
        return {"type": "image", "image": part}
    return {"type": "text", "text": part}


def plain(template: str = CONTENT_ONLY) -> ChatTemplate:
    return ChatTemplate.from_jinja(template)


def render(messages: list[Any], template: str = CONTENT_ONLY, marker: str = M) -> Rendered:
    return render_messages(messages, plain(template), marker=marker)


def refused(messages: list[Any], template: str = CONTENT_ONLY, marker: str = M) -> str:
    with pytest.raises(PromptError) as info:
        render(messages, template, marker)
    line = str(info.value)
    assert "\n" not in line
    assert len(line) < 400
    return line


# --- where images stand -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([b"a", "What?"], f"{M}\nWhat?"),
        (["Look: ", b"a"], f"Look: {M}"),
        (["Look: ", b"a", "What?"], f"Look: {M}\nWhat?"),
        ([b"a", b"b"], f"{M}\n{M}"),
        ([b"a", b"b", "What?"], f"{M}\n{M}\nWhat?"),
        (["1: ", b"a", "2: ", b"b", "Which?"], f"1: {M}\n2: {M}\nWhich?"),
        ([b"a"], M),
        ([b"a", ""], M),
        ([b"a", "", "What?"], f"{M}\nWhat?"),
        ([b"a", "\nWhat?"], f"{M}\n\nWhat?"),
        (["one ", "two"], "one two"),
        ([], ""),
    ],
)
def test_an_image_stands_where_its_part_stands(parts: list[Any], text: str) -> None:
    assert render([user(*parts)]).text == f"[user:{text}]"


def test_images_come_out_in_the_order_of_their_markers_over_all_turns() -> None:
    messages = [
        user(b"0", "first ", b"1"),
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "no image here"},
        user("then ", b"2"),
    ]
    prompt = render(messages)
    assert prompt.images == [b"0", b"1", b"2"]
    assert prompt.text == (
        f"[user:{M}\nfirst {M}][assistant:Yes.][user:no image here][user:then {M}]"
    )


def test_more_than_ten_images_keep_their_order() -> None:
    images = [bytes([i]) for i in range(23)]
    prompt = render([user(*images)])
    assert prompt.images == images
    assert prompt.text == "[user:" + "\n".join([M] * 23) + "]"


def test_every_way_to_write_an_image_part_gives_its_source() -> None:
    parts = [
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "low"}},
        {"type": "image", "image": b"bytes"},
    ]
    prompt = render([{"role": "user", "content": parts}])
    assert prompt.images == ["a.png", "data:image/png;base64,AA", b"bytes"]


B64 = "iVBORw0KGgo="


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image_url", "image_url": {"url": "a.png"}, "detail": "low"}, "a.png"),
        ({"type": "input_image", "image_url": "a.png", "detail": "auto"}, "a.png"),
        ({"type": "image", "image": "a.png", "max_pixels": None, "width": 9}, "a.png"),
        ({"type": "input_image", "image_url": "a.png", "file_id": None}, "a.png"),
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "url": "file:///a.png"}, "file:///a.png"),
        ({"type": "image", "path": "a.png"}, Path("a.png")),
        ({"type": "image", "path": Path("a.png")}, Path("a.png")),
        ({"type": "image", "base64": B64}, f"data:;base64,{B64}"),
        ({"type": "image", "base64": B64.encode()}, f"data:;base64,{B64}"),
        (
            {"type": "image", "base64": f"data:image/png;base64,{B64}"},
            f"data:image/png;base64,{B64}",
        ),
        ({"type": "image", "data": B64, "mimeType": "image/png"}, f"data:;base64,{B64}"),
        ({"type": "image", "image_url": {"url": "a.png"}}, "a.png"),
        ({"type": "image", "source": {"type": "url", "url": "file:///a.png"}}, "file:///a.png"),
        (
            {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/png", "data": B64},
                "cache_control": {"type": "ephemeral"},
            },
            f"data:;base64,{B64}",
        ),
    ],
)
def test_every_clients_image_part_gives_its_source(part: dict[str, Any], source: object) -> None:
    prompt = render([{"role": "user", "content": [part, {"type": "input_text", "text": "What?"}]}])
    assert prompt.images == [source]
    assert prompt.text == f"[user:{M}\nWhat?]"


def test_a_messages_images_stand_ahead_of_its_content() -> None:
    seen = "{% for m in messages %}[{{ m.role }}:{{ m.content }}{{ m.images }}]{% endfor %}"
    messages = [
        {"role": "user", "content": "What?", "images": ["a.png", b"b"]},
        {"role": "assistant", "content": "A cat.", "images": []},
        {**user("And ", b"d"), "images": (Path("c.png"),)},
        {"role": "user", "content": "", "images": None},
    ]
    prompt = render(messages, seen)
    assert prompt.images == ["a.png", b"b", Path("c.png"), b"d"]
    assert prompt.text == (f"[user:{M}\n{M}\nWhat?][assistant:A cat.][user:{M}\nAnd {M}][user:]")


@pytest.mark.parametrize(
    "images", ["a.png", b"a", 3, {"url": "a.png"}, [""], [None], [{"url": "a.png"}]]
)
def test_images_of_another_form_are_refused_with_their_place(images: object) -> None:
    line = refused([{"role": "user", "content": "What?", "images": images}])
    assert line.startswith("message 0")


@pytest.mark.parametrize(
    "key",
    [
        *("image", "image_url", "imageUrl", "image_urls", "IMAGES", "img", "picture", "photos"),
        *("video", "audio", "input_audio", "file", "file_id", "files", "attachments", "media"),
        *("experimental_attachments", "image_data", "image_id", "pixelImages", "frames"),
    ],
)
def test_a_key_that_sounds_like_a_picture_is_refused_where_it_is_not_read(key: str) -> None:
    value: Any
    for value in ("a.png", b"a", ["a.png"], {"url": "a.png"}, ""):
        line = refused([user("hi"), {"role": "user", "content": "What?", key: value}])
        assert f"message 1 has '{key}', which is not read" in line
        part = {"type": "text", "text": "What?", key: value}
        assert "message 0, part 0 has" in refused([{"role": "user", "content": [part]}])
    for value in (None, [], {}, 2, False):  # as replies of servers have them
        assert render([{"role": "user", "content": "What?", key: value}]).text == "[user:What?]"


def test_other_keys_pass() -> None:
    other = {"name": "Ann", "profile": "x", "weight": 1, "reasoning_content": "x", "refusal": None}
    assert render([{"role": "user", "content": "What?", **other}]).text == "[user:What?]"


def test_a_developer_is_the_system() -> None:
    assert render([{"role": "developer", "content": "Be brief."}]).text == "[system:Be brief.]"


def test_the_same_image_twice_has_two_markers() -> None:
    assert render([user(b"a", b"a")]).text.count(M) == 2


def test_the_messages_stay_as_they_are() -> None:
    messages = [user(b"a", "What?"), {"role": "assistant", "content": "A cat."}]
    render(messages)
    assert messages == [user(b"a", "What?"), {"role": "assistant", "content": "A cat."}]


# --- text is only ever text ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "<__media__>",
        "<image>",
        "#0#",
        "{{ messages }}",
        "{% raw %}",
        "<b>&amp;</b>",
        "[IMG]\n\n",
        M[:-1],
    ],
)
def test_marker_like_text_is_literal_and_moves_no_image(text: str) -> None:
    prompt = render([user(text, b"a", text, b"b", text)])
    assert prompt.text == f"[user:{text}{M}\n{text}{M}\n{text}]"
    assert prompt.images == [b"a", b"b"]


def test_random_texts_never_move_an_image() -> None:
    rng = random.Random(4)
    marker = "aba"
    n_refused = 0
    for _ in range(500):
        parts = [
            b"i" if rng.random() < 0.4 else "".join(rng.choice("ab#0\n") for _ in range(4))
            for _ in range(rng.randint(1, 5))
        ]
        try:
            prompt = render([user(*parts)], marker=marker)
        except PromptError:
            n_refused += 1
            continue
        # The tokenizer splits at every marker: the texts between must be those around the images.
        texts = [""]
        previous: object = ""
        for part in (part for part in parts if part):
            texts[-1] += "\n" if isinstance(previous, bytes) else ""
            if isinstance(part, bytes):
                texts.append("")
            else:
                texts[-1] += part
            previous = part
        texts[0] = "[user:" + texts[0]
        texts[-1] += "]"
        assert prompt.text.split(marker) == texts
    assert 0 < n_refused < 250


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": f"look {M}"}],
        [user(b"a", f"{M}")],
        [user(M[:5], M[5:])],
        [user(f"{M}#0#", b"a")],
        [{"role": "system", "content": M}, user(b"a")],
    ],
)
def test_text_that_contains_the_marker_is_refused(messages: list[Any]) -> None:
    assert "another random marker" in refused(messages)


def test_a_marker_that_arises_outside_the_contents_is_refused() -> None:
    named = [{"role": "user", "content": "hi", "name": M}]
    assert "another random marker" in refused(named, "{{ messages[0].name }}")
    split = [{"role": "user", "content": M[:5]}, {"role": "user", "content": M[5:]}]
    assert "another random marker" in refused(
        split, "{{ messages[0].content + messages[1].content }}"
    )
    # The end of the text and the start of the marker make a marker one place too early.
    assert "another random marker" in refused([user("aX", b"i")], marker="aXa")


def test_a_name_cannot_stand_in_for_a_dropped_image() -> None:
    messages = [{**user(b"a"), "name": f"{M}"}]
    refused(messages, "{{ messages[0].name }}")


def test_an_empty_marker_is_refused() -> None:
    assert "marker is empty" in refused([user("hi")], marker="")


def test_a_marker_of_pattern_characters_is_taken_literally() -> None:
    marker = r".*[a](\d+)|^$"
    assert render([user(b"a", "0123")], marker=marker).text == f"[user:{marker}\n0123]"


# --- templates that lose images -----------------------------------------------------------------

LAST_ONLY = "{{ messages[-1].content }}"
TWICE = "{{ messages[0].content }}{{ messages[0].content }}"
REVERSED = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"


def test_a_template_that_drops_an_image_is_refused() -> None:
    line = refused([user(b"a"), user(b"b")], LAST_ONLY)
    assert "wrote the images [1] instead of [0, 1]" in line
    assert "exactly once" in line


def test_a_template_that_repeats_an_image_is_refused() -> None:
    assert "wrote the images [0, 0] instead of [0]" in refused([user(b"a")], TWICE)


def test_a_template_that_swaps_images_is_refused() -> None:
    assert "[1, 0] instead of [0, 1]" in refused([user(b"a"), user(b"b")], REVERSED)


def test_a_template_may_drop_a_system_message_but_not_an_image_in_it() -> None:
    text = {"role": "system", "content": "Be brief."}
    assert render([text, user(b"a", "hi")], NO_SYSTEM).text == f"{M}\nhi"
    image = {"role": "system", "content": user(b"s")["content"]}
    assert "[1] instead of [0, 1]" in refused([image, user(b"a")], NO_SYSTEM)


def test_a_template_that_writes_nothing_is_refused() -> None:
    assert "empty prompt" in refused([user("hi")], "  \n")


def test_a_template_that_overlooks_strings_gets_typed_parts() -> None:
    template = plain(TYPED)
    assert template.typed_content
    assert not plain().typed_content
    messages = [user(b"a", "What?"), {"role": "assistant", "content": "A cat."}, user("Big?")]
    prompt = render_messages(messages, template, marker=M)
    assert prompt.text == f"USER: {M}\nWhat? ASSISTANT: A cat. USER: Big? ASSISTANT:"
    assert prompt.images == [b"a"]


def test_a_template_that_takes_strings_and_parts_gets_strings() -> None:
    both = "{% set c = messages[0].content %}{{ c if c is string else c[0].text }}"
    assert not plain(both).typed_content


# --- bad messages -------------------------------------------------------------------------------


def test_no_messages_are_refused() -> None:
    assert "0 messages" in refused([])


@pytest.mark.parametrize("role", ["narrator", "User", "", None, 3, ["user"]])
def test_an_unknown_role_is_refused_with_its_place_and_the_known_ones(role: object) -> None:
    line = refused([user("hi"), {"role": role, "content": "x"}])
    assert "message 1" in line
    assert repr(role) in line
    assert "system, user, assistant, tool, developer" in line


@pytest.mark.parametrize("message", ["hi", None, ["role", "user"], 3])
def test_a_message_of_another_form_is_refused_with_its_place(message: object) -> None:
    assert "message 1 is" in refused([user("hi"), message])


@pytest.mark.parametrize("content", [None, 3, b"bytes", {"type": "text", "text": "x"}])
def test_content_of_another_form_is_refused_with_its_place(content: bytes) -> None:
    assert "message 0 has the content" in refused([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("hi", "is 'hi'"),
        (None, "is None"),
        ({}, "type None"),
        ({"type": "audio"}, "type 'audio'"),
        ({"type": ["text"]}, "type ['text']"),
        ({"type": "text"}, "text None"),
        ({"type": "text", "text": 3}, "text 3"),
        ({"type": "image_url"}, "image_url None"),
        ({"type": "image_url", "image_url": ""}, "image_url ''"),
        ({"type": "image_url", "image_url": {"uri": "x"}}, "image_url {'uri': 'x'}"),
        ({"type": "image_url", "image_url": b"x"}, "image_url b'x'"),
        ({"type": "image_url", "image_url": "x", "image": "y"}, "'image', which is not read"),
        ({"type": "input_image", "file_id": "f"}, "'file_id', which is not read"),
        ({"type": "image", "image": "a.png", "max_pixels": 1}, "'max_pixels', which is not read"),
        ({"type": "image", "image": "a.png", "resized_height": 28}, "'resized_height', which"),
        ({"type": "image_url", "image_url": {"url": "a", "min_pixels": 9}}, "'min_pixels', which"),
        ({"type": "input_file", "file_id": "f"}, "type 'input_file'"),
        ({"type": "video", "video": "a.mp4"}, "type 'video'"),
        ({"type": "image", "url": "x", "path": "y"}, "has url and path"),
        ({"type": "image", "image": ""}, "image ''"),
        ({"type": "image", "image": {"url": "x"}}, "image {'url': 'x'}"),
        ({"type": "image", "base64": ""}, "base64 ''"),
        ({"type": "image", "base64": 3}, "base64 3"),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, "source {"),
        ({"type": "image", "source": {"type": "base64"}}, "data None"),
        ({"type": "image"}, "has no image"),
        ({"type": "image", "image": None}, "has no image"),
    ],
)
def test_a_part_of_another_form_is_refused_with_its_place(part: object, says: str) -> None:
    line = refused([user("a"), {"role": "user", "content": [as_part("b"), part]}])
    assert "message 1, part 1" in line
    assert says in line


def test_a_long_value_is_not_repeated_in_the_message() -> None:
    refused([{"role": "user", "content": [{"type": "x" * 100_000}]}])
    refused([{"role": "x" * 100_000, "content": "hi"}])


def test_an_assistant_turn_may_only_call_tools() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    template = "{{ messages[0].content }}|{{ messages[0].tool_calls[0].id }}"
    assert render([call, {"role": "tool", "content": "3"}], template).text == "|1"
    assert "message 0 has the content None" in refused([{"role": "tool", "content": None}])


# --- built-in templates -------------------------------------------------------------------------

TALK = [
    user(b"a", "What is this?"),
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Which colour?"},
]


def named(name: str, messages: list[Any], **options: Any) -> str:
    return render_messages(messages, ChatTemplate.named(name), marker=M, **options).text


def test_vicuna_text_is_exact() -> None:
    assert named("vicuna", TALK) == (
        f"{SYSTEM}\nUSER: {M}\nWhat is this?\nASSISTANT: A cat.</s>"
        "\nUSER: Which colour?\nASSISTANT: "
    )


def test_vicuna_takes_the_system_message_of_the_messages() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert named("vicuna", messages) == "Be brief.\nUSER: Hi\nASSISTANT: "


def test_without_generation_prompt_the_text_ends_with_the_last_turn() -> None:
    done = [*TALK[:2]]
    assert named("vicuna", done, add_generation_prompt=False).endswith("\nASSISTANT: A cat.</s>")
    assert named("chatml", done, add_generation_prompt=False).endswith("A cat.<|im_end|>\n")


@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_vicuna_equals_the_chat_format_of_llama_cpp_python(system: str | None) -> None:
    chat_format = pytest.importorskip("llama_cpp.llama_chat_format")
    handler = chat_format.Llava15ChatHandler
    sandbox = pytest.importorskip("jinja2.sandbox").ImmutableSandboxedEnvironment
    given = [] if system is None else [{"role": "system", "content": system}]
    talk = [
        user("What  is\n this?"),
        {"role": "assistant", "content": " <A> {cat}\n"},
        user("Which ", "colour?\n"),
    ]
    theirs = given + talk
    if not system:
        theirs = [{"role": "system", "content": handler.DEFAULT_SYSTEM_MESSAGE}, *theirs]
    theirs[-2] = {**talk[1], "content": talk[1]["content"] + "</s>"}
    # As CHAT_FORMAT is written: with trim_blocks, which the handler sets, Jinja eats the newlines
    # that stand before USER and ASSISTANT.
    expected = (
        sandbox()
        .from_string(handler.CHAT_FORMAT)
        .render(messages=theirs, add_generation_prompt=True)
    )
    assert named("vicuna", given + talk) == expected


def test_mistral_text_is_exact() -> None:
    assert named("mistral", TALK) == (
        f"[INST] {M}\nWhat is this? [/INST] A cat.</s>[INST] Which colour? [/INST]"
    )
    system = {"role": "system", "content": "Be brief."}
    assert named("mistral", [system, *TALK[2:]]) == "[INST] Be brief.\n\nWhich colour? [/INST]"


def test_chatml_text_is_exact() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert named("chatml", [system, *TALK]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{M}\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nWhich colour?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", ["vicuna", "mistral", "chatml"])
def test_named_templates_write_bos_only_if_asked_and_keep_white_space(name: str) -> None:
    messages = [{"role": "user", "content": "  a\n\n b  \n"}]
    text = ChatTemplate.named(name).render(messages)
    assert "  a\n\n b  \n" in text
    assert ChatTemplate.named(name, bos="<s>").render(messages) == "<s>" + text


@pytest.mark.parametrize("name", ["vicuna", "mistral"])
def test_templates_without_tool_turns_say_so(name: str) -> None:
    with pytest.raises(PromptError, match=f"{name} has no turns of the role tool"):
        ChatTemplate.named(name).render([{"role": "tool", "content": "42"}])


def test_mistral_refuses_a_system_message_without_a_user_turn() -> None:
    system = {"role": "system", "content": "Be brief."}
    for rest in ([], [{"role": "assistant", "content": "Hi"}]):
        with pytest.raises(PromptError, match="only before a user turn"):
            ChatTemplate.named("mistral").render([system, *rest])


@pytest.mark.parametrize("name", ["llava", "", "VICUNA"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(PromptError, match="chatml, mistral, vicuna") as info:
        ChatTemplate.named(name)
    assert {CMGError, ValueError} < set(type(info.value).mro())


# --- Jinja --------------------------------------------------------------------------------------


def test_bos_eos_and_tools_reach_the_template() -> None:
    template = ChatTemplate.from_jinja(
        "{{ bos_token }}{{ tools | tojson if tools else 'none' }}{{ eos_token }}",
        bos="<s>",
        eos="<e>",
    )
    assert template.render([]) == "<s>none<e>"
    assert template.render([], tools=[{"a": "<é>"}]) == '<s>[{"a": "<é>"}]<e>'


def test_what_transformers_adds_to_jinja_works() -> None:
    source = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% if loop.first %}{% break %}{% endif %}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    assert plain(source).render([{"role": "user", "content": "x"}] * 2) == "x4"


def test_a_template_error_keeps_its_message() -> None:
    with pytest.raises(PromptError, match=r"roles must\s+alternate") as info:
        plain("{{ raise_exception('roles must alternate') }}").render([])
    assert info.value.__cause__ is not None


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[5].content.x }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include 'other' %}",
        "{{ unknown() }}",
    ],
)
def test_a_template_that_fails_or_breaks_out_is_a_prompt_error(source: Any) -> None:
    with pytest.raises(PromptError, match="chat template refuses"):
        plain(source).render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("source", ["{% if %}", "{{ a", "{% endfor %}", "{{ a | nofilter }}"])
def test_invalid_jinja_is_refused_when_the_template_is_made(source: Any) -> None:
    with pytest.raises(PromptError, match="not valid Jinja"):
        ChatTemplate.from_jinja(source)


def test_templates_are_values() -> None:
    assert plain() == plain()
    assert hash(plain()) == hash(plain())
    assert plain() != ChatTemplate.from_jinja(CONTENT_ONLY, bos="<s>")
    with pytest.raises(AttributeError):
        plain().__setattr__("source", "x")

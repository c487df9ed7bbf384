"""Questions and answers on a tiny pair: what is asked reaches the model, what is said is so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guided import N_IMAGE_TOKENS, QUESTION, data_url, ids, is_empty, open_vlm, png, user
from PIL import Image
from prompts import picture
from support import EXACT, Tiny
from tiny_llava import TinyPair
from unhooked import Unhooked

from cmg_gguf import (
    ContextLengthError,
    Guidance,
    GuidanceError,
    GuidedVLM,
    PromptError,
    Reply,
    Sampling,
    Token,
    TopRatio,
    UnsupportedError,
)
from cmg_gguf.guidance import PLAIN
from cmg_gguf.opening import STEPS, Strategy
from cmg_gguf.prompt.segments import ImageSegment, Prompt, Segment

SYSTEM = {"role": "system", "content": "A curious human."}
RAW = f"USER: <__media__>\n{QUESTION} ASSISTANT:"
STRONG = Guidance(alpha=3.0, tokens=TopRatio(1.0))


@pytest.fixture(scope="module")
def vlm(pair: TinyPair) -> Iterator[GuidedVLM]:
    with open_vlm(pair) as opened:
        yield opened


@pytest.fixture
def prompts(vlm: GuidedVLM, monkeypatch: pytest.MonkeyPatch) -> list[Prompt]:
    """Every prompt that is tokenized from here on."""
    seen: list[Prompt] = []
    tokenize = vlm.projector.tokenize

    def spy(*args: Any, **kwargs: Any) -> Prompt:
        seen.append(tokenize(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(vlm.projector, "tokenize", spy)
    return seen


def spelled(vlm: GuidedVLM, prompt: Prompt) -> str:
    """The prompt as the model reads it, with "{n}" for n image tokens; BOS is dropped.

    So is the space that SentencePiece puts in front of every run of text.
    """

    def spell(segment: Segment) -> str:
        if isinstance(segment, ImageSegment):
            return f"{{{segment.n_tokens}}}"
        said = b"".join(vlm.model.token_bytes(token) for token in segment.tokens.tolist())
        return said.decode().removeprefix(" ")

    return "".join(spell(segment) for segment in prompt.segments)


# --- the reply ---------------------------------------------------------------------------------


def test_the_pieces_of_a_stream_are_the_reply(vlm: GuidedVLM) -> None:
    stream = vlm.stream(QUESTION, [picture(0)], max_tokens=20)
    shown = ""
    seen: list[Token] = []
    for piece in stream:
        shown += piece.text
        seen += piece.tokens
        assert stream.text == shown
    assert (stream.reply.text, list(stream.reply.tokens)) == (shown, seen)
    assert ids(stream.reply) == ids(vlm.generate(QUESTION, [picture(0)], max_tokens=20))


def test_a_reply_counts_its_tokens_and_seconds(vlm: GuidedVLM) -> None:
    reply = vlm.generate(QUESTION, [picture(0), picture(1)], max_tokens=9)
    text = f"USER: \n\n{QUESTION} ASSISTANT:"
    assert reply.n_image_tokens == 2 * N_IMAGE_TOKENS
    n_text = reply.n_prompt_tokens - reply.n_image_tokens
    assert n_text == pytest.approx(len(vlm.model.tokenize(text, add_bos=True)), abs=2)
    assert len(reply.tokens) == 9
    assert reply.finish_reason == "length"
    seconds = reply.seconds
    assert min(seconds.encode, seconds.prefill, seconds.decode) > 0
    assert reply.guidance == Guidance()
    assert reply.layers == (2, 3, 4, 5)


def test_what_is_written_of_each_token_is_what_was_said(vlm: GuidedVLM) -> None:
    reply = vlm.generate(QUESTION, [picture(0)], max_tokens=20)
    said = b"".join(vlm.model.token_bytes(token.id) for token in reply.tokens)
    assert reply.text == said.decode().lstrip(" ") == "".join(t.text for t in reply.tokens).lstrip()
    assert reply.n_changed == sum(token.changed for token in reply.tokens) > 0


def test_a_reply_names_its_seed_and_the_seed_brings_it_back(vlm: GuidedVLM) -> None:
    def reply(seed: int | None) -> Reply:
        sampling = Sampling(temperature=1.5, seed=seed)
        return vlm.generate(QUESTION, [picture(0)], sampling=sampling, max_tokens=20)

    first, second = reply(None), reply(None)
    assert first.seed != second.seed
    assert ids(first) != ids(second)
    assert ids(reply(first.seed)) == ids(first)
    assert reply(77).seed == 77


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("guidance", [Guidance(), STRONG, Guidance(refresh="prompt", scope="all")])
def test_the_first_plain_token_is_what_an_unguided_answer_says_there(
    vlm: GuidedVLM, guidance: Guidance, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, seed=5)
    for seed in range(4):
        guided = vlm.generate(
            QUESTION, [picture(seed)], guidance=guidance, sampling=sampling, max_tokens=40
        )
        plain = vlm.generate(
            QUESTION, [picture(seed)], guidance=PLAIN, sampling=sampling, max_tokens=40
        )
        assert plain.n_changed == 0
        first = next(i for i, token in enumerate(guided.tokens) if token.changed)
        expected = [*ids(guided)[:first], guided.tokens[first].plain]
        assert expected == ids(plain)[: first + 1]


def test_without_guidance_it_is_llama_cpp(vlm: GuidedVLM, llama: Tiny) -> None:
    reply = vlm.generate(RAW, [picture(0)], raw=True, guidance=PLAIN, max_tokens=30)
    other = Unhooked(llama, EXACT)
    prompt = llama.prompt(RAW, 0)
    expected, row = [], other.prefill(prompt)
    for position in range(prompt.n_tokens, prompt.n_tokens + 30):
        expected.append(int(row.argmax()))
        other.decode(expected[-1:], [position], [0], [True])
        row = other.logits(0)
    other.close()
    assert ids(reply) == expected
    assert (reply.layers, reply.n_prompt_tokens) == ((), prompt.n_tokens)


@pytest.mark.parametrize("guidance", [PLAIN, Guidance(), STRONG])
def test_two_contexts_say_what_a_pair_says(
    vlm: GuidedVLM, pair: TinyPair, guidance: Guidance
) -> None:
    with open_vlm(pair, pairing="contexts") as other:
        replies = [
            one.generate(QUESTION, [picture(0)], guidance=guidance, max_tokens=30)
            for one in (vlm, other)
        ]
    assert ids(replies[0]) == ids(replies[1])
    assert [t.plain for t in replies[0].tokens] == [t.plain for t in replies[1].tokens]


def test_an_answer_goes_on_until_the_context_is_full(vlm: GuidedVLM, prompts: list[Prompt]) -> None:
    plain = vlm.generate(QUESTION, [picture(0)], guidance=PLAIN)
    guided = vlm.generate(QUESTION, [picture(0)])
    n_own = prompts[0].segments[-1].n_tokens
    n_free = 256 - plain.n_prompt_tokens
    assert plain.finish_reason == guided.finish_reason == "length"
    assert len(plain.tokens) == n_free + 1  # the last token needs no cell
    assert len(guided.tokens) == (n_free - n_own) // 2 + 1
    assert is_empty(vlm)


def test_a_stop_string_ends_the_answer_before_it(vlm: GuidedVLM) -> None:
    whole = vlm.generate(QUESTION, [picture(0)], max_tokens=40).text
    for stop in (whole[10:13], whole[25:32], whole[0:2]):
        reply = vlm.generate(QUESTION, [picture(0)], max_tokens=40, stop=stop)
        assert (reply.text, reply.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_log_probabilities_are_of_the_guided_choice(vlm: GuidedVLM) -> None:
    reply = vlm.generate(QUESTION, [picture(0)], max_tokens=10, top_logprobs=3)
    for token in reply.tokens:
        assert token.logprob is not None
        assert token.top[0] == (token.id, token.logprob)  # greedy
        assert sum(np.exp(logprob) for _, logprob in token.top) <= 1 + 1e-5


# --- what is asked -----------------------------------------------------------------------------


def test_a_question_is_the_users_turn_behind_its_images(
    vlm: GuidedVLM, prompts: list[Prompt]
) -> None:
    replies = [
        vlm.generate(QUESTION, [picture(0), picture(1)], max_tokens=9),
        vlm.generate([user(picture(0), picture(1), QUESTION)], max_tokens=9),
        vlm.generate(
            f"USER: <__media__>\n<__media__>\n{QUESTION} ASSISTANT:",
            [picture(0), picture(1)],
            raw=True,
            max_tokens=9,
        ),
    ]
    assert spelled(vlm, prompts[0]) == f"USER: {{16}}\n{{16}}\n{QUESTION} ASSISTANT:"
    assert ids(replies[0]) == ids(replies[1]) == ids(replies[2])


def test_images_of_several_turns_stand_where_they_were_shown(
    vlm: GuidedVLM, prompts: list[Prompt]
) -> None:
    messages = [
        SYSTEM,
        user("Look: ", picture(0), "What?"),
        {"role": "assistant", "content": "A cat."},
        user("And", picture(1), picture(2)),
    ]
    text = (
        "A curious human. USER: Look: <__media__>\nWhat? ASSISTANT: A cat.</s>"
        "USER: And<__media__>\n<__media__> ASSISTANT:"
    )
    pictures = [picture(seed) for seed in range(3)]
    in_order = vlm.generate(messages, max_tokens=12)
    assert ids(in_order) == ids(vlm.generate(text, pictures, raw=True, max_tokens=12))
    assert ids(in_order) != ids(vlm.generate(text, pictures[::-1], raw=True, max_tokens=12))
    assert spelled(vlm, prompts[0]) == (
        "A curious human. USER: Look: {16}\nWhat? ASSISTANT: A cat. USER: And{16}\n{16} ASSISTANT:"
    )


@pytest.mark.parametrize(
    "text",
    ["<__media__>", "<image>", "a <image> <__media__> b", "<__image_0__>", "[img-1]"],
)
def test_text_that_looks_like_a_marker_is_only_text(
    vlm: GuidedVLM, prompts: list[Prompt], text: str
) -> None:
    reply = vlm.generate(text, [picture(0)], max_tokens=2)
    assert spelled(vlm, prompts[0]) == f"USER: {{16}}\n{text} ASSISTANT:"
    assert reply.n_image_tokens == N_IMAGE_TOKENS
    reply = vlm.generate([user(text), user(text, picture(0), text)], max_tokens=2)
    assert spelled(vlm, prompts[1]) == f"USER: {text} USER: {text}{{16}}\n{text} ASSISTANT:"
    assert vlm.generate(text, max_tokens=2).n_image_tokens == 0


def test_the_real_marker_is_refused_even_if_someone_knows_it(vlm: GuidedVLM) -> None:
    with pytest.raises(PromptError, match="image marker"):
        vlm.generate(f"a {vlm.projector.marker} b", [picture(0)])


def test_two_models_have_two_markers(vlm: GuidedVLM, pair: TinyPair) -> None:
    with open_vlm(pair) as other:
        assert other.projector.marker != vlm.projector.marker


@pytest.mark.parametrize(("n_markers", "n_images"), [(0, 1), (1, 0), (2, 1), (1, 2)])
def test_a_raw_prompt_has_one_marker_an_image(
    vlm: GuidedVLM, n_markers: int, n_images: int
) -> None:
    with pytest.raises(PromptError, match=f"room for {n_markers} images and {n_images} were"):
        vlm.generate("<__media__> " * n_markers + "a", [picture(0)] * n_images, raw=True)


def test_a_raw_prompt_gets_one_beginning_of_sequence_and_no_template(
    vlm: GuidedVLM, prompts: list[Prompt]
) -> None:
    for text in ("a <__media__>b", "<s>a <__media__>b"):
        vlm.generate(text, [picture(0)], raw=True, max_tokens=1)
    first, second = (prompt.segments[0] for prompt in prompts)
    assert not isinstance(first, ImageSegment)
    assert not isinstance(second, ImageSegment)
    assert first.tokens[0] == second.tokens[0] == 1
    assert 1 not in [*first.tokens[1:], *second.tokens[1:]]
    assert spelled(vlm, prompts[0]) == "a {16}b"


def test_every_image_source_gives_the_same_answer(vlm: GuidedVLM, tmp_path: Path) -> None:
    pixels = picture(3)
    path = tmp_path / "a picture.png"
    path.write_bytes(png(pixels))
    sources: list[Any] = [
        pixels,
        path,
        str(path),
        path.as_uri(),
        path.read_bytes(),
        bytearray(path.read_bytes()),
        Image.fromarray(pixels),
        Image.open(path),
        data_url(pixels),
        np.asfortranarray(pixels),
    ]
    answers = {tuple(ids(vlm.generate(QUESTION, [source], max_tokens=12))) for source in sources}
    assert len(answers) == 1
    assert tuple(ids(vlm.generate(QUESTION, [picture(4)], max_tokens=12))) not in answers


def test_any_named_template_or_jinja_text_may_be_given(pair: TinyPair, vlm: GuidedVLM) -> None:
    template = vlm.model.chat_template()
    expected = ids(vlm.generate(QUESTION, [picture(0)], max_tokens=9))
    with open_vlm(pair, chat_template=template) as same:
        assert ids(same.generate(QUESTION, [picture(0)], max_tokens=9)) == expected
    for name in ("vicuna", "mistral", "chatml"):
        with open_vlm(pair, chat_template=name) as other:
            assert ids(other.generate(QUESTION, [picture(0)], max_tokens=9)) != expected
    with pytest.raises(PromptError, match="'alpaca'"):
        open_vlm(pair, chat_template="alpaca")


def test_a_prompt_that_is_too_long_says_so_before_the_stream_begins(vlm: GuidedVLM) -> None:
    with pytest.raises(ContextLengthError, match="the context has 256"):
        vlm.stream("What " * 200, [picture(0)])


@pytest.mark.parametrize(("n_ctx", "n_ubatch"), [(10, 512), (17, 512), (512, 8), (512, 17)])
def test_fewer_rows_than_sequences_do_not_end_the_process(
    pair: TinyPair, n_ctx: int, n_ubatch: int
) -> None:
    with GuidedVLM(pair.llm, pair.mmproj, n_ctx=n_ctx, n_ubatch=n_ubatch, n_threads=1) as vlm:
        assert vlm.generate("x", raw=True, max_tokens=2).tokens


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"strategy": "quick"}, "strategy='quick' is unknown: one of auto, exact"),
        ({"strategy": "approximate", "pairing": "contexts"}, "none in common"),
    ],
)
def test_a_strategy_that_cannot_be_is_refused(
    pair: TinyPair, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(UnsupportedError, match=says):
        open_vlm(pair, **settings)


@pytest.mark.parametrize("name", list(STEPS))
def test_a_strategy_that_is_named_is_followed(pair: TinyPair, name: Strategy) -> None:
    with open_vlm(pair, strategy=name) as vlm:
        assert vlm.engine.strategy == STEPS[name]


def test_a_setting_that_there_is_not_is_named_with_those_that_there_are(vlm: GuidedVLM) -> None:
    with pytest.raises(TypeError, match=r"no setting 'temperature'.* guidance, .*Sampling\("):
        vlm.generate(QUESTION, temperature=1.0)


@pytest.mark.parametrize("wrong", [1.0, "strong", {"alpha": 1.0}, None])
def test_the_engine_refuses_guidance_that_is_none_as_requests_do(
    vlm: GuidedVLM, wrong: Any
) -> None:
    prompt = vlm.tokenize(QUESTION, [picture(0)])
    for take in (vlm.engine.check, vlm.engine.open):
        with pytest.raises(GuidanceError, match="is no Guidance; write Guidance"):
            take(prompt, wrong)
    if wrong is not None:  # which is the default of a request
        for ask in (vlm.generate, vlm.stream):
            with pytest.raises(GuidanceError, match="is no Guidance; write Guidance"):
                ask(QUESTION, [picture(0)], guidance=wrong)
        with pytest.raises(GuidanceError, match="is no Guidance; write Guidance"):
            vlm.create_chat_completion([user(QUESTION)], guidance=wrong)

"""The command line: flags, what goes to which stream, exit codes, a conversation."""

from __future__ import annotations

import base64
import contextlib
import inspect
import json
import os
import pty
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import typer.main
from commands import PROGRAM, environment, flat, invoke, run
from PIL import Image
from prompts import picture
from tiny_llava import TinyPair

import cmg_gguf
from cmg_gguf.cli.app import app
from cmg_gguf.cli.asker import Asker, Stopped, fetched, user_message
from cmg_gguf.cli.compare import bracketed, mark
from cmg_gguf.cli.guidance_flags import GuidanceFlags
from cmg_gguf.cli.info import layer_bar
from cmg_gguf.cli.interrupt import Interrupt, counted
from cmg_gguf.cli.model_flags import CacheType, ModelFlags
from cmg_gguf.cli.model_flags import Strategy as ModelStrategy
from cmg_gguf.cli.options import (
    format_gate,
    format_layers,
    format_tokens,
    parse_gate,
    parse_layers,
    parse_tokens,
    split_images,
)
from cmg_gguf.cli.sampling_flags import SamplingFlags
from cmg_gguf.cli.screen import Screen, duration
from cmg_gguf.errors import GuidanceError, ImageError
from cmg_gguf.guidance import (
    AttentionMass,
    CumulativeMass,
    Disagreement,
    Guidance,
    LayerPolicy,
    LayerRange,
    LayerSet,
    LowestCosine,
    MeanStd,
    TokenPolicy,
    TopRatio,
)
from cmg_gguf.llama.context import CACHE_TYPES
from cmg_gguf.llama.projector import Projector
from cmg_gguf.opening import Strategy
from cmg_gguf.sampling import Sampling
from cmg_gguf.settings import Settings, save_settings
from cmg_gguf.stream import Stream
from cmg_gguf.vlm import GuidedVLM

QUESTION = "What is there?"
N = 12
GUIDANCE_FLAGS = (
    *("--alpha", "--beta", "--tokens", "--layers", "--scope", "--refresh", "--no-guidance"),
    *("--pairing", "--strategy"),
)


@dataclass(frozen=True)
class Bench:
    """A tiny pair, a picture, and the library's own answers to compare with."""

    pair: TinyPair
    image: Path
    vlm: GuidedVLM

    @property
    def model(self) -> list[str]:
        files = ["-m", str(self.pair.llm), "--mmproj", str(self.pair.mmproj)]
        return [*files, "-c", "2048", "-t", "1"]

    @property
    def asking(self) -> list[str]:
        """Flags of `run`: everything but the question."""
        return [*self.model, "--image", str(self.image), "-n", str(N)]

    def answer(self, **settings: Any) -> cmg_gguf.Reply:
        """As by a model just opened, to the bit: on 64-bit Arm one that goes on from kept cells
        differs by rounding."""
        ask: Any = {"max_tokens": N, "repeatable": True, **settings}
        return self.vlm.generate(QUESTION, [self.image], **ask)


@pytest.fixture(scope="module")
def bench(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    image = tmp_path_factory.mktemp("images") / "squares.png"
    Image.fromarray(picture(0)).save(image)
    with GuidedVLM(pair.llm, pair.mmproj, n_ctx=2048, n_threads=1) as vlm:
        yield Bench(pair, image, vlm)


# --- Policies as text ---

TOKENS: list[tuple[str, TokenPolicy]] = [
    ("top:0.5", TopRatio(0.5)),
    ("top:1", TopRatio(1.0)),
    ("std:-1.5", MeanStd(-1.5)),
    ("mass:0.8", CumulativeMass(0.8)),
]
LAYERS: list[tuple[str, LayerPolicy]] = [
    ("10-20", LayerSet(tuple(range(10, 21)))),
    ("3,5,7-9", LayerSet((3, 5, 7, 8, 9))),
    ("0-1", LayerSet((0, 1))),
    ("none", LayerSet(())),
    ("1/3-", LayerRange(1 / 3, 1.0)),
    ("0.5-", LayerRange(0.5, 1.0)),
    ("0.25-0.75", LayerRange(0.25, 0.75)),
    ("0.0-2/3", LayerRange(0.0, 2 / 3)),
    ("all", LayerRange(0.0, 1.0)),
    ("mass:0.5", AttentionMass(0.5)),
    ("cosine:0.25", LowestCosine(0.25)),
]


@pytest.mark.parametrize(("text", "policy"), TOKENS)
def test_token_policies_are_read_and_written_alike(text: str, policy: TokenPolicy) -> None:
    assert parse_tokens(text) == policy
    assert format_tokens(policy) == text


@pytest.mark.parametrize(("text", "policy"), LAYERS)
def test_layer_policies_are_read_and_written_alike(text: str, policy: LayerPolicy) -> None:
    assert parse_layers(text) == policy
    assert format_layers(policy) == text


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("none", None),
        ("disagreement:3", Disagreement(3.0)),
        ("disagreement:0.5", Disagreement(0.5)),
    ],
)
def test_gates_are_read_and_written_alike(text: str, gate: Disagreement | None) -> None:
    assert parse_gate(text) == gate
    assert format_gate(gate) == text
    assert parse_gate("disagreement") == Disagreement()


@pytest.mark.parametrize("text", ["", "3", "none:1", "disagreement:", "disagreement:0", "entropy"])
def test_no_gate(text: str) -> None:
    with pytest.raises(GuidanceError):
        parse_gate(text)


def test_a_gate_flag_wins_over_the_files_and_none_takes_it_away(tmp_path: Path) -> None:
    save_settings(tmp_path / "s.json", Settings(Guidance(alpha=2.0, gate=Disagreement(7.0))))
    for flag, gate in ((None, Disagreement(7.0)), ("none", None), ("disagreement", Disagreement())):
        flags = GuidanceFlags(settings=tmp_path / "s.json", gate=flag)
        assert flags.guidance() == Guidance(alpha=2.0, gate=gate)
    assert GuidanceFlags(gate="none").told().endswith("but for --gate")


def test_any_range_of_fractions_survives_the_way_through_text() -> None:
    rng = random.Random(0)
    for _ in range(200):
        start, stop = sorted([rng.random(), rng.choice([rng.random(), rng.randint(1, 9) / 9])])
        assert parse_layers(format_layers(LayerRange(start, stop))) == LayerRange(start, stop)


def test_other_spellings_of_layers() -> None:
    assert parse_layers("0.5-1") == LayerRange(0.5, 1.0)
    assert parse_layers("-1/3") == LayerRange(0.0, 1 / 3)
    assert parse_layers(" 1, 2 ,5 - 7") == LayerSet((1, 2, 5, 6, 7))
    assert parse_layers("mass") == AttentionMass()
    assert parse_tokens("std") == MeanStd()


@pytest.mark.parametrize(
    "text", ["", "half", "top:", "top:x", "top:2", "top:1/0", "top:nan", "mean:1"]
)
def test_no_token_policy(text: str) -> None:
    with pytest.raises(GuidanceError):
        parse_tokens(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "10-", "-5", "5-3", "1,,2", "3,x", "10-99999"),
        *("0.5", "1/3", "0.9-0.1", "1.5-", "1/0-"),
        *("mass:0", "cosine:2", "top:0.5"),
    ],
)
def test_no_layer_policy(text: str) -> None:
    with pytest.raises(GuidanceError):
        parse_layers(text)


def test_images_are_split_at_commas_except_in_data_urls_and_names_of_files(tmp_path: Path) -> None:
    odd = tmp_path / "a,b.png"
    odd.touch()
    url = "data:image/png;base64,AAAA"
    assert split_images(["a.png,b.png", "c.png"]) == ["a.png", "b.png", "c.png"]
    assert split_images([url, str(odd)]) == [url, str(odd)]
    assert split_images(["x" * 10_000 + ",y"]) == ["x" * 10_000, "y"]


@pytest.mark.parametrize("source", ["", " ", ",", "a.png,", ",a.png", "a.png,,b.png"])
def test_an_image_without_a_name_is_an_error_instead_of_no_image(source: str) -> None:
    with pytest.raises(ImageError, match="names no image"):
        split_images(["c.png", source])
    for command in (["run", "-p", QUESTION], ["chat"]):
        result = invoke(*command, "--image", source)
        assert result.exit_code == 1
        assert "names no image" in flat(result.stderr)
        assert result.stdout == ""


def test_an_image_may_come_from_standard_input(bench: Bench) -> None:
    asking = [*bench.model, "-n", str(N), "--image"]
    expected = invoke("run", *asking, str(bench.image), "-p", QUESTION)
    piped = invoke("run", *asking, "-", "-p", QUESTION, input=bench.image.read_bytes())
    assert (piped.exit_code, piped.stdout) == (0, expected.stdout)


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="needs /dev/fd")
def test_an_image_may_come_from_a_pipe_and_as_base64(bench: Bench) -> None:
    expected = invoke("run", *bench.asking, "-p", QUESTION)
    reading, writing = os.pipe()
    os.write(writing, bench.image.read_bytes())  # less than a pipe holds
    os.close(writing)
    text = base64.b64encode(bench.image.read_bytes()).decode()
    for source in (f"/dev/fd/{reading}", text):
        flags = [*bench.model, "-n", str(N), "--image", source]
        assert invoke("run", *flags, "-p", QUESTION).stdout == expected.stdout
    os.close(reading)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["run", "--image", "-"], "standard input holds the image; write -p TEXT"),
        (["run", "--image", "-", "-p", "-"], "standard input holds the image; write -p TEXT"),
        (["run", "--image", "-,-", "-p", QUESTION], "standard input holds one image"),
        (["run", "--image", "-", "-p", QUESTION], "0 bytes"),
        (["chat", "--image", "-"], "standard input holds what you say"),
    ],
)
def test_standard_input_is_read_for_one_thing(flags: list[str], says: str) -> None:
    result = invoke(*flags, input="")
    assert result.exit_code == (1 if says == "0 bytes" else 2)
    assert says in flat(result.stderr)


def test_defaults_are_those_of_the_library() -> None:
    assert GuidanceFlags().guidance() == Guidance()
    assert SamplingFlags().sampling() == Sampling()
    assert set(get_args(CacheType)) == set(CACHE_TYPES)
    names = {"ctx_size": "n_ctx", "ubatch_size": "n_ubatch", "threads": "n_threads"}
    names |= {"cache_type_k": "type_k", "cache_type_v": "type_v"}
    defaults = {n: p.default for n, p in inspect.signature(GuidedVLM).parameters.items()}
    assert get_args(ModelStrategy) == get_args(Strategy)
    assert "strategy" not in ModelFlags().options()  # each command has its own
    assert ModelFlags().options()["encoder"] == defaults["encoder"]
    assert ModelFlags(stock_encoder=True).options()["encoder"] == "stock"
    for flag in ("chat_template", "pairing", "n_gpu_layers", "verbose", *names):
        assert getattr(ModelFlags(), flag) == defaults[names.get(flag, flag)], flag


# --- Comparing ---


def test_words_that_differ_are_marked_and_nothing_is_lost() -> None:
    plain, guided = mark("A cat, a dog.\nEnd", "A cat, a big fox.\nEnd")
    assert bracketed(plain) == "A cat, a [[dog]].\nEnd"
    assert bracketed(guided) == "A cat, a [[big]] [[fox]].\nEnd"
    rng = random.Random(0)
    for _ in range(50):
        texts = ["".join(rng.choices("ab' .,\n", k=rng.randrange(30))) for _ in range(2)]
        for text, parts in zip(texts, mark(texts[0], texts[1]), strict=True):
            assert "".join(part.text for part in parts) == text


def test_equal_answers_have_no_marks() -> None:
    for parts in mark("It's a cat.", "It's a cat."):
        assert not any(part.differs for part in parts)


def test_compare_writes_both_answers_with_marks(bench: Bench) -> None:
    result = invoke("run", *bench.asking, "-p", QUESTION, "--compare", "-q")
    plain, guided = bench.answer(guidance=Guidance(alpha=0.0, beta=0.0)), bench.answer()
    parts = mark(plain.text, guided.text)
    assert guided.n_changed > 0
    assert result.exit_code == 0
    assert bracketed(parts[0]) in result.stdout
    assert bracketed(parts[1]) in result.stdout
    assert f"guided ({N} tokens, {guided.n_changed} changed, " in result.stdout
    assert "\x1b" not in result.stdout


# --- run ---


def test_the_answer_alone_is_on_stdout(bench: Bench) -> None:
    done = run("run", *bench.asking, "-p", QUESTION, check=True)
    reply = bench.answer()
    assert done.stdout == reply.text + "\n"
    assert done.stderr.startswith(f"{N} tokens, {reply.n_changed} changed · cut off by -n")
    assert done.stderr.count("\n") == 1
    assert "layers 2-5 masked" in done.stderr


def test_quiet_leaves_stderr_empty(bench: Bench) -> None:
    result = invoke("run", *bench.model, "-p", QUESTION, "-n", "2", "-q", "--top-k", "3")
    assert result.stderr == ""
    assert result.stdout.endswith("\n")


@pytest.mark.parametrize("flags", [[], ["-p", "-"]])
def test_a_prompt_can_be_piped(bench: Bench, flags: list[str]) -> None:
    result = invoke("run", *bench.asking, *flags, input=QUESTION + "\n")
    assert result.stdout == bench.answer().text + "\n"


def test_a_blank_prompt_from_a_pipe_is_none(bench: Bench) -> None:
    result = invoke("run", *bench.asking, "-p", "-", input=" \n\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "standard input holds none" in flat(result.stderr)


def test_json_holds_what_the_library_says(bench: Bench) -> None:
    result = invoke("run", *bench.asking, "-p", QUESTION, "--json")
    said, reply = json.loads(result.stdout), bench.answer()
    assert result.stdout.count("\n") == 1
    assert said["text"] == reply.text
    assert said["finish_reason"] == "length"
    assert [(t["id"], t["text"], t["plain"], t["changed"]) for t in said["tokens"]] == [
        (t.id, t.text, t.plain, t.changed) for t in reply.tokens
    ]
    assert said["usage"]["completion_tokens"] == N
    assert said["cmg"]["layers"] == [2, 3, 4, 5]
    assert said["cmg"]["n_changed"] == reply.n_changed
    assert (said["prompt"], said["images"]) == (QUESTION, [str(bench.image)])
    assert (said["model"], said["mmproj"]) == (str(bench.pair.llm), str(bench.pair.mmproj))


@pytest.mark.parametrize(("flags", "reuses"), [([], True), (["--prefix-cells", "0"], False)])
def test_the_guided_answer_of_a_comparison_reuses_the_plain_ones_image(
    bench: Bench, flags: list[str], reuses: bool
) -> None:
    asking = ["run", *bench.asking, *flags, "-p", QUESTION, "--compare"]
    said = json.loads(invoke(*asking, "--json").stdout)
    cached = [
        said[name]["usage"]["prompt_tokens_details"]["cached_tokens"]
        for name in ("plain", "guided")
    ]
    assert cached[0] == 0
    assert (cached[1] > said["guided"]["cmg"]["n_image_tokens"]) == reuses
    assert (f"prompt ({cached[1]} reused) " in invoke(*asking).stderr) == reuses


def test_json_of_a_comparison_has_both_with_the_same_seed(bench: Bench) -> None:
    result = invoke("run", *bench.asking, "-p", QUESTION, "--json", "--compare", "--temp", "1")
    said = json.loads(result.stdout)
    assert not said["plain"]["cmg"]["guided"]
    assert said["guided"]["cmg"]["guided"]
    assert said["plain"]["cmg"]["seed"] == said["guided"]["cmg"]["seed"]


def test_flags_reach_the_library(bench: Bench) -> None:
    flags = ["--alpha", "3", "--beta", "0.05", "--tokens", "mass:0.8", "--layers", "1,3"]
    flags += ["--scope", "all", "--refresh", "prompt", "--temp", "0.8", "--seed", "7"]
    flags += ["--top-k", "20", "--repeat-penalty", "1.3", "--pairing", "contexts"]
    result = invoke("run", *bench.asking, "-p", QUESTION, *flags, "--json")
    with GuidedVLM(*bench.pair, n_ctx=2048, n_threads=1, pairing="contexts") as vlm:
        reply = vlm.generate(
            QUESTION,
            [bench.image],
            max_tokens=N,
            guidance=Guidance(
                alpha=3.0,
                beta=0.05,
                tokens=CumulativeMass(0.8),
                layers=[1, 3],
                scope="all",
                refresh="prompt",
            ),
            sampling=Sampling(temperature=0.8, seed=7, top_k=20, repeat_penalty=1.3),
        )
    assert json.loads(result.stdout)["text"] == reply.text


@pytest.mark.parametrize("strategy", ["auto", "exact"])
def test_every_exact_strategy_gives_the_same_answer(bench: Bench, strategy: str) -> None:
    result = invoke("run", *bench.asking, "-p", QUESTION, "--strategy", strategy)
    assert result.stdout == bench.answer().text + "\n"


def test_an_approximate_strategy_cannot_have_two_contexts(bench: Bench) -> None:
    flags = ["--strategy", "approximate", "--pairing", "contexts"]
    result = invoke("run", *bench.asking, "-p", QUESTION, *flags)
    assert result.exit_code == 1
    assert "none in common" in result.stderr


def test_no_guidance_is_plain_decoding(bench: Bench) -> None:
    result = invoke("run", *bench.asking, "-p", QUESTION, "--no-guidance")
    assert result.stdout == bench.answer(guidance=Guidance(alpha=0.0, beta=0.0)).text + "\n"
    assert "plain decoding" in result.stderr


def test_an_answer_keeps_to_a_grammar(bench: Bench, tmp_path: Path) -> None:
    grammar = tmp_path / "yes.gbnf"
    grammar.write_text('root ::= "Yes" | "No"')
    result = invoke("run", *bench.asking, "-p", QUESTION, "--grammar-file", str(grammar))
    assert result.stdout in ("Yes\n", "No\n")
    result = invoke("run", *bench.asking, "-p", QUESTION, "-j", '{"enum": ["cat"]}')
    assert result.stdout == '"cat"\n'


def test_flags_without_effect_are_named(bench: Bench) -> None:
    result = invoke("run", *bench.model, "-p", QUESTION, "-n", "1", "--top-k", "3")
    assert "note: --top-k without effect" in result.stderr
    assert "note: no --image" in result.stderr


@pytest.mark.parametrize(("flags", "noted"), [([], True), (["-ub", "512"], False), (["-q"], False)])
def test_a_step_that_is_larger_for_the_sake_of_pictures_is_noted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, flags: list[str], noted: bool
) -> None:
    asked = ["run", *bench.model, "-p", QUESTION, "-n", "1", *flags]
    assert "a step has room" not in invoke(*asked).stderr
    monkeypatch.setattr(Projector, "rows_at_once", lambda _: 1088)
    said = flat(invoke(*asked).stderr)
    assert (
        "note: this model decodes a picture at once, so a step has room for 1088" in said
    ) == noted
    assert ("-ub 512 takes small pictures only" in said) == noted


# --- Errors and exits ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-m", "missing.gguf"], "missing.gguf does not exist"),
        (["--image", "missing.png"], "'missing.png' cannot be opened"),
        (["--layers", "3,40"], "layer 40 is out of range: this model has 6 layers (0-5)"),
        (["-c", "256", "-p", "there " * 300], "raise n_ctx or shorten the prompt (--ctx-size, -c)"),
        (["--grammar", "root ::= nothing"], "grammar"),
        (["--chat-template", "nope"], "no chat template is named 'nope'"),
    ],
)
def test_an_error_is_one_line_and_exit_1(bench: Bench, flags: list[str], message: str) -> None:
    result = invoke("run", *bench.asking, "-p", QUESTION, *flags)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "most"], "'most' is no choice of image tokens: write top:0.5"),
        (["--layers", "10-"], "'10-' has no end"),
        (["--alpha", "101"], "Invalid value for '--alpha'"),
        (["--no-guidance", "--alpha", "2"], "leave those two out"),
        (["--no-guidance", "--compare"], "nothing to compare"),
        (["--grammar", "x", "-j", "{}"], "give one of them at most"),
        (["-j", "{"], "no JSON"),
        (["-n", "0"], "0 tokens are no answer"),
        (["-ctk", "q3"], "q8_0"),
        (["-p", ""], "it is empty"),
        (["-p", " \n\t"], "it is empty"),
    ],
)
def test_wrong_usage_is_exit_2(bench: Bench, flags: list[str], message: str) -> None:
    result = invoke("run", *bench.asking, "-p", QUESTION, *flags)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in flat(result.stderr)


def test_half_a_pair_is_said_to_be_half() -> None:
    for command in ("run", "chat"):
        result = invoke(command, "--mmproj", "x.gguf")
        assert result.exit_code == 2
        assert "'--model' / '-m': an image projector is only read" in flat(result.stderr)
        assert "'--mmproj': none is given" in flat(invoke(command, "-m", "x.gguf").stderr)


def test_a_bug_keeps_its_traceback(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Asker, "ask", broken)
    result = invoke("run", *bench.asking, "-p", QUESTION)
    assert isinstance(result.exception, ZeroDivisionError)


def test_ctrl_c_keeps_what_was_said_and_exits_130(bench: Bench) -> None:
    flags = ["--image", str(bench.image), "-c", "20000", "-p", QUESTION]
    with subprocess.Popen(
        [*PROGRAM, "run", *bench.model, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=bench.image.parent,
        bufsize=0,  # what read() left in a buffer, communicate() would not see
    ) as process:
        assert process.stdout is not None
        begun = process.stdout.read(40)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    said, text = (begun + out).decode(), bench.answer().text
    n = min(len(said) - 1, len(text))
    assert said.endswith("\n")
    assert said[:n] == text[:n]


def test_ctrl_c_behind_the_last_look_at_it_ends_the_block() -> None:
    def block(error: type[Exception] | None) -> None:
        with Interrupt() as interrupt:
            interrupt.check()
            signal.raise_signal(signal.SIGINT)
            if error is not None:
                raise error

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        block(None)
    with pytest.raises(ZeroDivisionError):  # which says more
        block(ZeroDivisionError)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("pressed_at", [1, 2])
def test_ctrl_c_is_noted_only_where_there_is_something_to_go_on_with(
    pressed_at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with counted(Screen(), "pictures") as progress:
            for done in (0, 1):
                progress(done, 1)
                if done + 1 == pressed_at:
                    signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert ("goes on from here" in capsys.readouterr().err) == (pressed_at == 1)


def test_ctrl_c_while_a_hub_is_asked_about_files_that_are_here_is_not_lost() -> None:
    def pair(progress: Any) -> tuple[Path, Path]:
        signal.raise_signal(signal.SIGINT)
        return Path("model"), Path("mmproj")  # without a word of progress

    flags: Any = SimpleNamespace(hf_repo="owner/repo", pair=pair)
    with pytest.raises(KeyboardInterrupt):
        fetched(Screen(quiet=True), flags)


def press_behind_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C behind the last piece of every answer."""
    close = Stream.close

    def pressed(stream: Stream) -> None:
        signal.raise_signal(signal.SIGINT)
        close(stream)

    monkeypatch.setattr(Stream, "close", pressed)


def test_ctrl_c_behind_the_last_piece_is_not_lost(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    press_behind_answers(monkeypatch)
    said: list[cmg_gguf.Piece] = []
    asker = Asker(bench.vlm, Screen(quiet=True), N, 0.0)
    messages = [user_message(QUESTION, [bench.image])]
    with pytest.raises(Stopped) as stopped:
        asker.ask(messages, Guidance(), Sampling(), said.append)
    assert stopped.value.text == "".join(piece.text for piece in said) != ""
    result = invoke("run", *bench.asking, "-p", QUESTION, "--compare")
    assert (result.exit_code, result.stdout) == (130, "")  # the guided answer is not begun


def test_nobody_reading_is_a_quiet_end(bench: Bench) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*PROGRAM, "run", *bench.asking, "-p", QUESTION],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=bench.image.parent,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# --- chat ---


def test_a_conversation_from_a_pipe(bench: Bench) -> None:
    image = f"/image {bench.image}\n"
    script = f"""\
{QUESTION}
/image {bench.image.parent / "missing.png"}
/nonsense
/image

And where?
/clear
{image}{QUESTION}
/help
/quit
never asked
"""
    result = invoke("chat", *bench.asking, input=script)
    first, second, third = result.stdout.splitlines()
    assert first == third == bench.answer().text
    history: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image", "image": bench.image}, part(QUESTION)]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": [part("And where?")]},
    ]
    assert second == bench.vlm.generate(history, max_tokens=N).text
    assert result.stderr.count("squares.png, 56 x 56 pixels, goes with the next message") == 2
    assert "error: image file" in result.stderr
    assert "there is no command /nonsense; /help lists them" in result.stderr
    assert "/image takes the path of an image" in result.stderr
    assert "forget the conversation" in result.stderr


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["/image missing.png"], 1),
        (["/image missing.png", QUESTION, "/quit"], 1),
        (["/image", QUESTION], 1),
        (["/nonsense", QUESTION], 1),
        (["there " * 300, QUESTION], 1),
        ([QUESTION, "", "/clear", "/help", "/quit", "/nonsense"], 0),
    ],
)
def test_a_piped_chat_in_which_a_line_failed_ends_with_1(
    bench: Bench, lines: list[str], code: int
) -> None:
    result = invoke("chat", *bench.asking, "-c", "256", input="\n".join(lines))
    assert result.exit_code == code
    assert bool(result.stdout) == (QUESTION in lines)  # the others were done


def test_a_warning_is_one_line_on_standard_error(bench: Bench) -> None:
    flags = ["-q", "-ngl", "9", "--device", "none"]
    done = run("run", *bench.asking, "-p", QUESTION, *flags)
    assert done.returncode == 0
    assert done.stdout == bench.answer().text + "\n"
    assert done.stderr == "warning: n_gpu_layers=9 puts no layer on a device: devices names none\n"


def test_who_types_sees_what_failed_and_leaves_with_0(bench: Bench) -> None:
    typed, keyboard = pty.openpty()
    os.write(typed, b"/image missing.png\n/nonsense\n/quit\n")
    done = run("chat", *bench.model, stdin=keyboard)
    os.close(keyboard)
    os.close(typed)
    assert done.returncode == 0
    assert "error: image file 'missing.png'" in done.stderr
    assert "there is no command /nonsense" in done.stderr


def test_a_failed_turn_leaves_no_trace_and_its_images_wait(bench: Bench) -> None:
    too_long = "there " * 300
    flags = [*bench.asking, "-c", "256", "-q"]
    result = invoke("chat", *flags, input=f"{too_long}\n{QUESTION}\n{too_long}\nAnd where?\n")
    alone = invoke("chat", *flags, input=f"{QUESTION}\nAnd where?\n")
    assert result.stderr.count("error: the prompt needs") == 2
    assert result.stderr.count("/clear makes room") == 1
    assert result.stdout == alone.stdout
    assert result.stdout.startswith(bench.answer().text + "\n")


def test_a_system_prompt_survives_clear(bench: Bench) -> None:
    flags = [*bench.model, "-n", str(N), "-sys", "Answer briefly.", "-q"]
    result = invoke("chat", *flags, input=f"{QUESTION}\n/clear\n{QUESTION}\n")
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": QUESTION},
    ]
    assert result.stdout.splitlines() == [bench.vlm.generate(messages, max_tokens=N).text] * 2


def test_ctrl_c_in_a_chat_ends_that_answer_only(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, asked = Asker.ask, []

    def interrupted(self: Asker, messages: Any, guidance: Any, sampling: Any, show: Any) -> Any:
        asked.append(messages)

        def show_then_stop(piece: cmg_gguf.Piece) -> None:
            show(piece)
            if len(asked) == 1:
                signal.raise_signal(signal.SIGINT)

        return original(self, messages, guidance, sampling, show_then_stop)

    monkeypatch.setattr(Asker, "ask", interrupted)
    result = invoke("chat", *bench.asking, input=f"{QUESTION}\nAnd where?\n")
    partial, answer = result.stdout.splitlines()
    assert result.exit_code == 0
    assert bench.answer().text.startswith(partial)
    assert len(answer) > len(partial) > 0
    assert asked[1][1] == {"role": "assistant", "content": partial}
    assert "stopped" in result.stderr


def test_a_chat_keeps_an_answer_behind_which_ctrl_c_comes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, asked = Asker.ask, []

    def ask(self: Asker, messages: Any, *given: Any) -> Any:
        asked.append(messages)
        return original(self, messages, *given)

    def press(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Asker, "ask", ask)
    monkeypatch.setattr(Asker, "summarise", press)
    result = invoke("chat", *bench.asking, input=f"{QUESTION}\nAnd where?\n")
    answer = result.stdout.splitlines()[0]
    assert asked[1][:2] == [asked[0][0], {"role": "assistant", "content": answer}]
    assert "before the first word" not in result.stderr


def test_a_chat_shows_what_it_keeps_of_an_answer_that_would_have_been_marked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    press_behind_answers(monkeypatch)
    result = invoke("chat", *bench.asking, "--evidence", input=f"{QUESTION}\n")
    assert result.stdout == bench.answer().text + "\n"
    assert result.stderr.endswith("stopped\n")


# --- info, help, version ---


def test_info_as_json(bench: Bench) -> None:
    files = bench.model[:4]
    facts = json.loads(invoke("info", *files, "--layers", "0,2-3", "--json").stdout)
    assert facts["cmg_gguf"] == cmg_gguf.__version__
    assert facts["devices"][0]["backend"]
    assert facts["model"]["layers"] == bench.vlm.model.n_layer
    assert facts["model"]["chat_template"] == "own"
    assert facts["mmproj"]["projector"] == "mlp"
    assert (facts["mmproj"]["image_size"], facts["mmproj"]["image_tokens"]) == (56, 16)
    assert facts["guidance"] == {"layers": "0,2-3", "masked": [0, 2, 3]}


def test_info_for_people(bench: Bench) -> None:
    shown = flat(invoke("info", *bench.model[:4]).stdout)
    assert "masked layers ░░████ 2-5 of 0-5 (1/3-)" in shown
    assert "image tokens 16 for 56 x 56 pixels" in shown
    dynamic = flat(invoke("info", *bench.model[:2], "--layers", "mass:0.5").stdout)
    assert "masked layers chosen by each prompt (mass:0.5)" in dynamic
    built_in = flat(invoke("info").stdout)
    assert "llama-cpp-python" in built_in
    assert "image tokens 64 for 112 x 112 pixels" in built_in
    assert layer_bar([0, 2], 4).plain == "█░█░"


def test_info_refuses_a_layer_that_is_not_there(bench: Bench) -> None:
    result = invoke("info", *bench.model[:4], "--layers", "6")
    assert result.exit_code == 1
    assert "this model has 6 layers (0-5)" in result.stderr


@pytest.mark.parametrize("command", ["run", "chat", "info", "doctor"])
def test_help_explains_every_flag(command: str) -> None:
    shown = invoke(command, "--help").stdout
    group: Any = typer.main.get_command(app)
    for parameter in group.commands[command].params:
        for name in parameter.opts:
            assert f" {name} " in shown, name
        assert parameter.help, parameter.name
    if command in ("run", "chat"):
        assert all(f" {flag} " in shown for flag in GUIDANCE_FLAGS)
    assert "Examples:" in shown


def test_help_says_how_many_threads_none_are() -> None:
    shown = flat(invoke("run", "--help").stdout)
    assert "0 = all usable CPUs up to 4, else half of them. 1 where other programs" in shown


def test_help_and_version_need_no_llama() -> None:
    code = "import sys; from cmg_gguf.cli import main\ntry: main(sys.argv[1:])\n"
    code += "except SystemExit as end: sys.exit(end.code or 'llama_cpp' in sys.modules)"
    for flags in (["run", "--help"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout == f"cmg-gguf {cmg_gguf.__version__}\n"


# --- Progress ---


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Screen().counting("pictures") as count:
        for seconds, done in ((0, 5), (29, 10), (31, 36), (40, 40), (62, 67), (90, 200)):
            now = 100.0 + seconds
            count(done, 200)
    assert capsys.readouterr().err.splitlines() == [
        "36 of 200 pictures, 1.00/s, 3 min left",
        "67 of 200 pictures, 1.00/s, 2 min left",
    ]
    with Screen(quiet=True).counting("pictures") as count:
        for now in (100.0, 200.0):
            count(int(now), 300)
    assert capsys.readouterr().err == ""
    assert [duration(seconds) for seconds in (5, 120, 3600, 12_010)] == [
        *("5 s", "2 min", "1 h 0 min", "3 h 20 min")
    ]


# --- Terminals ---


def test_terminals_show_progress_and_changes_and_pipes_do_not(bench: Bench) -> None:
    written = on_terminals("run", *bench.asking, "-p", QUESTION, "--show-changes")
    reply = bench.answer()
    changed = next(token.text.strip() for token in reply.tokens if token.changed)
    assert f"\x1b[4;33m{changed}\x1b[0m" in written["stdout"]
    assert "encoding the images" in written["stderr"]
    assert "reading the prompt" in written["stderr"]
    plain = invoke("run", *bench.asking, "-p", QUESTION, "--show-changes")
    assert plain.stdout == reply.text + "\n"
    assert "\x1b" not in plain.stderr


def test_terminals_show_differing_words_in_colour(bench: Bench) -> None:
    written = on_terminals("run", *bench.asking, "-p", QUESTION, "--compare", "-q")
    assert "\x1b[1;32m" in written["stdout"]
    assert "[[" not in written["stdout"]
    assert written["stderr"] == ""


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def on_terminals(*arguments: str) -> dict[str, str]:
    """What the program writes to two terminals of their own."""
    ends = {name: pty.openpty() for name in ("stdout", "stderr")}
    environ = {**environment(), "TERM": "xterm-256color", "COLUMNS": "80"}
    streams: dict[str, Any] = {name: writer for name, (_, writer) in ends.items()}
    process = subprocess.Popen([*PROGRAM, *arguments], env=environ, cwd="/", **streams)
    for _, writer in ends.values():
        os.close(writer)
    threads = {name: Reading(reader) for name, (reader, _) in ends.items()}
    assert process.wait(timeout=60) == 0
    return {name: thread.text() for name, thread in threads.items()}


class Reading(threading.Thread):
    """Reads a terminal until its other end is closed."""

    def __init__(self, reader: int) -> None:
        super().__init__()
        self._reader, self._data = reader, b""
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):  # how a pty says that it is over
            while data := os.read(self._reader, 4096):
                self._data += data

    def text(self) -> str:
        self.join()
        os.close(self._reader)
        return self._data.decode()

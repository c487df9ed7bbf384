"""llama.cpp's log: silence unless asked for, errors in exceptions, and no Ctrl-C lost in it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llama_cpp
import pytest
from guided import QUESTION, open_vlm
from llama_cpp import mtmd_cpp
from prompts import picture
from tiny_llava import TinyPair

from cmg_gguf import ModelError, _core
from cmg_gguf.llama.chunks import HAS_PARTS
from cmg_gguf.llama.log import captured_errors, captured_stderr, set_verbose


@pytest.fixture
def quiet_again() -> Iterator[None]:
    yield
    set_verbose(False)


def test_a_quiet_model_writes_nothing(
    pair: TinyPair, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(pair.llm.read_bytes()[:5000])
    with open_vlm(pair) as vlm:
        vlm.generate(QUESTION, [picture(0)], max_tokens=3)
        with pytest.raises(ModelError):
            open_vlm(TinyPair(broken, pair.mmproj))
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.usefixtures("quiet_again")
def test_a_verbose_model_writes_to_stderr_alone(
    pair: TinyPair, capfd: pytest.CaptureFixture[str]
) -> None:
    open_vlm(pair, verbose=True).close()
    out, err = capfd.readouterr()
    assert out == ""
    assert "llama_model_loader" in err
    open_vlm(pair, verbose=False).close()
    assert tuple(capfd.readouterr()) == ("", "")


def test_errors_are_collected_in_order_and_others_are_not(pair: TinyPair, tmp_path: Path) -> None:
    for n_missing in range(2):
        with captured_errors() as errors:
            for _ in range(n_missing):
                path = os.fsencode(tmp_path / "missing.gguf")
                params = llama_cpp.llama_model_default_params()
                assert not llama_cpp.llama_model_load_from_file(path, params)
        assert bool(errors) == bool(n_missing)
        assert all("\n" not in line and line.strip() == line for line in errors)


def load(path: Path) -> None:
    """Has llama.cpp log that the file, which is not there, cannot be opened."""
    params = llama_cpp.llama_model_default_params()
    assert not llama_cpp.llama_model_load_from_file(os.fsencode(path), params)


def load_projector(path: Path) -> None:
    """The same of mtmd, whose log is its own."""
    params = mtmd_cpp.mtmd_context_params_default()
    assert not mtmd_cpp.mtmd_init_from_file(os.fsencode(path), None, params)


def files_named(errors: list[str]) -> set[str]:
    return set(re.findall(r"missing_\w+", " ".join(errors)))


@pytest.mark.parametrize("fail", [load, load_projector])
def test_threads_that_fail_at_once_have_their_own_errors(
    fail: Callable[[Path], None], tmp_path: Path
) -> None:
    n_threads, n_rounds = 4, 100
    start = threading.Barrier(n_threads)

    def rounds(thread: int) -> list[set[str]]:
        found = []
        start.wait()
        for i in range(n_rounds):
            with captured_errors() as errors:
                fail(tmp_path / f"missing_{thread}_{i}")
            found.append(files_named(errors))
        return found

    with ThreadPoolExecutor(n_threads) as pool:
        for thread, found in enumerate(pool.map(rounds, range(n_threads))):
            assert found == [{f"missing_{thread}_{i}"} for i in range(n_rounds)]


def test_the_inner_of_two_captures_has_the_errors(tmp_path: Path) -> None:
    with captured_errors() as outer:
        load(tmp_path / "missing_1")
        with captured_errors() as inner:
            load(tmp_path / "missing_2")
        load(tmp_path / "missing_3")
    assert files_named(inner) == {"missing_2"}
    assert files_named(outer) == {"missing_1", "missing_3"}


def test_a_capture_stays_open_when_that_of_another_thread_ends(tmp_path: Path) -> None:
    begun, ended = threading.Event(), threading.Event()

    def other() -> list[str]:
        with captured_errors() as errors:
            begun.set()
            ended.wait()
            load(tmp_path / "missing_other")
        return errors

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(other)
        begun.wait()
        with captured_errors() as errors:
            load(tmp_path / "missing_own")
        ended.set()
        assert files_named(errors) == {"missing_own"}
        assert files_named(future.result()) == {"missing_other"}


@pytest.mark.usefixtures("quiet_again")
def test_what_a_thread_without_a_capture_logs_goes_where_it_went(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    set_verbose(True)
    written = []
    for capturing in (False, True, False):
        block: contextlib.AbstractContextManager[list[str]] = contextlib.nullcontext([])
        with captured_errors() if capturing else block as errors:
            thread = threading.Thread(target=load, args=(tmp_path / "missing",))
            thread.start()
            thread.join()
        assert errors == []
        written.append(capfd.readouterr())
    assert "failed to open" in written[0].err
    assert written[1:] == written[:1] * 2


def test_a_capture_that_is_dropped_is_closed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As when Ctrl-C comes before the block is entered; here also by another thread."""
    with captured_errors() as errors:
        dropped = [_core.LogCapture(False), _core.LogCapture(False)]
        dropped.pop()
        thread = threading.Thread(target=dropped.clear)
        thread.start()
        thread.join()
        load(tmp_path / "missing_file")
    assert files_named(errors) == {"missing_file"}
    capture = _core.LogCapture(False)
    load(tmp_path / "missing_file")
    assert capture.close() != []
    assert capture.close() == []


PROGRAM = """
import _thread, signal, sys, threading
sys.path[:0] = {path!r}
import llama_cpp
from llama_cpp import mtmd_cpp
from guided import QUESTION, open_vlm
from prompts import picture
from tiny_llava import TinyPair
from cmg_gguf.llama import context, model, projector

module, name = {function}
call, entered = getattr(module, name), threading.Event()

def press_ctrl_c():
    entered.wait()  # and then for the GIL, until llama.cpp is at work
    _thread.interrupt_main()

def called(*arguments):
    entered.set()
    return call(*arguments)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
setattr(module, name, called)
threading.Thread(target=press_ctrl_c).start()
try:
    vlm = open_vlm(TinyPair(*{pair!r}))
    for _ in range(100):
        vlm.generate(QUESTION, [picture(0)], max_tokens=3)
except KeyboardInterrupt:
    setattr(module, name, call)
    vlm = open_vlm(TinyPair(*{pair!r}))
    print(len(vlm.generate(QUESTION, [picture(0)], max_tokens=3).tokens))
"""


@pytest.mark.parametrize(
    "function",
    [
        'model, "_load"',
        'projector, "_init"',
        'context, "_init"',
        f'mtmd_cpp, "mtmd_tokenize{"_from_parts" if HAS_PARTS else ""}"',
        'mtmd_cpp, "mtmd_encode_chunk"',
        'llama_cpp, "llama_decode"',
    ],
)
def test_a_ctrl_c_while_llama_cpp_computes_is_not_lost(pair: TinyPair, function: str) -> None:
    program = PROGRAM.format(
        path=[str(Path(__file__).parent)], function=function, pair=tuple(map(str, pair))
    )
    run = subprocess.run(  # not in this folder: the package is the installed one
        [sys.executable, "-c", program], capture_output=True, text=True, cwd="/", timeout=120
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "3\n", "")


def test_what_others_print_beside_a_capture_of_stderr_is_printed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with captured_stderr(lambda text: text.replace("a reason\n", "")):
        os.write(2, b"a reason\n")
        os.write(2, b"of another\xff thread\n")
        assert capfd.readouterr().err == ""
    os.write(2, b"behind\n")
    assert capfd.readouterr().err == "of another\ufffd thread\nbehind\n"


def test_without_a_stderr_nothing_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(fd: int) -> int:
        raise OSError("bad file descriptor")

    monkeypatch.setattr(os, "dup", closed)
    told: list[str] = []
    with captured_stderr(lambda text: told.append(text) or text):  # type: ignore[func-returns-value]
        pass
    assert told == [""]

"""llama.cpp's log: silence unless asked for, errors in exceptions, and no Ctrl-C lost in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import pytest
from guided import QUESTION, open_vlm
from prompts import picture
from tiny_llava import TinyPair

from cmg_gguf import ModelError
from cmg_gguf.llama.log import captured_errors, set_verbose


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


PROGRAM = """
import _thread, sys, threading
sys.path[:0] = {path!r}
import llama_cpp
from llama_cpp import mtmd_cpp
from guided import QUESTION, open_vlm
from prompts import picture
from tiny_llava import TinyPair

module, name = {function}
call, entered = getattr(module, name), threading.Event()

def press_ctrl_c():
    entered.wait()  # and then for the GIL, until llama.cpp is at work
    _thread.interrupt_main()

def called(*arguments):
    entered.set()
    return call(*arguments)

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
        'llama_cpp, "llama_model_load_from_file"',
        'mtmd_cpp, "mtmd_init_from_file"',
        'llama_cpp, "llama_init_from_model"',
        'mtmd_cpp, "mtmd_tokenize"',
        'mtmd_cpp, "mtmd_encode_chunk"',
        'mtmd_cpp, "mtmd_helper_decode_image_chunk"',
        'llama_cpp, "llama_decode"',
    ],
)
def test_a_ctrl_c_while_llama_cpp_computes_is_not_lost(pair: TinyPair, function: str) -> None:
    program = PROGRAM.format(
        path=[str(Path(__file__).parent)], function=function, pair=tuple(map(str, pair))
    )
    run = subprocess.run(  # not in this folder: the package is the installed one
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd="/"
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "3\n", "")

"""`cmg-gguf doctor`: what is well is told so, and nothing that is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import flat, invoke
from judge import judge
from reference import Reference
from tiny_encoder import TinyEncoder, write_encoder
from tiny_llava import TinyConfig, TinyPair

from cmg_gguf import GuidedVLM
from cmg_gguf.doctor import Finding, examine, installation, model_pair, selftest
from cmg_gguf.doctor.branches import both
from cmg_gguf.doctor.finding import looked
from cmg_gguf.guidance import LayerSet, TopRatio
from cmg_gguf.llama.model import Model
from cmg_gguf.llama.repacking import is_safe
from cmg_gguf.tiny.pair import embedded_pair

N_SELFTEST = 5


def by_name(findings: tuple[Finding, ...]) -> dict[str, Finding]:
    return {finding.name.removeprefix("self-test: "): finding for finding in findings}


def statuses(findings: tuple[Finding, ...]) -> set[str]:
    return {finding.status for finding in findings}


def of_pair(pair: TinyPair | tuple[Path, Path], **settings: object) -> dict[str, Finding]:
    """What is found of a pair, without the rest of the examination, by name."""
    options: dict[str, Any] = {"n_ctx": 1024, "n_threads": 1, **settings}
    return by_name(tuple(looked("model pair", lambda: model_pair.look(*pair, **options))))


# --- the self-test ------------------------------------------------------------------------------


def test_here_all_is_well() -> None:
    found = examine(n_threads=1)
    assert statuses(found) == {"ok"}
    assert len(found) == (4 if is_safe() else 5) + N_SELFTEST
    assert all(finding.found and not finding.remedy for finding in found)


def test_what_is_stored_is_what_the_judge_computes() -> None:
    """Within what Q8_0 rounds: the judge multiplies with the weights as they are dequantised."""
    stored = selftest.load()
    llm, mmproj = embedded_pair()
    ref = Reference.load(llm)
    with GuidedVLM(llm, mmproj, n_ctx=512, n_threads=1) as vlm:
        prompt = vlm.projector.encode(vlm.tokenize(selftest.PROMPT, [stored.pixels]))
    verdict = judge(ref, prompt, selftest.GUIDANCE, selftest.N_FORCED)
    assert verdict.tokens == stored.tokens.tolist()
    right = stored.computed
    l_o, l_d = (
        np.array([getattr(step, name)[:: selftest.EVERY] for step in verdict.steps], np.float32)
        for name in ("original", "degraded")
    )
    assert selftest.off(right.l_o, l_o) < selftest.TOLERANCE / 3
    assert selftest.off(right.masking, l_d - l_o) < selftest.MASKING_TOLERANCE / 3
    for il, found in enumerate(right.masking_alone):
        guidance = replace(selftest.GUIDANCE, layers=LayerSet((il,)))
        alone = judge(ref, prompt, guidance, 1).steps[0].degraded[:: selftest.EVERY]
        assert selftest.off(found[:1], np.float32(alone[None] - l_o[:1])) < 0.25
    looked = judge(ref, prompt, selftest.LOOKED, 1).masked[0]
    shared = [len(set(a) & set(b)) for a, b in zip(looked, right.looked.tolist(), strict=True)]
    assert min(shared) > selftest.SHARED * right.looked.shape[1]


def test_where_nothing_is_masked_the_self_test_fails_loudly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(selftest, "GUIDANCE", replace(selftest.GUIDANCE, tokens=TopRatio(0.0)))
    found = by_name(tuple(selftest.look(n_threads=1)))
    assert found["plain branch"].status == "ok"
    assert found["guided branch"].status == found["each layer alone"].status == "failed"
    assert "off by 100 %" in found["guided branch"].found
    assert "0, 1, 2, 3, 4, 5" in found["each layer alone"].found
    assert found["ways of decoding"].status == "failed"
    assert found["guided branch"].remedy


def test_a_layer_that_is_not_masked_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_but_two(vlm: GuidedVLM, prompt: Any, guidance: Any, tokens: Any = ()) -> Any:
        if guidance.layers == LayerSet((2,)):
            guidance = replace(guidance, tokens=TopRatio(0.0))
        return both(vlm, prompt, guidance, tokens)

    monkeypatch.setattr(selftest, "both", all_but_two)
    found = by_name(tuple(selftest.look(n_threads=1)))
    assert [name for name, finding in found.items() if finding.status != "ok"] == [
        "each layer alone"
    ]
    assert "these are wrong: 2," in found["each layer alone"].found


@pytest.mark.parametrize(
    ("name", "what"),
    [("l_o", "plain branch"), ("looked", "attention on the image"), ("said", "ways of decoding")],
)
def test_other_results_than_the_stored_ones_are_told(
    monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    right = selftest.load().computed
    wrong: dict[str, Any] = {
        "l_o": right.l_o[::-1],
        "looked": (right.looked + 16) % 64,
        "said": {**right.said, "auto": right.said["auto"][::-1]},
    }
    monkeypatch.setattr(selftest, "compute", lambda *_, **__: replace(right, **{name: wrong[name]}))
    found = by_name(tuple(selftest.look()))
    assert found[what].status == "failed"
    assert found[what].remedy


def test_logits_that_are_no_numbers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = selftest.load().computed
    broken = replace(right, l_d=right.l_d * np.float32(np.nan), alone=right.alone * np.nan)
    monkeypatch.setattr(selftest, "compute", lambda *_, **__: broken)
    found = by_name(tuple(selftest.look()))
    assert found["guided branch"].status == found["each layer alone"].status == "failed"


def test_without_its_file_there_is_no_self_test(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for content in (None, b"no archive"):
        file = tmp_path / "selftest.npz"
        if content:
            file.write_bytes(content)
        monkeypatch.setattr(selftest, "FILE", file)
        (finding,) = (f for f in examine(n_threads=1) if f.name.startswith("self-test"))
        assert finding.status == "failed"
        assert "selftest.npz cannot be read" in finding.found
        assert finding.remedy == "reinstall cmg-gguf"


# --- the installation ---------------------------------------------------------------------------


def test_a_card_that_is_not_used_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver = tmp_path / "version"
    monkeypatch.setattr(installation, "NVIDIA_DRIVER", driver)
    cpu = {"name": "CPU", "backend": "CPU", "description": "x", "memory": 2**34}
    cuda = {"name": "CUDA0", "backend": "CUDA", "description": "H", "memory": 0}
    for present, devices, status in (
        (False, [cpu], "ok"),
        (True, [cpu], "warning"),
        (True, [cuda, cpu], "ok"),
    ):
        if present:
            driver.touch()
        monkeypatch.setattr(
            installation, "system_facts", lambda devices=devices: {**FACTS, "devices": devices}
        )
        finding = list(installation.look())[-1]
        assert (finding.status, bool(finding.remedy)) == (status, status == "warning")
    assert finding.found == "CUDA0 (CUDA): H; CPU: x, 16.0 GiB"


FACTS = {
    "waiting": "as told",
    **dict.fromkeys(("llama_cpp_python", "numpy", "pillow", "python", "library"), "1"),
    "repacking_remedy": None,
}


def test_another_llama_cpp_python_is_a_finding_and_no_traceback() -> None:
    program = (
        "import llama_cpp; llama_cpp.__version__ = '0.3.20'\nfrom cmg_gguf.cli import main; main()"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert (run.returncode, run.stderr) == (1, "")
    told = json.loads(run.stdout)
    assert told["ok"] is False
    (finding,) = told["findings"]
    assert finding["status"] == "failed"
    assert "0.3.20 is too old" in finding["found"]
    assert finding["remedy"].startswith("pip install")


# --- a model pair -------------------------------------------------------------------------------


def test_of_a_pair_it_is_told_what_it_is(pair: TinyPair) -> None:
    found = of_pair(pair, chat_template="vicuna")
    assert statuses(tuple(found.values())) == {"ok"}
    assert found["layers"].found == "all 6 attend"
    assert found["image encoder"].found == "nothing to mend"
    assert "a picture takes 16" in found["image tokens"].found
    assert "each of the 6 layers" in found["guidance"].found
    assert str(pair.mmproj) in found["image projector"].found


def test_guidance_reaches_the_layers_of_a_hybrid_that_attend(
    written: Callable[[TinyConfig], TinyPair],
) -> None:
    found = of_pair(written(TinyConfig(arch="lfm2")), chat_template="vicuna")
    assert found["layers"].found == "3 of 6 attend: 1, 3, 4"
    assert (found["guidance"].status, found["layers"].status) == ("ok", "ok")


@pytest.mark.parametrize("arch", ["gemma3", "gemma4"])
def test_guidance_reaches_layers_of_every_kind(
    written: Callable[[TinyConfig], TinyPair], arch: Any
) -> None:
    found = of_pair(written(TinyConfig(arch=arch)), chat_template="vicuna")
    assert found["guidance"].status == "ok", found["guidance"]


FORKS = {
    TinyConfig(): "degraded rows are not computed below the first masked layer",
    TinyConfig(arch="qwen3vl", n_deepstack=2): (
        "degraded rows are not computed below the first masked layer, but where that is 1, 2: "
        "it reads embd from below"
    ),
    TinyConfig(arch="lfm2"): (
        "degraded rows are computed in all layers: some layers keep a state, which would miss them"
    ),
}


@pytest.mark.parametrize("config", FORKS, ids=lambda config: config.arch)
def test_where_pairs_fork_is_told_and_why_not(
    written: Callable[[TinyConfig], TinyPair], config: TinyConfig
) -> None:
    found = of_pair(written(config), chat_template="vicuna")["forks"]
    assert (found.status, found.found) == ("ok", FORKS[config])


def test_two_contexts_do_not_fork_and_say_so(pair: TinyPair) -> None:
    found = of_pair(pair, chat_template="vicuna", pairing="contexts")["forks"]
    told = "degraded rows are computed in all layers: each branch has a context of its own"
    assert (found.status, found.found) == ("ok", told)


def test_a_layer_that_guidance_does_not_reach_is_named(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_but(idle: tuple[int, ...]) -> Callable[..., Any]:
        def decode(vlm: GuidedVLM, prompt: Any, guidance: Any) -> Any:
            if guidance.layers.layers[0] in idle:
                guidance = replace(guidance, tokens=TopRatio(0.0))
            return both(vlm, prompt, guidance)

        return decode

    monkeypatch.setattr(model_pair, "both", all_but((1, 4)))
    found = of_pair(pair)["guidance"]
    assert found.status == "warning"
    assert found.found == "masked alone, these of 6 layers change nothing: 1, 4"
    monkeypatch.setattr(model_pair, "both", all_but(tuple(range(6))))
    assert of_pair(pair)["guidance"].status == "failed"


def test_what_was_mended_is_told(pair: TinyPair, tmp_path: Path) -> None:
    mmproj = write_encoder(tmp_path / "mmproj.gguf", TinyEncoder("clip"))
    found = of_pair((pair.llm, mmproj))["image encoder"]
    assert (found.status, "llama.cpp issue 25814" in found.found) == ("ok", True)
    stock = of_pair((pair.llm, mmproj), encoder="stock")["image encoder"]
    assert "left as llama.cpp has it" in stock.found


def test_a_context_too_small_for_its_pictures_is_told(
    pair: TinyPair, written: Callable[[TinyConfig], TinyPair]
) -> None:
    found = of_pair(pair, n_ctx=256)["image tokens"]
    assert (found.status, found.remedy[:6]) == ("warning", "-c 768")
    assert of_pair(pair, n_ctx=768)["image tokens"].status == "ok"
    tiled = written(TinyConfig(longest_edge=224))
    found = of_pair(tiled, n_ctx=256)["image tokens"]
    assert found.status == "warning"
    enough = int(found.remedy.split(",")[0].removeprefix("-c "))
    assert of_pair(tiled, n_ctx=enough)["image tokens"].status == "ok"
    large = written(TinyConfig(any_resolution=True))
    assert of_pair(large, n_ctx=512)["image tokens"].status == "warning"  # half of it at most
    found = of_pair(large, n_ctx=512, image_max_tokens=1024)["image tokens"]
    assert found.status == "failed"
    assert int(found.found.split("up to ")[1].split(";")[0]) > 512


def test_a_template_that_is_missing_fails_or_does_not_read_is_told(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert of_pair(pair)["chat template"].status == "ok"
    found = of_pair(pair, chat_template="vicuna", chat_template_kwargs={"enable_thinking": False})
    assert (found["chat template"].status, found["guidance"].status) == ("warning", "ok")
    assert "enable_thinking" in found["chat template"].found
    failing = of_pair(pair, chat_template="{{ raise_exception('no users') }}")
    assert failing["chat template"].status == "failed"
    assert "no users" in failing["chat template"].found
    assert "guidance" not in failing
    monkeypatch.setattr(Model, "chat_template", lambda _: None)
    assert of_pair(pair)["chat template"].status == "warning"
    assert of_pair(pair, chat_template="vicuna")["chat template"].status == "ok"


def bad_pairs(pair: TinyPair, folder: Path) -> dict[str, tuple[Path, Path]]:
    cut, empty, text = (folder / name for name in ("cut.gguf", "empty.gguf", "text.gguf"))
    cut.write_bytes(pair.llm.read_bytes()[:-1000])
    empty.touch()
    text.write_text("no GGUF")
    return {
        "swapped": (pair.mmproj, pair.llm),
        "missing": (folder / "none.gguf", pair.mmproj),
        "cut": (cut, pair.mmproj),
        "empty": (empty, pair.mmproj),
        "text": (pair.llm, text),
        "folder": (pair.llm, folder),
        "no projector": (pair.llm, pair.llm),
    }


def test_bad_files_are_findings(
    pair: TinyPair, written: Callable[[TinyConfig], TinyPair], tmp_path: Path
) -> None:
    unfitting = written(TinyConfig(mmproj_n_embd=96)).mmproj
    bad = {**bad_pairs(pair, tmp_path), "unfitting": (pair.llm, unfitting)}
    for name, files in bad.items():
        found = of_pair(files)
        assert list(found) == ["model pair"], name
        assert found["model pair"].status == "failed"
        assert found["model pair"].found, name


def test_what_nobody_thought_of_is_a_finding_too(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(model_pair, "both", fail)
    found = of_pair(pair)["guidance"]
    assert (found.status, found.found) == ("failed", "ZeroDivisionError: by nothing")
    assert "report it" in found.remedy


# --- the command --------------------------------------------------------------------------------


def test_the_command_ends_with_0_only_if_all_is_well(pair: TinyPair) -> None:
    files = ("-m", str(pair.llm), "--mmproj", str(pair.mmproj), "-t", "1")
    warned = invoke("doctor", *files, "-c", "256")
    assert warned.exit_code == 1
    assert "→ -c 768" in flat(warned.stdout)
    well = invoke("doctor", *files, "--json")
    assert well.exit_code == 0
    told = json.loads(well.stdout)
    assert told["ok"] is True
    assert {finding["status"] for finding in told["findings"]} == {"ok"}
    assert {*told["findings"][0]} == {"name", "status", "found", "remedy"}


def test_a_repository_that_cannot_be_fetched_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    run = invoke("doctor", "-hf", "owner/nothing", "-t", "1", "--json")
    assert run.exit_code == 1
    *others, last = json.loads(run.stdout)["findings"]
    assert {finding["status"] for finding in others} == {"ok"}
    assert (last["name"], last["status"]) == ("model pair", "failed")

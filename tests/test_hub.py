"""Models by the name of their repository: which files that means, and how they get here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import PROGRAM, environment, flat, invoke, run
from hubs import Hub
from PIL import Image

from cmg_gguf.errors import HubError, HubNameError
from cmg_gguf.hub import Listing, language_files, projector_file, quant_of, split_name
from cmg_gguf.tiny.pair import embedded_pair
from cmg_gguf.tiny.scenes import draw, make_scene

MODEL, MMPROJ = (path.read_bytes() for path in embedded_pair())
REPO = "someone/tiny-llava"
FILES = {"README.md": b"", "tiny-Q8_0.gguf": MODEL, "mmproj-tiny-f16.gguf": MMPROJ}
ASKING = ("-p", "Describe the image.", "-n", "4", "-t", "1", "-c", "1024")


# --- Names ---


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b", ("a/b", None)),
        ("a-b.c/D_e-1:q4_k_m", ("a-b.c/D_e-1", "q4_k_m")),
        ("a/b:dir/m-Q8_0.gguf", ("a/b", "dir/m-Q8_0.gguf")),
    ],
)
def test_a_name_is_repository_and_quant(name: str, parts: tuple[str, str | None]) -> None:
    assert split_name(name) == parts


@pytest.mark.parametrize(
    "name",
    ["", "llava", "a/b/c", "a/b:", "/a", "a/", "a b/c", "../b", "a/b--c", "https://hub.co/a/b"],
)
def test_what_is_no_name_is_refused_with_the_form_of_one(name: str) -> None:
    with pytest.raises(HubNameError, match="write owner/repo or owner/repo:Q4_K_M"):
        split_name(name)


# --- Which files ---


def listing(*names: str) -> Listing:
    return Listing("a/b", names, "see it")


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("llava-v1.5-7b.Q4_K_M.gguf", "Q4_K_M"),
        ("x/Qwen2-VL-2B-IQ4_XS.gguf", "IQ4_XS"),
        ("m-UD-Q4_K_XL-00002-of-00003.gguf", "UD-Q4_K_XL"),
        ("mmproj-model-f16.gguf", "f16"),
        ("m_BF16.gguf", "BF16"),
        ("Q4_0/model.gguf", None),
    ],
)
def test_the_quant_of_a_file_is_read_off_its_name(name: str, quant: str | None) -> None:
    assert quant_of(name) == quant


@pytest.mark.parametrize(
    ("names", "wanted", "chosen"),
    [
        (["m-Q2_K.gguf", "m-Q8_0.gguf", "m-Q4_K_M.gguf"], None, "m-Q4_K_M.gguf"),
        (["m-Q2_K.gguf", "m-q8_0.gguf", "m-F16.gguf"], None, "m-q8_0.gguf"),
        (["m-Q6_K.gguf", "m-Q3_K_S.gguf", "README.md"], None, "m-Q3_K_S.gguf"),
        (["mmproj-Q4_K_M.gguf", "mtp-m-Q4_K_M.gguf", "m-F32.gguf"], None, "m-F32.gguf"),
        (["m-BF16.gguf", "m-F16.gguf"], "f16", "m-F16.gguf"),
        (["m-IQ4_XS.gguf", "m-Q4_K_S.gguf"], "q4_k_s", "m-Q4_K_S.gguf"),
        (["m-Q6_K_L.gguf", "m-Q6_K.gguf"], "Q6_K", "m-Q6_K.gguf"),
        (["m-UD-Q4_K_XL.gguf", "m-UD-Q2_K_XL.gguf"], "Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "b-Q8_0.gguf", "b-Q8_0.gguf"),
        (["m-special.gguf", "m-Q8_0.gguf"], "special", "m-special.gguf"),
    ],
)
def test_the_language_model_is_chosen_by_its_quant(
    names: list[str], wanted: str | None, chosen: str
) -> None:
    assert language_files(listing(*names), wanted) == [chosen]


def test_of_a_split_model_all_parts_are_taken_in_order() -> None:
    parts = [f"q/m-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    others = [f"q/m-Q2_K-0000{i}-of-00002.gguf" for i in (1, 2)]
    assert language_files(listing(*others, *reversed(parts)), None) == parts
    with pytest.raises(HubError, match=r"a/b has 2 of the 3 parts of .* q/m-Q8_0-00001-of-00003"):
        language_files(listing(*parts[1:]), "Q8_0")


@pytest.mark.parametrize(
    ("names", "wanted", "told"),
    [
        (["m-Q8_0.gguf", "m-Q4_K_M.gguf"], "Q5_K_M", "has no Q5_K_M; it has Q4_K_M, Q8_0; see it"),
        (["m-Q4_K_M.gguf", "m-Q3_K_M.gguf"], "K_M", "has no K_M; it has Q3_K_M, Q4_K_M"),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "Q8_0", "2 models .*: a-Q8_0.gguf, b-Q8_0.gguf; name one"),
        (["model.safetensors", "mmproj-f16.gguf"], None, "no GGUF file of a language model"),
    ],
)
def test_a_choice_that_is_none_says_what_there_is(
    names: list[str], wanted: str | None, told: str
) -> None:
    with pytest.raises(HubError, match=f"a/b {told}" if told[0] == "h" else told):
        language_files(listing(*names), wanted)


@pytest.mark.parametrize(
    ("names", "model", "chosen"),
    [
        (["mmproj-F32.gguf", "mmproj-BF16.gguf", "mmproj-f16.gguf"], "m.gguf", "mmproj-f16.gguf"),
        (["mmproj-Q8_0.gguf", "x.mmproj-f32.gguf"], "m.gguf", "x.mmproj-f32.gguf"),
        (["mmproj-b.gguf", "mmproj-a.gguf", "m.gguf"], "m.gguf", "mmproj-a.gguf"),
        (["mmproj-F16.gguf", "q/mmproj-Q8_0.gguf"], "q/m.gguf", "q/mmproj-Q8_0.gguf"),
        (["r/mmproj-F16.gguf", "mmproj-Q8_0.gguf"], "q/m.gguf", "mmproj-Q8_0.gguf"),
        (["r/mmproj-F16.gguf"], "q/m.gguf", "r/mmproj-F16.gguf"),
    ],
)
def test_the_best_projector_near_the_model_is_taken(
    names: list[str], model: str, chosen: str
) -> None:
    assert projector_file(listing(*names), model) == chosen


# --- The command line against a hub on loopback ---


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    Image.fromarray(draw(make_scene("test", 0, "counter"))).save(path)
    return path


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub({REPO: FILES, "someone/blind": {"m-Q4_K_M.gguf": b""}}) as hub:
        yield hub


def surroundings(hub: Hub, cache: Path, **more: str) -> dict[str, str]:
    clean = {name: value for name, value in environment().items() if not name.startswith("HF_")}
    return {**clean, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_TOKEN": "", **more}


def called(
    hub: Hub, cache: Path, *arguments: str, stdin: str = "", **more: str
) -> subprocess.CompletedProcess[str]:
    return run(*arguments, input=stdin, env=surroundings(hub, cache, **more), cwd=cache)


def contents(cache: Path) -> set[bytes]:
    """What the cache holds: the files behind its links, and whatever was left behind."""
    return {path.read_bytes() for path in cache.glob("hub/models--*/blobs/*")}


def test_a_named_model_is_downloaded_once_and_then_answers_offline(
    hub: Hub, scene: Path, tmp_path: Path
) -> None:
    asking = ("run", "-hf", REPO, "--image", str(scene), *ASKING)
    first = called(hub, tmp_path, *asking)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip()
    assert first.stderr.startswith("downloading the model, 3.803 MiB\n")
    assert hub.downloads() == [("tiny-Q8_0.gguf", None), ("mmproj-tiny-f16.gguf", None)]
    assert contents(tmp_path) == {MODEL, MMPROJ}
    again = called(hub, tmp_path, *asking)
    assert (again.stdout, len(hub.downloads())) == (first.stdout, 2)
    assert "downloading" not in again.stderr
    n_asked = len(hub.asked)
    offline = called(hub, tmp_path, *asking, HF_HUB_OFFLINE="1")
    assert (offline.stdout, len(hub.asked)) == (first.stdout, n_asked)
    hub.stop()
    unreached = called(hub, tmp_path, *asking)
    assert (unreached.returncode, unreached.stdout) == (0, first.stdout)


@pytest.mark.slow
def test_every_command_that_takes_a_model_takes_its_name(
    hub: Hub, scene: Path, tmp_path: Path
) -> None:
    small = ("-c", "1024", "-t", "1")
    info = called(hub, tmp_path, "info", "-hf", f"{REPO}:q8_0")
    assert info.returncode == 0, info.stderr
    assert "tiny-Q8_0.gguf" in info.stdout.replace("\n", "").replace(" ", "")
    chat = called(
        *(hub, tmp_path, "chat", "--hf-repo", REPO, "--image", str(scene), "-n", "2", *small),
        stdin="Describe the image.\n",
    )
    assert (chat.returncode, bool(chat.stdout.strip())) == (0, True), chat.stderr
    asked = ("eval", "scenes", "-hf", REPO, *small, "--methods", "greedy", "--limit", "1", "-o")
    evaluated = called(hub, tmp_path, *asked, "out")
    assert evaluated.returncode == 0, evaluated.stderr
    assert len(hub.downloads()) == 2


def test_a_dry_run_downloads_nothing_and_knows_what_is_here(
    hub: Hub, scene: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(scene.read_bytes())
    small = ("-c", "1024", "-t", "1", "-n", "8")
    dry = ("caption", str(folder), "-hf", REPO, *small, "--dry-run")
    told = called(hub, tmp_path, *dry)
    assert (told.returncode, told.stdout) == (0, f"{folder}/a.png -> {folder}/a.txt\n")
    assert f"note: {REPO} is not here yet and not downloaded for this" in flat(told.stderr)
    assert hub.asked == []
    assert contents(tmp_path) == set()
    # What an unfinished run has captioned is known as soon as the model is here.
    assert called(hub, tmp_path, *dry[:-1]).returncode == 0
    (folder / "b.png").write_bytes(scene.read_bytes())
    n_asked = len(hub.asked)
    told = called(hub, tmp_path, *dry)
    assert (told.stdout, told.stderr.count("note")) == (f"{folder}/b.png -> {folder}/b.txt\n", 0)
    assert len(hub.asked) == n_asked
    half = called(hub, tmp_path, *dry[:3], f"{REPO}:Q4_0", *dry[4:])
    assert "not downloaded for this" in flat(half.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_a_download_that_was_killed_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, ignores_ranges: bool
) -> None:
    # A chunk of the library's is 10 MiB: less than that is not kept.
    large = {**FILES, "tiny-Q8_0.gguf": MODEL + bytes(24 * 2**20)}
    asking = ("info", "-hf", REPO)
    with Hub({REPO: large}, stalls_at=21 * 2**20) as hub:
        killed = subprocess.Popen(
            [*PROGRAM, *asking],
            env=surroundings(hub, tmp_path),
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for_part(tmp_path, 20 * 2**20, killed)
        finally:
            killed.kill()
            killed.wait()
    assert contents(tmp_path) == {large["tiny-Q8_0.gguf"][: 20 * 2**20]}
    with Hub({REPO: large}, ignores_ranges=ignores_ranges) as hub:
        resumed = called(hub, tmp_path, *asking)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.startswith("downloading the model, 27.8 MiB")
    assert ("20 MiB of it are there" in resumed.stderr) != ignores_ranges
    assert hub.downloads()[0] == ("tiny-Q8_0.gguf", f"bytes={20 * 2**20}-")
    assert contents(tmp_path) == {large["tiny-Q8_0.gguf"], MMPROJ}


def wait_for_part(cache: Path, size: int, process: subprocess.Popen[Any]) -> None:
    """Returns when a file of the cache has that size; it then stays so, for the hub has stalled."""
    ends = time.monotonic() + 60
    while not any(p.stat().st_size == size for p in cache.glob("hub/models--*/blobs/*")):
        assert process.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.slow
def test_ctrl_c_ends_a_download_which_then_goes_on(tmp_path: Path) -> None:
    large = {**FILES, "tiny-Q8_0.gguf": MODEL + bytes(24 * 2**20)}
    with Hub({REPO: large}, stalls_at=11 * 2**20) as hub:
        stopped = subprocess.Popen(
            [*PROGRAM, "info", "-hf", REPO],
            env=surroundings(hub, tmp_path),
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_part(tmp_path, 10 * 2**20, stopped)
        stopped.send_signal(signal.SIGINT)
        stopped.send_signal(signal.SIGINT)
        hub.release()
        stopped.communicate(timeout=60)
        assert stopped.returncode == 130
        hub.stalls_at = None
        assert called(hub, tmp_path, "info", "-hf", REPO).returncode == 0
    assert hub.downloads()[-2:] == [
        ("tiny-Q8_0.gguf", f"bytes={10 * 2**20}-"),
        ("mmproj-tiny-f16.gguf", None),
    ]


@pytest.mark.slow
def test_two_programs_at_once_download_a_model_once(hub: Hub, tmp_path: Path) -> None:
    both = [
        subprocess.Popen(
            [*PROGRAM, "info", "-hf", REPO],
            env=surroundings(hub, tmp_path),
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    assert [process.wait(60) for process in both] == [0, 0]
    assert sorted(hub.downloads()) == [("mmproj-tiny-f16.gguf", None), ("tiny-Q8_0.gguf", None)]


@pytest.mark.slow
def test_what_does_not_arrive_as_it_was_sent_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.broken["tiny-Q8_0.gguf"] = MODEL[:-1] + b"?"
    done = called(hub, tmp_path, "info", "-hf", REPO)
    assert (done.returncode, done.stdout) == (1, "")
    assert "tiny-Q8_0.gguf did not arrive as it is on the hub" in done.stderr
    assert contents(tmp_path) == set()


@pytest.mark.slow
def test_a_split_model_is_opened_from_all_its_parts(hub: Hub, tmp_path: Path) -> None:
    names = [f"q/m-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]
    hub.repos = {REPO: {names[1]: b"two", names[0]: MODEL, "mmproj-f16.gguf": MMPROJ}}
    found = "import sys, cmg_gguf.hub as h; print(*h.fetch_pair(sys.argv[1]), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", found, REPO],
        capture_output=True,
        text=True,
        env=surroundings(hub, tmp_path),
        cwd=tmp_path,
        check=True,
    )
    model, mmproj = (Path(line) for line in done.stdout.splitlines())
    assert [path.name for path in sorted(model.parent.iterdir())] == [n[2:] for n in names]
    assert (model.name, model.read_bytes()) == (names[0][2:], MODEL)
    assert mmproj.read_bytes() == MMPROJ


@pytest.mark.slow
def test_a_model_by_name_answers_in_python(hub: Hub, tmp_path: Path) -> None:
    program = (
        "import sys; from cmg_gguf import GuidedVLM; told = []\n"
        "vlm = GuidedVLM.from_pretrained(sys.argv[1], n_ctx=512, n_threads=1,\n"
        "    progress=lambda *news: told.append(news))\n"
        "print(vlm.n_ctx, {n[0] for n in told} == {'download', 'load'})\n"
        "print(max(n[1:] for n in told if n[0] == 'download'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, f"{REPO}:Q8_0"],
        capture_output=True,
        text=True,
        env=surroundings(hub, tmp_path),
        cwd=tmp_path,
        check=True,
    )
    total = len(MODEL) + len(MMPROJ)
    assert done.stdout == f"512 True\n({total}, {total})\n"


@pytest.mark.slow
def test_a_private_repository_opens_to_its_token(hub: Hub, tmp_path: Path) -> None:
    hub.token = "hf_secret"
    refused = called(hub, tmp_path, "info", "-hf", REPO)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"has no model repository {REPO}, or it is private" in refused.stderr
    assert "set HF_TOKEN" in refused.stderr
    wrong = called(hub, tmp_path, "info", "-hf", REPO, HF_TOKEN="hf_wrong")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert f"refuses your token for {REPO} (401): set HF_TOKEN" in wrong.stderr
    opened = called(hub, tmp_path, "info", "-hf", REPO, HF_TOKEN="hf_secret")
    assert opened.returncode == 0, opened.stderr


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("someone/else", "has no model repository someone/else, or it is private"),
        ("someone/blind", "someone/blind has no mmproj file, so its model does not see"),
        (f"{REPO}:Q5_K_M", f"{REPO} has no Q5_K_M; it has Q8_0"),
        ("tiny-llava", "'tiny-llava' names no model repository; write owner/repo"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(
    hub: Hub, tmp_path: Path, name: str, told: str
) -> None:
    done = called(hub, tmp_path, "info", "-hf", name)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert told in done.stderr


def test_a_gated_repository_says_where_its_terms_are(hub: Hub, tmp_path: Path) -> None:
    hub.gated = frozenset([REPO])
    done = called(hub, tmp_path, "info", "-hf", REPO)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{REPO} is gated: accept its terms at {hub.url}/{REPO}" in done.stderr


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("stopped", "is not reached"),
        ("offline", "HF_HUB_OFFLINE is set"),
        ("busy", "does not answer now (503)"),
    ],
)
def test_without_a_hub_and_a_cache_the_error_says_which_is_missing(
    hub: Hub, tmp_path: Path, kind: str, told: str
) -> None:
    more = {"HF_HUB_OFFLINE": "1"} if kind == "offline" else {}
    if kind == "stopped":
        hub.stop()
    hub.status = 503 if kind == "busy" else None
    done = called(hub, tmp_path, "info", "-hf", REPO, **more)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert told in done.stderr
    assert "in the cache" in done.stderr


def test_an_address_that_is_no_hub_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.status = 200
    done = called(hub, tmp_path, "info", "-hf", REPO)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"{hub.url} does not answer as a hub does; check HF_ENDPOINT" in done.stderr


@pytest.mark.slow
def test_offline_with_half_a_pair_the_error_says_what_the_cache_lacks(
    hub: Hub, tmp_path: Path
) -> None:
    own = str(embedded_pair()[1])
    assert called(hub, tmp_path, "info", "-hf", REPO, "--mmproj", own).returncode == 0
    assert hub.downloads() == [("tiny-Q8_0.gguf", None)]
    hub.stop()
    done = called(hub, tmp_path, "info", "-hf", REPO)
    assert done.returncode == 1
    assert f"the cache of {REPO} has no mmproj file" in done.stderr
    assert "ask again with a connection" in done.stderr


def test_without_the_library_it_says_how_to_install_it(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = called(hub, tmp_path, "info", "-hf", REPO, PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install 'cmg-gguf[hub]'" in done.stderr


def test_a_model_has_one_name() -> None:
    done = invoke("run", "-hf", REPO, "-m", "x.gguf", *ASKING)
    assert done.exit_code == 2
    assert "leave one of the two out" in flat(done.stderr)

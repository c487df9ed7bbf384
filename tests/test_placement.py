"""On which devices a model lies: what is asked of llama.cpp, and what is refused."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import llama_cpp
import pytest
from guided import QUESTION, ids, open_vlm
from offload import N_GPU_LAYERS, ON_DEVICE
from prompts import picture
from support import EXACT, Tiny
from tiny_llava import TinyPair

from cmg_gguf import BackendError, ModelError, UnsupportedError
from cmg_gguf.cli.model_flags import ModelFlags
from cmg_gguf.llama import cache_size, context, model, placement
from cmg_gguf.llama.about import Device, device_handle, devices, free_memory, takes
from cmg_gguf.llama.context import LlamaContext
from cmg_gguf.llama.layers import layer_places
from cmg_gguf.llama.model import Model
from cmg_gguf.llama.placement import Placement

CPU = Device("CPU", "a processor", "CPU", "cpu", 24 * 10**9, 20 * 10**9)
GPUS = [Device(f"CUDA{i}", "a GPU", "CUDA", "gpu", 8 * 10**9, 10**9, True) for i in range(2)]
INSIDE = Device("Vulkan0", "part of the processor", "Vulkan", "igpu", 0, 0)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has two GPUs."""
    monkeypatch.setattr(placement, "devices", lambda: [*GPUS, INSIDE, CPU])
    monkeypatch.setattr(placement, "device_handle", lambda name: 100 + int(name[-1]))


def filled(**placed: Any) -> Any:
    """The llama_model_params, and what must outlive them."""
    params = llama_cpp.llama_model_default_params()
    return params, Placement(**placed).fill(params)


@pytest.mark.usefixtures("two_gpus")
def test_what_is_named_reaches_llama_cpp() -> None:
    params, kept = filled(
        n_gpu_layers=7, devices=["CUDA1", "CUDA0"], split_mode="row", tensor_split=[3, 1]
    )
    assert (params.n_gpu_layers, params.split_mode) == (7, llama_cpp.LLAMA_SPLIT_MODE_ROW)
    assert list((ctypes.c_void_p * 3).from_address(params.devices)) == [101, 100, None]
    assert [params.tensor_split[i] for i in range(2)] == [3.0, 1.0]
    assert len(kept[1]) == llama_cpp.llama_max_devices()
    params, _ = filled(split_mode="none", main_gpu=1)
    assert (params.split_mode, params.main_gpu) == (llama_cpp.LLAMA_SPLIT_MODE_NONE, 1)
    assert params.devices is None


def test_nothing_named_is_llama_cpps_default() -> None:
    (params, kept), plain = filled(), llama_cpp.llama_model_default_params()
    assert kept == ()
    for name in ("split_mode", "main_gpu", "devices"):
        assert getattr(params, name) == getattr(plain, name), name
    assert not params.tensor_split


@pytest.mark.usefixtures("two_gpus")
def test_without_names_all_gpus_are_meant_and_those_inside_where_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Placement().used() == GPUS
    monkeypatch.setattr(placement, "devices", lambda: [CPU, INSIDE])
    assert Placement().used() == [INSIDE]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("placed", "handle"),
    [
        ({}, None),
        ({"devices": ["CUDA1"]}, 101),
        ({"split_mode": "none", "main_gpu": 1}, 101),
        ({"devices": ["CUDA1", "CUDA0"], "split_mode": "none", "main_gpu": 1}, 100),
        ({"devices": ()}, None),
    ],
    ids=str,
)
def test_the_image_encoder_goes_where_the_first_layer_may(
    placed: dict[str, Any], handle: int | None
) -> None:
    params = SimpleNamespace(device=None)
    Placement(**placed).fill_encoder(params)
    assert params.device == handle


@pytest.mark.usefixtures("two_gpus")
def test_an_mtmd_that_cannot_be_told_the_encoders_device_is_not_asked_for_one() -> None:
    Placement().fill_encoder(SimpleNamespace())
    with pytest.raises(UnsupportedError, match=r"since llama-cpp-python 0\.3\.36; update it"):
        Placement(devices=["CUDA1"]).fill_encoder(SimpleNamespace())


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("placed", "says"),
    [
        ({"split_mode": "tensor"}, "'tensor' is unknown: one of none, layer, row"),
        ({"split_mode": "row", "devices": ["CUDA0", "Vulkan0"]}, "'row': .* Vulkan0 cannot cut"),
        ({"split_mode": "row", "n_gpu_layers": 0}, "'row' with n_gpu_layers=0 has no device"),
        ({"split_mode": "row", "devices": ()}, "'row' .* has no device .* 0 of them"),
        ({"n_gpu_layers": -2}, "n_gpu_layers=-2 is out of range"),
        ({"devices": ["CUDA7"]}, "no device 'CUDA7' .* 3 of them, CUDA0, CUDA1, Vulkan0"),
        ({"devices": ["CPU"]}, "no device 'CPU'"),
        ({"main_gpu": 1}, "main_gpu=1 is read with split_mode='none' alone"),
        ({"main_gpu": 2, "split_mode": "none"}, "main_gpu=2 is out of range: there are 2"),
        ({"tensor_split": [1]}, "has 1 shares: there are 2 of them, CUDA0, CUDA1"),
        ({"tensor_split": [1, 1], "devices": ["CUDA0"]}, "has 2 shares: there are 1"),
        ({"tensor_split": [1, 1], "split_mode": "none"}, "of no use with split_mode='none'"),
        ({"tensor_split": [1, -1]}, "shares are 0 and up"),
        ({"tensor_split": [0, 0]}, "not all 0"),
        ({"tensor_split": [1, float("inf")]}, "shares are 0 and up"),
    ],
    ids=str,
)
def test_what_cannot_be_or_would_be_ignored_is_refused(placed: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        Placement(**placed)


@pytest.mark.skipif(ON_DEVICE, reason="there is a device here")
def test_a_build_for_the_cpu_says_so(pair: TinyPair) -> None:
    for placed in ({"devices": ["CUDA0"]}, {"tensor_split": [1.0]}, {"split_mode": "row"}):
        with pytest.raises(UnsupportedError, match="built for the CPU"):
            Model.load(pair.llm, **placed)


def test_layers_that_find_no_device_are_told_of_and_lie_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placement, "devices", lambda: [CPU])
    with pytest.warns(UserWarning, match="n_gpu_layers=99 puts no layer .* built for the CPU"):
        filled(n_gpu_layers=99)
    monkeypatch.setattr(placement, "devices", lambda: [*GPUS, CPU])
    with pytest.warns(UserWarning, match="n_gpu_layers=1 .*: devices names none"):
        filled(n_gpu_layers=1, devices=())
    for unsaid in ({}, {"n_gpu_layers": 99}, {"n_gpu_layers": 0, "devices": ()}, {"devices": ()}):
        filled(**unsaid)  # a warning is an error here


def test_without_devices_everything_is_on_the_cpu(pair: TinyPair) -> None:
    with (
        open_vlm(pair, devices=(), n_gpu_layers=-1) as without,
        open_vlm(pair, n_gpu_layers=0, use_gpu=False) as plain,
    ):
        replies = [vlm.generate(QUESTION, [picture(0)], max_tokens=8) for vlm in (without, plain)]
        places = layer_places(without.model.handle, without.model.n_layer, offload_kqv=True)
    assert ids(replies[0]) == ids(replies[1])
    assert set(places.weights) == set(places.caches) == {"CPU"}


def test_a_layer_lies_where_it_was_put_and_its_cells_with_it(llama: Tiny) -> None:
    first = Placement(n_gpu_layers=N_GPU_LAYERS).used()[0].name if ON_DEVICE else "CPU"
    n, handle = llama.model.n_layer, llama.model.handle
    places = layer_places(handle, n, offload_kqv=True)
    assert places.weights == places.caches == [first] * n
    on_host = layer_places(handle, n, offload_kqv=False)
    assert (on_host.weights, on_host.caches) == ([first] * n, ["CPU"] * n)


def test_the_devices_have_handles_kinds_and_memory() -> None:
    found = devices()
    assert [device.kind for device in found].count("cpu") == 1
    assert len({device_handle(device.name) for device in found}) == len(found)
    assert all(device.free <= device.memory for device in found)
    assert bool(free_memory()) == any(device.kind != "cpu" and device.memory for device in found)
    with pytest.raises(KeyError):
        device_handle("no such device")


# --- no room ------------------------------------------------------------------------------------


def test_a_cache_without_room_is_an_error_and_nothing_is_lost(llama: Tiny, pair: TinyPair) -> None:
    """2**31 - 1 cells of the tiny pair are terabytes, on any device."""
    options = replace(EXACT, n_ctx=2**31 - 1)
    with pytest.raises(BackendError, match="cannot make a context") as error:
        LlamaContext(llama.model, options, n_seq_max=2)
    assert "n_ctx=2147483647" in str(error.value)
    if ON_DEVICE:
        assert "GB free; if it does not fit, lower n_ctx" in str(error.value)
    LlamaContext(llama.model, EXACT, n_seq_max=2).close()
    with pytest.raises(BackendError, match="cannot make a context"):
        open_vlm(pair, n_ctx=2**31 - 1)


def test_a_cache_that_no_device_computes_on_is_an_error(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Vulkan device has memory for more than it takes as one tensor, and llama.cpp aborts."""
    monkeypatch.setattr(Placement, "used", lambda self: [replace(CPU, name="Vulkan0")])
    monkeypatch.setattr(cache_size, "device_handle", lambda name: 7)
    monkeypatch.setattr(
        cache_size, "takes", lambda device, kind, width, length: width * length * 4 <= 64_000
    )
    monkeypatch.setattr(llama.model, "placement", Placement(n_gpu_layers=99))
    width = 2 * llama.model.n_embd // 4  # two of four heads
    most = 64_000 // (4 * width)
    with pytest.raises(BackendError, match=rf"Vulkan0 .* layer's K of 999 .* n_ctx={most} is the"):
        LlamaContext(llama.model, replace(EXACT, n_ctx=999), n_seq_max=2)
    LlamaContext(llama.model, replace(EXACT, n_ctx=most), n_seq_max=2).close()
    LlamaContext(llama.model, replace(EXACT, n_ctx=999, offload_kqv=False), n_seq_max=2).close()
    monkeypatch.setattr(llama.model, "placement", Placement(n_gpu_layers=1))
    LlamaContext(llama.model, replace(EXACT, n_ctx=999), n_seq_max=2).close()


def test_whether_a_device_takes_a_tensor_is_its_own_answer() -> None:
    for device in devices():
        handle = device_handle(device.name)
        assert takes(handle, 1, 64, 256)
        assert device.kind != "cpu" or takes(handle, 1, 64, 2**31 - 1)


def test_how_much_room_there_is_is_told_where_a_device_may_have_too_little(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = "CUDA0 has 1.0 of 8.0 GB free"
    monkeypatch.setattr(model, "free_memory", lambda: room)
    monkeypatch.setattr(context, "free_memory", lambda: room)
    with monkeypatch.context() as patched:
        patched.setattr(model, "_load", lambda *arguments: None)
        with pytest.raises(ModelError, match=f"of 0.0 GB, and {room}; .* lower n_gpu_layers"):
            Model.load(llama.model.path)
    with pytest.raises(BackendError, match=f"{room}; if it does not fit, lower n_ctx"):
        LlamaContext(llama.model, replace(EXACT, n_ctx=2**31 - 1), n_seq_max=2)


# --- flags --------------------------------------------------------------------------------------


def test_flags_are_the_librarys_options() -> None:
    flags = ModelFlags(
        device="CUDA1, CUDA0",
        split_mode="row",
        tensor_split="3,1",
        no_kv_offload=True,
        no_mmproj_offload=True,
    )
    options = flags.options()
    assert options["devices"] == ("CUDA1", "CUDA0")
    assert options["tensor_split"] == (3.0, 1.0)
    assert (options["split_mode"], options["main_gpu"]) == ("row", 0)
    assert (options["offload_kqv"], options["use_gpu"]) == (False, False)
    assert ModelFlags(device="none").options()["devices"] == ()

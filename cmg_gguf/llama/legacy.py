"""Files of llama.cpp's retired LLaVA converter, whose encoders run one layer short.

LLaVA looks at the output of the encoder's layer before the last. The converter left the last layer
out of the file and counted it out of `block_count`; llama.cpp counts it out once more, and leaves
the last layer of the file unused (llama.cpp issue 25817). A file that says by `feature_layer` which
layer's output is looked at is read as it says: that is all such a file lacks.

    if lacks_layer(path):
        with repaired(path) as copy:   # which says so
            load(copy)
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmg_gguf.errors import ProjectorError
from cmg_gguf.llama.header import Header, gguf_library, open_header

_KINDS = ("mlp", "mlp_norm", "ldp", "ldpv2")
_FEATURE_LAYER = "clip.vision.feature_layer"
_INT32 = 5  # gguf_type


def lacks_layer(path: str | Path) -> bool:
    """Whether the mmproj file was written so."""
    with open_header(path) as header:
        return _is_legacy(header)


@contextmanager
def repaired(path: Path) -> Iterator[Path]:
    """A copy of such a file that is read as it was meant; the file itself stays as it is.

    The copy is in the folder for temporary files, and gone afterwards. Raises ProjectorError where
    there is no room for it.
    """
    with open_header(path) as header:
        start, metadata = _repaired(header)
    with tempfile.TemporaryDirectory(prefix="cmg-gguf-") as folder:
        copy = Path(folder) / path.name
        _check_room(path, Path(folder))
        try:
            with path.open("rb") as source, copy.open("xb") as target:
                target.write(metadata)
                source.seek(start)
                shutil.copyfileobj(source, target, 1 << 20)
        except OSError as exc:
            raise ProjectorError(_no_copy(path, Path(folder), exc.strerror or str(exc))) from exc
        yield copy


def _is_legacy(header: Header) -> bool:
    n_layer = header.number("clip.vision.block_count")
    return (
        header.text("clip.projector_type") in _KINDS
        # Only that converter wrote this, and left the norm behind the last layer out.
        and header.flag("clip.has_llava_projector")
        and not header.has_tensor("v.post_ln.weight")
        and not header.has_key(_FEATURE_LAYER)
        # CLIP's encoders, 12 to 48 layers, have an even number: odd is one less than there were.
        and header.has_tensor("v.class_embd")
        and n_layer % 2 == 1
        and header.has_tensor(f"v.blk.{n_layer - 1}.ln1.weight")
        and not header.has_tensor(f"v.blk.{n_layer}.ln1.weight")
    )


def _repaired(header: Header) -> tuple[int, bytes]:
    """Where the tensors' data begin in the file, and what is to stand before them instead."""
    lib = gguf_library()
    start = int(lib.gguf_get_data_offset(header.handle))
    layers = (ctypes.c_int32 * 1)(header.number("clip.vision.block_count"))
    lib.gguf_set_arr_data(header.handle, _FEATURE_LAYER.encode(), _INT32, layers, len(layers))
    metadata = ctypes.create_string_buffer(lib.gguf_get_meta_size(header.handle))
    lib.gguf_get_meta_data(header.handle, metadata)
    return start, metadata.raw


def _check_room(path: Path, folder: Path) -> None:
    needed, free = path.stat().st_size, shutil.disk_usage(folder).free
    if free < needed + (1 << 20):
        raise ProjectorError(_no_copy(path, folder, f"{free >> 20} MB are free"))


def _no_copy(path: Path, folder: Path, why: str) -> str:
    return (
        f"{path} was written by llama.cpp's old converter and runs one encoder layer short; the "
        f"copy that does not takes {path.stat().st_size >> 20} MB in {folder.parent} while it is "
        f"loaded, and cannot be written: {why}. Set TMPDIR to a folder with room, or leave the "
        'encoder as it is with encoder="stock"'
    )

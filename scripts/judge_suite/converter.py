"""llama.cpp's own converter, out of the source package of the llama-cpp-python that is installed.

Nothing of it is in this repository: pip downloads the package once, to the folder of the run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGE = "llama-cpp-python"


def llama_cpp_sources(work: Path) -> Path:
    """The folder with convert_hf_to_gguf.py, fetched and unpacked where it is not there yet."""
    release = f"llama_cpp_python-{version(PACKAGE)}"
    sources = work / release / "vendor" / "llama.cpp"
    if (sources / "convert_hf_to_gguf.py").exists():
        return sources
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", PACKAGE, f"{PACKAGE}=={version(PACKAGE)}", "--dest", str(work)]
    subprocess.run(command, check=True)
    with tarfile.open(work / f"{release}.tar.gz") as archive:
        wanted = [m for m in archive.getmembers() if _is_converter(m.name)]
        archive.extractall(work, members=wanted, filter="data")
    return sources


def _is_converter(name: str) -> bool:
    inside = name.partition("/vendor/llama.cpp/")[2]
    return inside.startswith(("convert_hf_to_gguf.py", "conversion/", "gguf-py/"))


def convert(
    sources: Path,
    folder: Path,
    out: Path,
    *,
    mmproj: bool,
    pre: str,
    options: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
) -> None:
    """Writes `out` from the checkpoint in `folder`; raises RuntimeError with the converter's words.

    pre: the pre-tokenizer's name: llama.cpp knows it by a hash, and has none of a tiny vocabulary.
    rename: parts of tensors' names that the converter gets wrong -> right.
    """
    kind = ["--mmproj"] if mmproj else []
    command = [sys.executable, str(Path(__file__)), str(sources), pre, json.dumps(rename or {})]
    command += [str(folder), "--outfile", str(out), "--outtype", "f32", *kind, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not out.exists():
        raise RuntimeError(f"llama.cpp's converter failed on {folder}:\n{done.stderr[-2000:]}")


def _main(sources: str, pre: str, rename: str, *arguments: str) -> None:
    sys.path[:0] = [sources, f"{sources}/gguf-py"]
    import conversion.base  # type: ignore[import-not-found]
    import convert_hf_to_gguf  # type: ignore[import-not-found]
    import gguf

    def known(_model: Any, _tokenizer: Any) -> str:
        return pre

    add_tensor, names = gguf.GGUFWriter.add_tensor, json.loads(rename)

    def renamed(writer: Any, name: str, *tensor: Any, **settings: Any) -> None:
        for wrong, right in names.items():
            name = name.replace(wrong, right)
        add_tensor(writer, name, *tensor, **settings)

    gguf.GGUFWriter.add_tensor = renamed
    conversion.base.TextModel.get_vocab_base_pre = known
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    _main(*sys.argv[1:])

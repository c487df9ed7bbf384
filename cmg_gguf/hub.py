"""Model pairs by the name of their repository on a Hugging Face hub.

    fetch_pair("owner/repo:Q4_K_M")     # (language model, mmproj), in the hub's own cache

Which files that means is decided by their names alone, in the order of llama.cpp's `-hf`:

- the language model: that of the quant that is named, in any case; else of Q4_K_M; else of Q8_0;
  else the first by name. Where several have that quant, the file itself must be named
  (`owner/repo:FILE.gguf`). Of a split model (`-00001-of-0000N`), all parts, and the first one's
  path.
- the mmproj: of those in the folder of the language model or nearest above it, F16, else BF16, else
  F32, else Q8_0, else the first by name.

Downloads are `huggingface_hub`'s, with its settings (HF_TOKEN, HF_ENDPOINT, HF_HUB_CACHE,
HF_HUB_OFFLINE), but for one thing: what a stopped program has of a file is gone on with. Without a
connection, what is in the cache is taken.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from cmg_gguf.errors import HubConnectionError, HubError, HubNameError, UnsupportedError, shown

DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")
PROJECTOR_QUANTS = ("F16", "BF16", "F32", "Q8_0")
"""The most exact first, but for F32: of an encoder it is twice the size and no better."""

Told = Callable[[int, int], None]
"""told(done, total): bytes."""

_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::(.+))?")
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)")
_QUANT = re.compile(
    r"(?<![A-Za-z0-9])(?:UD-)?"
    r"(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|FP?16|FP?32)(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_NO_MODEL = re.compile("mmproj|imatrix|mtp-|eagle3-|dflash-|dspark-", re.IGNORECASE)
"""Files beside a model, as llama.cpp tells them."""


def fetch_pair(
    name: str, mmproj: str | Path | None = None, *, progress: Told | None = None
) -> tuple[Path, Path]:
    """Paths of a model and its mmproj, downloaded where the cache does not have them.

    name: "owner/repo", "owner/repo:QUANT" or "owner/repo:FILE.gguf". mmproj: a file to take instead
    of the repository's. progress: called with (done, total) bytes while something is downloaded.

    Raises HubNameError, HubConnectionError, HubError; UnsupportedError without huggingface_hub.
    """
    repo, wanted = split_name(name)
    there = _listing(repo)
    model = language_files(there, wanted)
    names = [*model, *([] if mmproj is not None else [projector_file(there, model[0])])]
    if there.folder is not None:
        paths = [there.folder / name for name in names]
    else:
        paths = _downloaded(repo, names, progress or (lambda done, total: None))
    return paths[0], paths[-1] if mmproj is None else Path(mmproj)


def held_pair(name: str, mmproj: str | Path | None = None) -> tuple[Path, Path] | None:
    """What `fetch_pair` gives without a connection; None where the cache has not all of it.

    Raises HubNameError; UnsupportedError without huggingface_hub.
    """
    repo, wanted = split_name(name)
    there = _cached(repo, "")
    if there is None or there.folder is None:
        return None
    try:
        model = language_files(there, wanted)[0]
        beside = mmproj or there.folder / projector_file(there, model)
    except HubError:
        return None
    return there.folder / model, Path(beside)


def split_name(name: str) -> tuple[str, str | None]:
    """Repository and quant (or file) of "owner/repo[:quant]". Raises HubNameError."""
    found = _NAME.fullmatch(name)
    if found is None or ".." in found[1] or "--" in found[1]:
        raise HubNameError(
            f"{shown(name)} names no model repository; write owner/repo or owner/repo:Q4_K_M (a "
            "file on this machine is named with its path: -m FILE --mmproj FILE)"
        )
    return found[1], found[2]


# --- Which files ---


@dataclass(frozen=True)
class Listing:
    """The files of a repository. where: how it is called. folder: where they are in the cache, if
    it is the cache that they were found in. remedy: what may help where one is missing."""

    where: str
    names: Collection[str]
    remedy: str
    folder: Path | None = None


def language_files(there: Listing, wanted: str | None) -> list[str]:
    """The parts of the language model, in order. Raises HubError."""
    split: dict[str, set[str]] = {}
    for name in sorted(there.names):
        if name.endswith(".gguf") and not _NO_MODEL.search(PurePosixPath(name).name):
            found = _SPLIT.search(name)
            first = name if found is None else _part(name, 1)
            split.setdefault(first, set()).add(name)
    if not split:
        raise HubError(f"{there.where} has no GGUF file of a language model; {there.remedy}")
    return _whole(there, split, _chosen(there, list(split), wanted))


def _chosen(there: Listing, files: Sequence[str], wanted: str | None) -> str:
    if wanted is not None and wanted in files:
        return wanted
    for quant in DEFAULT_QUANTS if wanted is None else (wanted,):
        fitting = _of_quant(files, quant)
        if len(fitting) > 1:
            raise HubError(
                f"{there.where} has {len(fitting)} models that {quant} fits: {', '.join(fitting)}; "
                "name one of these files behind the colon"
            )
        if fitting:
            return fitting[0]
    if wanted is None:
        return files[0]
    quants = sorted({quant_of(name) or PurePosixPath(name).name for name in files})
    raise HubError(f"{there.where} has no {wanted}; it has {', '.join(quants)}; {there.remedy}")


def _of_quant(files: Sequence[str], quant: str) -> list[str]:
    """Files of that quant; without any, those in whose name it stands, as in `UD-Q4_K_XL`."""
    exact = [name for name in files if (quant_of(name) or "").upper() == quant.upper()]
    within = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(quant)}[.-]", re.IGNORECASE)
    return exact or [name for name in files if within.search(PurePosixPath(name).name)]


def _whole(there: Listing, split: dict[str, set[str]], first: str) -> list[str]:
    found = _SPLIT.search(first)
    if found is None:
        return [first]
    parts = [_part(first, i) for i in range(1, int(found[2]) + 1)]
    if missing := [part for part in parts if part not in split[first]]:
        raise HubError(
            f"{there.where} has {len(parts) - len(missing)} of the {len(parts)} parts of {first}; "
            f"{missing[0]} is missing; {there.remedy}"
        )
    return parts


def _part(name: str, i: int) -> str:
    return _SPLIT.sub(lambda found: f"-{i:05}-of-{found[2]}", name)


def projector_file(there: Listing, model: str) -> str:
    """The best mmproj for that language model. Raises HubError."""
    folder = PurePosixPath(model).parent

    def rank(name: str) -> tuple[bool, int, int, str]:
        path, quant = PurePosixPath(name), (quant_of(name) or "").upper().replace("FP", "F")
        known = quant in PROJECTOR_QUANTS
        place = PROJECTOR_QUANTS.index(quant) if known else len(PROJECTOR_QUANTS)
        above = path.parent in (folder, *folder.parents)
        return not above, -len(path.parts) if above else 0, place, name

    found = [n for n in there.names if n.endswith(".gguf") and "mmproj" in n.lower()]
    if not found:
        raise HubError(
            f"{there.where} has no mmproj file, so its model does not see; name one with --mmproj "
            f"(mmproj_path=), or take a repository that has one; {there.remedy}"
        )
    return min(found, key=rank)


def quant_of(name: str) -> str | None:
    """The number type that a file is named after, as it is written there: "Q4_K_M"."""
    found = _QUANT.findall(_SPLIT.sub("", PurePosixPath(name).name.removesuffix(".gguf")))
    return found[-1] if found else None


# --- From the hub, or from its cache ---


def _listing(repo: str) -> Listing:
    """What is there: on the hub or, without a connection, in the cache."""
    huggingface_hub = _library()
    try:
        with _telling(repo):
            info = huggingface_hub.HfApi().model_info(repo)
        names = [file.rfilename for file in info.siblings or ()]
        return Listing(repo, names, f"see {huggingface_hub.constants.ENDPOINT}/{repo}")
    except HubConnectionError:
        offline = huggingface_hub.constants.is_offline_mode()
        there = _cached(repo, "HF_HUB_OFFLINE is set" if offline else "the hub is not reached")
        if there is None:
            raise
        return there


def _cached(repo: str, why: str) -> Listing | None:
    """What the cache has of a repository; why it is looked at. None = nothing."""
    try:
        folder = _library().snapshot_download(repo, local_files_only=True, allow_patterns=[])
    except OSError:
        return None
    there = Path(folder)
    names = [p.relative_to(there).as_posix() for p in there.rglob("*.gguf") if p.is_file()]
    return Listing(f"the cache of {repo}", names, f"{why}: ask again with a connection", there)


@dataclass(frozen=True)
class _File:
    """A file on the hub, and where the cache keeps its content."""

    name: str
    url: str
    etag: str
    size: int
    blob: Path
    lock: Path

    @property
    def part(self) -> Path:
        """What there is of it before it is whole."""
        return self.blob.with_name(f"{self.etag}.incomplete")


def _downloaded(repo: str, names: Sequence[str], progress: Told) -> list[Path]:
    """Paths in the cache of files that are on the hub."""
    huggingface_hub = _library()
    with _telling(repo):
        missing = [f for f in (_remote(repo, n) for n in names) if f and not f.blob.exists()]
        total, done = sum(file.size for file in missing), 0
        for file in missing:
            _complete(file, partial(_tell, progress, done, total))
            done += file.size
        return [Path(huggingface_hub.hf_hub_download(repo, name)) for name in names]


def _tell(progress: Told, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _remote(repo: str, name: str) -> _File | None:
    """None for what plain HTTP does not give: `hf_hub_download` has other ways."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name

    url = hf_hub_url(repo, name)
    about = get_hf_file_metadata(url)
    if not about.etag or not about.size or about.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return None
    cache, folder = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=repo, repo_type="model")
    return _File(
        name,
        url,
        about.etag,
        about.size,
        blob=cache / folder / "blobs" / about.etag,
        lock=cache / ".locks" / folder / f"{about.etag}.lock",
    )


def _complete(file: _File, tell: Callable[[int], None]) -> None:
    """Downloads what is missing of a file, and checks it. Under the lock that the hub's own
    downloads take."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    for path in (file.lock, file.blob):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(file.lock):
        if file.blob.exists():
            return
        with file.part.open("ab") as content:
            if content.tell() > file.size:
                content.truncate(0)
            http_get(
                file.url,
                content,
                resume_size=content.tell(),
                headers=build_hf_headers(),
                expected_size=file.size,
                tqdm_class=partial(_Bar, tell),
            )
        _check_sum(file)
        file.part.replace(file.blob)


def _check_sum(file: _File) -> None:
    """Of large files, the hub's etag is the SHA-256 of the content. Raises HubError."""
    if not re.fullmatch("[0-9a-f]{64}", file.etag):
        return
    digest = hashlib.sha256()
    with file.part.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    if digest.hexdigest() != file.etag:
        file.part.unlink()
        raise HubError(
            f"{file.name} did not arrive as it is on the hub (another checksum); what there was of "
            "it is deleted, so ask again"
        )


class _Bar:
    """What `huggingface_hub` tells its progress to: hands on the bytes that are there."""

    def __init__(self, tell: Callable[[int], None], *, initial: int = 0, **shown: Any) -> None:
        self._tell, self._done = tell, initial
        tell(initial)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def update(self, n: int) -> None:
        self._done += n
        self._tell(self._done)


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as exc:
        raise UnsupportedError(
            "a model by the name of its repository needs huggingface_hub: "
            "pip install 'cmg-gguf[hub]', or name its files"
        ) from exc
    return huggingface_hub


@contextmanager
def _telling(repo: str) -> Iterator[None]:
    """Turns what the library raises into this package's errors."""
    from huggingface_hub import constants, errors, get_token

    hub = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError as exc:
        raise HubError(
            f"{repo} is gated: accept its terms at {hub}/{repo}, and set HF_TOKEN to a token of "
            "the account that did"
        ) from exc
    except errors.RepositoryNotFoundError as exc:
        token = "a token that may read it (yours may not)" if get_token() else "a token of yours"
        raise HubError(
            f"{hub} has no model repository {repo}, or it is private: check the spelling, or set "
            f"HF_TOKEN to {token}"
        ) from exc
    except errors.OfflineModeIsEnabled as exc:
        raise HubConnectionError(
            f"HF_HUB_OFFLINE is set and {repo} is not in the cache ({constants.HF_HUB_CACHE}); "
            "unset it to download"
        ) from exc
    except errors.HfHubHTTPError as exc:
        raise _refused(repo, hub, exc.response.status_code) from exc
    except (errors.HTTPError, errors.LocalEntryNotFoundError) as exc:
        raise HubConnectionError(
            f"{hub} is not reached ({_line(exc)}) and {repo} is not whole in the cache "
            f"({constants.HF_HUB_CACHE}); ask again with a connection, and it goes on from there"
        ) from exc
    except OSError as exc:
        raise HubError(f"{repo} cannot be downloaded: {_line(exc)}") from exc
    except ValueError as exc:
        raise HubError(f"{hub} does not answer as a hub does; check HF_ENDPOINT") from exc


def _refused(repo: str, hub: str, status: int) -> HubError:
    if status in (401, 403):
        return HubError(
            f"{hub} refuses your token for {repo} ({status}): set HF_TOKEN to a valid one, or log "
            "in again with `hf auth login`"
        )
    if status == 429 or status >= 500:
        return HubConnectionError(
            f"{hub} does not answer now ({status}) and {repo} is not whole in the cache; ask later"
        )
    return HubError(f"{hub} answers {status} for {repo}; check the name")


def _line(exc: Exception) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__

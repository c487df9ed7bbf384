"""Which pictures a request may name: what is allowed is had, and all the rest is refused alike."""

from __future__ import annotations

import base64
import os
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import anyio
import httpcore
import numpy as np
import pytest
import trustme
from numpy.typing import NDArray
from pictured import PictureHost, picture_host, png
from PIL import Image
from prompts import picture

from cmg_gguf import ImageError, PromptError
from cmg_gguf.cli.media_flags import MediaFlags
from cmg_gguf.server import remote
from cmg_gguf.server.files import read_below
from cmg_gguf.server.media import Media
from cmg_gguf.server.remote import Host, fetched, is_public

BASE64 = base64.b64encode(png()).decode()
PUBLIC = "93.184.215.14"


class Touched:
    """What the process opened, looked up and connected to, as Python's audit events tell it."""

    def __init__(self) -> None:
        self.on = False
        self.events: list[tuple[str, Any]] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event in ("open", "socket.connect", "socket.getaddrinfo"):
            self.events.append((event, arguments[1 if event == "socket.connect" else 0]))

    def during(self, act: Callable[[], object]) -> list[tuple[str, Any]]:
        self.events, self.on = [], True
        try:
            act()
        finally:
            self.on = False
        return self.events


TOUCHED = Touched()


@pytest.fixture(scope="module")
def host() -> Iterator[PictureHost]:
    with picture_host() as served:
        yield served


@pytest.fixture(scope="module", autouse=True)
def _warm(host: PictureHost) -> None:
    """What is imported with the first picture is no file that a request reached."""
    Image.init()
    admit(message(f"{host.url}/a.png"), Media(hosts=[Host.of(f"127.0.0.1:{host.port}")]))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `open` with pictures, and around it what must not be read."""
    root = tmp_path_factory.mktemp("media").resolve()
    (root / "open" / "cats").mkdir(parents=True)
    (root / "open2").mkdir()
    for name in ("secret.png", "open2/a.png", "open/a.png", "open/cats/my cat.png", "open/%41.png"):
        (root / name).write_bytes(png())
    (root / "open" / "large.png").write_bytes(png(size=400))
    (root / "open" / "text.png").write_text("secret: 42")
    (root / "open" / "empty.png").write_bytes(b"")
    (root / "open" / "cut.png").write_bytes(png()[:-40])
    (root / "open" / "inside.png").symlink_to("cats/my cat.png")
    (root / "open" / "outside.png").symlink_to(root / "secret.png")
    (root / "open" / "up").symlink_to(root)
    (root / "open" / "circle.png").symlink_to("circle.png")
    (root / "open" / "device.png").symlink_to("/dev/zero")
    os.mkfifo(root / "open" / "pipe.png")
    listening = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(root / "open")  # a socket's path is short
    listening.bind("socket.png")
    os.chdir(here)
    listening.close()
    (root / "open" / "locked.png").write_bytes(png())
    (root / "open" / "locked.png").chmod(0)
    return root


@pytest.fixture
def all_open(root: Path, host: PictureHost) -> Media:
    hosts = (Host.of(f"127.0.0.1:{host.port}"), Host.of("pics.example.org"))
    return Media(folder=root / "open", hosts=hosts, max_bytes=20_000, max_pixels=80 * 80)


def message(part: object) -> list[dict[str, Any]]:
    spelled = part if isinstance(part, dict) else {"type": "image_url", "image_url": part}
    return [{"role": "user", "content": [spelled, {"type": "text", "text": "What is it?"}]}]


def admit(messages: Any, media: Media) -> Any:
    return anyio.run(media.resolved, messages)


def pixels(part: object, media: Media) -> NDArray[np.uint8]:
    """Of the picture that becomes of a part."""
    got = admit(message(part), media)[0]["content"]
    assert got[1] == {"type": "text", "text": "What is it?"}
    rgb: NDArray[np.uint8] = got[0]["image"]
    return rgb


def refusal(part: object, media: Media) -> str:
    with pytest.raises(ImageError) as caught:
        admit(message(part), media)
    return str(caught.value)


# --- what is allowed ---------------------------------------------------------------------------


SPELLINGS: list[Callable[[str], dict[str, Any]]] = [
    lambda source: {"type": "image_url", "image_url": {"url": source}},
    lambda source: {"type": "image_url", "image_url": source},
    lambda source: {"type": "input_image", "image_url": source, "detail": "auto"},
    lambda source: {"type": "image", "image": source},
    lambda source: {"type": "image", "url": source},
    lambda source: {"type": "image", "image_url": {"url": source}},
    lambda source: {"type": "image", "source": {"type": "url", "url": source}},
]
IN_BASE64: list[Callable[[str], dict[str, Any]]] = [
    lambda data: {"type": "image", "base64": data},
    lambda data: {"type": "image", "data": data},
    lambda data: {"type": "image", "source": {"type": "base64", "data": data}},
]


@pytest.mark.parametrize("spelling", [*SPELLINGS, *IN_BASE64])
@pytest.mark.parametrize("source", [BASE64, f"data:image/png;base64,{BASE64}"])
def test_base64_and_data_urls_are_taken_in_every_spelling(
    spelling: Callable[[str], dict[str, Any]], source: str
) -> None:
    def take() -> None:
        assert np.array_equal(pixels(spelling(source), Media()), picture(0))

    assert TOUCHED.during(take) == []


@pytest.mark.parametrize("spelling", [*SPELLINGS, lambda source: {"type": "image", "path": source}])
@pytest.mark.parametrize("name", ["a.png", "cats/my cat.png", "inside.png", "%41.png", "./a.png"])
def test_files_below_the_folder_are_read(
    spelling: Callable[[str], dict[str, Any]], name: str, all_open: Media, root: Path
) -> None:
    for path in (name, f"{root}/open/{name}"):
        assert np.array_equal(pixels(spelling(path), all_open), picture(0))


@pytest.mark.parametrize("name", ["a.png", "cats/my%20cat.png", "%61.png", "%2541.png"])
def test_file_urls_are_decoded_once(name: str, all_open: Media, root: Path) -> None:
    for url in (f"file://{root}/open/{name}", f"FILE://localhost{root}/open/{name}"):
        assert np.array_equal(pixels(url, all_open), picture(0))


def test_an_allowed_host_is_asked(all_open: Media, host: PictureHost) -> None:
    url = f"{host.url}/a.png?size=full#top"
    assert np.array_equal(pixels(url, all_open), picture(0))
    assert host.asked[-1] == ("/a.png?size=full", f"127.0.0.1:{host.port}")


def test_what_is_handed_on_names_nothing(all_open: Media, host: PictureHost) -> None:
    said = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": f"{host.url}/a.png"},
                {"type": "text", "text": "a.png"},
                {"type": "image", "path": "a.png"},
                {"type": "image", "image": f"data:;base64,{BASE64}"},
            ],
            "images": [BASE64, "a.png"],
        },
        {"role": "assistant", "content": None},
    ]
    system, user, assistant = admit(said, all_open)
    assert (system, assistant) == (said[0], said[2])
    assert user["content"][1] == {"type": "text", "text": "a.png"}
    pictures = [*user["images"], *(user["content"][i]["image"] for i in (0, 2, 3))]
    assert all(np.array_equal(rgb, picture(0)) for rgb in pictures)


@pytest.mark.parametrize("messages", [None, "a.png", {"role": "user"}, [], ["a.png"], [7]])
def test_what_is_no_message_is_left_to_the_request(messages: object) -> None:
    assert admit(messages, Media()) == messages


# --- what is refused ---------------------------------------------------------------------------


NAMES = [
    # Nothing is there, or it is outside.
    *("nothing.png", "/etc/passwd", "/etc/shadow", "/nothing", "{root}/secret.png", "/", "."),
    *("cats", "{root}/open2/a.png", "../secret.png", "cats/../a.png", ".."),
    *("../open/a.png", "cats/.."),
    *("~/.ssh/id_rsa", "/proc/self/environ", "/dev/stdin", "/dev/fd/0", "", " ",),
    # Links, devices, pipes.
    *("outside.png", "up/secret.png", "up/open/../secret.png", "circle.png", "device.png"),
    *("pipe.png", "socket.png", "/dev/zero", "/dev/null"),
    # Spelled otherwise.
    *("file:{root}/secret.png", "file:///etc/passwd", "file://{root}/open/../secret.png"),
    *("file://{root}/open/%2e%2e/secret.png", "file://{root}/open/%2E%2E%2Fsecret.png"),
    *("file://{root}/open/%252e%252e/secret.png", "file://{root}/open/..%5csecret.png"),
    *("file://{root}/open/a.png%00.jpg", "a.png\0", "a\0.png", "a.png\n", "%61.png"),
    *("%2e%2e/secret.png", "file://elsewhere/share/a.png", "file:////elsewhere/share/a.png"),
    *("//elsewhere/share/a.png"),
    *("\\\\elsewhere\\share\\a.png", "\\\\?\\C:\\a.png", "C:\\a.png", "C:/a.png", "c:a.png"),
    *("..\\secret.png", "a.png:stream", "file:C:/a.png", "file:///C:/a.png", "file:///C|/a.png"),
    *("file://", "file:", "file:///", "file://127.0.0.1{root}/open/a.png", "jar:file:///a.png!/b"),
    *("local:a.png", "php://filter/resource=a.png", "\u2025/secret.png", "\uff0e\uff0e/secret.png"),
    # There, and no picture.
    *("text.png", "empty.png", "cut.png", "large.png", "x" * 300, "cats/" * 2000 + "a.png"),
    # Hosts.
    *("http://{host}/missing", "http://{host}/redirect", "http://{host}/redirect_to_file"),
    *("http://{host}/text", "http://{host}/cut", "http://{host}/shorter_than_said"),
    *("http://{host}/longer_than_said", "http://{host}/compressed", "http://{host}/large"),
    *("http://{host}/endless", "http://{host}/no_http", "https://{host}/a.png"),
    *("http://127.0.0.1/a.png", "http://127.0.0.1:1/a.png", "http://localhost:{port}/a.png"),
    *("http://2130706433:{port}/a.png", "http://0x7f000001:{port}/a.png", "http://0x7f.1:{port}/"),
    *("http://0177.0.0.1:{port}/a.png", "http://127.1:{port}/a.png", "http://127.0.0.01:{port}/"),
    *("http://0:{port}/a.png", "http://0.0.0.0:{port}/a.png", "http://[::1]:{port}/a.png"),
    *("http://[::]:{port}/", "http://[::ffff:127.0.0.1]:{port}/", "http://[::ffff:7f00:1]:{port}/"),
    *("http://[::127.0.0.1]:{port}/", "http://[fe80::1%25lo]:{port}/", "http://169.254.169.254/"),
    *("http://metadata.google.internal/", "http://127.0.0.1:{port}.example.org/a.png"),
    *("http://{host}@example.org/a.png", "http://example.org@{host}/a.png", "http://{host}:80/a.png"),
    *("http://user:key@{host}/a.png", "http://@{host}/a.png", "http://{host}\\@example.org/a.png"),
    *("http://{host}%00/a.png", "http://{host}\0/a.png", "http://{host}/a.png\r\nX-Key: 1"),
    *("http://{host}/ a.png", " http://{host}/a.png", "http:/{host}/a.png", "http:{host}/a.png"),
    *("http:///{host}/a.png", "http:\\\\{host}\\a.png", "http://127。0。0。1:{port}/a.png"),
    *("http://①②⑦.0.0.1:{port}/a.png", "http://pics.example.org./a.png", "http://pics.example.org:22/"),
    *("http://pics.example.org.evil.example/", "http://evil.example/pics.example.org"),
    *("ftp://{host}/a.png", "gopher://{host}/a.png", "ws://{host}/a.png", "unix:/run/a.sock"),
    *("http+unix://%2Frun%2Fdocker.sock/a.png", "http://[v1.x]:{port}/a.png", "http://"),
    # Not base64 of a picture.
    *("AAAA", base64.b64encode(b"secret: 42").decode(), BASE64[1:], "iVBORw0KGgo=" * 400),
]  # fmt: skip


def test_all_that_is_not_allowed_is_refused_in_the_same_words(
    all_open: Media, root: Path, host: PictureHost
) -> None:
    known = {"root": str(root), "host": f"127.0.0.1:{host.port}", "port": host.port}
    said: dict[str, list[str]] = {}
    refused = refusal("nothing.png", all_open)

    async def try_all() -> None:
        for name in NAMES:
            source = name.format(**known) if "{" in name else name
            for spelling in SPELLINGS:
                try:
                    await all_open.resolved(message(spelling(source)))
                    answer = "admitted"
                except (ImageError, PromptError) as exc:
                    answer = str(exc)
                said.setdefault(answer if source else "", []).append(source)

    touched = TOUCHED.during(lambda: anyio.run(try_all))
    assert said.pop("")
    assert {answer: set(sources) for answer, sources in said.items() if answer != refused} == {}
    # It is the judge of what was reached, not the code: that one address, and no name.
    reached = {what for event, what in touched if event == "socket.connect"}
    assert reached == {("127.0.0.1", host.port)}
    assert not [
        what for event, what in touched if event == "socket.getaddrinfo" and not _is_ip(what)
    ]
    outside = {str(what) for event, what in touched if event == "open" and str(what)[:1] == "/"}
    assert {path for path in outside if "media" in path or "/etc/pass" in path} <= {f"{root}/open"}
    assert not {what for event, what in touched if "secret" in str(what)}


def _is_ip(name: object) -> bool:
    try:
        ip_address(name.decode() if isinstance(name, bytes) else str(name))
    except ValueError:
        return False
    return True


def test_a_file_below_the_folder_is_read_whole_and_a_way_out_of_it_is_not(tmp_path: Path) -> None:
    folder = (tmp_path / "open").resolve()
    (folder / "cats").mkdir(parents=True)
    (folder / "cats" / "1 a.png").write_bytes(b"12345")
    (tmp_path / "secret").write_bytes(b"s")
    (folder / "link").symlink_to(tmp_path / "secret")
    for name in ("cats/1 a.png", f"file://{folder}/cats/1%20a.png"):
        assert read_below(folder, name, max_bytes=5) == b"12345"
    for name in ("../secret", "link", f"file://{tmp_path}/secret", "cats", ""):
        with pytest.raises(ImageError):
            read_below(folder, name, max_bytes=5)
    with pytest.raises(ImageError):
        read_below(folder, "cats/1 a.png", max_bytes=4)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_refused_alike(all_open: Media) -> None:
    assert refusal("locked.png", all_open) == refusal("nothing.png", all_open)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_folder_and_hosts_nothing_is_reached(
    name: str, root: Path, host: PictureHost
) -> None:
    known = {"root": str(root), "host": f"127.0.0.1:{host.port}", "port": host.port}
    source = name.format(**known) if "{" in name else name
    nothing = [] if source else [PromptError]

    def attempt() -> None:
        with pytest.raises((ImageError, *nothing)) as caught:
            admit(message({"type": "image", "image": source}), Media())
        if source:
            assert str(caught.value) == (
                "message 0, part 0: the picture cannot be had: give the base64 or data: URL of a "
                "whole image file"
            )

    assert TOUCHED.during(attempt) == []


@pytest.mark.parametrize("source", [7, True, ["a.png"], [["a.png"]], 1.5])
def test_what_is_no_string_is_refused_alike(source: object, all_open: Media) -> None:
    assert refusal({"type": "image", "image": source}, all_open) == refusal("no.png", all_open)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": {"path": "a.png"}},
        {"type": "input_image", "file_id": "file-1"},
        {"type": "image_url", "image_url": {"path": "a.png"}},
        {"type": "text", "text": "", "image": "a.png"},
        {"type": "file", "file": "a.png"},
        {"type": "image", "path": "a.png", "url": "b.png"},
        "a.png",
    ],
)
def test_pictures_of_another_form_are_the_clients_mistake(part: object, all_open: Media) -> None:
    said = [{"role": "user", "content": [part]}]
    with pytest.raises(PromptError, match="message 0, part 0"):
        admit(said, all_open)


@pytest.mark.parametrize("where", ["slow", "slow_header", "silent"])
def test_a_slow_host_is_given_up_and_told_alike(
    where: str, all_open: Media, host: PictureHost
) -> None:
    impatient = Media(folder=all_open.folder, hosts=all_open.hosts, seconds=0.4)
    started = anyio.run(_seconds, impatient, f"{host.url}/{where}")
    assert 0.3 < started < 2
    assert refusal(f"{host.url}/{where}", impatient) == refusal("nothing.png", all_open)


async def _seconds(media: Media, url: str) -> float:
    started = anyio.current_time()
    with pytest.raises(ImageError):
        await media.resolved(message(url))
    return anyio.current_time() - started


def test_the_time_is_for_all_pictures_together(all_open: Media, host: PictureHost) -> None:
    impatient = Media(folder=all_open.folder, hosts=all_open.hosts, seconds=0.4)
    said = [{"role": "user", "content": "", "images": ["a.png", *[f"{host.url}/silent"] * 9]}]
    with pytest.raises(ImageError, match="message 0, image 1"):
        admit(said, impatient)


def test_there_are_no_more_pictures_than_allowed() -> None:
    said = [{"role": "user", "content": "", "images": [BASE64] * 3}] * 2
    assert admit(said, Media(max_pictures=6))
    with pytest.raises(PromptError, match="6 pictures and the limit is 5"):
        admit(said, Media(max_pictures=5))


def test_there_are_no_more_pixels_than_allowed() -> None:
    said = [{"role": "user", "content": "", "images": [BASE64] * 3}]
    assert admit(said, Media(max_request_pixels=3 * 56 * 56))
    with pytest.raises(PromptError, match="the first 2 pictures have 6272 pixels together"):
        admit(said, Media(max_request_pixels=2 * 56 * 56 - 1))


def test_what_is_wrong_with_a_picture_that_was_sent_is_told() -> None:
    cut, large = (base64.b64encode(content).decode() for content in (png()[:-40], png(size=400)))
    assert "damaged" in refusal(cut, Media())
    assert "damaged" in refusal(f"data:image/png;base64,{cut}", Media())
    assert "400 x 400 = 160000 pixels and the limit is 80000" in refusal(
        large, Media(max_pixels=80_000)
    )
    assert refusal("data:image/png;base64,!", Media()).startswith("message 0, part 0: data URL")


def test_a_link_that_is_put_there_between_check_and_use_is_not_followed(
    all_open: Media, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, folder = root / "open" / "swapped.png", root / "open" / "swapped"
    resolve = Path.resolve

    def swapping(path: Path, strict: bool = False) -> Path:
        real = resolve(path, strict)
        if path == victim:
            victim.unlink()
            victim.symlink_to(root / "secret.png")
        if path == folder / "secret.png":
            (folder / "secret.png").unlink()
            folder.rmdir()
            folder.symlink_to(root)
        return real

    victim.write_bytes(png())
    folder.mkdir()
    (folder / "secret.png").write_bytes(png())
    monkeypatch.setattr(Path, "resolve", swapping)
    assert refusal("swapped.png", all_open) == refusal("nothing.png", all_open)
    assert refusal("swapped/secret.png", all_open) == refusal("nothing.png", all_open)
    assert victim.is_symlink()
    assert folder.is_symlink()


# --- names and addresses -----------------------------------------------------------------------


class Names:
    """A resolver: each name's answers in turn, the last one again and again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: list[list[str]]) -> None:
        self.answers, self.asked = answers, list[str]()
        self.connected: list[str] = []
        monkeypatch.setattr(socket, "getaddrinfo", self._getaddrinfo)
        monkeypatch.setattr(httpcore, "AnyIOBackend", lambda: self)

    def _getaddrinfo(self, host: Any, port: Any, *_: Any, **__: Any) -> list[Any]:
        if _is_ip(host):
            families = [socket.AF_INET6 if ":" in str(host) else socket.AF_INET]
            return [(families[0], socket.SOCK_STREAM, 6, "", (str(host), port))]
        self.asked.append(host if isinstance(host, str) else host.decode())
        now = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        kinds = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(kinds[":" in ip], socket.SOCK_STREAM, 6, "", (ip, port)) for ip in now]

    async def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> Any:
        self.connected.append(host)
        raise httpcore.ConnectError("nobody there")


@pytest.mark.parametrize(
    "answer",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.0.8", "198.18.0.1"),
        *("192.0.2.1", "198.51.100.1", "203.0.113.1", "192.88.99.1", "0.1.2.3", "127.255.0.1"),
        *("::1", "::", "::ffff:127.0.0.1", f"::ffff:{PUBLIC}", "::127.0.0.1", f"::{PUBLIC}"),
        *("fe80::1", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1", "3fff::1"),
        *("2002:7f00:1::", "2001:0:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a00:1", "100::1"),
        *("64:ff9b:1::1", "5f00::1", "4000::1"),
    ],
)
def test_a_name_of_an_address_that_is_not_public_is_not_connected_to(
    answer: str, all_open: Media, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names(monkeypatch, [[answer], [PUBLIC, answer], [answer, PUBLIC]])
    for url in ("http://pics.example.org/", "https://PICS.example.org/", "http://pics.example.org"):
        assert refusal(url, all_open) == refusal("nothing.png", all_open)
    assert names.asked == ["pics.example.org"] * 3
    assert names.connected == []


def test_the_connection_goes_to_the_address_that_was_checked(
    all_open: Media, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is public when it is checked, and loopback ever after."""
    public = "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
    names = Names(monkeypatch, [[PUBLIC, public, PUBLIC], ["127.0.0.1"]])
    refusal("http://pics.example.org/a.png", all_open)
    assert names.asked == ["pics.example.org"]
    assert names.connected == [PUBLIC, public]


@pytest.mark.parametrize("address", [PUBLIC, "2606:2800:21f::1", "64:ff9b::5db8:d70e", "8.8.8.8"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(ip_address(address))


def test_a_name_without_addresses_is_refused(
    all_open: Media, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Names(monkeypatch, [[]])
    assert refusal("http://pics.example.org/", all_open) == refusal("nothing.png", all_open)
    assert names.connected == []


def test_a_private_host_is_allowed_by_its_address_alone(host: PictureHost) -> None:
    named = Media(hosts=[Host.of(f"localhost:{host.port}")])
    before = len(host.asked)
    refusal(f"http://localhost:{host.port}/a.png", named)
    assert len(host.asked) == before
    addressed = Media(hosts=[Host.of(f"127.0.0.1:{host.port}")])
    assert np.array_equal(pixels(f"{host.url}/a.png", addressed), picture(0))


@pytest.mark.parametrize(
    ("certified", "is_had"), [("pics.example.org", True), ("evil.example", False)]
)
def test_tls_is_checked_against_the_name(
    certified: str, is_had: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(certified).configure_cert(serving)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    monkeypatch.setattr(remote, "is_public", lambda address: True)
    with picture_host(serving) as host:
        answer = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", host.port))
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [answer])
        url, hosts = (
            f"https://pics.example.org:{host.port}/a.png",
            [Host.of(f"pics.example.org:{host.port}")],
        )

        async def fetch(tls: ssl.SSLContext | None) -> bytes:
            return await fetched(url, hosts, max_bytes=1 << 20, tls=tls)

        if is_had:
            assert anyio.run(fetch, trusting) == png()
            assert host.asked[-1] == ("/a.png", f"pics.example.org:{host.port}")
        for tls in (None, *([] if is_had else [trusting])):
            with pytest.raises(ImageError, match="certificate verify failed"):
                anyio.run(fetch, tls)


@pytest.mark.parametrize(
    ("text", "name", "port"),
    [
        ("pics.example.org", "pics.example.org", None),
        ("Pics.Example.ORG:8443", "pics.example.org", 8443),
        ("192.0.2.1:80", "192.0.2.1", 80),
        ("[2001:DB8:0::1]", "2001:db8::1", None),
        ("[2001:db8::1]:443", "2001:db8::1", 443),
        ("3com.example", "3com.example", None),
    ],
)
def test_hosts_are_read(text: str, name: str, port: int | None) -> None:
    assert Host.of(text) == Host(name, port)


@pytest.mark.parametrize(
    "text",
    [
        *("", "https://pics.example.org", "pics.example.org/", "a b", "user@pics.example.org", "*"),
        *("pics.example.org:0", "pics.example.org:65536", "pics.example.org:", "127.1"),
        *("2130706433", "0x7f000001", "0177.0.0.1", "1.2.3.4.5", "2001:db8::1", "[1.2.3.4]x"),
        *("[fe80::1%eth0]", "*.example.org", "pics.example.org\n", "münchen.example"),
    ],
)  # fmt: skip
def test_what_is_no_host_is_told(text: str) -> None:
    with pytest.raises(ImageError, match=r"give a name or an address, as pics\.example\.org"):
        Host.of(text)


@pytest.mark.parametrize(
    "settings", [{"folder": "/nothing/here"}, {"max_bytes": 0}, {"seconds": 0}, {"max_pixels": 0}]
)
def test_settings_that_cannot_be_are_told(settings: dict[str, Any]) -> None:
    with pytest.raises(ImageError, match=f"{next(iter(settings.values()))}|nothing"):
        Media(**{**settings, **({"folder": Path("/nothing")} if "folder" in settings else {})})


def test_why_is_in_the_log_and_on_one_line(
    all_open: Media, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="cmg_gguf.server.media"):
        refusal("../secret\n.png", all_open)
    (said,) = caplog.messages
    assert said.startswith(
        "message 0, part 0: picture refused: '../secret\\n.png' is no path below"
    )


def test_flags_say_what_is_allowed(root: Path) -> None:
    assert MediaFlags().media() == Media(hosts=())
    flags = MediaFlags(
        media_path=root / "open" / "up" / "open",
        allow_image_host=["Pics.example.org:8443", "192.0.2.1"],
        max_images=2,
        max_request_pixels=6,
        max_image_bytes=3,
        image_timeout=4,
    )
    assert flags.media(5) == Media(
        folder=root / "open",
        hosts=(Host("pics.example.org", 8443), Host("192.0.2.1")),
        max_bytes=3,
        max_pixels=5,
        max_pictures=2,
        max_request_pixels=6,
        seconds=4,
    )
    with pytest.raises(ImageError, match="media path '/nothing' is no folder"):
        MediaFlags(media_path=Path("/nothing")).media()

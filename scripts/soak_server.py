"""A server under clients of every kind at once: each is answered or refused properly, all is freed.

    python scripts/soak_server.py                    # 2,000 requests of 16 clients
    python scripts/soak_server.py --requests 300 --clients 8

Starts `cmg-gguf serve` on the built-in pair as a program of its own, asks a few questions alone,
then everything at once: answers, streams, clients that leave in them or in the queue, broken
pictures, bodies that are too large, wrong JSON, wrong values. Greedy answers must be those given
alone. Then it must hold nothing, and end when told to, with a stream under way. A table, and one
JSON object as the last line; exit code 1 if anything is not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from cmg_gguf.tiny.scenes import draw, make_scene

PATH = "/v1/chat/completions"
BODY_LIMIT = 32 * 2**20
SCENES = (5, 7, 8, 9, 12, 18)
"""In their answers the best two of each draw are .15 and more apart: answers that share a decode
differ by rounding."""
MAX_GROWTH = 0.05
"""Of memory, from the second quarter of the requests to the last."""
SEED = 20260101
Run = Callable[[httpx.AsyncClient, random.Random], Awaitable[str]]
"""Asks one thing: "answered", "refused", "left", "queue full", or what is wrong."""


@dataclass
class Account:
    """What came of all requests. samples: (requests done, resident bytes, file descriptors)."""

    came: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    samples: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def n_done(self) -> int:
        return sum(self.came.values())

    def growth(self) -> float:
        """Of resident memory: mean of the last quarter over that of the second, less 1."""
        n = self.n_done
        second = [b for done, b, _ in self.samples if n / 4 <= done < n / 2]
        last = [b for done, b, _ in self.samples if done >= n * 3 / 4]
        return (sum(last) / len(last)) / (sum(second) / len(second)) - 1


class Asker:
    """Requests of every kind. expected: greedy answers of scenes, guided and plain."""

    def __init__(self, expected: dict[tuple[int, bool], str]) -> None:
        self._expected = expected
        self.kinds: dict[str, tuple[int, Run]] = {
            "answer": (30, self._answer),
            "stream": (25, self._stream),
            "choices": (5, self._choices),
            "leaves a stream": (10, self._leaves_stream),
            "leaves an answer or the queue": (10, self._leaves_answer),
            "broken picture": (5, self._broken_picture),
            "wrong JSON": (4, self._wrong_json),
            "wrong value": (4, self._wrong_value),
            "too large": (1, self._too_large),
            "looks around": (6, self._looks),
        }

    async def ask(self, client: httpx.AsyncClient, draws: random.Random) -> tuple[str, str]:
        """(kind, outcome) of one request."""
        weights = [weight for weight, _ in self.kinds.values()]
        (kind,) = draws.choices(list(self.kinds), weights)
        try:
            return kind, await self.kinds[kind][1](client, draws)
        except httpx.HTTPError as exc:
            return kind, f"broke off: {type(exc).__name__} {exc}"

    async def _answer(self, client: httpx.AsyncClient, draws: random.Random) -> str:
        scene, guided = draws.choice(SCENES), draws.random() < 0.7
        response = await client.post(PATH, json=asking(scene, guided=guided))
        if response.status_code != 200:
            return refusal(response, 429)
        return self._judged(response.json()["choices"][0]["message"]["content"], scene, guided)

    async def _stream(self, client: httpx.AsyncClient, draws: random.Random) -> str:
        scene, guided = draws.choice(SCENES), draws.random() < 0.7
        body = asking(scene, guided=guided, stream=True)
        async with client.stream("POST", PATH, json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return refusal(response, 429)
            lines = [x[6:] async for x in response.aiter_lines() if x.startswith("data: ")]
        if lines[-1] != "[DONE]":
            return f"a stream ended with {lines[-1]}"
        deltas = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]
        return self._judged("".join(d.get("content", "") for d in deltas), scene, guided)

    async def _choices(self, client: httpx.AsyncClient, draws: random.Random) -> str:
        scene = draws.choice(SCENES)
        response = await client.post(PATH, json=asking(scene, n=2))
        if response.status_code != 200:
            return refusal(response, 429)
        texts = [choice["message"]["content"] for choice in response.json()["choices"]]
        judged = {self._judged(text, scene, True) for text in texts}
        return judged.pop() if len(judged) == 1 else f"two choices said {texts}"

    async def _leaves_stream(self, client: httpx.AsyncClient, draws: random.Random) -> str:
        body = asking(draws.choice(SCENES), stream=True, endless=True)
        async with client.stream("POST", PATH, json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return refusal(response, 429)
            n_read = draws.randrange(12)
            async for _ in response.aiter_lines():
                if (n_read := n_read - 1) < 0:
                    break
        return "left"

    async def _leaves_answer(self, client: httpx.AsyncClient, draws: random.Random) -> str:
        body = asking(draws.choice(SCENES), endless=True)
        try:
            posting = client.post(PATH, json=body)
            response = await asyncio.wait_for(posting, draws.uniform(0.001, 0.4))
        except asyncio.TimeoutError:
            return "left"
        return refusal(response, 429) if response.status_code != 200 else "answered"

    async def _broken_picture(self, client: httpx.AsyncClient, draws: random.Random) -> str:
        whole = picture(0)
        url = draws.choice(
            [
                whole[: len(whole) // 2],
                "data:image/png;base64,????",
                "data:image/png;base64,aGVsbG8=",
                "/etc/passwd",
                "http://127.0.0.1:1/a.png",
            ]
        )
        return refusal(await client.post(PATH, json=asking(url)), 400, 429)

    async def _wrong_json(self, client: httpx.AsyncClient, draws: random.Random) -> str:
        content = draws.choice([b"", b"{", b"[]", b'{"messages": }', b"\xff", b"[" * 5000])
        headers = {"Content-Type": "application/json"}
        return refusal(await client.post(PATH, content=content, headers=headers), 400)

    async def _wrong_value(self, client: httpx.AsyncClient, draws: random.Random) -> str:
        name, value = draws.choice([("temperature", 1e9), ("n", 0), ("cmg", {"alpha": -1})])
        return refusal(await client.post(PATH, json={**asking(0), name: value}), 400)

    async def _too_large(self, client: httpx.AsyncClient, draws: random.Random) -> str:
        try:
            response = await client.post(PATH, content=b" " * (BODY_LIMIT + 1))
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            return "refused"  # it is told before all of it was sent, and the connection is closed
        return refusal(response, 413)

    async def _looks(self, client: httpx.AsyncClient, draws: random.Random) -> str:
        path = draws.choice(["/health", "/v1/models", "/slots", "/props", "/metrics", "/nowhere"])
        response = await client.get(path)
        return refusal(response, 404) if path == "/nowhere" else told(response.status_code == 200)

    def _judged(self, text: str, scene: int, guided: bool) -> str:
        expected = self._expected[scene, guided]
        return "answered" if text == expected else f"said {text!r} instead of {expected!r}"


def told(well: bool) -> str:
    """The outcome of what must be well."""
    return "answered" if well else "was not answered"


def refusal(response: httpx.Response, *statuses: int) -> str:
    """The outcome of what must be refused with one of these, in OpenAI's shape."""
    status = response.status_code
    try:
        fields = set(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"{status} with the body {response.text[:80]!r}"
    if status not in statuses or fields != {"message", "type", "param", "code"}:
        return f"{status} {response.text[:200]}"
    if status == 429:
        return "queue full" if response.headers.get("Retry-After", "").isdigit() else "429 alone"
    return "refused"


def picture(scene: int) -> str:
    """A drawn scene as a data: URL."""
    buffer = io.BytesIO()
    Image.fromarray(draw(make_scene("test", scene, "counter"))).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def asking(
    scene: int | str, *, guided: bool = True, endless: bool = False, **fields: Any
) -> dict[str, Any]:
    """The body of a greedy chat completion about a scene, or about what a URL names."""
    url = picture(scene) if isinstance(scene, int) else scene
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Describe the image."},
    ]
    if endless:
        fields |= {"logit_bias": {"2": -100.0}}
    plain = {} if guided else {"cmg": "off"}
    messages = [{"role": "user", "content": parts}]
    n = 400 if endless else 24
    return {"messages": messages, "temperature": 0, "max_tokens": n, **plain, **fields}


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[psutil.Popen, str]]:
    """`cmg-gguf serve` as a program, and its address."""
    command = [sys.executable, "-c", "from cmg_gguf.cli import main; main()", "serve"]
    process = psutil.Popen([*command, "--port", "0", *arguments], stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if found := re.search(r"is served at (\S+)/v1", line):
                break
        else:
            raise SystemExit("the server did not start")
        yield process, found[1]
    finally:
        with suppress(psutil.NoSuchProcess):
            process.kill()
        process.wait()


async def soak(url: str, process: psutil.Process, n_requests: int, n_clients: int) -> Account:
    """Asks everything, from all clients at once."""
    account, queue = Account(), iter(range(n_requests))
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        expected = {
            (scene, guided): (await client.post(PATH, json=asking(scene, guided=guided))).json()[
                "choices"
            ][0]["message"]["content"]
            for scene in SCENES
            for guided in (True, False)
        }
    asker = Asker(expected)

    async def one_client(seed: int) -> None:
        draws = random.Random(seed)
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            for _ in queue:
                kind, came = await asker.ask(client, draws)
                if came not in ("answered", "refused", "left", "queue full"):
                    account.wrong.append(f"{kind}: {came}")
                    came = "wrong"
                account.came[kind, came] += 1
                if came == "queue full":
                    await asyncio.sleep(draws.uniform(0.1, 0.5))
                memory = process.memory_info().rss
                account.samples.append((account.n_done, memory, process.num_fds()))

    await asyncio.gather(*(one_client(SEED + i) for i in range(n_clients)))
    return account


def held(url: str) -> list[str]:
    """What the server still holds, when it has had time to let go."""
    with httpx.Client(base_url=url, timeout=30) as client:
        for _ in range(100):
            slots = [slot["id"] for slot in client.get("/slots").json() if slot["is_processing"]]
            metrics = client.get("/metrics").text
            names = ("llamacpp:requests_processing", "llamacpp:requests_deferred")
            busy = [x for x in metrics.splitlines() if x.startswith(names) and x[-3:] != "0.0"]
            if not slots and not busy:
                return []
            time.sleep(0.1)
    return [f"slots {slots} are busy", *busy]


def drained(url: str, process: psutil.Popen) -> list[str]:
    """What is wrong with its end, told to end with a stream under way."""
    with httpx.Client(base_url=url, timeout=60) as client:
        body = {**asking(0, endless=True), "stream": True}
        with client.stream("POST", PATH, json=body) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            said = [line for line in lines if line.startswith("data: ")]
    wrong = [] if said[-1] == "data: [DONE]" else [f"the last stream ended with {said[-1]}"]
    code = process.wait(60)
    return wrong + ([] if code == 0 else [f"it ended with exit code {code}"])


def report(account: Account, wrong: list[str], figures: dict[str, Any]) -> None:
    """A table, what is wrong, and a line of JSON."""
    table = Table("request", "came of it", "times")
    for (kind, came), n in sorted(account.came.items()):
        table.add_row(kind, came, str(n))
    console = Console()
    console.print(table)
    for line in wrong[:20]:
        console.print(f"WRONG {line}", markup=False)
    print(json.dumps(figures))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description="A server under clients of every kind at once.")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args(argv)
    with serving("-np", "4", "--queue", "8", "-t", "1") as (process, url):
        n_fds, started = process.num_fds(), time.monotonic()
        account = asyncio.run(soak(url, process, options.requests, options.clients))
        seconds = time.monotonic() - started
        wrong = [*account.wrong, *held(url)]
        time.sleep(1)
        n_left = process.num_fds() - n_fds
        if n_left > 2:  # a connection that is just being closed
            wrong.append(f"{n_left} file descriptors more than at the start")
        growth = account.growth()
        if growth > MAX_GROWTH:
            wrong.append(f"memory grew by {growth:.1%}")
        wrong += drained(url, process)
    figures = {
        "requests": account.n_done,
        "clients": options.clients,
        "seconds": round(seconds, 1),
        "outcomes": Counter(came for _, came in account.came.elements()),
        "memory_growth": round(growth, 4),
        "resident_mib": round(account.samples[-1][1] / 2**20),
        "most_file_descriptors": max(fds for *_, fds in account.samples),
        "file_descriptors_left": n_left,
        "wrong": len(wrong),
    }
    report(account, wrong, figures)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""What the server costs over the engine, and what it brings: in turns, on random weights.

    python scripts/bench_server.py                    # 1.1 billion parameters, Q4_0
    python scripts/bench_server.py --model embedded   # the built-in pair: seconds
    python scripts/bench_server.py --no-stock         # without llama_cpp.server beside it

The server is `cmg-gguf serve` as a program of its own, one model like the one in this process,
which is asked the same beside it: by turns, so that both meet the same machine. Where
llama-cpp-python's own server is installed (`llama-cpp-python[server]`), it is asked the same
questions, plain. A table for people on stdout, and one JSON object as its last line for programs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import httpx
import numpy as np
from benchmark_model import cache_folder
from benchmarks.ratios import Middle, Times, rotated
from benchmarks.subjects import Messages, Subject, embedded_subject, random_subject
from rich.console import Console
from rich.table import Table
from soak_server import PATH, serving

from cmg_gguf import Guidance, GuidedVLM, LayerRange, Request
from cmg_gguf.guidance import PLAIN
from cmg_gguf.llama.log import set_verbose
from cmg_gguf.settings import Settings, save_settings

STDERR = Console(stderr=True)
HALF = Guidance(layers=LayerRange(0.5, 1.0))
N_CLIENTS, N_CTX = 4, 8192
END = {"2": -100.0}
"""The end token, which no answer draws."""
COMPARED = {
    # value, base, what is wanted of the ratio
    "a token: server / engine, guided": ("server, guided", "engine, guided", "at most 1.05"),
    "a token: server / engine, plain": ("server, plain", "engine, plain", "at most 1.05"),
    "tokens a second, guided: 4 clients / one": ("one client", "four clients", "at least 1.3"),
    "first token: first question / second": ("first question", "second question", "at least 5"),
    "a token, plain: llama_cpp.server / server": ("stock, plain", "server, plain", ""),
    "first token, plain: llama_cpp.server / server": (
        "stock, first question",
        "server, first question, plain",
        "",
    ),
    "first token, second question: llama_cpp.server / server": (
        "stock, second question",
        "server, second question, plain",
        "",
    ),
}


@dataclass(frozen=True)
class Timed:
    """Of one streamed answer: milliseconds to its first text, and from there on for each token."""

    first: float
    token: float


def timed(started: float, arrivals: Sequence[float], n_tokens: int) -> Timed:
    """arrivals: of pieces of text; n_tokens: of the whole answer."""
    first = (arrivals[0] - started) * 1e3
    return Timed(first, (arrivals[-1] - arrivals[0]) * 1e3 / max(1, n_tokens - 1))


class Asker:
    """Asks a server. body: what is in each request."""

    def __init__(self, url: str, **body: Any) -> None:
        self._client = httpx.Client(base_url=url, timeout=600, trust_env=False)
        self._body = body

    def __call__(self, messages: Messages, n_tokens: int, **fields: Any) -> Timed:
        limits = {"max_tokens": n_tokens, "logit_bias": END, "temperature": 0.0}
        body = {"messages": messages, "stream": True, **limits, **self._body, **fields}
        started, arrivals = time.perf_counter(), []
        with self._client.stream("POST", PATH, json=body) as response:
            if response.status_code != 200:
                response.read()
                raise RuntimeError(response.text)
            for line in response.iter_lines():
                if '"content"' in line:
                    arrivals.append(time.perf_counter())
        return timed(started, arrivals, n_tokens)


class Bench:
    """Measures in turns. times: milliseconds by name, one of each round."""

    def __init__(
        self,
        vlm: GuidedVLM,
        subject: Subject,
        server: Asker,
        stock: Asker | None,
        n_tokens: int,
    ) -> None:
        self.times: Times = {}
        self._n_tokens = n_tokens
        self._vlm, self._subject, self._server, self._stock = vlm, subject, server, stock
        self._seeds = count(1)

    def round(self, i: int) -> None:
        """One of everything."""
        messages = self._new()
        tokens: dict[str, Callable[[], Timed]] = {
            "engine, guided": lambda: self._engine(messages, HALF),
            "server, guided": lambda: self._server(messages, self._n_tokens),
            "engine, plain": lambda: self._engine(messages, PLAIN),
            "server, plain": lambda: self._server(messages, self._n_tokens, cmg="off"),
        }
        if (stock := self._stock) is not None:
            tokens["stock, plain"] = lambda: stock(messages, self._n_tokens)
        for ask in tokens.values():
            ask()  # its prompt is kept from here on: what is timed are tokens
        for name, ask in rotated(tokens, i):
            self._note(name, ask().token)
        self._questions(self._server, "")
        self._questions(self._server, "server, ", ", plain", cmg="off")
        if stock is not None:
            self._questions(stock, "stock, ")
        self._clients()

    def _questions(self, ask: Asker, before: str, behind: str = "", **fields: Any) -> None:
        messages = self._new()
        other = [*messages[:-1], {**messages[-1], "content": [*messages[-1]["content"]]}]
        other[-1]["content"][-1] = {"type": "text", "text": self._subject.questions[1]}
        for name, asked in (("first question", messages), ("second question", other)):
            self._note(f"{before}{name}{behind}", ask(asked, 4, **fields).first)

    def _clients(self) -> None:
        """Milliseconds a token of four answers, one after another and at once."""
        several = [self._new() for _ in range(N_CLIENTS)]
        for messages in several:
            self._server(messages, 2)
        n_tokens = N_CLIENTS * self._n_tokens
        started = time.perf_counter()
        for messages in several:
            self._server(messages, self._n_tokens)
        self._note("one client", (time.perf_counter() - started) * 1e3 / n_tokens)
        with ThreadPoolExecutor(N_CLIENTS) as pool:
            started = time.perf_counter()
            list(pool.map(self._server, several, [self._n_tokens] * N_CLIENTS))
            self._note("four clients", (time.perf_counter() - started) * 1e3 / n_tokens)

    def _engine(self, messages: Messages, guidance: Guidance) -> Timed:
        limits: dict[str, Any] = {"max_tokens": self._n_tokens, "guidance": guidance}
        sampling = Request("", **limits).sampling
        bias = {int(token): value for token, value in END.items()}
        sampling = type(sampling)(logit_bias=bias)
        started, arrivals = time.perf_counter(), []
        for piece in self._vlm.stream(Request(messages, sampling=sampling, **limits)):
            if piece.text:
                arrivals.append(time.perf_counter())
        return timed(started, arrivals, self._n_tokens)

    def _new(self) -> Messages:
        """The first question about a picture that nobody has seen."""
        random = np.random.default_rng(next(self._seeds))
        shape = self._subject.pixels.shape
        return self._subject.messages(pixels=random.integers(0, 256, shape, dtype=np.uint8))

    def _note(self, name: str, ms: float) -> None:
        self.times.setdefault(name, []).append(ms)


@contextmanager
def stock_serving(subject: Subject, threads: int) -> Iterator[str]:
    """llama-cpp-python's own server on the same pair, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {
        "--model": subject.pair.llm,
        "--clip_model_path": subject.pair.mmproj,
        "--chat_format": "llava-1-5",
        "--n_ctx": N_CTX,
        "--n_threads": threads,
        "--n_threads_batch": threads,
        "--flash_attn": "true",
        "--verbose": "false",
        "--port": port,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    command = [sys.executable, "-m", "llama_cpp.server", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit("llama_cpp.server did not start; leave it out with --no-stock")
            try:
                httpx.get(f"{url}/v1/models", trust_env=False)
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.wait()


def measure(subject: Subject, n_rounds: int, threads: int, n_tokens: int, *, stock: bool) -> Times:
    """Milliseconds of everything in each round."""
    files = ["-m", str(subject.pair.llm), "--mmproj", str(subject.pair.mmproj)]
    settings = cache_folder() / "bench-server-settings.json"
    save_settings(settings, Settings(HALF))
    flags = ["-c", str(N_CTX), "-t", str(threads), "-ngl", "0", "-fa", "on"]
    flags += ["-np", str(N_CLIENTS), "--settings", str(settings)]
    with ExitStack() as stack:
        _, url = stack.enter_context(serving(*files, *flags))
        stock_url = stack.enter_context(stock_serving(subject, threads)) if stock else None
        vlm = stack.enter_context(
            GuidedVLM(
                *subject.pair,
                n_ctx=N_CTX,
                n_threads=threads,
                n_gpu_layers=0,
                flash_attn=True,
                n_parallel=N_CLIENTS,
            )
        )
        beside = Asker(stock_url) if stock_url else None
        bench = Bench(vlm, subject, Asker(url), beside, n_tokens)
        for i in range(n_rounds):
            bench.round(i)
            last = {name: round(values[-1], 1) for name, values in bench.times.items()}
            STDERR.print(f"a round of {n_rounds}: {last}")
        return bench.times


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, returns 0."""
    parser = argparse.ArgumentParser(description="What the server costs over the engine.")
    parser.add_argument("--model", choices=("random", "embedded"), default="random")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--no-stock", action="store_true")
    args = parser.parse_args(argv)
    set_verbose(False)
    embedded = embedded_subject() if args.model == "embedded" else None
    subject = embedded or random_subject(cache_folder(), "q4_0")
    there = importlib.util.find_spec("starlette_context") is not None
    if not there and not args.no_stock:
        STDERR.print("llama_cpp.server is not installed: pip install 'llama-cpp-python[server]'")
    stock = there and not args.no_stock
    times = measure(subject, args.rounds, args.threads, args.tokens, stock=stock)
    report(times, subject.name)
    return 0


def report(times: Times, name: str) -> None:
    """A table, and a line of JSON."""
    table = Table("median of rounds", name, "wanted", box=None)
    for title, (value, base, wanted) in COMPARED.items():
        if value in times and base in times:
            ratio = Middle.of_ratios(times[value], times[base])
            table.add_row(title, str(ratio), wanted)
    for title, values in times.items():
        table.add_row(title, f"{Middle.of(values).median:.1f} ms", "")
    Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(table)
    print(json.dumps({name: times}))


if __name__ == "__main__":
    sys.exit(main())

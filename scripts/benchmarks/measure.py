"""All figures of one subject, phase by phase, and how long they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import llama_cpp
from rich.progress import Progress

from benchmarks.answers import measure_questions, measure_requests
from benchmarks.decoding import WAYS, Unhooked, encoded_prompt, measure_decoding, open_ways
from benchmarks.memory import KINDS, LOADS, measure_memory
from benchmarks.plain_llama import open_llama
from benchmarks.ratios import milliseconds
from benchmarks.report import Figures
from benchmarks.schedule import Schedule
from benchmarks.subjects import N_QUESTIONS, Subject
from cmg_gguf import GuidedVLM

N_CTX = 2048
PAIRS_A_PLAIN_STEP = 12
"""What one step in every way costs, in plain steps: about."""
REQUESTS_A_ROUND = 4.1 + N_QUESTIONS + 1.6
"""Prefills that one round of requests and questions costs: about."""


@dataclass(frozen=True)
class Options:
    """How much is measured, and with what. rounds: answers that are replayed."""

    rounds: int
    n_threads: int
    n_gpu_layers: int

    @property
    def request_rounds(self) -> int:
        """Requests take longer than answers, and differ less."""
        return max(1, self.rounds // 2)


def measure(subject: Subject, schedule: Schedule, options: Options, progress: Progress) -> Figures:
    """All figures of one subject."""
    figures = Figures(subject.name, subject.random)
    use_gpu = options.n_gpu_layers != 0

    def phase(name: str, total: int) -> Callable[[], None]:
        task = progress.add_task(f"{subject.name}: {name}", total=total)
        return lambda: progress.advance(task)

    figures.times |= measure_memory(
        subject,
        options.n_threads,
        options.n_gpu_layers,
        phase("memory", len(LOADS) * len(KINDS)),
    )
    with _opened(subject, options) as llama:
        report = phase("decoding", options.rounds + 1)
        ways = open_ways(llama, subject, use_gpu)
        figures.times |= measure_decoding(ways, schedule, options.rounds, report)
    with _opened(subject, options) as llama:
        _count_tokens(llama, subject, use_gpu, figures)
        n, rounds = options.request_rounds, (llama, subject, use_gpu, options.request_rounds)
        figures.times |= measure_requests(*rounds, phase("requests", n))
        figures.times |= measure_questions(*rounds, phase("six questions", n))
    return figures


def expected_seconds(subject: Subject, schedule: Schedule, options: Options) -> float:
    """About how long `measure` will take, from a short trial."""
    with _opened(subject, options) as llama:
        tokens, n_answer = Unhooked(llama, 256), 5
        rows = milliseconds(lambda: next(tokens.answer((False,)))) / 256e3
        steps = milliseconds(lambda: list(tokens.answer((False,) * n_answer))) / n_answer / 1e3
    n_tokens = sum(map(len, schedule.captions)) / len(schedule.captions)
    prefill = 640 * rows if subject.random else 160 * rows
    decoding = (options.rounds + 1) * n_tokens * PAIRS_A_PLAIN_STEP * steps
    prefills = len(WAYS) + 5 + options.request_rounds * REQUESTS_A_ROUND
    return decoding + prefills * prefill + 10


def _count_tokens(
    llama: llama_cpp.Llama, subject: Subject, use_gpu: bool, figures: Figures
) -> None:
    with GuidedVLM.from_llama(llama, subject.pair.mmproj, use_gpu=use_gpu) as vlm:
        prompt = encoded_prompt(vlm, subject)
        figures.n_prompt_tokens = prompt.n_tokens
        figures.n_image_tokens = prompt.n_image_tokens


@contextmanager
def _opened(subject: Subject, options: Options) -> Iterator[llama_cpp.Llama]:
    """A `Llama`, whose weights everything that is compared shares; closed with all of it."""
    llama = open_llama(
        subject.pair.llm,
        n_ctx=N_CTX,
        n_threads=options.n_threads,
        n_threads_batch=options.n_threads,
        n_gpu_layers=options.n_gpu_layers,
        flash_attn=True,
        verbose=False,
    )
    with closing(llama):
        yield llama

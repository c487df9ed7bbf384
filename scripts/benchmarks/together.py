"""What an answer costs beside others: the same captions and questions, one at a time and several.

Captions are replayed through the scheduler, as `cmg_gguf.stream.Run` goes through it, but tokens
are not drawn: degraded rows are asked for where a record says so. Their prompts are kept before the
clock starts, so what is timed are tokens. Questions are whole requests, image rows included.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from contextlib import closing

from benchmarks.decoding import HALF
from benchmarks.ratios import Times, in_turns
from benchmarks.schedule import Asked, Schedule
from benchmarks.subjects import N_QUESTIONS, Subject, pictures
from cmg_gguf import Guidance, GuidedVLM, Request
from cmg_gguf.answer.scheduler import Scheduler
from cmg_gguf.answer.work import Admission, Steps
from cmg_gguf.engine.engine import Engine
from cmg_gguf.guidance import PLAIN
from cmg_gguf.prompt.segments import Prompt

N_PARALLEL = 4
N_PICTURES, N_CAPTIONS = 8, 16
"""As many pictures as prompts are kept; each is captioned twice."""


class Replay:
    """One caption of a prompt: see `cmg_gguf.answer.work.Work`."""

    cancelled = alone = False

    def __init__(
        self, engine: Engine, prompt: Prompt, guidance: Guidance, asked: Asked, token: int
    ) -> None:
        self._engine, self._prompt, self._guidance = engine, prompt, guidance
        self._asked, self._token = asked, token
        self.over = threading.Event()
        self.error: BaseException | None = None

    def admission(self) -> Admission:
        return "go"

    def steps(self) -> Steps:
        engine = self._engine
        session = engine.open(self._prompt, self._guidance)
        try:
            yield from engine.prefilling(session)
            for needs_l_d in self._asked[1:]:
                yield from session.step(self._token)
                if needs_l_d:
                    yield from session.catch_up()
        finally:
            engine.drop(session)

    def ended(self, error: BaseException | None) -> None:
        self.error = error
        self.over.set()


def measure_captions(
    vlm: GuidedVLM, subject: Subject, schedule: Schedule, n_rounds: int, report: Callable[[], None]
) -> Times:
    """Milliseconds a token of 16 captions of 8 pictures: plain and guided, one at a time and four
    at once."""
    engine, token = vlm.engine, vlm.model.n_vocab // 2
    prompts = [
        vlm.projector.encode(vlm.tokenize(subject.messages(pixels=pixels)))
        for pixels in pictures(subject, N_PICTURES)
    ]
    captions = [schedule.captions[i % len(schedule.captions)] for i in range(N_CAPTIONS)]
    n_tokens = sum(len(asked) - 1 for asked in captions)

    def replay(guidance: Guidance, n_parallel: int) -> None:
        with closing(Scheduler(engine, n_parallel, engine.lock)) as scheduler:
            works = [
                Replay(engine, prompt, guidance, asked, token)
                for prompt, asked in zip(itertools.cycle(prompts), captions)
            ]
            for work in works:
                scheduler.submit(work)
            for work in works:
                work.over.wait()
                if work.error is not None:
                    raise work.error

    for guidance in (PLAIN, HALF):
        keep(engine, prompts, guidance)
        replay(guidance, N_PARALLEL)  # what is done once, as settling the strategy, is done here
    ways = {
        "captions, plain, one at a time": lambda: replay(PLAIN, 1),
        "captions, plain, four at once": lambda: replay(PLAIN, N_PARALLEL),
        "captions, guided, one at a time": lambda: replay(HALF, 1),
        "captions, guided, four at once": lambda: replay(HALF, N_PARALLEL),
    }
    times = in_turns(ways, n_rounds, report)
    return {name: [ms / n_tokens for ms in runs] for name, runs in times.items()}


def keep(engine: Engine, prompts: Sequence[Prompt], guidance: Guidance) -> None:
    """Decodes prompts, which are kept."""
    for prompt in prompts:
        session = engine.open(prompt, guidance)
        engine.prefill(session)
        engine.degraded(session)
        engine.end(session)


def measure_questions(
    vlm: GuidedVLM, subject: Subject, n_rounds: int, report: Callable[[], None]
) -> Times:
    """Milliseconds of six questions of one word about a picture, image rows included: one at a
    time, and asked at once as an evaluation does."""
    asked = [(subject.messages(i)) for i in range(N_QUESTIONS)]

    def one_at_a_time(guidance: Guidance) -> None:
        vlm.forget()
        for messages in asked:
            vlm.generate(messages, guidance=guidance, max_tokens=2)

    def at_once(guidance: Guidance) -> None:
        vlm.forget()
        requests = [Request(messages, guidance=guidance, max_tokens=2) for messages in asked]
        for outcome in vlm.generate_many(requests):
            outcome.unwrap()

    at_once(HALF)
    return in_turns(
        {
            "six questions, plain, one at a time": lambda: one_at_a_time(PLAIN),
            "six questions, plain, at once": lambda: at_once(PLAIN),
            "six questions, guided, one at a time": lambda: one_at_a_time(HALF),
            "six questions, guided, at once": lambda: at_once(HALF),
        },
        n_rounds,
        report,
    )

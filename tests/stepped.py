"""The engine with one answer in hand, as tests step through it: `prefill`, rows, `step`."""

from __future__ import annotations

from cmg_gguf import _core
from cmg_gguf.arrays import FloatArray, IntArray
from cmg_gguf.engine.context import Branch, Branches
from cmg_gguf.engine.engine import AnySession, Engine, Progress
from cmg_gguf.engine.prefix_cache import PrefixCache
from cmg_gguf.engine.session import Session
from cmg_gguf.engine.steps import EAGER, Filling, Pace, Strategy
from cmg_gguf.errors import BackendError
from cmg_gguf.guidance import Guidance
from cmg_gguf.prompt.segments import Prompt


class SharePace(Pace):
    """Decodes both branches together where more than a share of the steps asks for l_d; no clock
    has a say."""

    def __init__(self, share: float = 0.3) -> None:
        super().__init__()
        self.share = share

    def _together_is_cheaper(self) -> bool:
        return self._share_asked > self.share

    def step(self, *, asked: bool) -> None:
        super().step(asked=asked)
        self._is_together = self._together_is_cheaper()


class Unfilled(Filling):
    """Every decode as it is; no clock has a say."""

    def n_padding(self, n_below: int, n_rows: int) -> int:
        return 0


class FilledUp(Filling):
    """Small decodes are filled up to a multiple of four, always."""

    def n_padding(self, n_below: int, n_rows: int) -> int:
        return -n_rows % 4 if 1 < n_rows < self.MOST else 0


class Answering:
    """What one answer of an engine shows."""

    def __init__(self, engine: Engine) -> None:
        self.whole = engine
        self._opened: AnySession | None = None

    @property
    def open_session(self) -> AnySession | None:
        """The engine's one session."""
        return self.whole.sessions[0] if self.whole.sessions else None

    @property
    def session(self) -> AnySession:
        if self.open_session is None or self.open_session is not self._opened:
            raise BackendError("nothing to continue: call prefill first")
        return self.open_session

    @property
    def has_room(self) -> bool:
        return self.session.has_room

    @property
    def original_logits(self) -> FloatArray:
        return self.session.l_o

    @property
    def degraded_logits(self) -> FloatArray | None:
        return self.whole.degraded(self.session)

    @property
    def original_address(self) -> int:
        return int(self.original_logits.ctypes.data)

    @property
    def degraded_address(self) -> int:
        degraded = self.degraded_logits
        return 0 if degraded is None else int(degraded.ctypes.data)

    @property
    def n_cells(self) -> int:
        return self.open_session.n_cells if self.open_session else 0

    def step(self, token: int) -> None:
        self.whole.step(self.session, token)

    def reset(self) -> None:
        if self.open_session is not None:
            self.whole.drop(self.open_session)

    def release(self) -> None:
        if self.open_session is not None:
            self.whole.end(self.open_session)


class PairedEngine(Answering):
    """One answer to one prompt. stepping: may be changed between answers."""

    def __init__(
        self,
        original: Branch,
        degraded: Branch,
        prefixes: PrefixCache | None = None,
        *,
        stepping: Strategy = EAGER,
        pace: Pace | None = None,
        filling: Filling | None = None,
        aside: int | None = None,
    ) -> None:
        branches = Branches(original, degraded, aside)
        super().__init__(
            Engine(
                [branches],
                prefixes,
                strategy=stepping,
                pace=pace or SharePace(),
                filling=filling or Unfilled(),
            )
        )
        self.original, self.degraded, self.paired = original, degraded, branches.paired
        self.prefixes = self.whole.prefixes

    @property
    def stepping(self) -> Strategy:
        return self.whole.strategy

    @stepping.setter
    def stepping(self, strategy: Strategy) -> None:
        self.whole.strategy = strategy

    @property
    def n_past(self) -> int:
        return self.open_session.n_past if isinstance(self.open_session, Session) else 0

    @property
    def n_reused(self) -> int:
        return self.session.n_reused

    @property
    def layers(self) -> tuple[int, ...]:
        return self.open_session.layers if self.open_session else ()

    @property
    def guided(self) -> bool:
        return self.open_session is not None and self.open_session.guided

    @property
    def selections(self) -> _core.Selections:
        assert isinstance(self.session, Session)
        return self.session.selections

    @property
    def attended(self) -> tuple[IntArray, ...]:
        return self.session.attended() if isinstance(self.session, Session) else ()

    def check(self, prompt: Prompt, guidance: Guidance) -> None:
        self.whole.check(prompt, guidance)

    def cells_needed(self, prompt: Prompt, guidance: Guidance) -> int:
        return self.whole.cells(prompt, guidance, 0)

    def first_decoded_row(self, prompt: Prompt, guidance: Guidance) -> int:
        """Asked of a session that is then dropped."""
        self.release()
        row = self.whole.open(prompt, guidance).first_row
        self.reset()
        return row

    def prefill(self, prompt: Prompt, guidance: Guidance, progress: Progress | None = None) -> None:
        self.whole.check(prompt, guidance)
        self.release()
        self._opened = self.whole.open(prompt, guidance)
        self.whole.prefill(self._opened, prompt, progress)


class ContrastEngine(Answering):
    """One answer behind two prompts, in the branches of another engine."""

    def __init__(self, engine: PairedEngine) -> None:
        super().__init__(engine.whole)

    def check(self, original: Prompt, degraded: Prompt) -> None:
        self.whole.check_contrast(original, degraded)

    def prefill(self, original: Prompt, degraded: Prompt, progress: Progress | None = None) -> None:
        self.whole.check_contrast(original, degraded)
        self.release()
        self._opened = self.whole.open_contrast(original, degraded)
        self.whole.prefill(self._opened, None, progress)

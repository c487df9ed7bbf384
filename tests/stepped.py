"""The engine with one answer in hand, as tests step through it: `prefill`, rows, `step`."""

from __future__ import annotations

from cmg_gguf import _core
from cmg_gguf.arrays import FloatArray, IntArray
from cmg_gguf.engine.context import Branch, Branches
from cmg_gguf.engine.engine import AnySession, Engine, Progress
from cmg_gguf.engine.prefix_cache import PrefixCache
from cmg_gguf.engine.rows import PromptRows
from cmg_gguf.engine.session import Session, cells_of
from cmg_gguf.engine.steps import EAGER, Pace, Strategy
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


class Answering:
    """What one answer of an engine shows."""

    def __init__(self, engine: Engine) -> None:
        self.whole = engine
        self._opened: AnySession | None = None

    @property
    def session(self) -> AnySession:
        if self.whole.session is None or self.whole.session is not self._opened:
            raise BackendError("nothing to continue: call prefill first")
        return self.whole.session

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
        return self.whole.session.n_cells if self.whole.session else 0

    def step(self, token: int) -> None:
        self.whole.step(self.session, token)

    def reset(self) -> None:
        self.whole.reset()


class PairedEngine(Answering):
    """One answer to one prompt. stepping: may be changed between answers."""

    def __init__(
        self,
        original: Branch,
        degraded: Branch,
        selections: _core.Selections,
        prefixes: PrefixCache | None = None,
        *,
        stepping: Strategy = EAGER,
        pace: Pace | None = None,
    ) -> None:
        branches = Branches(original, degraded)
        super().__init__(
            Engine(branches, selections, prefixes, strategy=stepping, pace=pace or SharePace())
        )
        self.original, self.degraded, self.paired = original, degraded, branches.paired
        self.selections, self.prefixes = selections, self.whole.prefixes

    @property
    def stepping(self) -> Strategy:
        return self.whole.strategy

    @stepping.setter
    def stepping(self, strategy: Strategy) -> None:
        self.whole.strategy = strategy

    @property
    def n_past(self) -> int:
        return self.whole.session.n_past if isinstance(self.whole.session, Session) else 0

    @property
    def n_reused(self) -> int:
        return self.session.n_reused

    @property
    def layers(self) -> tuple[int, ...]:
        return self.whole.session.layers if self.whole.session else ()

    @property
    def guided(self) -> bool:
        return self.whole.session is not None and self.whole.session.guided

    @property
    def attended(self) -> tuple[IntArray, ...]:
        return self.session.attended() if isinstance(self.session, Session) else ()

    def check(self, prompt: Prompt, guidance: Guidance) -> None:
        self.whole.check(prompt, guidance)

    def cells_needed(self, prompt: Prompt, guidance: Guidance) -> int:
        guided = guidance.contrasts and prompt.n_image_tokens > 0
        n_layer = self.original.context.n_layer
        rows = PromptRows(prompt, guidance, n_layer, guided=guided)
        return cells_of(rows, paired=self.paired)

    def first_decoded_row(self, prompt: Prompt, guidance: Guidance) -> int:
        """Asked of a session that is then dropped."""
        row = self.whole.open(prompt, guidance).first_row
        self.reset()
        return row

    def prefill(self, prompt: Prompt, guidance: Guidance, progress: Progress | None = None) -> None:
        self.release()
        self._opened = self.whole.open(prompt, guidance)
        self.whole.prefill(self._opened, prompt, progress)

    def release(self) -> None:
        self.whole.end()


class ContrastEngine(Answering):
    """One answer behind two prompts, in the branches of another engine."""

    def __init__(self, engine: PairedEngine) -> None:
        super().__init__(engine.whole)

    def check(self, original: Prompt, degraded: Prompt) -> None:
        self.whole.check_contrast(original, degraded)

    def prefill(self, original: Prompt, degraded: Prompt, progress: Progress | None = None) -> None:
        self.whole.end()
        self._opened = self.whole.open_contrast(original, degraded)
        self.whole.prefill(self._opened, None, progress)

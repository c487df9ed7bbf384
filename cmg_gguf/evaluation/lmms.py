"""A model for lmms-eval, found through its entry points once this package is installed beside it.

    python -m lmms_eval --model cmg_gguf --tasks pope --batch_size 1 \\
        --model_args model=llava.gguf,mmproj=mmproj.gguf,settings=llava.json

Model arguments: model, mmproj, or hf=owner/repo:QUANT of the Hugging Face hub; settings = a file of
guidance settings, or alpha and beta; any other is an option of `GuidedVLM`. alpha=0,beta=0 is plain
decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cmg_gguf.errors import UnsupportedError
from cmg_gguf.guidance import Guidance
from cmg_gguf.sampling import Sampling
from cmg_gguf.settings import load_settings

if TYPE_CHECKING:
    from cmg_gguf.vlm import GuidedVLM

MODEL_ID = "cmg_gguf"
DEFAULT_MAX_TOKENS = 1024


def manifest() -> Any:
    """What lmms-eval's registry of models is told."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, simple_class_path=f"{__name__}.GuidedModel")


def __getattr__(name: str) -> Any:
    # The class has a base of lmms-eval's, so it exists only where that is installed.
    if name == "GuidedModel":
        globals()[name] = _model_class()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _model_class() -> Any:
    try:
        from lmms_eval.api.model import lmms
    except ImportError as exc:
        raise UnsupportedError("lmms-eval is not installed: pip install lmms-eval") from exc

    def init(
        self: Any, model: str | None = None, mmproj: str | None = None, **arguments: Any
    ) -> None:
        lmms.__init__(self)
        self._answerer = Answerer(model, mmproj, **arguments)

    def generate_until(self: Any, requests: Sequence[Any]) -> list[str]:
        return [self._answerer.answer(self.task_dict, *request.args) for request in requests]

    return type(
        "GuidedModel",
        (lmms,),
        {
            "__module__": __name__,
            "__doc__": "A GGUF pair under Cross-Modal Guidance.",
            "is_simple": True,
            "__init__": init,
            "generate_until": generate_until,
            "generate_until_multi_round": _unsupported("rounds that depend on answers"),
            "loglikelihood": _unsupported("likelihoods of given answers"),
        },
    )


class Answerer:
    """Answers lmms-eval's requests. Raises CMGError."""

    def __init__(
        self,
        model: str | None = None,
        mmproj: str | None = None,
        *,
        hf: str | None = None,
        settings: str | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        """batch_size, device: what lmms-eval tells every model; this one takes one at a time."""
        if batch_size is not None and str(batch_size) != "1":
            raise UnsupportedError(f"batch_size={batch_size} is not supported: only 1")
        base = load_settings(settings).guidance if settings else Guidance()
        given = {"alpha": alpha, "beta": beta}
        changes: dict[str, Any] = {k: float(v) for k, v in given.items() if v is not None}
        self._guidance = Guidance(**{**vars(base), **changes})
        self._vlm = _opened(model, mmproj, hf, {"strategy": "exact", **options})

    def answer(
        self,
        tasks: Any,
        context: str,
        settings: dict[str, Any],
        images: Callable[[Any], Sequence[Any]],
        document: Any,
        task: str,
        split: str,
    ) -> str:
        """The answer to one `generate_until` request, whose arguments these are."""
        stop = settings.get("until") or ()
        return self._vlm.generate(
            context.replace("<image>", "").strip(),
            list(images(tasks[task][split][document]) or ()),
            guidance=self._guidance,
            sampling=_sampling(settings),
            max_tokens=int(settings.get("max_new_tokens") or DEFAULT_MAX_TOKENS),
            stop=[stop] if isinstance(stop, str) else [text for text in stop if text],
        ).text


def _opened(
    model: str | None, mmproj: str | None, hf: str | None, options: dict[str, Any]
) -> GuidedVLM:
    """The model by its files, or by its repository with a projector file of one's own or not."""
    from cmg_gguf.vlm import GuidedVLM

    if hf is not None and model is None:
        return GuidedVLM.from_pretrained(hf, mmproj_path=mmproj, **options)
    if hf is not None or model is None or mmproj is None:
        raise UnsupportedError(
            f"model={model}, mmproj={mmproj}, hf={hf} name no model: give model and mmproj, or hf"
        )
    return GuidedVLM(model, mmproj, **options)


def _sampling(settings: dict[str, Any]) -> Sampling:
    temperature = float(settings.get("temperature") or 0.0)
    if settings.get("do_sample") is False or temperature == 0:
        return Sampling()
    top_p = settings.get("top_p")
    top_p = 1.0 if top_p is None else float(top_p)
    return Sampling(temperature=temperature, top_p=top_p, top_k=0, min_p=0.0, seed=0)


def _unsupported(what: str) -> Callable[..., Any]:
    def refuse(self: Any, requests: Any) -> Any:
        raise UnsupportedError(f"cmg_gguf gives no {what}; choose tasks that generate answers")

    return refuse

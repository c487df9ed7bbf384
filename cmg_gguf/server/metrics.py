"""GET /metrics, for Prometheus: llama-server's names with its meanings, and ours.

Of the speeds, llama-server has two gauges; here too they are means over the server's life.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.responses import Response

from cmg_gguf.server.service import Service


class Counts(Collector):
    """What a service has done, read off when it is asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """The metrics."""
        for name, text, value in _counters(self._service):
            yield CounterMetricFamily(name, text, value=value)
        for name, text, value in _gauges(self._service):
            yield GaugeMetricFamily(name, text, value=value)


def router(service: Service) -> APIRouter:
    """The route, on a service."""
    routes, registry = APIRouter(), CollectorRegistry(auto_describe=False)
    registry.register(Counts(service))

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counts over the server's life, in Prometheus' text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return routes


def _counters(service: Service) -> Iterator[tuple[str, str, float]]:
    tally = service.tally
    ours, theirs = "cmg:", "llamacpp:"
    yield f"{theirs}prompt_tokens", "Prompt tokens computed.", tally.n_prompt_tokens
    yield f"{theirs}prompt_seconds", "Seconds of prompts and pictures.", tally.prompt_seconds
    yield f"{theirs}tokens_predicted", "Tokens of answers.", tally.n_answer_tokens
    yield f"{theirs}tokens_predicted_seconds", "Seconds of answers.", tally.answer_seconds
    yield f"{ours}answers", "Answers that were finished.", tally.n_answers
    yield f"{ours}answers_left", "Answers whose client went away, or that broke off.", tally.n_left
    yield f"{ours}requests_refused", "Requests refused for a full queue.", tally.n_refused
    yield f"{ours}prompt_tokens_reused", "Prompt tokens found kept.", tally.n_reused_tokens
    yield f"{ours}image_tokens", "Image tokens of prompts.", tally.n_image_tokens
    yield f"{ours}tokens_changed", "Tokens that guidance changed.", tally.n_changed_tokens
    if (vlm := service.lifetime.vlm) is None:
        return
    counts, images = vlm.engine.decoder.counts, vlm.projector.embeddings  # since it was loaded
    yield f"{theirs}n_decode", "Decodes.", counts.n_decodes
    yield f"{ours}rows", "Rows decoded.", counts.n_rows
    yield f"{ours}degraded_rows", "Rows decoded for degraded branches.", counts.n_degraded_rows
    yield f"{ours}image_cache_hits", "Pictures found encoded.", images.n_found
    yield f"{ours}image_cache_misses", "Pictures that were encoded.", images.n_missed


def _gauges(service: Service) -> Iterator[tuple[str, str, float]]:
    tally, queue, vlm = service.tally, service.queue, service.lifetime.vlm
    n_active = len(vlm.engine.sessions) if vlm is not None else 0
    n_held = vlm.engine.n_cells if vlm is not None else 0
    theirs = "llamacpp:"
    if vlm is not None:
        counts = vlm.engine.decoder.counts
        each = _rate(counts.n_batches, counts.n_decodes)
        yield f"{theirs}n_busy_slots_per_decode", "Answers in a decode, on average.", each
    yield (
        f"{theirs}prompt_tokens_seconds",
        "Prompt tokens a second.",
        _rate(tally.n_prompt_tokens, tally.prompt_seconds),
    )
    yield (
        f"{theirs}predicted_tokens_seconds",
        "Answer tokens a second.",
        _rate(tally.n_answer_tokens, tally.answer_seconds),
    )
    yield f"{theirs}requests_processing", "Answers under way.", n_active
    n_deferred = max(0, queue.n_taken - n_active) + queue.n_waiting
    yield f"{theirs}requests_deferred", "Answers that wait for their turn.", n_deferred
    yield f"{theirs}kv_cache_tokens", "KV cells in use.", n_held
    yield f"{theirs}kv_cache_usage_ratio", "KV cells in use, of all.", n_held / service.n_ctx
    yield "cmg:asleep", "1 while the model is not loaded.", float(vlm is None)


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds else 0.0

"""The whole examination. What is broken here is told, so nothing is imported before it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmg_gguf.doctor.finding import Finding, looked, unusable


def examine(
    pair: tuple[str | Path, str | Path] | None = None, **settings: Any
) -> tuple[Finding, ...]:
    """What is found of this installation, by itself and on the built-in pair; then of a model pair.

    pair: model and mmproj file; None = no other than the built-in one. settings: of `GuidedVLM`,
    with which that pair is opened. Raises nothing for what is broken: that is a finding.
    """
    try:
        from cmg_gguf.doctor import installation, model_pair, selftest
    except (ImportError, OSError, RuntimeError) as exc:
        found, colon, command = unusable(exc).partition(": pip ")
        return (Finding("llama.cpp", "failed", found, f"pip {command}" if colon else ""),)
    findings = looked("installation", installation.look)
    device = {k: v for k, v in settings.items() if k in ("n_gpu_layers", "main_gpu", "n_threads")}
    findings += looked("self-test", lambda: selftest.look(**device))
    if pair is not None:
        model, mmproj = map(Path, pair)
        findings += looked("model pair", lambda: model_pair.look(model, mmproj, **settings))
    return tuple(findings)

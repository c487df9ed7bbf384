"""Flags that say how tokens are drawn. Names are llama-mtmd-cli's; the default is greedy."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cmg_gguf.sampling import Sampling

RANDOM_SEED = -1

_flag = partial(typer.Option, rich_help_panel="Sampling")


@dataclass(frozen=True, kw_only=True)
class DrawFlags:
    """llama.cpp's samplers but for grammars: how a token is drawn."""

    temp: Annotated[
        float,
        _flag(
            "--temp",
            min=0.0,
            max=100.0,
            metavar="X",
            help="Temperature; 0 = greedy: always the best token, the same answer every time.",
        ),
    ] = 0.0
    seed: Annotated[
        int,
        _flag(
            "--seed",
            "-s",
            min=RANDOM_SEED,
            metavar="N",
            help="Seed of the draws; -1 = a new one each time, and so is 4294967295.",
        ),
    ] = RANDOM_SEED
    top_k: Annotated[
        int, _flag("--top-k", min=0, metavar="N", help="Draw from the N best tokens; 0 = all.")
    ] = 40
    top_p: Annotated[
        float,
        _flag(
            "--top-p",
            min=0.0,
            max=1.0,
            metavar="X",
            help="Draw from the best tokens that hold this share of the probability; 1 = off.",
        ),
    ] = 0.95
    min_p: Annotated[
        float,
        _flag(
            "--min-p",
            min=0.0,
            max=1.0,
            metavar="X",
            help="Draw from tokens with this share of the best one's probability; 0 = off.",
        ),
    ] = 0.05
    typical: Annotated[
        float,
        _flag(
            "--typical",
            min=0.0,
            max=1.0,
            metavar="X",
            help="Draw from the most typical tokens with this share of the probability; 1 = off.",
        ),
    ] = 1.0
    repeat_penalty: Annotated[
        float,
        _flag(
            "--repeat-penalty",
            min=1e-6,
            max=100.0,
            metavar="X",
            help="Divides the logits of tokens already said; 1 = off.",
        ),
    ] = 1.0
    presence_penalty: Annotated[
        float,
        _flag(
            "--presence-penalty",
            min=-100.0,
            max=100.0,
            metavar="X",
            help="Taken off the logits of tokens already said; 0 = off.",
        ),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        _flag(
            "--frequency-penalty",
            min=-100.0,
            max=100.0,
            metavar="X",
            help="Taken off the logits of tokens once for each time they were said; 0 = off.",
        ),
    ] = 0.0
    repeat_last_n: Annotated[
        int,
        _flag(
            "--repeat-last-n",
            min=-1,
            metavar="N",
            help="Tokens of the answer that the penalties look back on; -1 = all, 0 = none.",
        ),
    ] = 64
    mirostat: Annotated[
        int,
        _flag(
            "--mirostat",
            min=0,
            max=2,
            metavar="N",
            help="Mirostat 1 or 2 in place of top-k, top-p, min-p and typical; 0 = off.",
        ),
    ] = 0
    mirostat_lr: Annotated[
        float,
        _flag(
            "--mirostat-lr",
            min=0.0,
            max=1000.0,
            metavar="X",
            help="Mirostat's learning rate, eta.",
        ),
    ] = 0.1
    mirostat_ent: Annotated[
        float,
        _flag(
            "--mirostat-ent",
            min=0.0,
            max=1000.0,
            metavar="X",
            help="Mirostat's target entropy, tau.",
        ),
    ] = 5.0

    def sampling(self) -> Sampling:
        """The same as the library takes it. Raises SamplingError, BadParameter."""
        from cmg_gguf.sampling import Sampling

        return Sampling(
            temperature=self.temp,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical,
            repeat_penalty=self.repeat_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            penalty_last_n=self.repeat_last_n,
            mirostat_mode=self.mirostat,
            mirostat_tau=self.mirostat_ent,
            mirostat_eta=self.mirostat_lr,
            **self._constraints(),
            seed=self.seed,
        )

    def idle(self) -> list[str]:
        """Names of flags that were given and have no effect on a greedy draw."""
        drawing = ("top_k", "top_p", "min_p", "typical", "mirostat")
        if self.temp > 0:
            return []
        return [
            f"--{field.name.replace('_', '-')}"
            for field in fields(self)
            if field.name in drawing and getattr(self, field.name) != field.default
        ]

    def _constraints(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(DrawFlags):
    """llama.cpp's samplers."""

    grammar: Annotated[
        str | None,
        _flag(
            "--grammar",
            metavar="GBNF",
            show_default=False,
            help="A grammar that the answer keeps to, its first rule named root.",
        ),
    ] = None
    grammar_file: Annotated[
        Path | None,
        _flag(
            "--grammar-file",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            readable=True,
            help="The same, from a file.",
        ),
    ] = None
    json_schema: Annotated[
        str | None,
        _flag(
            "--json-schema",
            "-j",
            metavar="SCHEMA",
            help="A JSON schema that the answer keeps to; {} = any JSON object.",
        ),
    ] = None

    def _constraints(self) -> dict[str, Any]:
        given = [x for x in (self.grammar, self.grammar_file, self.json_schema) if x is not None]
        if len(given) > 1:
            raise typer.BadParameter(
                "give one of them at most",
                param_hint="'--grammar', '--grammar-file' and '--json-schema'",
            )
        if self.grammar_file is not None:
            return {"grammar": _read(self.grammar_file)}
        if self.json_schema is not None:
            return {"response_format": _response_format(self.json_schema)}
        return {"grammar": self.grammar}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as exc:
        raise typer.BadParameter(
            f"{path} is not UTF-8 text", param_hint="'--grammar-file'"
        ) from exc


def _response_format(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except ValueError as exc:
        raise typer.BadParameter(f"no JSON: {exc}", param_hint="'--json-schema' / '-j'") from exc
    if not isinstance(schema, dict):
        raise typer.BadParameter("no JSON object", param_hint="'--json-schema' / '-j'")
    return {"type": "json_object", "schema": schema or None}

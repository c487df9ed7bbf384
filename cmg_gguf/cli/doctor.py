"""`cmg-gguf doctor`: whether all is well here, and with a model pair, and what to do if not."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from cmg_gguf.cli.asker import fetched
from cmg_gguf.cli.exits import manners
from cmg_gguf.cli.model_flags import ModelFlags
from cmg_gguf.cli.output import write_json, write_rendered
from cmg_gguf.cli.screen import Screen
from cmg_gguf.doctor import Finding, Status, examine
from cmg_gguf.doctor.finding import failed
from cmg_gguf.errors import CMGError

EXAMPLES = """\
Examples:

  cmg-gguf doctor                                    this installation, with a self-test

  cmg-gguf doctor -m llava.gguf --mmproj mmproj.gguf         and a model, as run would open it

  cmg-gguf doctor -hf owner/repo:Q4_K_M -c 8192      a model of the hub, with these flags

  cmg-gguf doctor --json && deploy                   status 0 only if all is well
"""

_SIGNS: dict[Status, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "warning": ("warning", "bold yellow"),
    "failed": ("failed", "bold red"),
}


@manners()
def doctor(
    *,
    model: ModelFlags,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", rich_help_panel="Output", help="Write one JSON object instead of the table."
        ),
    ] = False,
) -> None:
    """Examine this installation and a model pair, and say what to do about anything wrong.

    The built-in model is always tried: its logits, plain and masked, are compared with stored ones.
    With -m and --mmproj, or -hf, that pair is opened with the flags given, and each of its layers
    is masked alone. Ends with status 0 only if all is well.
    """
    findings = _findings(model)
    well = all(finding.status == "ok" for finding in findings)
    if as_json:
        write_json({"ok": well, "findings": [asdict(finding) for finding in findings]})
    else:
        write_rendered(_table(findings))
    if not well:
        raise typer.Exit(1)


def _findings(flags: ModelFlags) -> tuple[Finding, ...]:
    err = Screen(progress=not flags.verbose)
    options = flags.options()
    if flags.built_in:
        with err.waiting("examine"):
            return examine(**options)
    try:
        files = fetched(err, flags)
    except CMGError as exc:
        return (*examine(**options), failed("model pair", exc))
    with err.waiting("examine"):
        return examine(files, **options)


def _table(findings: tuple[Finding, ...]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for finding in findings:
        found = Text(finding.found)
        if finding.remedy:
            found.append(f"\n→ {finding.remedy}", style="bold")
        grid.add_row(Text(*_SIGNS[finding.status]), finding.name, found)
    return grid

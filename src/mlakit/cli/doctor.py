"""``mlakit doctor``: what is installed here, which kernel would run, and why."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Show versions, devices and the decode kernel chosen here."""
    from mlakit.api import doctor as examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
        return
    width = max(len(key) for key in findings)
    for key, value in findings.items():
        typer.echo(f"{key:<{width}}  {value}")

"""`headwater doctor`: what is wrong with this setup, and what to do next."""

from __future__ import annotations

import msgspec
import typer
from rich.table import Column, Table
from rich.text import Text

from gateway.cli.client import CommandFailed, load_settings
from gateway.cli.format import printable
from gateway.cli.models import AsJSON
from gateway.cli.output import make_console, print_json

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(as_json: AsJSON = False) -> None:
    """Check this setup. Exits with 1 when there is a problem."""
    from gateway.cli.checks import Finding, Level, examine  # noqa: PLC0415 - imports psutil and sqlite3

    findings: list[Finding] = []

    def report(finding: Finding) -> None:
        findings.append(finding)
        if not as_json:
            _print_finding(finding.check, finding.level, finding.detail, finding.advice)

    try:
        settings = load_settings()
    except CommandFailed as failure:
        report(Finding("settings", Level.PROBLEM, str(failure), "correct the value; the rest was not checked"))
    else:
        report(Finding("settings", Level.OK, "valid"))
        for finding in examine(settings):
            report(finding)
    has_problem = any(finding.level is Level.PROBLEM for finding in findings)
    if as_json:
        print_json({"ok": not has_problem, "findings": msgspec.to_builtins(findings)})
    raise typer.Exit(int(has_problem))


def _print_finding(check: str, level: str, detail: str, advice: str) -> None:
    row = Table.grid(Column(width=8), Column(width=10), Column(overflow="fold"))
    text = f"{detail}\n-> {advice}" if advice else detail
    row.add_row(Text(level, style=_STYLES[level]), check, Text(printable(text)))
    make_console().print(row)

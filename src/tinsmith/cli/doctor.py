"""`tinsmith doctor`: is this machine fit to serve, and do the server's parts agree?"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tinsmith.cli.answers import UNBOUNDED, AsJson
from tinsmith.cli.checks import folder, machine
from tinsmith.cli.checks.finding import Check, Finding, Verdict, run

_MARKS = {Verdict.OK: ("✓", "green"), Verdict.WARN: ("!", "yellow"), Verdict.FAIL: ("✗", "bold red")}


def doctor(
    base_model: Annotated[
        str, typer.Option("--base-model", metavar="ID|FOLDER|NAME=FOLDER", help="Base model to try.")
    ] = "tinsmith/tiny",
    data_dir: Annotated[
        Path | None, typer.Option(help="Data folder to look into. Default: the one `tinsmith serve` would take.")
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="TINSMITH_DATABASE",
            show_envvar=True,
            help="PostgreSQL for the registry, if it is there.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on.")] = 8000,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    skip_model: Annotated[bool, typer.Option("--skip-model", help="Do not load the base model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check hardware, disk, data folder and model, and say what to do. Exits with 1 if something would not work."""
    from tinsmith.server.assemble import default_data_dir

    place = (data_dir or default_data_dir()).expanduser()
    checks: list[tuple[str, Check]] = [
        ("versions", machine.versions),
        ("processor", machine.processor),
        ("memory", machine.memory),
        ("gpu", machine.gpu),
        ("clock", machine.clock),
        ("port", partial(machine.port, host, port)),
        ("data folder", partial(folder.permissions, place)),
        ("lock", partial(folder.in_use, place)),
        ("disk", partial(folder.disk, place)),
        ("registry", partial(folder.registry, place) if database is None else partial(folder.database, database)),
        ("ledger", partial(folder.ledger, place)),
    ]
    if not skip_model:
        checks.append(("model", _model_check(base_model, dtype, device)))
    findings = _run_all(checks, quiet=as_json)
    if as_json:
        typer.echo(json.dumps({"verdict": worst(findings), "checks": [finding.as_row() for finding in findings]}))
    else:
        _print_summary(findings)
    raise typer.Exit(1 if worst(findings) is Verdict.FAIL else 0)


def worst(findings: Sequence[Finding]) -> Verdict:
    found = {finding.verdict for finding in findings}
    return next((verdict for verdict in (Verdict.FAIL, Verdict.WARN) if verdict in found), Verdict.OK)


def _model_check(base_model: str, dtype: str, device: str) -> Check:
    """Raises `UserError` if an option is wrong: that is the command line's fault, and no finding."""
    from pydantic import ValidationError

    from tinsmith.types.engine_options import EngineOptions, ModelSource
    from tinsmith.types.errors import InvalidInput

    source = ModelSource.parse(base_model)
    try:
        options = EngineOptions.model_validate({"dtype": dtype, "device": device})
    except ValidationError as error:
        (first, *_) = error.errors()
        raise InvalidInput(f"--{first['loc'][0]} {first['input']!r}: {first['msg']}") from error

    def check() -> list[Finding]:
        from tinsmith.cli.checks.model import model
        from tinsmith.observe.logs import LEVEL_VARIABLE

        os.environ.setdefault(LEVEL_VARIABLE, "warning")
        return list(model(source, options))

    return check


def _run_all(checks: Sequence[tuple[str, Check]], *, quiet: bool) -> list[Finding]:
    """Shows each finding as it comes."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = UNBOUNDED
    findings: list[Finding] = []
    for name, check in checks:
        if quiet:
            findings += run(name, check)
            continue
        with console.status(f"looking at {name} …"):
            new = run(name, check)
        for finding in new:
            _print_finding(console, finding)
        findings += new
    return findings


def _print_finding(console: object, finding: Finding) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    assert isinstance(console, Console)
    mark, style = _MARKS[finding.verdict]
    line = Table.grid(padding=(0, 1))
    line.add_column(width=1)
    line.add_column(width=11)
    line.add_column(overflow="fold")
    line.add_row(Text(mark, style=style), Text(finding.check, style="bold"), Text(finding.found))
    if finding.advice is not None:
        line.add_row("", "", Text(f"→ {finding.advice}", style=style))
    console.print(line)


def _print_summary(findings: Sequence[Finding]) -> None:
    counts = {verdict: sum(f.verdict is verdict for f in findings) for verdict in Verdict}
    words = f"{counts[Verdict.OK]} ok, {counts[Verdict.WARN]} to look at, {counts[Verdict.FAIL]} broken"
    verdict = worst(findings)
    says = {
        Verdict.OK: "fit to serve",
        Verdict.WARN: "fit to serve; see the lines marked !",
        Verdict.FAIL: "not fit to serve; see the lines marked ✗",
    }
    typer.secho(f"\n{says[verdict]}  ({words})", fg="red" if verdict is Verdict.FAIL else None, bold=True)

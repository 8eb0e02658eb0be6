"""A page that shows a run: curves, figures, samples. One file that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from tinsmith.kitchen.run_folder import RunFolder
from tinsmith.observe import StepRow
from tinsmith.observe.plots import running_mean

WIDTH, HEIGHT, MARGIN = 640, 220, 64
SAMPLES_SHOWN: Final = 24
STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#1c2733;background:#fff}
h1{font-size:1.5em;margin-bottom:0}h2{font-size:1.1em;margin-top:2em;border-bottom:1px solid #d5dde5}
table{border-collapse:collapse;width:100%}td,th{padding:.25em .7em .25em 0;text-align:left;vertical-align:top}
th{color:#5b6b7b;font-weight:600}td.n{font-variant-numeric:tabular-nums}pre{white-space:pre-wrap;margin:0;font-size:13px}
figure{margin:1em 0}figcaption{font-weight:600}.good{color:#17683a}.bad{color:#a3262a}
tr+tr td{border-top:1px solid #eef2f5}
@media (prefers-color-scheme:dark){body{background:#12181f;color:#dbe4ec}h2,tr+tr td{border-color:#2b3743}}
"""


def write_report(folder: RunFolder) -> None:
    """Write `report.html` from the run's files. Raises `RunFolderError` if they cannot be read."""
    page = render(
        manifest=folder.read_manifest(),
        config=folder.read_config(),
        rows=folder.rows(),
        evaluations=folder.evaluations(),
        rollouts=folder.rollouts(),
    )
    partial = folder.report_file.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(folder.report_file)


def render(
    *,
    manifest: Mapping[str, Any],
    config: Mapping[str, Any],
    rows: Sequence[StepRow],
    evaluations: Sequence[Mapping[str, Any]],
    rollouts: Sequence[Mapping[str, Any]],
) -> str:
    title = f"{manifest.get('recipe')} on {manifest.get('model')}"
    parts = [
        f"<h1>{escape(title)}</h1><p>started {escape(str(manifest.get('started')))}</p>",
        _figures(rows),
        _curves(rows),
        _evaluations(evaluations),
        _samples(rollouts),
        f"<h2>Settings</h2>{_table(config)}",
        f"<h2>Made of</h2>{_table(_flat(manifest))}",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>\n'


def _figures(rows: Sequence[StepRow]) -> str:
    if not rows:
        return "<p>No step was taken.</p>"
    first, last = rows[0], rows[-1]
    tokens = sum(row.tokens for row in rows)
    values = {
        "steps": str(last.step),
        "seconds": f"{last.seconds:.1f}",
        "tokens": f"{tokens:,}",
        "loss": f"{first.loss:.4f} → {last.loss:.4f}",
    }
    values |= {name: f"{first.metrics.get(name, 0):.4f} → {value:.4f}" for name, value in last.metrics.items()}
    return f"<h2>Figures</h2>{_table(values)}"


def _curves(rows: Sequence[StepRow]) -> str:
    if len(rows) < 2:
        return ""
    steps = [float(row.step) for row in rows]
    series = {"loss": [row.loss for row in rows]}
    series |= {name: [row.metrics.get(name, 0.0) for row in rows] for name in rows[-1].metrics}
    series["learning rate"] = [row.learning_rate for row in rows]
    return "<h2>Curves</h2>" + "".join(
        f"<figure><figcaption>{escape(name)}</figcaption>{curve(steps, values)}</figure>"
        for name, values in series.items()
    )


def curve(xs: Sequence[float], ys: Sequence[float]) -> str:
    """An SVG of the values and, where they are many, of their running mean."""
    low, high = min(ys), max(ys)
    if high - low < 1e-12:
        room = abs(high) / 2 if abs(high) > 1e-9 else 0.5
        low, high = low - room, high + room
    window = max(1, len(ys) // 15)

    def points(values: Sequence[float]) -> str:
        return " ".join(
            f"{MARGIN + (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - 2 * MARGIN):.1f},"
            f"{HEIGHT - 24 - (y - low) / (high - low) * (HEIGHT - 44):.1f}"
            for x, y in zip(xs, values, strict=True)
        )

    lines = [f'<polyline fill="none" stroke="#8fb0cf" stroke-width="1.3" points="{points(ys)}"/>']
    if window > 1:
        mean = points(running_mean(ys, window))
        lines.append(f'<polyline fill="none" stroke="#1f4e79" stroke-width="2.2" points="{mean}"/>')
    labels = [
        (2, 18, "start", f"{high:.3g}"),
        (2, HEIGHT - 22, "start", f"{low:.3g}"),
        (MARGIN, HEIGHT - 6, "start", f"step {xs[0]:.0f}"),
        (WIDTH - MARGIN, HEIGHT - 6, "end", f"{xs[-1]:.0f}"),
    ]
    texts = [
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="11" fill="#70808f">{text}</text>'
        for x, y, anchor, text in labels
    ]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img">{"".join(lines + texts)}</svg>'


def _evaluations(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return ""
    names = list(evaluations[-1])
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f'<td class="n">{_number(row.get(name))}</td>' for name in names) + "</tr>"
        for row in evaluations
    )
    return f"<h2>Evaluations</h2><table><tr>{head}</tr>{body}</table>"


def _samples(rollouts: Sequence[Mapping[str, Any]]) -> str:
    """From the first and from the last step that sampled: what a reader compares."""
    if not rollouts:
        return ""
    half = SAMPLES_SHOWN // 2
    shown = list(rollouts) if len(rollouts) <= SAMPLES_SHOWN else [*rollouts[:half], *rollouts[-half:]]
    body = "".join(_sample(row) for row in shown)
    head = "<tr><th>step</th><th>prompt</th><th>answer</th><th>reward</th></tr>"
    return f"<h2>Samples, first and last</h2><table>{head}{body}</table>"


def _sample(row: Mapping[str, Any]) -> str:
    reward = row.get("reward")
    mark = "" if reward is None else ' class="good"' if reward > 0 else ' class="bad"'
    return (
        f'<tr><td class="n">{row.get("step")}</td><td><pre>{escape(str(row.get("prompt")))}</pre></td>'
        f"<td><pre>{escape(str(row.get('answer')))}</pre></td><td{mark}>{_number(reward)}</td></tr>"
    )


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th>{escape(str(name))}</th><td class="n">{escape(str(value))}</td></tr>'
        for name, value in values.items()
    )
    return f"<table>{rows}</table>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name} ") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else escape(str(value))

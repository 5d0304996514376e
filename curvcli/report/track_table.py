"""The terminal view and the CSV of a track."""

from __future__ import annotations

import csv
import io

from rich.console import Console
from rich.table import Table
from rich.text import Text

from curvcli.report.frame import number
from curvcli.report.table import COLOURS, findings_text, rho_bar
from curvcli.results import Track, TrackPoint


def show(track: Track, console: Console) -> None:
    """Print the run step by step, its findings and its cost; readable at 60 columns."""
    console.print(_head(track), _points(track, console), findings_text(track.findings), _foot(track), sep="\n")


def to_csv(track: Track) -> str:
    """One row per point, with a column for each layer's lambda; empty where a value is not certified."""
    layers = sorted({(e.index, e.name) for p in track.points if p.report for e in p.report.layers})
    columns = [
        "checkpoint", "step", "source", "status", "lambda", "rho", "residual", "threshold", "rho_low", "rho_high",
        "update_ratio", "lr", "shard_loss", "training_loss", "verdict", "surge", "surged", "hvps", "seconds",
    ]  # fmt: skip
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*columns, *(f"lambda {name}" for _, name in layers), "message"], lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(_row(point) for point in track.points)
    return buffer.getvalue()


def _row(point: TrackPoint) -> dict[str, object]:
    row: dict[str, object] = {
        "checkpoint": point.checkpoint,
        "step": point.step,
        "source": point.source,
        "training_loss": point.training_loss,
        "surge": point.surge,
        "surged": point.surged,
        "message": point.message,
    }
    if (report := point.report) is not None:
        full = report.full
        sure = full.status == "converged"
        row |= {
            "status": full.status,
            "lambda": full.eigenvalue if sure else None,
            "rho": full.rho if sure else None,
            "residual": full.residual,
            "threshold": report.optimizer.threshold,
            "rho_low": report.generalisation.rho_low,
            "rho_high": report.generalisation.rho_high,
            "update_ratio": report.update.ratio,
            "lr": report.optimizer.lr,
            "shard_loss": report.data.loss,
            "verdict": report.verdict,
            "hvps": report.cost.hvps,
            "seconds": report.cost.seconds,
        }
        row |= {f"lambda {e.name}": e.eigenvalue for e in report.layers if e.status == "converged"}
    return row


def _head(track: Track) -> Text:
    text = Text(track.run, style="bold")
    newest = track.points[-1]
    measured = sum(p.source == "measured" for p in track.points)
    cached = sum(p.source == "cached" for p in track.points)
    failed = sum(p.source == "failed" for p in track.points)
    counts = [f"{measured} measured", f"{cached} from the cache", *([f"{failed} failed"] if failed else [])]
    text.append(f"\n{len(track.points)} checkpoints: {', '.join(counts)}\n", style="not bold")
    if newest.report is not None:
        verdict = newest.report.verdict
        text.append("\n").append(f" {verdict.upper()} ", style=f"bold reverse {COLOURS[verdict]}")
        step = f" at step {newest.step:,}" if newest.step is not None else ""
        text.append(f"  rho {number(newest.report.full.rho, 3)}{step}, the newest\n", style="bold")
    return text


def _points(track: Track, console: Console) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    wide = console.width >= 100
    titles = ["step", "rho", *(["lambda", "of critical lr"] if wide else []), "lr", "loss", "verdict"]
    for title in titles:
        table.add_column(title, justify="left" if title == "verdict" else "right", no_wrap=True)
    table.add_column("", no_wrap=True)
    values = [p.report.full.rho if p.report and p.report.full.status == "converged" else None for p in track.points]
    limit = max([*(v for v in values if v is not None), 1.0])
    width = max(6, min(40, console.width - (78 if wide else 58)))
    for point, value in zip(track.points, values, strict=True):
        step = f"{point.step:,}" if point.step is not None else point.checkpoint
        report = point.report
        if report is None:
            table.add_row(step, Text("failed", style="red"), *[""] * len(titles[2:]), "")
            continue
        rho = number(value, 3) if value is not None else Text(report.full.status, style="yellow")
        more = [number(report.full.eigenvalue), number(report.update.ratio, 3)] if wide else []
        loss = point.training_loss if point.training_loss is not None else report.data.loss
        bar = rho_bar(value, limit, width, console)
        mark = Text(f" surge x{number(point.surge, 2)}", style="bold yellow") if point.surged else Text("")
        verdict = Text(report.verdict, style=COLOURS[report.verdict])
        table.add_row(step, rho, *more, number(report.optimizer.lr, 2), number(loss, 4), verdict, bar + mark)
    return table


def _foot(track: Track) -> Text:
    return Text(f"\n{track.hvps} Hessian-vector products, {track.seconds:.1f} s", style="dim")

"""What commands print: tables and lines for people, JSON for machines, always on standard output."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mio_export.console.terminal import json_text, printable
from mio_export.schema import finite

if TYPE_CHECKING:
    from mio_export.parity import ParityReport
    from mio_export.train import Evaluation, Plan, SeedSummary

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def echo(*lines: str, err: bool = False) -> None:
    """Print lines, on standard error if ``err``; a name in them breaks no line and steers no terminal."""
    for line in lines:
        typer.echo(printable(line), err=err)


def print_json(values: Any) -> None:
    """Print one JSON document in ASCII; NaN and infinity, which JSON lacks, become null."""
    typer.echo(json_text(finite(values), indent=2))


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    pairs = list(pairs)
    width = max(len(name) for name, _ in pairs)
    echo(*(f"{name:<{width}}  {value}" for name, value in pairs))


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; the first column to the left, the others to the right."""
    lines = [[printable(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    echo("", title)
    for number, line in enumerate(lines):
        cells = [
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        echo("  " + "  ".join(cells).rstrip())
        if not number:
            echo("  " + "  ".join("-" * width for width in widths))


def print_evaluation(evaluation: "Evaluation") -> None:
    """Print an encoder's scores beside its baselines."""
    columns = {name: scores.columns() for name, scores in evaluation.scores.items()}
    header = ["", *next(iter(columns.values()))]
    rows = [[name, *(f"{100 * value:.1f} %" for value in cells.values())] for name, cells in columns.items()]
    print_table(f"evaluation on {evaluation.num_test:,} held-out images", header, rows)


def print_plan(plan: "Plan") -> None:
    """Print what a training run would be and cost."""
    recipe = plan.recipe.to_dict()
    flat = [
        (f"{key}.{inner}" if isinstance(value, dict) else key, inner_value)
        for key, value in recipe.items()
        for inner, inner_value in (value.items() if isinstance(value, dict) else [("", value)])
    ]
    echo("recipe")
    print_pairs([(f"  {name}", json.dumps(value)) for name, value in flat])
    echo("", "model")
    print_pairs(
        [
            ("  encoder", f"{plan.num_encoder_parameters:,} parameters, {plan.embedding_dim:,} features"),
            ("  heads", f"{plan.num_head_parameters:,} parameters, {recipe['output_dim']:,} projections"),
            ("  memory", f"{_bytes(plan.model_bytes)} for weights, gradients, optimiser and target encoder,"),
            ("", f"about {_bytes(plan.activation_bytes)} for a step's activations on each device"),
        ]
    )
    echo("", "cost")
    pairs = [("  a step", f"{recipe['batch_size']:,} images, {plan.step_flops / 1e12:,.2f} Tflop")]
    if plan.num_steps is None or plan.num_views is None:
        pairs.append(("  the run", f"{recipe['epochs']:,} epochs; steps and images with --data DIR"))
    else:
        pairs.append(("  an epoch", f"{plan.num_images:,} images, {plan.steps_per_epoch:,} batches"))
        total = plan.num_views / 2 / recipe["batch_size"] * plan.step_flops
        pairs.append(("  the run", f"{plan.num_steps:,} steps, {plan.num_views:,} views, {total / 1e15:,.2f} Pflop"))
    print_pairs(pairs)


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def print_seeds(summary: "SeedSummary") -> None:
    """Print mean and deviation over the seeds beside the baselines, which have none, and the differences in kNN."""
    from mio_export.metrics import HEADLINE_K
    from mio_export.train.scores import VARYING

    header = ["", *next(iter(summary.spread.values()))]
    rows = [
        [name, *(_mean(spread.mean, spread.deviation, varies=name in VARYING) for spread in cells.values())]
        for name, cells in summary.spread.items()
    ]
    seeds = ", ".join(name.removeprefix("seed-") for name in summary.evaluations)
    print_table(f"evaluation on {summary.num_test:,} held-out images, seeds {seeds}: mean ± deviation", header, rows)
    if summary.differences:
        intervals = summary.differences.items()
        rows = [[name, *(f"{100 * x:+.1f}" for x in (d.difference, d.low, d.high))] for name, d in intervals]
        title = f"trained less each other in kNN (k={HEADLINE_K}), points, 95 % paired bootstrap over seeds and images"
        print_table(title, ["", "difference", "from", "to"], rows)


def print_parity(reports: Iterable["ParityReport"]) -> None:
    """Print what every artifact was proved to be, its worst batch size and device counting."""
    header = ["artifact", "runtime", "precision", "batches", "min cosine", "rms error", "allowed", "top-1", "recall@10"]
    rows = []
    for report in reports:
        found, allowed = report.comparisons, report.budget.max_rms_error
        cells = ["", "", "", ""]
        if found:
            cells = [
                f"{min(c.min_cosine for c in found):.7f}",
                f"{max(c.rms_relative_error for c in found):.1e}",
                f"{min(c.top1_agreement for c in found):.1%}",
                f"{min(c.recall_at_10_agreement for c in found):.1%}",
            ]
        rows.append(
            [
                report.artifact,
                " ".join([report.runtime, "+".join(report.devices)]).strip(),
                report.precision,
                ",".join(dict.fromkeys(str(c.batch_size) for c in found)),
                *cells[:2],
                "" if allowed is None else f"{allowed:.1e}",
                *cells[2:],
                report.verdict if report.verdict != "refused" else "REFUSED",
            ]
        )
    print_table("parity with the encoder in float64", [*header, "verdict"], rows)


def _mean(mean: float, deviation: float, *, varies: bool) -> str:
    around = f" ± {100 * deviation:.1f}" if varies and math.isfinite(deviation) else ""
    return f"{100 * mean:.1f}{around} %"

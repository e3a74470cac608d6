"""The report of a training run: one HTML page that needs nothing beside it."""

import json
import math
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mio_export.files import write_text
from mio_export.metrics import HEADLINE_K
from mio_export.models.checkpoint import DESCRIPTION, EVALUATION
from mio_export.pages import Figure, Line, data_url, line_chart, number_label, render
from mio_export.train.run_files import METRICS, RECIPE, REPORT, SPECTRUM, VIEWS
from mio_export.train.run_report.curves import curve_figures, is_number
from mio_export.train.run_report.scores_table import scores_table

_SPECTRUM_FLOOR = 1e-6
_MOST_FAILURES = 20
_SPECTRUM_MEANING = (
    "How strong each direction of the outputs is, the strongest set to 1 and the mean not removed, on training images"
    " without augmentation. A flat curve uses many directions, a steep one few; where it falls to the bottom, the rest"
    " are empty. “untrained” are the features before training."
)
_VIEWS_MEANING = (
    "Training images, each above two of its views. The encoder learns to ignore whatever differs between views, so what"
    " you care about should survive in both: if a person could not match them, draw gentler ones."
)


def write_report(run: Path) -> Path:
    """Write ``report.html`` from whatever else lies in a run's folder; the same files give the same bytes.

    A file that is missing leaves its section out, and an evaluation of other weights than the run's is left out too.

    Returns:
        The page's path.
    """
    stored = _read_json(run / RECIPE)
    recipe, data = stored.get("recipe", {}), stored.get("data", {})
    metrics = _read_metrics(run / METRICS)
    subject = _subject(recipe, data)
    page = render(
        "training.html",
        title=" · ".join([*subject, "training report"]),
        subject=subject,
        facts=_facts(recipe, metrics),
        alarms=_alarms(metrics),
        evaluation=_evaluation(_read_evaluation(run)),
        curves=curve_figures(metrics, objective=str(recipe.get("objective"))),
        spectrum=_spectrum(_read_json(run / SPECTRUM)),
        views=_views(run / VIEWS),
        settings=[*_flat(recipe), *_flat(data, "data.")],
        made=_made(data),
    )
    path = run / REPORT
    write_text(path, page)
    return path


def _read_json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of all whole epochs; one that is being written has no line end yet."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _read_evaluation(run: Path) -> dict[str, Any]:
    evaluation, weights = _read_json(run / EVALUATION), _read_json(run / DESCRIPTION).get("weights_sha256")
    return evaluation if evaluation.get("weights_sha256") in (None, weights) else {}


def _subject(recipe: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    images = [f"{data['num_images']:,}\u00a0images"] if "num_images" in data else []
    return [*[str(recipe[key]) for key in ("objective", "backbone") if key in recipe], *images]


def _facts(recipe: Mapping[str, Any], metrics: list[dict[str, Any]]) -> list[str]:
    last: Mapping[str, Any] = metrics[-1] if metrics else {"epoch": 0}
    facts = [f"Epoch {last['epoch']:,}" + (f" of {recipe['epochs']:,}" if "epochs" in recipe else "")]
    facts += [f"step {last['step']:,}"] if "step" in last else []
    facts += [f"last loss {number_label(last['loss'])}"] if is_number(last.get("loss")) else []
    facts += [f"images of {recipe['image_size']} px"] if recipe.get("image_size") else []
    return facts


def _alarms(metrics: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Epochs by alarm."""
    epochs: dict[str, list[str]] = {}
    for line in metrics:
        if line.get("alarm"):
            epochs.setdefault(str(line["alarm"]), []).append(str(line["epoch"]))
    return epochs


def _evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    scores, differences = evaluation.get("scores", {}), evaluation.get("differences") or {}
    if "trained" not in scores:
        return None
    num_test, num_classes = evaluation["num_test"], evaluation.get("num_classes")
    notes = ["Good is above every baseline."]
    if num_classes:
        notes.append(
            f"kNN is the share of test images that their {HEADLINE_K} nearest training images classify rightly;"
            f" guessing among {num_classes} classes would score {100 / num_classes:.3g} %."
        )
    notes.append("Copy recall@k is the share that are among the k nearest to their augmented copy; it needs no labels.")
    notes.append(f"A share of {num_test:,} images is uncertain by up to ±{98 / math.sqrt(num_test):.1f} points (95 %).")
    notes += ["A range beside a difference is its own 95 % interval."] if differences else []
    failures = list(evaluation.get("failures", ()))
    more = len(failures) - _MOST_FAILURES
    return {
        "num_test": f"{num_test:,}",
        "table": scores_table(scores, differences),
        "notes": notes,
        "num_failures": f"{len(failures):,}",
        "failures": [*failures[:_MOST_FAILURES], *([f"and {more:,} more"] if more > 0 else [])],
    }


def _spectrum(spectra: Mapping[str, list[float]]) -> Figure | None:
    lines = [
        Line(name=name, points=[(index, max(value, _SPECTRUM_FLOOR)) for index, value in enumerate(values, start=1)])
        for name, values in spectra.items()
        if values
    ]
    if not lines:
        return None
    limits = 1, max(len(line.points) for line in lines)
    title = "Singular values, descending, on a logarithmic axis"
    chart = line_chart(lines, title=title, x_label="index", x_limits=limits, log=True)
    return Figure(picture=chart, meaning=_SPECTRUM_MEANING, keys=[line.name for line in lines])


def _views(path: Path) -> Figure | None:
    if not path.is_file():
        return None
    picture = Markup('<img src="{}" alt="Training images, each above two augmented views of it">')
    return Figure(picture=picture.format(data_url(path.read_bytes(), "PNG")), meaning=_VIEWS_MEANING)


def _made(data: Mapping[str, Any]) -> list[str]:
    made = [f"mio-export {version('mio-export')}", f"PyTorch {version('torch')}"]
    return made + ([f"data {str(data['sha256'])[:12]}"] if "sha256" in data else [])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


__all__ = ["write_report"]

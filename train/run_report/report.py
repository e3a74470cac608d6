"""The report of a training run: one HTML page that needs nothing beside it."""

import base64
import json
import math
from collections.abc import Iterable, Mapping
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mio_export.chart import Line, line_chart, number_label
from mio_export.files import write_text
from mio_export.metrics import HEADLINE_K
from mio_export.models.checkpoint import DESCRIPTION, EVALUATION
from mio_export.page import figure, html_page, section
from mio_export.train.run_files import METRICS, RECIPE, REPORT, SPECTRUM, VIEWS
from mio_export.train.run_report.curves import curve_figures, is_number
from mio_export.train.run_report.scores import scores_table

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
    sections = [
        _header(recipe, data, metrics),
        _alarms(metrics),
        _evaluation(_read_evaluation(run)),
        _curves(metrics, str(recipe.get("objective"))),
        _spectrum(_read_json(run / SPECTRUM)),
        _views(run / VIEWS),
        _settings(recipe, data),
    ]
    title = " · ".join([*_subject(recipe, data), "training report"])
    path = run / REPORT
    write_text(path, html_page(title, sections))
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


def _header(recipe: Mapping[str, Any], data: Mapping[str, Any], metrics: list[dict[str, Any]]) -> str:
    last: Mapping[str, Any] = metrics[-1] if metrics else {"epoch": 0}
    facts = [f"epoch {last['epoch']:,}" + (f" of {recipe['epochs']:,}" if "epochs" in recipe else "")]
    facts += [f"step {last['step']:,}"] if "step" in last else []
    facts += [f"last loss {number_label(last['loss'])}"] if is_number(last.get("loss")) else []
    facts += [f"images of {recipe['image_size']} px"] if recipe.get("image_size") else []
    subject = " <span>·</span> ".join(map(escape, _subject(recipe, data))) or "A run"
    return f"<header><p>Training report</p><h1>{subject}</h1><p>{escape(', '.join(facts)).capitalize()}</p></header>"


def _alarms(metrics: list[dict[str, Any]]) -> str:
    epochs: dict[str, list[str]] = {}
    for line in metrics:
        if line.get("alarm"):
            epochs.setdefault(str(line["alarm"]), []).append(str(line["epoch"]))
    items = [f"<p><strong>Alarm</strong> in epoch {', '.join(e)}: {escape(text)}</p>" for text, e in epochs.items()]
    return f'<aside class="alarm">{"".join(items)}</aside>' if items else ""


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    scores, differences = evaluation.get("scores", {}), evaluation.get("differences") or {}
    if "trained" not in scores:
        return ""
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
    return section(
        "Evaluation",
        f"<p>On {num_test:,} held-out images, in %; differences in points.</p>"
        f'<div class="wide">{scores_table(scores, differences)}</div>'
        f'<p class="note">{escape(" ".join(notes))}</p>{_failures(evaluation.get("failures", ()))}',
    )


def _failures(failures: Iterable[str]) -> str:
    failures = list(failures)
    if not failures:
        return ""
    shown = failures[:_MOST_FAILURES]
    more = [f"and {len(failures) - len(shown):,} more"] if len(failures) > len(shown) else []
    items = "".join(f"<li>{escape(text)}</li>" for text in (*shown, *more))
    return f"<details><summary>{len(failures):,} files could not be read</summary><ul>{items}</ul></details>"


def _curves(metrics: list[dict[str, Any]], objective: str) -> str:
    figures = "".join(curve_figures(metrics, objective=objective))
    return section("Curves", f'<div class="grid">{figures}</div>') if figures else ""


def _spectrum(spectra: Mapping[str, list[float]]) -> str:
    lines = [
        Line(name=name, points=[(index, max(value, _SPECTRUM_FLOOR)) for index, value in enumerate(values, start=1)])
        for name, values in spectra.items()
        if values
    ]
    if not lines:
        return ""
    limits = 1, max(len(line.points) for line in lines)
    title = "Singular values, descending, on a logarithmic axis"
    chart = line_chart(lines, title=title, x_label="index", x_limits=limits, log=True)
    return section(
        "Spectrum", f'<div class="beside">{figure(chart, _SPECTRUM_MEANING, keys=[line.name for line in lines])}</div>'
    )


def _views(path: Path) -> str:
    if not path.is_file():
        return ""
    source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    picture = f'<img src="{source}" alt="Training images, each above two augmented views of it">'
    return section("Views", f'<div class="beside">{figure(picture, _VIEWS_MEANING)}</div>')


def _settings(recipe: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    pairs = [*_flat(recipe), *_flat(data, "data.")]
    rows = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in pairs)
    table = f"<details><summary>All settings</summary><table>{rows}</table></details>" if rows else ""
    made = [f"mio-export {version('mio-export')}", f"PyTorch {version('torch')}"]
    made += [f"data {str(data['sha256'])[:12]}"] if "sha256" in data else []
    return f"<footer>{table}<p>{escape(' · '.join(made))}</p></footer>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


__all__ = ["write_report"]

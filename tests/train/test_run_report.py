import io
import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image

from mio_export.metrics import spectrum
from mio_export.pages import Line, line_chart, number_label
from mio_export.sample import read_sample
from mio_export.train import evaluate, recipe_from_dict, train
from mio_export.train.run_report import views_sheet, write_report
from mio_export.train.run_report.scores_table import scores_table

TINY = {"epochs": 3, "batch_size": 64, "hidden_dim": 64, "output_dim": 32}
VOID = {"meta", "img"}
SECTIONS = ["Evaluation", "Curves", "Spectrum", "Views"]


class Page(HTMLParser):
    """What a page holds; a tag that is not closed where it should be is an error."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def within(self, tag):
        return [text for where, text in self.texts if where == tag]


def page(run):
    return Page(write_report(run).read_text(encoding="utf-8"))


def write_metrics(run, lines):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three epochs on 300 images, evaluated with two made-up classes; read only."""
    folder = tmp_path_factory.mktemp("report")
    for index, image in enumerate(read_sample("train", limit=300)):
        path = folder / "data" / ("first" if index < 150 else "second") / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    train(recipe_from_dict(TINY), folder / "data", folder / "run")
    trained = (folder / "run" / "report.html").read_bytes()
    evaluate(folder / "run", folder / "data")
    return folder / "run", trained


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def test_training_and_evaluation_leave_a_whole_page(finished):
    run, trained = finished
    before = Page(trained.decode())
    assert before.within("h2") == SECTIONS[1:]
    assert "table" in before.tags  # of settings
    after = Page((run / "report.html").read_text(encoding="utf-8"))
    assert after.within("h2") == SECTIONS
    assert after.within("h1")[0] == "mio "
    assert after.within("h3") == [
        "Loss",
        "Mutual information, nats",
        "Effective rank",
        "Spread",
        "Alignment",
        "Uniformity",
        "Learning rate",
    ]
    assert after.tags.count("svg") == 8
    assert "Epoch 3 of 3, step 9, last loss" in "".join(after.within("p"))


def table(html):
    """Cells without their marks, by row."""
    rows = re.findall(r'<tr class="[^"]*"><th scope="row">(.*?)</th>(.*?)</tr>', html)
    return {
        name: [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", cells)] for name, cells in rows
    }


def test_the_table_shows_what_the_evaluation_says(finished):
    run, _ = finished
    shown = table((run / "report.html").read_text())
    scores = json.loads((run / "evaluation.json").read_text())["scores"]
    columns = [("knn", "20"), ("copy_recall", "1"), ("copy_recall", "10")]
    values = {name: [100 * row[key][k] for key, k in columns] for name, row in scores.items()}
    baselines = zip(values["raw pixels"], values["PCA"], values["untrained"], strict=True)
    gains = {
        "over untrained": [a - b for a, b in zip(values["trained"], values["untrained"], strict=True)],
        "over best baseline": [a - max(b) for a, b in zip(values["trained"], baselines, strict=True)],
    }
    expected = {name: [f"{value:.1f}" for value in row] for name, row in values.items()}
    expected |= {name: [f"{gain:+.1f}".replace("-", "−") for gain in row] for name, row in gains.items()}
    for name in gains:  # without the interval that stands behind
        shown[name] = [cell.split(" ")[0] for cell in shown[name]]
    assert shown == expected
    assert list(shown) == ["raw pixels", "PCA", "untrained", "trained", "over untrained", "over best baseline"]


def test_a_table_takes_probes_more_rows_intervals_and_gaps():
    scores = {
        "untrained": {"knn": {"20": 0.5}, "linear": 0.6, "copy_recall": {"1": 0.1}},
        "trained": {"knn": {"20": 0.75}, "linear": 0.5, "sgd": 0.7, "few_shot": {"1": 0.3}, "copy_recall": {"1": 0.1}},
        "first 4 projections": {"knn": {"20": 0.25}, "copy_recall": {"1": 0.1}},
    }
    html = scores_table(scores, {"untrained": {"difference": 0.25, "low": 0.2, "high": 0.31}})
    Page(html)
    assert re.findall(r'scope="col">(.*?)<', html) == ["kNN\u00a0(k=20)", "linear", "SGD", "1-shot", "copy recall@1"]
    assert table(html) == {
        "untrained": ["50.0", "60.0", "–", "–", "10.0"],
        "trained": ["75.0", "50.0", "70.0", "30.0", "10.0"],
        "over untrained": ["+25.0 +20.0 to +31.0", "−10.0", "–", "–", "+0.0"],
        "over best baseline": ["+25.0 +20.0 to +31.0", "−10.0", "–", "–", "+0.0"],
        "first 4 projections": ["25.0", "–", "–", "–", "10.0"],
    }
    assert 'class="up">+25.0' in html
    assert 'class="down">−10.0' in html


def test_nothing_is_fetched_or_run_and_the_page_is_small(finished):
    run, _ = finished
    text = (run / "report.html").read_text()
    sources = [value for name, value in Page(text).attributes if name in ("src", "href", "srcset", "data")]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)
    assert str(run) not in text
    assert len(text) < 1_000_000


def test_the_same_files_give_the_same_bytes(run, tmp_path):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert write_report(shutil.copytree(run, tmp_path / "elsewhere")).read_bytes() == first


def test_everything_from_outside_is_escaped(tmp_path):
    nasty = "</td><script>alert(\"1 & 2\")</script><b x='{y}'>"
    recipe = {"objective": nasty, "backbone": nasty, "loss": {nasty: nasty}, "epochs": 1}
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": recipe, "data": {"sha256": nasty}}))
    write_metrics(tmp_path, [{"epoch": 1, "step": 1, "loss": 1.0, "alarm": nasty}])
    scores = {"trained": {"knn": {"20": 0.5}, "copy_recall": {nasty: 0.5}}, nasty: {"copy_recall": {nasty: 0.25}}}
    evaluation = {"scores": scores, "num_test": 10, "num_classes": 2, "failures": [nasty]}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "spectrum.json").write_text(json.dumps({nasty: [1.0, 0.5], "features": [1.0]}))
    written = page(tmp_path)
    assert {"script", "b"} & set(written.tags) == set()
    assert "".join(text for _, text in written.texts).count(nasty) >= 8
    assert escape(nasty) in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("file", "section"),
    [
        ("evaluation.json", "Evaluation"),
        ("metrics.jsonl", "Curves"),
        ("spectrum.json", "Spectrum"),
        ("views.png", "Views"),
    ],
)
def test_a_missing_file_leaves_its_section_out(run, file, section):
    (run / file).unlink()
    assert page(run).within("h2") == [name for name in SECTIONS if name != section]


def test_an_empty_run_still_gives_a_page(tmp_path):
    written = page(tmp_path)
    assert written.within("h2") == []
    assert "table" not in written.tags


def test_an_evaluation_of_other_weights_is_left_out(run):
    values = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(values | {"weights_sha256": "0"}))
    assert "Evaluation" not in page(run).within("h2")


def test_a_quantity_without_numbers_has_no_curve_and_an_unknown_one_is_passed_over(tmp_path):
    line = {"epoch": 1, "step": 1, "loss": 2.5, "mutual_information": None, "uniformity": math.nan, "weather": 3.0}
    write_metrics(tmp_path, [line, {**line, "epoch": 2, "effective_rank_projections": 7.0}])
    written = page(tmp_path)
    assert written.within("h3") == ["Loss", "Effective rank"]
    assert "nan" not in "".join(value or "" for _, value in written.attributes)


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    write_metrics(tmp_path, [{"epoch": 1, "step": 1, "loss": 2.5}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "lo')
    assert "Epoch 1, step 1, last loss 2.5" in page(tmp_path).within("p")


def test_an_alarm_is_said_once_with_its_epochs(tmp_path):
    alarms = [None, "constant features", "constant features", None]
    write_metrics(tmp_path, [{"epoch": n, "loss": 1.0, "alarm": alarm} for n, alarm in enumerate(alarms, start=1)])
    assert page(tmp_path).within("p").count(" in epoch 2, 3: constant features") == 1


@pytest.mark.parametrize("values", [[0.0], [3.25], [-1e-12, -1e-12], [5.0] * 40, [1e-9, 2e-9], [-4e7, 1e30]])
@pytest.mark.parametrize("log", [False, True])
def test_every_line_lies_inside_its_chart(values, log):
    points = [(index, abs(value) + 1e-6 if log else value) for index, value in enumerate(values, start=1)]
    svg = line_chart([Line(name="", points=points)], title="", x_label="epoch", x_limits=(1, len(values)), log=log)
    Page(svg)
    drawn = re.search(r'class="line line-0" d="M([^"]*)"', svg)[1]
    for x, y in (map(float, point.split()) for point in drawn.split("L")):
        assert 44 <= x <= 306
        assert 8 <= y <= 168
    labels = re.findall(r'text-anchor="end">([^<]+)<', svg)[:-1]
    assert len(set(labels)) == len(labels) >= 2


def test_an_axis_is_read_as_it_was_drawn():
    points = [(1, 0.3), (2, 0.9), (3, 0.6)]
    svg = line_chart([Line(name="", points=points)], title="", x_label="epoch", x_limits=(1, 3))
    ticks = {float(label): float(y) - 4 for y, label in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)}
    assert list(ticks) == [0.2, 0.4, 0.6, 0.8, 1.0]
    per_unit = (ticks[1.0] - ticks[0.2]) / 0.8
    drawn = re.search(r'class="line line-0" d="M([^"]*)"', svg)[1]
    ys = [float(point.split()[1]) for point in drawn.split("L")]
    assert ys == pytest.approx([ticks[0.2] + per_unit * (y - 0.2) for _, y in points], abs=0.1)
    assert ">0.6</text></svg>" in svg


def test_last_values_do_not_lie_on_one_another():
    lines = [Line(name=name, points=[(1, 0.0), (2, 1 + shift)]) for name, shift in (("a", 0.0), ("b", 0.001))]
    svg = line_chart(lines, title="", x_label="epoch", x_limits=(1, 2))
    first, second = (float(y) for y in re.findall(r'class="value line-\d" x="[\d.]+" y="([\d.]+)"', svg))
    assert second - first >= 12


def test_numbers_are_short():
    assert [number_label(value) for value in (0.0, -1.2345, 12_345.6, 0.00045, 160.4)] == [
        "0",
        "−1.23",
        "12,346",
        "4.5e−4",
        "160",
    ]


def test_a_spectrum_starts_at_one_and_falls():
    rows = np.diag([3.0, 1.5, 6.0]).astype(np.float32)
    np.testing.assert_allclose(spectrum(rows), [1, 0.5, 0.25])
    np.testing.assert_array_equal(spectrum(np.zeros((4, 2), np.float32)), [0, 0])


@pytest.mark.parametrize(("side", "channels", "tile"), [(28, 1, 112), (32, 3, 96), (64, 3, 64), (224, 3, 80)])
def test_a_sheet_has_six_images_a_row_each_above_its_views(side, channels, tile):
    levels = np.arange(1, 22, dtype=np.uint8).reshape(3, 7, 1, 1, 1) * 10
    trio = np.broadcast_to(levels, (3, 7, side, side, channels))
    sheet = Image.open(io.BytesIO(views_sheet(*trio)))
    assert sheet.width == 6 * tile + 5 * 4
    seen = np.asarray(sheet)
    for row in range(3):
        for column in range(6):
            middle = seen[row * (tile + 4) + tile // 2, column * (tile + 4) + tile // 2]
            assert middle.tolist() == [*[int(levels[row, column].item())] * channels, 255]
    assert seen[tile + 1, 0, -1] == 0  # gaps are transparent


def test_a_sheet_of_large_noise_keeps_the_page_below_a_megabyte():
    noise = np.random.default_rng(0).integers(0, 256, (3, 12, 224, 224, 3), dtype=np.uint8)
    assert len(views_sheet(*noise)) * 4 / 3 < 950_000

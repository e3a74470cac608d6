import base64
import io
import re
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image

from mio_export.errors import UsageError
from mio_export.exporting.bundle_page import ArtifactProof, bundle_page
from mio_export.exporting.worst_images import relative_errors, shown_rows, worst_images
from mio_export.pages import log_histogram, thumbnail
from mio_export.parity import budget_for, compare
from mio_export.runtimes import open_runtime

FP32 = budget_for("fp32", own_rms_error=5e-7, own_row_error=1e-6)
VOID = {"meta", "img", "br"}


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


def report(reference, candidate, artifact):
    comparison = compare(reference, candidate, batch_size=24, budget=FP32)
    return comparison.problems, {
        "artifact": artifact,
        "budget": asdict(FP32),
        "comparisons": [asdict(comparison)],
        "evidence": {"artifact_sha256": f"hash of {artifact}", "images": "24 photos"},
        "versions": {"torch": "1.2.3"},
    }


@pytest.fixture(scope="module")
def pixels(encoder, photo_crops):
    return np.stack([encoder.preprocess.pixels(crop) for crop in photo_crops])


@pytest.fixture(scope="module")
def reference(encoder, pixels):
    return encoder.embed(pixels, batch_size=24).astype(np.float64)


@pytest.fixture(scope="module")
def proofs(bundle, pixels, reference):
    """A proved artifact that ran, a refused one whose images 5 and 20 lie on each other, and one that did not run."""
    with open_runtime(bundle, "onnxruntime", device="cpu") as runtime:
        good = runtime.embed(pixels)
    bad = good * np.float32(1.01)
    bad[5] = bad[20]
    problems, refused = report(reference, bad, "encoder.int8.onnx")
    _, proved = report(reference, good, "encoder.onnx")
    common = {"reason": "", "embeddings": None, "report": {}}
    return [
        ArtifactProof(**common | {"report": proved, "embeddings": good}, **kind("onnx", "fp32", "proved")),
        ArtifactProof(
            **common | {"reason": "; ".join(problems), "report": refused, "embeddings": bad},
            **kind("onnx", "int8", "refused"),
        ),
        ArtifactProof(**common | {"reason": "no GPU here"}, **kind("tensorrt", "fp16", "unproven")),
    ]


def kind(format, precision, verdict):
    return {"format": format, "precision": precision, "verdict": verdict}


@pytest.fixture(scope="module")
def write(bundle, pixels, reference, proofs):
    """Write the page; a keyword replaces what it is made of."""

    def written(**changes):
        values = {
            "manifest": bundle.manifest,
            "proofs": proofs,
            "pixels": pixels,
            "reference": reference,
            "sizes": {"encoder.safetensors": 2_000_000, "encoder.onnx": 1_000_000, "encoder.int8.onnx": 500_000},
            "speeds": {("torch", "fp32"): 100.0, ("onnx", "fp32"): 250.0},
        } | changes
        return bundle_page(values.pop("manifest"), values.pop("proofs"), **values)

    return written


def rows(html, section):
    """Cells of a section's table without marks, by row."""
    body = html.split(f"<h2>{section}</h2>")[1].split("</section>")[0]
    found = re.findall(r'<tr class=""><th scope="row">(.*?)</th>(.*?)</tr>', body)
    return {
        re.sub(" <small>.*", "", name): [
            re.sub("<[^>]*>", " ", cell).strip() for cell in re.findall("<td>(.*?)</td>", cells)
        ]
        for name, cells in found
    }


def test_the_page_has_every_section_and_verdict(write, bundle):
    html = write()
    page = Page(html)
    assert page.within("h2") == ["Parity", "Errors", "Worst images", "Size and speed"]
    assert page.within("h1") == [bundle.manifest.name]
    assert "1 proved, 1 unproven, 1 refused, on 24 images" in page.within("p")
    shown = rows(html, "Parity")
    assert [cells[0] for cells in shown.values()] == ["✓\u00a0proved", "✕\u00a0refused", "?\u00a0unproven"]
    assert shown["tensorrt fp16"][1:] == ["–"] * 5
    assert "row 5: relative error" in "".join(page.within("p"))
    assert {"hash of encoder.int8.onnx", bundle.manifest.space, bundle.manifest.weights_sha256} <= set(
        page.within("td")
    )
    assert any("torch 1.2.3" in text for text in page.within("p"))


def test_numbers_stand_beside_their_budget_and_what_breaks_it_is_marked(write, proofs):
    shown = rows(write(), "Parity")
    comparison = proofs[1].report["comparisons"][0]
    assert shown["onnx int8"][1] == f"✕\u00a0{comparison['min_cosine']:.7f}   ≥ 0.999999"
    assert shown["onnx fp32"][2].endswith("≤ 4e-06")
    assert "✕" not in "".join(shown["onnx fp32"])


def test_sizes_and_speeds_are_beside_the_encoders(write):
    shown = rows(write(), "Size and speed")
    assert shown["onnx fp32"] == ["1.00\u00a0MB", "0.50", "250", "2.50"]
    assert shown["onnx int8"] == ["0.50\u00a0MB", "0.25", "–", "–"]
    assert rows(write(speeds={}), "Size")["encoder, PyTorch"] == ["2.00\u00a0MB", "1.00"]


def test_nothing_is_fetched_or_run_every_thumbnail_is_there_once_and_the_page_is_small(write, bundle):
    html = write()
    ids = re.findall(r'<image id="([\w-]+)"', html)
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'<use href="#([\w-]+)"', html)) == set(ids)
    links = [value for name, value in Page(html).attributes if name in ("src", "href", "srcset", "data")]
    assert all(link.startswith(("#i", "data:image/png;base64,", "data:image/jpeg;base64,")) for link in links)
    assert not re.search(r"https?://|url\(|@import|<script|<link", html)
    assert str(bundle.path.parent) not in html
    assert len(html) < 100_000
    assert html == write()


def test_everything_from_outside_is_escaped(write, bundle, proofs):
    nasty = "</td><script>alert(\"1 & 2\")</script><b x='{y}'>"
    values = {"evidence": {"images": nasty, "artifact_sha256": nasty}, "versions": {nasty: nasty}, "artifact": nasty}
    proof = replace(proofs[1], format=nasty, reason=nasty, report={**proofs[1].report, **values})
    html = write(manifest=replace(bundle.manifest, name=nasty), proofs=[proof])
    assert {"script", "b"} & set(Page(html).tags) == set()
    assert html.count(escape(nasty)) >= 10


def test_the_worst_images_are_those_of_the_largest_error_with_changed_neighbours(reference):
    candidate = reference.copy()
    candidate[5] = reference[20]
    candidate[7] *= 1.5
    worst = worst_images(reference, candidate)
    assert [image.row for image in worst[:2]] == list(np.argsort(-relative_errors(reference, candidate))[:2])
    image = next(image for image in worst if image.row == 5)
    assert image.after[0] == 20
    assert image.changed == set(image.after) - set(image.before)
    scaled = next(image for image in worst if image.row == 7)
    assert scaled.changed <= {5}  # its direction is the same; only what moved can be new
    assert all(image.row not in image.before + image.after for image in worst)


def test_equal_images_may_stand_in_for_each_other():
    equal, rng = np.repeat(np.eye(3), 8, axis=0) + 0.1, np.random.default_rng(0)
    reference, candidate = (equal * (1 + rng.normal(0, 1e-5, equal.shape)) for _ in range(2))
    assert any(set(image.after) != set(image.before) for image in worst_images(reference, candidate))
    assert not any(image.changed for image in worst_images(reference, candidate))


def test_a_row_that_is_not_finite_is_worst_and_has_no_neighbours_nor_is_one(write, reference, proofs):
    candidate = reference.astype(np.float32)
    candidate[3], candidate[9] = np.nan, np.inf
    worst = worst_images(reference, candidate)
    assert [(image.row, image.after) for image in worst[:2]] == [(3, ()), (9, ())]
    assert not {3, 9} & {row for image in worst for row in image.after}
    html = write(proofs=[replace(proofs[1], embeddings=candidate)])
    assert "2 of 24 are NaN or infinite and not drawn." in html
    assert "image 3, relative error not finite, no neighbours" in html


def test_an_artifact_shows_thirty_images_at_most():
    rng = np.random.default_rng(0)
    worst = worst_images(rng.normal(size=(500, 8)), rng.normal(size=(500, 8)))
    assert len(worst) == 3
    assert 20 < len(shown_rows(worst)) <= 30


@pytest.mark.parametrize(("side", "channels", "shown"), [(28, 1, 28), (64, 3, 64), (224, 3, 64)])
def test_a_thumbnail_is_the_image_at_64_px_or_less(side, channels, shown):
    made = thumbnail(np.full((side, side, channels), 200, dtype=np.uint8), 64)
    assert made.crisp == (side < 64)
    image = Image.open(io.BytesIO(base64.b64decode(made.url.partition(",")[2])))
    assert image.size == (shown, shown)
    assert np.abs(np.asarray(image).astype(int) - 200).max() <= 2


def test_a_histogram_counts_every_value_where_it_lies():
    values = [2e-7] * 3 + [0.0, 1e-12] + [0.5] * 6
    svg = log_histogram(values, title="t", limits=(-8, 0), mark=(1e-4, "budget 0.0001"))
    Page(svg)
    bars = [
        tuple(map(float, bar)) for bar in re.findall(r'x="([\d.]+)" y="[\d.]+" width="[\d.]+" height="([\d.]+)"', svg)
    ]
    assert [height / bars[0][1] for _, height in bars] == pytest.approx([1, 1.5, 3], abs=0.01)
    mark = float(re.search(r'class="mark" d="M([\d.]+)', svg)[1])
    assert bars[1][0] < mark < bars[2][0]
    assert ">budget 0.0001</text>" in svg


def test_an_empty_bundle_and_another_shape_still_give_a_page(write, proofs):
    assert Page(write(proofs=[])).within("h2") == ["Size and speed"]
    other = replace(proofs[1], embeddings=np.zeros((24, 3), np.float32))
    assert Page(write(proofs=[other])).within("h2") == ["Parity", "Size and speed"]


def test_images_without_embeddings_are_refused(write, pixels):
    with pytest.raises(UsageError, match="must be equally many, at least 1; got 23 and 24"):
        write(pixels=pixels[1:])


@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_draws_the_thumbnails_and_nothing_sticks_out(write, tmp_path, width):
    (tmp_path / "page.html").write_text(write(), encoding="utf-8")
    probe = (
        f'<body style="margin:0"><iframe style="width:{width}px;height:900px" src="page.html"></iframe>'
        "<script>onload=()=>{"
        "const d=document.querySelector('iframe').contentDocument,u=[...d.querySelectorAll('use')];"
        "document.title=[d.documentElement.scrollWidth<=d.documentElement.clientWidth,u.length>0,"
        "u.every(e=>e.getBoundingClientRect().width>20)]}</script>"
    )
    (tmp_path / "probe.html").write_text(probe)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    result = subprocess.run(
        ["chromium", *options, profile, f"file://{tmp_path}/probe.html"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "<title>true,true,true</title>" in result.stdout

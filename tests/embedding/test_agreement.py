"""Going on with other versions than those that began a store: only where they agree."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mio_export.console.progress import Progress
from mio_export.embedding import agreement, embed
from mio_export.embedding.versions import difference, versions_here
from mio_export.errors import GateError, SpaceError
from mio_export.limits import Limits
from mio_export.preprocess import Preprocess
from mio_export.store import load_embeddings, read_info, shard_paths, write_info

OPTIONS = {"runtime": "onnxruntime", "decode": "full", "shard_size": 5}


class Said(Progress):
    def __init__(self):
        self.lines = []

    def line(self, text):
        self.lines.append(text)


@pytest.fixture
def folder(photos, tmp_path):
    """Half of the photos; a test adds some of the others."""
    return shutil.copytree(photos / "temple", tmp_path / "photos")


@pytest.fixture
def out(bundle, folder, tmp_path):
    """A store of theirs."""
    embed(bundle.path, folder, tmp_path / "out", **OPTIONS)
    return tmp_path / "out"


def add(photos, folder, *names):
    for name in names:
        shutil.copy(photos / "flower" / name, folder)


def made_with(out, **versions):
    """Let a store say that other versions computed what it holds."""
    info = read_info(out)
    spans = [replace(span, versions={**span.versions, **versions}) for span in info.spans]
    write_info(out, replace(info, spans=tuple(spans)))


def perturb(monkeypatch, amount):
    """Let decoding give other pixels, as another JPEG library would."""
    original = Preprocess.decode

    def decode(self, data, **options):
        pixels = original(self, data, **options)
        return np.clip(pixels.astype(int) + amount, 0, 255).astype(np.uint8)

    monkeypatch.setattr(Preprocess, "decode", decode)


def test_a_store_says_which_versions_computed_which_shards(bundle, photos, folder, out):
    here = versions_here("onnxruntime")
    assert {"mio-export", "pillow", "onnxruntime"} < here.keys()
    assert any(name.startswith("libjpeg") for name in here)
    spans = json.loads((out / "store.json").read_text())["spans"]
    assert spans == [{"first_shard": 0, "versions": here}]
    before = (out / "store.json").read_bytes()
    add(photos, folder, "12.jpg")
    embed(bundle.path, folder, out)
    assert (out / "store.json").read_bytes() == before  # the same versions go on in the same span


def test_other_versions_that_agree_go_on_in_a_span_of_their_own(bundle, photos, folder, out, mio):
    made_with(out, pillow="12.0.0")
    said = Said()
    assert embed(bundle.path, folder, out, progress=said).num_embedded == 0  # nothing to do, nothing to compare
    assert said.lines == []
    add(photos, folder, "12.jpg")
    embed(bundle.path, folder, out, progress=said)
    assert any(
        "was made with pillow 12.0.0 (here " in line and "they agree: 12 of its files" in line for line in said.lines
    )
    first, second = read_info(out).spans
    assert (first.first_shard, first.versions["pillow"]) == (0, "12.0.0")
    assert (second.first_shard, second.versions) == (3, versions_here("onnxruntime"))
    lines = mio("inspect", out).out
    assert "from shard 0 on: " in lines
    assert "pillow 12.0.0" in lines
    assert "from shard 3 on: " in lines
    add(photos, folder, "13.jpg")
    said.lines.clear()
    embed(bundle.path, folder, out, progress=said)
    assert not any("agree" in line for line in said.lines)
    assert len(read_info(out).spans) == 2


def test_versions_that_give_other_vectors_are_refused_with_the_numbers(bundle, photos, folder, out, monkeypatch, mio):
    made_with(out, **{"libjpeg-turbo": "2.0.0"})
    add(photos, folder, "12.jpg")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    perturb(monkeypatch, 1)
    result = mio("embed", bundle.path, folder, "-o", out)
    assert result.code == 4
    assert "was made with libjpeg-turbo 2.0.0 (here " in result.err
    assert "the vectors do not agree: 12 of its files, embedded again, have a relative error of " in result.err
    assert "install those versions again, or choose another -o" in result.err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    monkeypatch.undo()
    assert embed(bundle.path, folder, out).num_embedded == 1


def test_a_store_of_an_earlier_schema_can_be_read_and_resumed(bundle, photos, folder, out, monkeypatch):
    text = json.loads((out / "store.json").read_text()) | {"schema_version": 1}
    del text["spans"]
    (out / "store.json").write_text(json.dumps(text))
    for path in shard_paths(out):
        table = pq.read_table(path)
        metadata = {name: value for name, value in table.schema.metadata.items() if name != b"mio.runtime"}
        pq.write_table(table.replace_schema_metadata(metadata), path)
    assert len(load_embeddings(out).keys) == 12
    add(photos, folder, "12.jpg")
    with monkeypatch.context() as patch:
        perturb(patch, 1)
        with pytest.raises(SpaceError, match="was made with versions that were not recorded, and the vectors do not"):
            embed(bundle.path, folder, out)
    embed(bundle.path, folder, out)
    spans = read_info(out).spans
    assert [(span.first_shard, bool(span.versions)) for span in spans] == [(0, False), (3, True)]
    assert json.loads((out / "store.json").read_text())["schema_version"] == 2
    assert len(load_embeddings(out).keys) == 13


def test_where_nothing_can_be_compared_it_says_so(bundle, photos, folder, out, mio):
    made_with(out, pillow="12.0.0")
    for path in folder.iterdir():
        path.unlink()
    add(photos, folder, "12.jpg")
    result = mio("embed", bundle.path, folder, "-o", out)
    assert result.code == 4
    assert "none of its files is still there unchanged and readable, so nothing can be compared; install" in result.err
    assert len(shard_paths(out)) == 3


def test_what_a_run_may_not_read_is_not_read_for_the_comparison_either(bundle, photos, folder, out):
    made_with(out, pillow="12.0.0")
    add(photos, folder, "12.jpg")
    largest = max(path.stat().st_size for path in folder.iterdir())
    with pytest.raises(SpaceError, match="none of its files is still there unchanged and readable"):
        embed(bundle.path, folder, out, limits=Limits(max_file_bytes=10))
    assert embed(bundle.path, folder, out, limits=Limits(max_file_bytes=largest)).num_failed == 0


def test_a_file_that_memory_does_not_suffice_for_is_passed_over_in_the_comparison(
    bundle, photos, folder, out, monkeypatch
):
    made_with(out, pillow="12.0.0")
    add(photos, folder, "12.jpg")
    original, decoded = Preprocess.decode, []

    def decode(self, data, **options):
        decoded.append(data)
        if len(decoded) == 1:
            raise MemoryError
        return original(self, data, **options)

    monkeypatch.setattr(Preprocess, "decode", decode)
    said = Said()
    assert embed(bundle.path, folder, out, progress=said).num_embedded == 1
    assert any("they agree: 11 of its files" in line for line in said.lines)


def test_files_that_only_got_another_time_can_be_compared_and_changed_ones_are_not(bundle, folder, out, monkeypatch):
    made_with(out, pillow="12.0.0")
    for index, path in enumerate(sorted(folder.iterdir())):
        if index < 6:
            path.touch()
        else:
            data = bytearray(path.read_bytes())
            data[len(data) // 2 : len(data) // 2 + 9] = b"a change!"  # of the same size
            path.write_bytes(data)
    said = Said()
    embed(bundle.path, folder, out, progress=said)
    assert any("they agree: 6 of its files" in line for line in said.lines)


def test_rows_of_the_same_versions_are_no_sample(bundle, photos, folder, out):
    """Only the few rows of other versions say whether those agree, however many others there are."""
    add(photos, folder, "12.jpg")
    embed(bundle.path, folder, out)
    info = read_info(out)
    here = info.spans[0].versions
    other = {**here, "pillow": "12.0.0"}
    spans = [replace(info.spans[0], first_shard=number, versions=v) for number, v in ((0, here), (3, other))]
    write_info(out, replace(info, spans=tuple(spans)))
    add(photos, folder, "13.jpg")
    said = Said()
    embed(bundle.path, folder, out, progress=said)
    assert any("they agree: 1 of its files" in line for line in said.lines)
    assert [span.first_shard for span in read_info(out).spans] == [0, 3, 4]


def test_a_span_without_shards_is_forgotten(bundle, photos, folder, out):
    """A run that was killed before its first shard, or pruned, leaves one behind."""
    info = read_info(out)
    stale = replace(info.spans[0], first_shard=3, versions={"pillow": "12.0.0"})
    write_info(out, replace(info, spans=(*info.spans, stale)))
    add(photos, folder, "12.jpg")
    embed(bundle.path, folder, out)
    assert read_info(out).spans == info.spans


def test_failed_rows_of_other_versions_need_no_comparison(bundle, photos, tmp_path):
    folder, out = tmp_path / "bad", tmp_path / "out"
    folder.mkdir()
    (folder / "broken.jpg").write_bytes(b"no image")
    embed(bundle.path, folder, out, **OPTIONS)
    made_with(out, pillow="12.0.0")
    add(photos, folder, "12.jpg")
    assert embed(bundle.path, folder, out).num_ok == 1


def test_the_sample_is_evenly_spread(bundle, tmp_path, monkeypatch):
    folder, out = tmp_path / "many", tmp_path / "out"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(300):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{index:03d}.png")
    embed(bundle.path, folder, out, **OPTIONS | {"shard_size": 50})
    made_with(out, pillow="12.0.0")
    Image.new("RGB", (40, 40)).save(folder / "new.png")
    seen = []
    original = agreement._compared
    monkeypatch.setattr(
        agreement, "_compared", lambda *args: (seen.extend(found.file.key for found in args[2]), original(*args))[1]
    )
    embed(bundle.path, folder, out)
    places = [int(key[:3]) for key in seen]
    assert len(places) == len(set(places)) == 32
    assert max(np.diff(places)) <= 12  # of 300 files, every ninth or tenth
    assert (places[0] < 10, places[-1] > 285) == (True, True)


def test_a_damaged_report_is_one_line(bundle, photos, folder, out, tmp_path):
    made_with(out, pillow="12.0.0")
    add(photos, folder, "12.jpg")
    copy = shutil.copytree(bundle.path, tmp_path / "copy" / bundle.path.name)
    for path in (copy / "parity").glob("onnx*.json"):
        path.write_text("{}")
    with pytest.raises(GateError, match=r"is refused\n *parity/onnx-fp32.json: sha256 is"):
        embed(copy, folder, out)


def test_a_difference_of_versions_in_words():
    ours = {"pillow": "13.0", "torch": "2.15"}
    assert difference(ours, {"pillow": "12.0", "torch": "2.15"}) == "pillow 12.0 (here 13.0)"
    assert difference(ours, {"pillow": "13.0", "heif": "1"}) == "torch absent (here 2.15), heif 1 (here absent)"
    assert difference(ours, {}) == "versions that were not recorded"

import base64
import io
import re
import shutil
import subprocess
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from mio_export.bundle import load_bundle, save_manifest
from mio_export.embedding import embed
from mio_export.errors import MioError, SpaceError, UsageError
from mio_export.searching import answer, neighbors, search, write_gallery
from mio_export.searching.clusters import Structure, duplicate_groups, examine, outliers, spread_sample, walk
from mio_export.searching.neighbors import nearest_in_blocks, other_neighbors
from mio_export.store import Row, StoreInfo, load_embeddings, read_rows, shard_path, write_info, write_shard

COPY, AGAIN = "flower/a <copy> & more.jpg", "temple/again.jpg"
QUERY = "flower/065-384.jpg"


@pytest.fixture(scope="module")
def collection(tmp_path_factory, bundle):
    """A folder of 60 crops, one of them copied and one encoded again, its store, and an image that is not in it."""
    base = tmp_path_factory.mktemp("searching")
    photos = base / "photos"
    for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (photos / name).mkdir(parents=True)
        for top in (0, 65, 130, 195, 260):
            for left in (0, 96, 192, 288, 384, 480):
                crop = Image.fromarray(photo[top : top + 160, left : left + 160])
                crop.save(photos / name / f"{top:03d}-{left:03d}.jpg", quality=95)
    shutil.copy(photos / "temple/000-000.jpg", photos / COPY)
    Image.open(photos / "temple/065-096.jpg").save(photos / AGAIN, quality=80)
    Image.open(photos / QUERY).save(base / "query.jpg", quality=90)
    shutil.copytree(bundle.path, base / "encoder.mio")
    embed(base / "encoder.mio", photos, base / "store", shard_size=20)
    return base


@pytest.fixture(scope="module")
def store(collection):
    return load_embeddings(collection / "store")


def brute_force(queries, bank, k):
    """Indices and cosines, with nothing clever."""
    cosines = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in bank] for a in queries.astype(float)])
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(cosines, order, axis=1)


def test_the_nearest_are_those_of_brute_force(store, collection):
    queries = np.random.default_rng(0).normal(size=(5, store.info.embedding_dim)).astype(np.float32)
    order, cosines = brute_force(queries, store.vectors, 7)
    for row, found in enumerate(search(collection / "store", queries, k=7)):
        assert [neighbor.key for neighbor in found] == [store.keys[i] for i in order[row]]
        assert [neighbor.rank for neighbor in found] == [1, 2, 3, 4, 5, 6, 7]
        np.testing.assert_allclose([neighbor.cosine for neighbor in found], cosines[row], atol=1e-6)


def test_blocks_change_nothing_and_equal_cosines_stay_in_order(monkeypatch):
    bank = np.random.default_rng(0).integers(-2, 3, size=(100, 3)).astype(np.float32)  # many equal directions
    whole = nearest_in_blocks(bank[:20], bank, 12)
    monkeypatch.setattr(neighbors, "_BLOCK", 7)
    blocked = nearest_in_blocks(bank[:20], bank, 12)
    np.testing.assert_allclose(blocked[1], whole[1], atol=1e-6)
    assert blocked[1].shape == (20, 12)
    np.testing.assert_array_equal(nearest_in_blocks(bank[:1], np.tile(bank[:1], (30, 1)), 9)[0][0], range(9))


def test_no_row_is_its_own_neighbour_even_among_many_equal_ones():
    equal = np.ones((30, 4), np.float32)
    indices, cosines = other_neighbors(equal, np.arange(30), 10)
    assert indices.shape == cosines.shape == (30, 10)
    assert not (indices == np.arange(30)[:, None]).any()
    assert other_neighbors(equal[:1], np.arange(1), 10)[0].shape == (1, 0)


def test_an_image_file_and_a_stored_image_find_their_neighbours(collection):
    by_file, by_key = answer(
        collection / "store", images=[collection / "query.jpg"], keys=["temple/000-000.jpg"], bundle=None, k=3
    )
    assert by_file.neighbors[0].key == QUERY
    assert by_file.neighbors[0].cosine > 0.999
    assert by_key.neighbors[0].key == COPY  # not itself
    assert by_key.neighbors[0].cosine == pytest.approx(1, abs=1e-6)
    assert [len(found.neighbors) for found in (by_file, by_key)] == [3, 3]


def test_k_is_clamped_to_the_store(collection, store):
    assert len(answer(collection / "store", keys=[AGAIN], k=1000)[0].neighbors) == len(store.keys) - 1


def test_wrong_searches_are_refused_in_a_line(collection, store, tmp_path):
    out = collection / "store"
    with pytest.raises(UsageError, match="k, the number of neighbours, must be 1 or more; got 0"):
        answer(out, keys=[AGAIN], k=0)
    with pytest.raises(UsageError, match=r"no embedding of 'temple/agan.jpg'; the nearest name is 'temple/again.jpg'"):
        answer(out, keys=["temple/agan.jpg"])
    with pytest.raises(UsageError, match=r"is not an embedding store \(it holds no store.json\)"):
        answer(tmp_path / "nowhere", keys=[AGAIN])
    with pytest.raises(UsageError, match=rf"must be finite, of shape \(Q, {store.info.embedding_dim}\).*got \(2, 3\)"):
        search(store, np.ones((2, 3), np.float32))
    with pytest.raises(MioError, match=r"nowhere.jpg cannot be read: No such file or directory; give an image file"):
        answer(out, images=[tmp_path / "nowhere.jpg"])
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(MioError, match=r"text.jpg cannot be decoded: not an image that Pillow can read"):
        answer(out, images=[tmp_path / "text.jpg"])


def test_an_empty_store_is_refused(store, tmp_path):
    write_info(tmp_path, StoreInfo(**vars(store.info)))
    with pytest.raises(MioError, match="holds no embeddings: all its files failed; why: mio inspect"):
        search(tmp_path, np.ones((1, store.info.embedding_dim), np.float32))
    with pytest.raises(MioError, match="holds no embeddings: all its files failed; why: mio inspect"):
        write_gallery(tmp_path / "page.html", tmp_path)


def test_a_bundle_that_is_nowhere_is_asked_for(collection, tmp_path, monkeypatch):
    shutil.copytree(collection / "store", tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"made with encoder.mio, which is neither beside it nor here.*--bundle PATH"):
        answer("store", images=[collection / "query.jpg"])
    monkeypatch.chdir(collection)
    assert answer(tmp_path / "store", images=["query.jpg"])[0].neighbors[0].key == QUERY


@pytest.fixture
def changed(collection, tmp_path):
    """A copy of the bundle whose manifest a test changes."""

    def write(**changes):
        path = shutil.copytree(collection / "encoder.mio", tmp_path / "other.mio")
        save_manifest(path, replace(load_bundle(path).manifest, **changes))
        return path

    return write


def test_a_bundle_of_another_space_is_refused_with_both_named(collection, store, changed):
    other = changed(space="0" * 64)
    with pytest.raises(SpaceError, match=rf"\(encoder, {store.info.space[:12]}…\) than .*other.mio \(0{{12}}…\)"):
        answer(collection / "store", images=[collection / "query.jpg"], bundle=other)


def test_a_bundle_without_the_stores_artifact_is_refused_with_both_named(collection, store, changed):
    kept = [a for a in load_bundle(collection / "encoder.mio").manifest.artifacts if a.format != "onnx"]
    other = changed(artifacts=tuple(kept))
    sha256 = store.info.artifact_sha256[:12]
    with pytest.raises(SpaceError, match=rf"{sha256}…\), which .*other.mio does not hold .* {kept[0].sha256[:12]}…\)"):
        answer(collection / "store", images=[collection / "query.jpg"], bundle=other)


def test_duplicates_are_found_and_identical_files_told_from_similar_ones(collection, store):
    groups = duplicate_groups(examine(store.vectors), [row.sha256 for row in read_rows(collection / "store")])
    named = [({store.keys[row] for row in group.rows}, group.identical) for group in groups]
    assert named[:2] == [({COPY, "temple/000-000.jpg"}, True), ({AGAIN, "temple/065-096.jpg"}, False)]
    assert len(named) <= 3  # two crops of bare sky are nearly the same
    assert groups[0].cosine == 1 > groups[1].cosine > 0.99


def test_identical_files_count_where_their_rows_were_not_examined():
    structure = Structure(rows=np.array([0]), neighbors=np.array([[1]]), cosines=np.array([[0.5]]))
    groups = duplicate_groups(structure, ["a", "b", "c", "c", None, None])
    assert [(group.rows, group.identical) for group in groups] == [((2, 3), True)]


def test_the_row_that_is_like_no_other_is_the_first_outlier():
    rng = np.random.default_rng(0)
    vectors = np.array([1.0, 0, 0, 0]) + 0.1 * rng.normal(size=(50, 4))
    vectors[17] = [0, 0, 0, 1]
    assert outliers(examine(vectors), 3)[0][0] == 17


def test_a_sample_reaches_every_cluster_and_takes_equal_rows_once():
    rows = np.repeat(np.eye(5), [1, 2, 900, 40, 3], axis=0)
    assert sorted(rows[spread_sample(rows, 200)].argmax(axis=1)) == [0, 1, 2, 3, 4]
    assert len(spread_sample(np.random.default_rng(0).normal(size=(50, 3)), 8)) == 8


def test_a_walk_takes_every_row_and_keeps_similar_ones_together():
    angles = np.array([0.0, 0.9, 0.1, 1.0, 0.2, 1.1])
    order = walk(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    assert sorted(order) == list(range(6))
    assert angles[order].tolist() in (sorted(angles), sorted(angles, reverse=True))


def test_a_large_collection_is_examined_in_part_against_all(monkeypatch):
    monkeypatch.setattr("mio_export.searching.clusters._MOST_COSINES", 300_000)
    vectors = np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32)
    structure = examine(vectors)
    assert len(structure.rows) == 300
    assert structure.neighbors.max() > structure.rows.max()


@pytest.fixture
def gallery(collection, tmp_path):
    """Write the page; return what was written and its text."""

    def write(source=collection / "photos"):
        found = answer(collection / "store", images=[collection / "query.jpg"], keys=[AGAIN], k=4)
        result = write_gallery(tmp_path / "page.html", collection / "store", answers=found, source=source)
        return result, (tmp_path / "page.html").read_text(encoding="utf-8")

    return write


def test_the_gallery_has_every_section_and_fetches_nothing(gallery):
    result, html = gallery()
    assert re.findall("<h2>(.*?)</h2>", html) == ["Queries", "Collection", "Duplicates", "Outliers"]
    assert (result.num_images, result.num_examined, result.num_shown, result.notes) == (62, 62, 61, ())
    assert "a &lt;copy&gt; &amp; more.jpg" in html
    assert "<copy>" not in html
    assert "2 identical files" in html
    sources = re.findall(r'(?:href|src)="([^"]{0,20})', html)
    assert all(source.startswith(("#", "data:image/jpeg;")) for source in sources)
    ids = re.findall(r'id="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'<use href="#([^"]*)"', html))
    assert used == {name for name in ids if name.startswith("i-")}
    assert len(html) < 5_000_000


def test_files_that_are_gone_or_changed_leave_a_placeholder_and_are_counted(collection, gallery, tmp_path):
    photos = shutil.copytree(collection / "photos", tmp_path / "photos")
    (photos / "temple/000-096.jpg").unlink()
    with (photos / AGAIN).open("ab") as file:
        file.write(b"more")
    result, html = gallery(photos)
    assert result.notes == (
        "1 picture not shown: file missing from the source folder",
        "1 picture not shown: file of another size than when it was embedded",
    )
    assert all(note in html for note in result.notes)
    assert 'title="file missing from the source folder">000-096.jpg</span>' in html


def test_without_a_source_names_take_the_place_of_pictures(gallery, collection):
    result, html = gallery(None)
    assert result.notes == ("62 pictures not shown: no source folder was given (--source)",)
    assert 'id="i-0"' not in html
    with pytest.raises(UsageError, match="--source names the folder that was embedded"):
        gallery(collection / "query.jpg")


def test_a_key_that_looks_like_a_tag_stays_text(shown, tmp_path):
    keys = ["<script>alert(1)</script>.bmp", "a/\"><b onload='x'>.bmp"]
    _, size = save_colours(tmp_path)
    shutil.copy(tmp_path / "photos/own.bmp", tmp_path / "photos" / "<i>.bmp")
    assert shown([*keys, "<i>.bmp"], tmp_path / "photos", size=size)[1] == ["blue"]
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"<script>alert|<b onload|<i>", html)
    assert html.count("&lt;script&gt;alert(1)&lt;/<wbr>script&gt;.bmp") >= 3


OUTSIDE = "file lies outside the source (a path with .., an absolute one, or a link to other bytes than were embedded)"
MISSING = "file missing from the source folder"


@pytest.fixture
def shown(store, tmp_path):
    """Write a store with given keys, each 1 kB of red, and its gallery; return its notes and the colours it shows."""

    def write(keys, source, *, size):
        out = tmp_path / "crafted"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        info = replace(store.info, embedding_dim=4)
        rows = [
            Row(key=key, size=size, mtime_ns=0, sha256=f"{i:064d}", status="ok", stage=None, reason=None)
            for i, key in enumerate(keys)
        ]
        write_info(out, info)
        write_shard(shard_path(out, 0), info, rows, np.random.default_rng(0).normal(size=(len(rows), 4)).astype("f4"))
        result = write_gallery(tmp_path / "page.html", out, source=source)
        pictures = re.findall(r'base64,([^"]+)"', (tmp_path / "page.html").read_text(encoding="utf-8"))
        images = [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in pictures]
        return result.notes, ["red" if image.getpixel((48, 48))[0] > 128 else "blue" for image in images]

    return write


def save_colours(folder):
    """A blue picture in folder/photos, a red one of the same size outside of it."""
    (folder / "photos").mkdir()
    for path, colour in ((folder / "private.bmp", "red"), (folder / "photos/own.bmp", "blue")):
        Image.new("RGB", (8, 8), colour).save(path)
    return folder / "photos", (folder / "private.bmp").stat().st_size


def test_the_gallery_shows_nothing_from_outside_its_folder(shown, tmp_path):
    photos, size = save_colours(tmp_path)
    (photos / "link.bmp").symlink_to(tmp_path / "private.bmp")
    (photos / "up").symlink_to(tmp_path)
    (photos / "within.bmp").symlink_to("own.bmp")
    (photos / "circle.bmp").symlink_to("circle.bmp")
    (tmp_path / "photos2").mkdir()
    shutil.copy(tmp_path / "private.bmp", tmp_path / "photos2")
    outside = ["link.bmp", "up/private.bmp"]
    missing = ["circle.bmp", r"\x00.bmp", r"a\x00/../own.bmp", "own.bmp/x.bmp", "", "up"]
    missing += ["../private.bmp", str(tmp_path / "private.bmp"), "../photos2/private.bmp"]
    notes, colours = shown([*outside, *missing, "own.bmp", "within.bmp"], photos, size=size)
    assert colours == ["blue", "blue"]
    assert notes == (f"2 pictures not shown: {OUTSIDE}", f"9 pictures not shown: {MISSING}")
    (tmp_path / "named").symlink_to(photos)
    assert shown([f"{photos}/own.bmp"], photos, size=size) == ((), ["blue"])  # as a list elsewhere names it
    assert shown(["own.bmp", "link.bmp"], tmp_path / "named", size=size)[1] == ["blue"]


def test_a_folder_of_links_shows_the_pictures_that_were_embedded(bundle, tmp_path):
    (tmp_path / "originals").mkdir()
    (tmp_path / "links").mkdir()
    for name in ("file", "folder"):
        Image.new("RGB", (8, 8), "red" if name == "file" else "blue").save(tmp_path / "originals" / f"{name}.bmp")
    (tmp_path / "links/file.bmp").symlink_to(tmp_path / "originals/file.bmp")
    (tmp_path / "links/all").symlink_to(tmp_path / "originals")
    out = tmp_path / "out"
    embed(bundle.path, tmp_path / "links", out, runtime="onnxruntime", decode="full")
    assert write_gallery(tmp_path / "page.html", out, source=tmp_path / "links").notes == ()
    Image.new("RGB", (8, 8), "green").save(tmp_path / "originals/file.bmp")
    result = write_gallery(tmp_path / "page.html", out, source=tmp_path / "links")
    assert result.notes == (f"2 pictures not shown: {OUTSIDE}",)


def test_the_gallery_reads_archives_and_lists_as_they_were_embedded(shown, tmp_path):
    photos, size = save_colours(tmp_path)
    (photos / "all.txt").write_text("own.bmp\n../private.bmp\n")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(photos / "own.bmp", "own.bmp")
        tar.add(tmp_path / "private.bmp", "../private.bmp")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(photos / "own.bmp", "own.bmp")
    keys = ["own.bmp", "../private.bmp"]
    assert shown(keys, photos / "all.txt", size=size) == ((f"1 picture not shown: {OUTSIDE}",), ["blue"])
    assert sorted(shown(keys, tmp_path / "all.tar", size=size)[1]) == ["blue", "red"]  # of the tar, not of the disk
    (tmp_path / "private.bmp").unlink()
    assert sorted(shown(keys, tmp_path / "all.tar", size=size)[1]) == ["blue", "red"]
    both = [tmp_path / "all.zip", photos]
    assert shown(["all.zip/own.bmp", "photos/own.bmp", "own.bmp"], both, size=size)[1] == ["blue", "blue"]


def test_pictures_beyond_the_pages_room_are_left_out_and_counted(gallery, monkeypatch):
    monkeypatch.setattr("mio_export.searching.thumbnails._MOST_BYTES", 20_000)
    result, html = gallery()
    assert re.fullmatch(r"\d+ pictures not shown: there is no room left on the page", result.notes[0])
    assert 'id="i-q0"' in html


@pytest.mark.parametrize("width", [400, 1200])
def test_in_a_browser_a_click_opens_the_nearest_images_and_escape_closes_them(gallery, store, tmp_path, width):
    gallery()
    row = store.keys.index("temple/065-096.jpg")
    (tmp_path / "probe.html").write_text(
        f'<body style="margin:0"><iframe style="width:{width}px;height:900px" src="page.html"></iframe><script>'
        "const wait=()=>new Promise(done=>setTimeout(done,100));onload=async()=>{"
        "const w=document.querySelector('iframe').contentWindow,d=w.document,"
        "open=()=>[...d.querySelectorAll('.panel')].filter(e=>e.getBoundingClientRect().width),"
        "fits=()=>d.documentElement.scrollWidth<=d.documentElement.clientWidth;"
        f"const link=d.querySelector('.tiles a[href=\"#n{row}\"]');const before=open().length;"
        "link.click();await wait();const panel=open()[0];"
        "const found=[before,open().length,panel.querySelectorAll('li')[1].title,d.activeElement===panel,fits(),"
        "panel.querySelectorAll('use')[1].getBoundingClientRect().width>40];"
        "w.dispatchEvent(new w.KeyboardEvent('keydown',{key:'Escape'}));await wait();"
        "document.title=[...found,open().length,d.activeElement===link]}</script>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    result = subprocess.run(
        ["chromium", *options, "--virtual-time-budget=5000", profile, f"file://{tmp_path}/probe.html"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert f"<title>0,1,{AGAIN},true,true,true,0,true</title>" in result.stdout


def test_a_store_of_a_format_that_may_hold_code_is_searched_only_when_it_is_named(collection, bundle, tmp_path, mio):
    embed(bundle.path, collection / "photos" / "temple", tmp_path / "out", runtime="torchscript", decode="full")
    command = ["search", tmp_path / "out", "--image", collection / "query.jpg", "--bundle", bundle.path]
    result = mio(*command)
    assert result.code == 2
    assert "was made with torchscript, whose files may hold code and run only when they are named" in result.err
    assert mio(*command, "--runtime", "torchscript").code == 0
    result = mio(*command, "--runtime", "onnxruntime")
    assert (result.code, "holds vectors of torchscript, not of onnxruntime" in result.err) == (4, True)

import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from mio_export.console.progress import Progress
from mio_export.errors import MioError
from mio_export.preprocess import Preprocess
from mio_export.train.data import load_images, open_data

COLOUR = Preprocess(image_size=40)
FIRST = "fake-train-000000.tar"


def members_of(path):
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def png(folder, value):
    path = folder / "one.png"
    Image.new("L", (8, 8), value).save(path)
    data = path.read_bytes()
    path.unlink()
    return data


def test_the_bytes_and_the_labels_are_those_that_tarfile_reads(fake_set):
    folder = fake_set("tar")
    data = open_data(folder)
    expected = {}
    for shard in sorted(folder.glob("*train*.tar")):
        members = dict(members_of(shard))
        for name, content in members.items():
            if name.endswith(".jpg"):
                stem = name.removesuffix(".jpg")
                label = members.get(f"{stem}.cls") or json.loads(members[f"{stem}.json"])["label"]
                expected[f"{shard.name}/{name}"] = (content, int(label))
    assert list(expected) == list(data.train.keys)
    assert [data.train.read(index) for index in range(40)] == [content for content, _ in expected.values()]
    assert data.train.labels.tolist() == [label for _, label in expected.values()]
    assert (data.class_names, data.notes) == (tuple("01234"), ())


def test_many_threads_read_one_shard_at_once(fake_set):
    part = open_data(fake_set("tar")).train
    alone = [part.read(index) for index in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(part.read, list(range(40)) * 50)) == alone * 50


def test_parts_may_be_folders(fake_set):
    folder = fake_set("tar")
    for part in ("train", "val"):
        (folder / part).mkdir()
        for path in folder.glob(f"*{part}*.tar"):
            path.rename(folder / part / path.name)
    data = open_data(folder)
    assert (len(data.train), len(data.test), data.train.keys[0]) == (40, 20, f"train/{FIRST}/0000.jpg")


def test_a_fifth_is_held_out_if_the_shards_do_not_say_and_labels_may_be_missing(tmp_path, tar_writer):
    for shard in range(2):
        members = [(f"{n:05d}.png", png(tmp_path, n)) for n in range(100)]
        tar_writer(tmp_path / f"{shard:05d}.tar", members)
    data = open_data(tmp_path)
    assert len(data.train) + len(data.test) == 200
    assert 25 <= len(data.test) <= 55
    assert set(data.train.keys).isdisjoint(data.test.keys)
    assert (data.class_names, data.train.labels, data.notes) == ((), None, ())
    assert open_data(tmp_path).test.keys == data.test.keys


def test_the_val_of_interval_is_no_part_and_shards_in_no_part_are_named(fake_set):
    folder = fake_set("tar")
    (folder / "fake-val-000000.tar").rename(folder / "interval.tar")
    data = open_data(folder)
    assert len(data.train) + len(data.test) == 40
    assert data.notes == ("1 tar files in neither part were left out, such as interval.tar",)


def test_no_shard_is_in_both_parts(fake_set):
    folder = fake_set("tar")
    (folder / "fake-val-000000.tar").rename(folder / "fake-train-val.tar")
    data = open_data(folder)
    assert set(data.train.keys).isdisjoint(data.test.keys)
    assert len(data.train) + len(data.test) == 60


def test_what_is_neither_image_nor_label_is_counted_and_a_mask_is_no_image(fake_set, tar_writer):
    folder = fake_set("tar")
    others = [("0003.seg.png", png(folder, 0)), ("0003.txt", b"text"), ("0004.txt", b"text"), ("x/0005.heix", b"")]
    tar_writer(folder / FIRST, [*members_of(folder / FIRST), *others])
    data = open_data(folder)
    assert (len(data.train), len(data.class_names)) == (40, 5)
    assert data.notes == ("4 files are not images and were left out: .txt (2), .heix (1), .seg.png (1)",)


def test_labels_are_used_only_if_every_image_has_one(fake_set, tar_writer):
    folder = fake_set("tar")
    members = [(name, content) for name, content in members_of(folder / FIRST) if name not in ("0003.cls", "0005.cls")]
    tar_writer(folder / FIRST, [*members, ("0005.json", b"{broken")])
    data = open_data(folder)
    assert data.train.labels is None
    assert data.notes == (f"2 of 60 images have no label, such as {FIRST}/0003.jpg; no label is used",)


def test_names_are_classes_too_and_numbers_keep_their_order(tmp_path, tar_writer):
    for part in ("train", "test"):
        texts = [b"2", b"10", b"9"]
        tar_writer(
            tmp_path / f"numbers/{part}.tar",
            [m for n, t in enumerate(texts) for m in ((f"{n}.png", png(tmp_path, n)), (f"{n}.cls", t))],
        )
        tar_writer(
            tmp_path / f"names/{part}.tar",
            [
                m
                for n, t in enumerate(("dog", "cat", "dog"))
                for m in ((f"{n}.json", json.dumps({"label": t}).encode()), (f"{n}.png", png(tmp_path, n)))
            ],
        )
    numbers, names = open_data(tmp_path / "numbers"), open_data(tmp_path / "names")
    assert (numbers.class_names, numbers.train.labels.tolist()) == (("2", "9", "10"), [0, 2, 1])
    assert (names.class_names, names.test.labels.tolist()) == (("cat", "dog"), [1, 0, 1])


def test_a_broken_image_is_left_out_and_named_and_the_labels_of_others_stay(fake_set, tar_writer):
    folder = fake_set("tar")
    before = load_images(open_data(folder).train, COLOUR, Progress())
    members = members_of(folder / FIRST)
    damaged = [(name, content[:300] if name in ("0004.jpg", "0005.jpg") else content) for name, content in members]
    tar_writer(folder / FIRST, damaged)
    images = load_images(open_data(folder).train, COLOUR, Progress())
    assert [failure.split(": ")[0] for failure in images.failures] == [f"{FIRST}/0004.jpg", f"{FIRST}/0005.jpg"]
    kept = [index for index in range(40) if index not in (4, 5)]
    np.testing.assert_array_equal(images.pixels, before.pixels[kept])
    assert images.labels.tolist() == before.labels[kept].tolist()
    assert images.keys == tuple(before.keys[index] for index in kept)
    assert images.sha256 != before.sha256


def test_a_link_in_a_shard_is_a_failure_not_a_loss(tmp_path, tar_writer):
    tar_writer(tmp_path / "test.tar", [("0.png", png(tmp_path, 0))])
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        (tmp_path / "real.dat").write_bytes(png(tmp_path, 1))
        tar.add(tmp_path / "real.dat", "0.png")
        os.link(tmp_path / "real.dat", tmp_path / "other.dat")
        tar.add(tmp_path / "other.dat", "sub/odd\\name.png")
    images = load_images(open_data(tmp_path).train, COLOUR, Progress())
    reason = "not a regular file in the tar (a link or a device)"
    assert images.failures == (f"train.tar/sub/odd\\\\name.png: {reason}",)


@pytest.mark.parametrize("cut", [100, 512, 700, 12_345, -10_240, -10_239])
def test_a_shard_that_is_cut_off_is_named_wherever_it_was_cut(fake_set, cut):
    folder = fake_set("tar")
    with tarfile.open(folder / FIRST) as tar:
        last = tar.getmembers()[-1]
    data = (folder / FIRST).read_bytes()
    end = last.offset_data + 512  # the label is shorter than a block
    (folder / FIRST).write_bytes(data[: cut if cut > 0 else end + cut + 10_240])
    with pytest.raises(MioError, match=rf"{FIRST} is damaged or cut off \(.*\); fetch it again"):
        open_data(folder)


def test_a_damaged_header_is_not_taken_for_the_end(fake_set):
    path = fake_set("tar") / FIRST
    with tarfile.open(path) as tar:
        header = tar.getmembers()[10].offset
    data = bytearray(path.read_bytes())
    data[header + 5] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(MioError, match=rf"no entry and no end mark at byte {header:,}"):
        open_data(path.parent)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_header_that_claims_more_than_there_is_is_damage(fake_set, kind):
    path = fake_set("tar") / FIRST
    info = tarfile.TarInfo("name")
    info.type, info.size = kind, 2**42
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + path.read_bytes())
    with pytest.raises(MioError, match=r"is damaged or cut off \(.*claim more than 8,388,608 bytes\); fetch it again"):
        open_data(path.parent)


def test_other_files_that_cannot_be_shards_are_named(tmp_path, tar_writer):
    (tmp_path / "gz").mkdir()
    with tarfile.open(tmp_path / "gz" / "train.tar", "w:gz") as tar:
        tar.add(__file__, "a.py")
    with pytest.raises(MioError, match=r"train\.tar is damaged or cut off \(not a whole uncompressed tar file"):
        open_data(tmp_path / "gz")
    tar_writer(tmp_path / "outer" / "ILSVRC2012_img_train.tar", [("n01440764.tar", b"x" * 1000)])
    with pytest.raises(MioError, match=r"holds 0 images in its tar files \(ILSVRC2012_img_train\.tar\)"):
        open_data(tmp_path / "outer")
    tar_writer(tmp_path / "twice" / "a.tar", [("0.png", b"x"), ("0.png", b"y")])
    with pytest.raises(MioError, match=r"holds 'a\.tar/0\.png' twice"):
        open_data(tmp_path / "twice")


def test_image_files_come_before_shards(fake_set, tar_writer):
    folder = fake_set("imagefolder")
    tar_writer(folder / "ILSVRC2012_img_train.tar", [("n01440764.tar", b"x")])
    data = open_data(folder)
    assert (data.kind, data.notes) == ("folder", ("1 files are not images and were left out: .tar (1)",))

import gzip
import hashlib
import io
import os
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mio_export.errors import MissingBackendError, UsageError
from mio_export.sources import list_images, list_sources
from mio_export.sources.blob import local_blob
from mio_export.sources.parquet import list_parquet
from mio_export.sources.seekable_gzip import Gunzipped
from mio_export.sources.zip_directory import zip_entries

NAMES = [f"{label}/{number:02d}.jpg" for label in ("cat", "dog", "Ä") for number in range(15)]


def content(name):
    """Bytes of their own for each name; nothing here decodes them."""
    return np.random.default_rng(list(name.encode())).bytes(200 + 37 * len(name) + NAMES.index(name) * 101)


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(name))
    return tmp_path / "photos"


def member(name, data=b"", **attributes):
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(data), 1_700_000_000
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info, io.BytesIO(data)


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for info, data in members:
            tar.addfile(info, data)
    return path


def write_parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return path


def as_list(folder, path):
    path.write_text("".join(f"{folder.name}/{name}\n" for name in reversed(NAMES)))
    return path


def as_tar(folder, path):
    return write_tar(
        path, [member(name, content(name)) for name in reversed(NAMES)], "w:gz" if "gz" in path.name else "w"
    )


def as_zip(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(reversed(NAMES)):
            archive.writestr(name, content(name), [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED][number % 2])
    return path


def as_parquet(folder, path):
    names = NAMES[::-1]
    return write_parquet(path, {"key": names, "jpg": [content(name) for name in names]}, row_group_size=7)


def as_hugging_face(folder, path):
    images = [{"bytes": content(name), "path": name} for name in NAMES]
    return write_parquet(path, {"image": images, "label": list(range(len(NAMES)))})


def as_memory(folder, path):
    filesystem = fsspec.filesystem("memory")
    for name in NAMES:
        filesystem.pipe_file(f"/{path.name}/{name}", content(name))
    return f"memory://{path.name}"


def read_all(listing):
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda file: file.read()[0], listing.files))
    return [
        (file.key, file.size, hashlib.sha256(data).hexdigest()) for file, data in zip(listing.files, read, strict=True)
    ]


def problems(listing):
    return {file.key: file.problem for file in listing.files if file.problem}


@pytest.fixture
def memory():
    """The file system in memory, empty again afterwards."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (as_tar, "photos.tar"),
        (as_tar, "photos.tar.gz"),
        (as_tar, "photos.TGZ"),
        (as_zip, "photos.zip"),
        (as_parquet, "photos.parquet"),
        (as_hugging_face, "photos.parquet"),
        (as_memory, "photos"),
    ],
)
def test_every_kind_gives_the_same_images_as_the_folder(folder, tmp_path, memory, write, name):
    expected = read_all(list_images(folder))
    assert [key for key, _, _ in expected] == sorted(NAMES, key=str.encode)
    listing = list_sources([write(folder, tmp_path / name)])
    assert read_all(listing) == expected
    assert listing.notes() == []


def test_a_list_gives_the_images_of_the_folder_it_lies_in(folder, tmp_path):
    expected = [(f"photos/{key}", *rest) for key, *rest in read_all(list_images(folder))]
    assert read_all(list_sources([as_list(folder, tmp_path / "all.txt")])) == expected


@pytest.mark.parametrize("write", [as_list, as_tar, as_zip, as_parquet])
def test_archives_and_lists_are_read_behind_a_url(folder, tmp_path, memory, write):
    name = {as_list: "a.lst", as_tar: "a.tar.gz", as_zip: "a.zip", as_parquet: "a.parquet"}[write]
    path = write(folder, tmp_path / name)
    as_memory(folder, folder)
    memory.pipe_file(f"/{name}", path.read_bytes())
    expected = read_all(list_sources([path]))
    assert read_all(list_sources([f"memory://{name}"])) == expected
    assert read_all(list_sources([f"file://{path}"])) == expected


def test_several_sources_have_their_names_before_the_keys(folder, tmp_path):
    listing = list_sources([folder, str(as_tar(folder, tmp_path / "photos.tar"))])
    assert [file.key for file in listing.files] == sorted(
        [f"{source}/{name}" for source in ("photos", "photos.tar") for name in NAMES], key=str.encode
    )
    assert len(read_all(listing)) == 2 * len(NAMES)


def test_two_sources_of_one_name_are_refused(folder, tmp_path):
    other = tmp_path / "other" / "photos"
    other.mkdir(parents=True)
    with pytest.raises(
        UsageError, match=r"two sources are called 'photos' \(.*\) and their keys would mix; rename one"
    ):
        list_sources([folder, f"{other}/"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.tar", "is not a folder of images: it does not exist; a source is a folder, a list"),
        ("notes.md", r"is not a folder of images; a source is a folder, a list \(.txt, .lst\), an archive"),
        ("memory://nowhere.tar", "memory://nowhere.tar cannot be read: "),
        ("x" * 300 + ".tar", "x.tar cannot be examined: File name too long"),
        ("nonsense://a/b", "nonsense:// is not a protocol that fsspec knows"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, monkeypatch, memory, spec, message):
    monkeypatch.chdir(tmp_path)
    Path("notes.md").touch()
    with pytest.raises(UsageError, match=message):
        list_sources([spec])
    with pytest.raises(UsageError, match="no source of images is given"):
        list_sources([])


def test_a_missing_protocol_names_its_package():
    with pytest.raises(MissingBackendError, match=r"^s3:// needs a package: pip install s3fs$"):
        list_sources(["s3://bucket/photos"])
    with pytest.raises(MissingBackendError, match=r"pip install 'fsspec\[sftp\]'$"):
        list_sources(["sftp://host/photos"])


def test_lines_of_a_list_are_paths_of_any_bytes(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"1")
    (tmp_path / "a b.png").write_bytes(b"22")
    (tmp_path / "folder.png").mkdir()
    lines = [b"# a note", b"", b"  ", b"\xff.png", b"./a b.png", b"a b.png", b"gone.png", b"folder.png", b"x.md"]
    (tmp_path / "l.lst").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    listing = list_sources([tmp_path / "l.lst"])
    assert [(file.key, file.size) for file in listing.files if not file.problem] == [("\\xff.png", 1), ("a b.png", 2)]
    assert problems(listing) == {
        "gone.png": "cannot be examined (No such file or directory)",
        "folder.png": "not a regular file (folder)",
    }
    assert listing.notes() == [
        "l.lst holds 1 entries whose key comes again; the last of each counts",
        "1 files are not images and were left out: .md (1)",
    ]


def test_other_members_are_counted_and_names_are_only_keys(tmp_path):
    names = ["./a.jpg", "a.cls", "/etc/b.jpg", "../../c.png", os.fsdecode(b"\xff\\.png"), "readme"]
    listing = list_sources([write_tar(tmp_path / "a.tar", [member(name, b"x") for name in names])])
    assert [file.key for file in listing.files] == ["../../c.png", "/etc/b.jpg", "\\xff\\\\.png", "a.jpg"]
    assert listing.ignored == {".cls": 1, "": 1}
    assert list(tmp_path.iterdir()) == [tmp_path / "a.tar"]


def test_links_in_a_tar_are_what_they_lead_to(tmp_path):
    links = [
        member("sub/soft.jpg", type=tarfile.SYMTYPE, linkname="../real/a.jpg"),
        member("real/a.jpg", b"first"),
        member("hard.jpg", type=tarfile.LNKTYPE, linkname="real/a.jpg"),
        member("real/a.jpg", b"second"),
        member("early.jpg", type=tarfile.LNKTYPE, linkname="late.jpg"),
        member("late.jpg", b"late"),
        member("out.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("self.jpg", type=tarfile.SYMTYPE, linkname="self.jpg"),
        member("pipe.jpg", type=tarfile.FIFOTYPE),
    ]
    listing = list_sources([write_tar(tmp_path / "a.tar", links)])
    assert problems(listing) == {
        "early.jpg": "link to late.jpg, which is not in the tar before it",
        "out.jpg": "link to /etc/passwd, which is not in the tar",
        "pipe.jpg": "not a regular file in the tar (a device or a pipe)",
        "self.jpg": "a link that leads to itself",
    }
    assert {file.key: file.read() for file in listing.files if not file.problem} == {
        "hard.jpg": (b"first", 1_700_000_000 * 10**9),
        "late.jpg": (b"late", 1_700_000_000 * 10**9),
        "real/a.jpg": (b"second", 1_700_000_000 * 10**9),
        "sub/soft.jpg": (b"second", 1_700_000_000 * 10**9),
    }


def test_the_last_member_of_a_key_counts_and_the_others_are_told(tmp_path):
    path = write_tar(tmp_path / "a.tar", [member("a.jpg", data) for data in (b"one", b"two", b"three")])
    listing = list_sources([path])
    assert [file.read()[0] for file in listing.files] == [b"three"]
    assert listing.notes() == ["a.tar holds 2 entries whose key comes again; the last of each counts"]


@pytest.mark.parametrize(
    ("end", "key"),
    [
        (1536 + 512 + 100, "b.jpg"),
        (1536 + 100, "cut.tar#truncated"),
        (1536, "cut.tar#truncated"),
        (0, "cut.tar#truncated"),
    ],
)
def test_a_cut_tar_gives_its_whole_members_and_one_failed_row(tmp_path, end, key):
    data = write_tar(tmp_path / "a.tar", [member("a.jpg", b"a" * 1024), member("b.jpg", b"b" * 1024)]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:end])
    listing = list_sources([tmp_path / "cut.tar"])
    assert [file.read()[0] for file in listing.files if not file.problem] == ([b"a" * 1024] if end else [])
    assert list(problems(listing)) == [key]
    assert "cut off" in problems(listing)[key]
    assert listing.unlisted[0].startswith("cut.tar: cut off or damaged (")


def test_a_member_that_is_cut_off_has_the_size_of_what_is_there(tmp_path):
    """So that it is embedded once the tar is whole."""
    data = write_tar(tmp_path / "a.tar", [member("a.jpg", b"a" * 1024)]).read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:612])
    (file,) = list_sources([tmp_path / "a.tar"]).files
    assert (file.size, file.problem) == (100, "cut off: 100 of 1,024 bytes are there")


def test_a_cut_or_damaged_gzip_gives_its_whole_members_and_one_failed_row(folder, tmp_path):
    data = as_tar(folder, tmp_path / "a.tgz").read_bytes()
    whole = {file.key: file.read() for file in list_sources([tmp_path / "a.tgz"]).files}
    (tmp_path / "cut.tgz").write_bytes(data[: len(data) // 2])
    listing = list_sources([tmp_path / "cut.tgz"])
    good = {file.key: file.read() for file in listing.files if not file.problem}
    assert 10 < len(good) < len(whole)
    assert good.items() <= whole.items()
    assert len(problems(listing)) == 1
    assert "its gzip stream is cut off" in listing.notes()[0]
    (tmp_path / "sum.tgz").write_bytes(data[:-8] + b"\0" * 8)
    assert list(problems(list_sources([tmp_path / "sum.tgz"]))) == ["sum.tgz#truncated"]


def test_tars_that_were_joined_are_not_taken_for_one(tmp_path):
    one = write_tar(tmp_path / "a.tar", [member("a.jpg", b"a")]).read_bytes()
    (tmp_path / "two.tar").write_bytes(one + one)
    assert (
        "data follows its end-of-archive marker" in problems(list_sources([tmp_path / "two.tar"]))["two.tar#truncated"]
    )


def test_gzip_is_read_at_any_position(tmp_path, monkeypatch):
    monkeypatch.setattr("mio_export.sources.seekable_gzip._FIRST_SPACING_BYTES", 10_000)
    monkeypatch.setattr("mio_export.sources.seekable_gzip._WINDOW_BYTES", 20_000)
    monkeypatch.setattr("mio_export.sources.seekable_gzip._MOST_STATES", 16)
    rng = np.random.default_rng(0)
    plain = rng.bytes(1_000_000)
    (tmp_path / "a.gz").write_bytes(gzip.compress(plain[:300_000]) + gzip.compress(plain[300_000:]) + b"\0" * 512)
    gunzipped = Gunzipped(local_blob(str(tmp_path / "a.gz")))
    for offset, size in zip(rng.integers(0, 1_010_000, 50).tolist(), rng.integers(0, 90_000, 50).tolist(), strict=True):
        assert gunzipped.read_at(offset, size) == plain[offset : offset + size]
    assert gunzipped.problem is None


def test_members_of_a_zip_that_cannot_be_read_have_a_reason(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("good.jpg", b"good" * 50)
        archive.writestr("bad.jpg", b"bad." * 50)
        archive.writestr("odd.jpg", b"odd", zipfile.ZIP_LZMA)
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "good.jpg")
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes().replace(b"bad.bad.", b"Bad.bad.", 1))
    listing = list_sources([tmp_path / "a.zip"])
    assert problems(listing) == {
        "link.jpg": "a link in a zip, which is not followed",
        "odd.jpg": "compressed by zip method 14; stored (0) and deflate (8) are read",
    }
    bad, good = listing.files[:2]
    assert good.read()[0] == b"good" * 50
    with pytest.raises(OSError, match="damaged in the zip"):
        bad.read()


@pytest.mark.parametrize(("write", "name"), [(as_zip, "a.zip"), (as_parquet, "a.parquet")])
def test_an_archive_without_its_directory_is_one_failed_row(folder, tmp_path, write, name):
    path = write(folder, tmp_path / name)
    path.write_bytes(path.read_bytes()[:-200])
    listing = list_sources([path])
    (file,) = listing.files
    kind = {"a.zip": "zip", "a.parquet": "Parquet"}[name]
    assert (file.key, file.size) == (name, path.stat().st_size)
    assert file.problem.startswith(f"cannot be listed: not a whole {kind} file (")
    assert listing.unlisted[0].startswith(f"{name}: cannot be listed")


def test_rows_without_a_key_have_their_number_and_nulls_a_reason(tmp_path):
    rows = [bytes([number]) for number in range(11)]
    path = write_parquet(tmp_path / "a.parquet", {"bytes": [*rows[:4], None, *rows[5:]]}, row_group_size=3)
    listing = list_sources([path])
    assert [file.key for file in listing.files] == [f"{number:02d}" for number in range(11)]
    assert problems(listing) == {"04": "the row holds no image bytes (null)"}
    assert listing.files[10].read() == (b"\x0a", path.stat().st_mtime_ns)
    other = write_parquet(tmp_path / "b.parquet", {"image": ["text"], "id": [1]})
    assert (
        "b.parquet has no column of image bytes; its columns are image, id"
        in problems(list_sources([other]))["b.parquet"]
    )


def test_an_archive_that_changed_is_not_read_at_old_positions(folder, tmp_path):
    path = as_tar(folder, tmp_path / "a.tar")
    file = list_sources([path]).files[0]
    file.read()
    with path.open("ab") as tar:
        tar.write(b"\0")
    with pytest.raises(OSError, match=r"a\.tar changed since it was listed"):
        file.read()


def raw_zip(names, *, flags=0, extra=b""):
    """A zip of members with names of any bytes, each of which holds ``data``."""
    body, directory = b"", b""
    for name in names:
        common = struct.pack("<HHHHHLLLHH", 20, flags, 0, 0, 0x5821, zlib.crc32(b"data"), 4, 4, len(name), len(extra))
        directory += b"PK\1\2\x14\0" + common + struct.pack("<HHHLL", 0, 0, 0, 0, len(body)) + name + extra
        body += b"PK\3\4" + common + name + extra + b"data"
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(names), len(names), len(directory), len(body), 0)
    return body + directory + end


def unicode_path(name, text):
    """Info-ZIP's field of a second name, which Python takes for the name from 3.12 on."""
    return struct.pack("<HHBL", 0x7075, 5 + len(text.encode()), 1, zlib.crc32(name)) + text.encode()


@pytest.mark.parametrize(
    ("name", "flags", "extra", "key"),
    [
        (b"x.png", 0, unicode_path(b"x.png", "日本.png"), "x.png"),
        (b"\x82t\x82.png", 0, unicode_path(b"\x82t\x82.png", "été.png"), "\\x82t\\x82.png"),
        (b"\xff.png", 0x800, b"", "\\xff.png"),
        ("ä.png".encode(), 0, b"", "ä.png"),
        (b"a.png\0b.exe", 0, b"", "a.png"),
        (b"a.png", 0, b"\1\0\xff\xff", "a.png"),
    ],
)
def test_keys_of_a_zip_are_the_bytes_of_its_names(tmp_path, name, flags, extra, key):
    (tmp_path / "a.zip").write_bytes(raw_zip([name], flags=flags, extra=extra))
    (file,) = list_sources([tmp_path / "a.zip"]).files
    assert (file.key, file.read()[0]) == (key, b"data")


def test_a_member_of_a_zip_without_a_name_is_no_image(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"program" + raw_zip([b"a.png", b"", b"\0", b"folder/"]))
    listing = list_sources([tmp_path / "a.zip"])
    assert [(file.key, file.read()[0]) for file in listing.files] == [("a.png", b"data")]
    assert listing.ignored == {"": 2}


def test_a_zip_has_what_pythons_zipfile_finds_in_it(folder, tmp_path):
    path = as_zip(folder, tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"PK\5\6 is no end record here"[4:]
        archive.writestr(zipfile.ZipInfo("late.jpg", (2107, 12, 31, 23, 59, 58)), b"late")
    with zipfile.ZipFile(path) as archive:
        expected = [
            (info.filename.encode(), info.header_offset, info.compress_size, info.file_size, info.CRC)
            for info in archive.infolist()
        ]
    found = [(e.name, e.offset, e.packed_size, e.size, e.crc) for e in zip_entries(local_blob(str(path)))]
    assert found == expected


def test_a_large_zip_has_numbers_of_64_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)  # so that few members are as many as need an end of 64 bits
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(5):
            archive.writestr(f"{number}.jpg", b"data")
    assert b"PK\6\6" in (tmp_path / "a.zip").read_bytes()
    assert [file.read()[0] for file in list_sources([tmp_path / "a.zip"]).files] == [b"data"] * 5
    size = struct.pack("<HHQQQ", 1, 24, 2**64 - 1, 4, 0)
    data = bytearray(raw_zip([b"a.jpg"], extra=size))
    entry = data.index(b"PK\1\2")
    data[entry + 24 : entry + 28] = data[entry + 42 : entry + 46] = b"\xff" * 4
    (tmp_path / "b.zip").write_bytes(data)
    (file,) = list_sources([tmp_path / "b.zip"]).files
    assert file.size == 2**63 - 1
    with pytest.raises(OSError, match="damaged in the zip"):
        file.read()


@pytest.mark.parametrize(
    ("name", "claimed", "message"),
    [
        ("a.zip", struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 2_000_000_000, 0, 0), "not a whole zip file"),
        ("a.parquet", struct.pack("<L4s", 2_000_000_000, b"PAR1"), "its footer claims 2,000,000,000 bytes"),
    ],
)
def test_a_directory_that_claims_most_of_a_large_file_costs_nothing(tmp_path, name, claimed, message):
    with (tmp_path / name).open("wb") as file:
        file.write(b"PAR1")
        file.truncate(3_000_000_000)  # holes, which take no disk
        file.seek(0, os.SEEK_END)
        file.write(claimed)
    assert peak_bytes(lambda: list_sources([tmp_path / name])) < 20_000_000
    assert message in problems(list_sources([tmp_path / name]))[name]


def test_zeros_between_the_members_of_a_gzip_file_are_passed_over(folder, tmp_path):
    plain = as_tar(folder, tmp_path / "a.tar").read_bytes()
    middle = len(plain) // 2
    data = gzip.compress(plain[:middle]) + bytes(512) + gzip.compress(plain[middle:]) + bytes(700)
    (tmp_path / "a.tar.gz").write_bytes(data)
    listing = list_sources([tmp_path / "a.tar.gz"])
    assert (problems(listing), listing.notes(), len(listing.files)) == ({}, [], len(NAMES))


def header(kind, size):
    """A tar header that says how long the name or the records behind it are."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [2**33, 2**42, 2**80])
def test_a_tar_header_that_claims_more_than_there_is_costs_nothing(tmp_path, kind, size):
    good = write_tar(tmp_path / "good.tar", [member("a.jpg", b"a")]).read_bytes()[:1024]
    (tmp_path / "a.tar").write_bytes(good + header(kind, size) + b"a" * 512 + bytes(1024))
    listing = list_sources([tmp_path / "a.tar"])
    assert listing.files[0].read()[0] == b"a"
    assert list(problems(listing)) == ["a.tar#truncated"]
    assert "claim more than 8,388,608 bytes" in problems(listing)["a.tar#truncated"]


def test_a_thousand_long_names_in_a_row_are_damage(tmp_path):
    chain = (header(tarfile.GNUTYPE_LONGNAME, 5) + b"a.jpg" + bytes(507)) * 3000
    (tmp_path / "a.tar").write_bytes(chain + bytes(1024))
    listing = list_sources([tmp_path / "a.tar"])
    assert list(problems(listing)) == ["a.tar#truncated"]


def test_a_tar_with_a_cut_map_of_a_sparse_file_is_damage(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    data = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    data[482] = 1  # the map goes on in another block, which is not there
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    (tmp_path / "a.tar").write_bytes(data)
    assert list(problems(list_sources([tmp_path / "a.tar"]))) == ["a.tar#truncated"]


@pytest.mark.parametrize("mtime", [2**34, 1e18, float("nan"), float("inf"), -5])
def test_times_of_members_that_no_store_can_hold_are_not_known(tmp_path, mtime):
    info, data = member("a.jpg", b"a")
    info.pax_headers = {"mtime": str(mtime)}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, data)
    (file,) = list_sources([tmp_path / "a.tar"]).files
    assert (file.mtime_ns, file.read()) == (0, (b"a", 0))


def peak_bytes(call):
    """How much memory Python holds at most during a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(file, max_bytes):
    with pytest.raises(OSError, match=r"more than the limit|damaged in the zip"):
        file.read(max_bytes)


def bomb(path, size):
    """An archive of a few kB with one member of zeros."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", bytes(size))
    elif path.suffix == ".parquet":
        write_parquet(path, {"key": ["a.png"], "image": [bytes(size)]}, compression="zstd")
    else:
        write_tar(path, [member("a.png", bytes(size))], "w:gz")
    return path


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.parquet"])
def test_a_member_beyond_the_limit_is_not_unpacked(tmp_path, name):
    (file,) = list_sources([bomb(tmp_path / name, 64 << 20)]).files
    with pytest.raises(OSError, match=r"has 67,108,864 bytes, more than the limit of 1,000,000 \(--max-file-bytes\)"):
        file.read(1_000_000)
    assert len(file.read(64 << 20)[0]) == 64 << 20
    if name != "a.parquet":  # Arrow's memory is not Python's
        assert peak_bytes(lambda: refused(file, 1_000_000)) < 1_000_000


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_what_an_archive_unpacks_is_held_twice_at_most(tmp_path, name):
    (file,) = list_sources([bomb(tmp_path / name, 32 << 20)]).files
    assert peak_bytes(file.read) < 90 << 20


def test_a_zip_member_gives_no_more_than_its_directory_says(tmp_path):
    path = bomb(tmp_path / "a.zip", 64 << 20)
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    data[entry + 24 : entry + 28] = struct.pack("<L", 1000)
    path.write_bytes(data)
    (file,) = list_sources([path]).files
    with pytest.raises(OSError, match="damaged in the zip"):
        file.read(2000)
    assert peak_bytes(lambda: refused(file, 2000)) < 1_000_000


def test_keys_of_a_parquet_file_that_are_not_utf_8_are_escaped(tmp_path):
    buffers = [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0\6\0\0\0"), pa.py_buffer(b"a\xff\xfebcd")]
    keys = pa.Array.from_buffers(pa.string(), 2, buffers)
    path = write_parquet(tmp_path / "a.parquet", {"key": keys, "image": [b"1", b"22"]})
    assert [(file.key, file.read()[0]) for file in list_sources([path]).files] == [
        ("a\\xff\\xfeb", b"1"),
        ("cd", b"22"),
    ]


def test_a_parquet_file_whose_schema_is_not_utf_8_is_one_failed_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"key": ["a"], "image": [b"1"]}, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"image", b"\xffmage"))
    assert problems(list_sources([path]))["a.parquet"].startswith("cannot be listed: not a whole Parquet file (")


def test_a_parquet_file_is_read_a_batch_at_a_time(tmp_path):
    """With Arrow's default the whole row group would be read before its first row."""
    rows = [number.to_bytes(2, "big") + bytes(1_000_000) for number in range(40)]
    options = {"compression": "NONE", "use_dictionary": False, "write_batch_size": 1}
    blob = Watched(local_blob(str(write_parquet(tmp_path / "a.parquet", {"image": rows}, **options))))
    assert [file.read()[0] for file in list_parquet(blob).files] == rows
    assert blob.largest < 3_000_000


PEAK_MIB = """
import sys
from pathlib import Path
from mio_export.sources import list_sources
import pyarrow.parquet
def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024
before = peak()
(file,) = list_sources(sys.argv[1:]).files
print(peak() - before, file.problem)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_parquet_page_that_claims_gibibytes_takes_no_memory_for_them(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"image": [b"abc" * 100]}, compression="NONE", use_dictionary=False)
    data = path.read_bytes()
    claim = bytes.fromhex("82ffffff0f")  # 2,147,483,585 as Thrift writes it
    assert data[6:12] == bytes.fromhex("15ec0415ec04")  # both lengths of the first page
    path.write_bytes(data[:10] + claim + data[12:])
    run = subprocess.run([sys.executable, "-c", PEAK_MIB, path], capture_output=True, text=True, check=True)
    mib, problem = run.stdout.split(" ", 1)
    assert int(mib) < 64
    assert "cannot be listed" in problem


def test_what_an_archive_says_in_a_reason_stays_one_line(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.LNKTYPE, "b\nc.png"
        tar.addfile(link)
    (file,) = list_sources([tmp_path / "a.tar"]).files
    assert file.problem == "link to b c.png, which is not in the tar before it"


def test_one_failing_read_of_a_parquet_file_is_one_failed_row(tmp_path):
    rows = [bytes([number]) * 1_000_000 for number in range(30)]
    path = write_parquet(tmp_path / "a.parquet", {"image": rows}, row_group_size=5)
    blob = Watched(local_blob(str(path)))
    listing, errors = list_parquet(blob), []
    for number, file in enumerate(listing.files):
        blob.is_failing = number >= 12 and not errors
        try:
            assert file.read()[0] == rows[number]
        except OSError as error:
            errors.append(str(error))
    assert errors == ["[Errno 5] no luck"]


@dataclass(eq=False)
class Watched:
    """A file whose reads are watched, and fail at times."""

    blob: object
    is_failing: bool = False
    largest: int = 0

    def __getattr__(self, name):
        return getattr(self.blob, name)

    def read_at(self, offset, size):
        self.largest = max(self.largest, size)
        if self.is_failing:
            raise OSError(5, "no luck")
        return self.blob.read_at(offset, size)


def test_a_list_names_files_by_their_paths_only(tmp_path):
    (tmp_path / "l.txt").write_text("https://user:SECRET@host/a.jpg?sig=SECRET\nhttps://h/b.md?sig=SECRET\n")
    listing = list_sources([tmp_path / "l.txt"])
    assert problems(listing) == {"https://host/a.jpg": "a URL; a list names files by their paths from its own folder"}
    assert listing.ignored == {".md": 1}


def test_a_reason_can_be_written_whatever_the_name_of_the_archive(tmp_path):
    path = write_tar(tmp_path / os.fsdecode(b"\xff.tar"), [member("a.jpg", b"a")])
    (file,) = list_sources([path]).files
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(OSError, match=r"^\\xff\.tar changed since it was listed") as caught:
        file.read()
    str(caught.value).encode()

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, UnidentifiedImageError

from mio_export.errors import UsageError
from mio_export.image_formats.supported import readable_formats
from mio_export.sources import SourceFile, evenly_spaced, image_suffixes, list_images, read_file
from mio_export.sources.limited import read_limited


def touch(path, data=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_lists_images_of_all_folders_in_bytewise_order(tmp_path):
    for name in ("b/2.jpg", "b/10.JPG", "a.png", "B/x.webp", "ä.gif", "b.tiff"):
        touch(tmp_path / name)
    keys = [file.key for file in list_images(tmp_path).files]
    assert keys == ["B/x.webp", "a.png", "b.tiff", "b/10.JPG", "b/2.jpg", "ä.gif"]
    assert keys == sorted(keys, key=str.encode)


def test_other_files_are_counted_and_named(tmp_path):
    for name in ("a.png", "readme.txt", "notes.txt", "noext", "a.heic2"):
        touch(tmp_path / name)
    listing = list_images(tmp_path)
    assert len(listing.files) == 1
    assert listing.notes() == ["4 files are not images and were left out: .txt (2), .heic2 (1), no suffix (1)"]


def test_heic_without_its_extra_is_named_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("mio_export.sources.folder.image_suffixes", lambda: frozenset({".png"}))
    touch(tmp_path / "a.png")
    touch(tmp_path / "b.heic")
    assert list_images(tmp_path).notes() == [
        "1 HEIC files left out: HEIC needs the extra: pip install 'mio-export[heic]'"
    ]


def test_suffixes_are_those_that_can_be_read():
    suffixes = image_suffixes()
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".gif"} <= suffixes
    assert ".pdf" not in suffixes  # Pillow only writes it
    assert ".heic" in suffixes  # its extra is installed for tests
    assert ".mpo" in suffixes  # read as JPEG
    assert not suffixes & {".eps", ".ps"}  # Ghostscript reads them
    assert not suffixes & {".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf", ".mpg", ".mpeg", ".iim"}


def test_formats_are_those_that_pillow_decodes_in_this_process(tmp_path):
    formats = readable_formats()
    assert formats[:2] == ("JPEG", "PNG")
    assert not {"EPS", "HDF5", "GRIB", "BUFR", "WMF", "MPEG", "IPTC"} & set(formats)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    with pytest.raises(UnidentifiedImageError):
        Image.open(tmp_path / "a.eps", formats=formats)
    two = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "red")
    two[0].save(tmp_path / "a.mpo", save_all=True, append_images=[two[1]])
    with Image.open(tmp_path / "a.mpo", formats=formats) as image:
        assert (image.format, image.n_frames) == ("MPO", 2)


def test_undecodable_names_and_backslashes_have_distinct_keys(tmp_path):
    names = [b"\xff.png", b"\\xff.png", b"a\nb.png", b"sp ace.png"]
    for name in names:
        touch(tmp_path / os.fsdecode(name))
    files = list_images(tmp_path).files
    assert sorted(file.key for file in files) == sorted(["\\xff.png", "\\\\xff.png", "a\nb.png", "sp ace.png"])
    assert {os.fsencode(file.place.relative) for file in files} == set(names)


def test_links_are_followed_but_never_in_circles(tmp_path):
    touch(tmp_path / "photos" / "real" / "a.png")
    touch(tmp_path / "elsewhere" / "b.png")
    folder = tmp_path / "photos"
    (folder / "1-linked").symlink_to(folder / "real")
    (folder / "2-outside").symlink_to(tmp_path / "elsewhere")
    (folder / "3-outside").symlink_to(tmp_path / "elsewhere")
    (folder / "real" / "up").symlink_to(folder)
    (folder / "dangling.png").symlink_to(tmp_path / "nowhere")
    (folder / "self.png").symlink_to(folder / "self.png")
    listing = list_images(folder)
    problems = {file.key: file.problem for file in listing.files}
    assert set(problems) == {"real/a.png", "2-outside/b.png", "dangling.png", "self.png"}
    assert problems["dangling.png"] == "broken link (No such file or directory)"
    assert problems["self.png"] == "broken link (Too many levels of symbolic links)"
    assert listing.notes() == [
        "1-linked: listed already as real, not followed",
        "3-outside: listed already as 2-outside, not followed",
        "real/up: a link back into its own folder, not followed",
    ]


def test_many_links_to_one_folder_are_one_folder_and_one_note(tmp_path):
    for number in range(15):
        touch(tmp_path / f"d{number}" / "x.txt")
        for name in ("a", "b"):
            (tmp_path / f"d{number}" / name).symlink_to(f"../d{number + 1}")
    touch(tmp_path / "d15" / "x.jpg")
    listing = list_images(tmp_path / "d0")
    assert [file.key for file in listing.files] == ["a/" * 15 + "x.jpg"]
    assert len(listing.notes()) == 2
    assert listing.notes()[0].startswith("15 links to folders were not followed, such as a/a/")


@pytest.mark.parametrize(("name", "num_levels"), [("d", 1200), ("d" * 200, 25)])
def test_deep_folders_are_listed_as_far_as_paths_go_and_then_named(tmp_path, name, num_levels):
    touch(tmp_path / "top.png")
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(num_levels):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("deep.png", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    try:
        listing = list_images(tmp_path)
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / name)], check=True)  # shutil goes down by recursion
    deep = "/".join([name] * num_levels) + "/deep.png"
    if len(deep) < 4000:
        assert ([file.key for file in listing.files], listing.unlisted) == ([deep, "top.png"], [])
    else:
        assert [file.key for file in listing.files] == ["top.png"]
        (line,) = listing.unlisted
        assert line.endswith(f"{name}: cannot be listed (File name too long)")


@pytest.mark.parametrize("seconds", [11_000_000_000, -1, -2_000_000_000])
def test_times_that_no_store_can_hold_are_not_known(tmp_path, seconds):
    touch(tmp_path / "a.png")
    os.utime(tmp_path / "a.png", (1, seconds))
    if (tmp_path / "a.png").stat().st_mtime != seconds:
        pytest.skip("the file system holds no such time")
    (file,) = list_images(tmp_path).files
    assert file.mtime_ns == 0
    assert file.read() == (b"x", 0)  # so that its row is as it was listed, and it is not embedded again


def test_a_size_and_a_time_are_always_within_64_bits():
    file = SourceFile(key="a.png", place=None, size=2**80, mtime_ns=2**63)
    assert (file.size, file.mtime_ns) == (2**63 - 1, 0)
    assert SourceFile(key="a.png", place=None, size=-1, mtime_ns=2**63 - 1).size == 0


def test_no_more_is_read_of_a_file_than_the_limit(tmp_path):
    touch(tmp_path / "a.png", b"x" * 100)
    (file,) = list_images(tmp_path).files
    assert file.read(100)[0] == b"x" * 100
    with pytest.raises(OSError, match=r"^has 100 bytes, more than the limit of 99 \(--max-file-bytes\)$"):
        file.read(99)
    with Path("/dev/zero").open("rb") as endless, pytest.raises(OSError, match=r"more than the limit of 1,000 "):
        read_limited(endless, 10, 1000)
    status = "/proc/self/status"  # longer than its length, as a file is that grows
    assert read_file(status, 1_000_000)[0].startswith(b"Name:")
    with pytest.raises(OSError, match="more than the limit of 10 "):
        read_file(status, 10)
    assert read_limited(io.BytesIO(b"longer than it was"), 3, 1000) == b"longer than it was"
    assert read_limited(io.BytesIO(b"short"), 100, 1000) == b"short"


def test_a_pipe_is_named_and_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (file,) = list_images(tmp_path).files
    assert file.problem == "not a regular file (named pipe)"
    with pytest.raises(OSError, match="not a regular file"):
        read_file(tmp_path / "pipe.jpg")  # returns at once


def test_what_vanishes_or_is_closed_while_it_is_listed_is_named(tmp_path, monkeypatch):
    touch(tmp_path / "a.png")
    touch(tmp_path / "closed" / "b.png")
    real = os.stat

    def stat(path, **options):
        if os.fsencode(path).endswith(b"closed"):
            raise PermissionError(13, "Permission denied")
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    listing = list_images(tmp_path)
    assert [file.key for file in listing.files] == ["a.png"]
    assert listing.unlisted == ["closed: cannot be listed (Permission denied)"]


def test_a_folder_that_may_be_listed_but_not_searched_gives_rows_with_a_reason(tmp_path):
    touch(tmp_path / "sub" / "b.png")
    (tmp_path / "sub").chmod(0o444)
    code = "import sys; from pathlib import Path; from mio_export.sources import list_images\n"
    code += "print([(f.key, f.problem) for f in list_images(Path(sys.argv[1])).files])"
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else []
    try:
        result = subprocess.run(
            [*drop, sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        )
    finally:
        (tmp_path / "sub").chmod(0o755)
    assert result.stdout.strip() == "[('sub/b.png', 'cannot be examined (Permission denied)')]"


def test_spread_takes_from_the_whole_range():
    assert evenly_spaced(range(10), 20) == list(range(10))
    assert evenly_spaced(range(100), 4) == [12, 37, 62, 87]
    assert evenly_spaced(range(15), 10)[-1] == 14
    with pytest.raises(UsageError, match="limit must be 1 or more, got 0"):
        evenly_spaced(range(3), 0)


def test_what_is_no_folder_is_refused(tmp_path):
    touch(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="is not a folder of images"):
            list_images(path)

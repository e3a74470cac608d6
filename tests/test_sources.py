import os
import subprocess
import sys

import pytest

from mio_export.errors import UsageError
from mio_export.sources import image_suffixes, list_images, read_file, spread


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


def test_undecodable_names_and_backslashes_have_distinct_keys(tmp_path):
    names = [b"\xff.png", b"\\xff.png", b"a\nb.png", b"sp ace.png"]
    for name in names:
        touch(tmp_path / os.fsdecode(name))
    files = list_images(tmp_path).files
    assert sorted(file.key for file in files) == sorted(["\\xff.png", "\\\\xff.png", "a\nb.png", "sp ace.png"])
    assert {os.fsencode(file.place.relative) for file in files} == set(names)


def test_links_are_followed_but_never_in_circles(tmp_path):
    touch(tmp_path / "real" / "a.png")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "up").symlink_to(tmp_path)
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    listing = list_images(tmp_path)
    problems = {file.key: file.problem for file in listing.files}
    assert set(problems) == {"real/a.png", "linked/a.png", "dangling.png", "self.png"}
    assert problems["dangling.png"] == "broken link (No such file or directory)"
    assert problems["self.png"] == "broken link (Too many levels of symbolic links)"
    assert len(listing.circles) == 2
    assert all("not followed" in line for line in listing.notes())


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
    assert spread(range(10), 20) == list(range(10))
    assert spread(range(100), 4) == [12, 37, 62, 87]
    assert spread(range(15), 10)[-1] == 14
    with pytest.raises(UsageError, match="limit must be 1 or more, got 0"):
        spread(range(3), 0)


def test_what_is_no_folder_is_refused(tmp_path):
    touch(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="is not a folder of images"):
            list_images(path)

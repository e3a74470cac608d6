import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mio_export.errors import UsageError
from mio_export.files import sha256_file, staged_file, staged_folder, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fail_halfway(path):
    with staged_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError


def test_a_staged_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError):
        fail_halfway(path)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]
    write_text(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) & 0o044  # others may read it


def test_a_staged_folder_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "deep" / "folder"
    for text in ("first", "second"):
        with staged_folder(target) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / f"{text}.txt").write_text(text)
    assert names(target / "sub") == ["second.txt"]
    with pytest.raises(RuntimeError), staged_folder(target):
        raise RuntimeError
    assert names(target / "sub") == ["second.txt"]
    assert names(tmp_path / "deep") == ["folder"]


def test_a_folder_that_is_replaced_over_and_over_exists_at_every_moment(tmp_path):
    code = """
import sys
from pathlib import Path
from mio_export.errors import UsageError
from mio_export.files import staged_folder
for number in range(10_000):
    with staged_folder(Path(sys.argv[1])) as folder:
        (folder / "a").write_text(str(number))
        (folder / "b").write_text(str(number))
"""
    target = tmp_path / "folder"
    process = subprocess.Popen([sys.executable, "-c", code, str(target)])
    try:
        while not target.exists():
            time.sleep(0.01)
        for _ in range(2_000):
            assert target.is_dir()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (target / "a").read_text() == (target / "b").read_text()
    left = [path for path in tmp_path.iterdir() if path != target]
    write_text(tmp_path / "other", "")
    assert all(path.exists() for path in left)  # whoever made it may still be at work on another machine
    for path in left:
        make_older(path, days=1.1)
    with staged_folder(target):
        assert len(names(tmp_path)) == 3  # what the killed process left is gone
    assert names(tmp_path) == ["folder", "other"]


def make_older(path, *, days):
    changed = time.time() - days * 86400
    for inner in [*path.rglob("*"), path]:
        os.utime(inner, (changed, changed))


def test_two_writers_of_one_path_do_not_disturb_each_other(tmp_path):
    with staged_folder(tmp_path / "b") as first:
        (first / "one").write_text("1")
        with staged_folder(tmp_path / "b") as second:
            assert (first / "one").exists()
            (second / "two").write_text("2")
        (first / "three").write_text("3")
    assert names(tmp_path / "b") == ["one", "three"]
    with staged_file(tmp_path / "f") as one:
        one.write_text("the first, which ends last")
        write_text(tmp_path / "f", "the second")
    assert (tmp_path / "f").read_text() == "the first, which ends last"
    assert names(tmp_path) == ["b", "f"]


@pytest.mark.parametrize("name", [".c.tmp-999999", ".c.tmp", ".c.tmp-elsewhere-999999-0123abcd"])
def test_what_another_machine_may_be_writing_is_kept_for_a_day(tmp_path, name):
    left = tmp_path / name
    left.mkdir()
    (left / "weights").write_text("being written on another machine")
    with staged_folder(tmp_path / "c"):
        pass
    assert left.exists()
    make_older(left, days=0.9)
    with staged_folder(tmp_path / "c"):
        pass
    assert left.exists()
    make_older(left, days=1.1)
    os.utime(left / "weights")  # a large file takes more than a day
    with staged_folder(tmp_path / "c"):
        pass
    assert left.exists()
    make_older(left, days=1.1)
    with staged_folder(tmp_path / "c"):
        pass
    assert names(tmp_path) == ["c"]


def test_what_a_killed_writer_of_a_file_left_is_cleared_after_a_day(tmp_path):
    for name in (".f.tmp", ".f.tmp-elsewhere-999999-0123abcd"):
        (tmp_path / name).write_text("half")
        make_older(tmp_path / name, days=1.1)
    (tmp_path / ".mine.tmp-x").write_text("not one of ours")
    make_older(tmp_path / ".mine.tmp-x", days=9)
    write_text(tmp_path / "f", "whole")
    assert names(tmp_path) == [".mine.tmp-x", "f"]


def test_behind_a_link_the_file_or_folder_is_written_and_the_link_stays(tmp_path):
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "a").write_text("old")
    (tmp_path / "real").write_text("old")
    for link, target in (("current", "v1"), ("link", "real"), ("dangling", "deep/v2"), ("nothing", "later")):
        (tmp_path / link).symlink_to(target)
    for name in ("current", "dangling"):
        with staged_folder(tmp_path / name) as folder:
            (folder / "a").write_text("new")
        assert (tmp_path / name / "a").read_text() == "new"
    for name in ("link", "nothing"):
        write_text(tmp_path / name, "new")
    assert names(tmp_path) == ["current", "dangling", "deep", "later", "link", "nothing", "real", "v1"]
    assert [(tmp_path / name).is_symlink() for name in ("current", "dangling", "link", "nothing")] == [True] * 4
    assert ((tmp_path / "real").read_text(), (tmp_path / "later").read_text()) == ("new", "new")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        write_text(tmp_path / "circle", "")
    assert (tmp_path / "circle").is_symlink()


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127])
def test_the_longest_name_can_be_staged(tmp_path, name):
    write_text(tmp_path / name, "a")
    (tmp_path / name).unlink()
    with staged_folder(tmp_path / name):
        pass
    assert names(tmp_path) == [name]


def write_while_another_is_faster(path):
    with staged_folder(path, replace=False) as folder:
        (folder / "a").write_text("late")
        path.mkdir()
        (path / "a").write_text("early")


def test_a_folder_that_came_meanwhile_is_not_replaced_if_that_is_not_wanted(tmp_path):
    with pytest.raises(UsageError, match="new exists by now; choose another -o"):
        write_while_another_is_faster(tmp_path / "new")
    assert (tmp_path / "new" / "a").read_text() == "early"
    assert names(tmp_path) == ["new"]


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("path", [".", "other/.."])
def test_a_folder_without_a_name_is_not_replaced(tmp_path, monkeypatch, path):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    message = rf"^{re.escape(path)} cannot be replaced: .*; give that, as in \.\./NAME$"
    with pytest.raises(UsageError, match=message), staged_folder(Path(path)):
        pass
    assert names(tmp_path) == ["other"]

import signal
import stat
import subprocess
import sys
import time

import pytest

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
    with staged_folder(target):
        assert len(names(tmp_path)) == 2  # what the killed process left is gone
    assert names(tmp_path) == ["folder"]


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

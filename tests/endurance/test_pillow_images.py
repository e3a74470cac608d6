"""The images that Pillow is tested with, about a thousand odd files: one row for each, and nothing worse."""

import json
import subprocess
import sys
import tarfile

import PIL
import pytest
from watched import fuzz_block, in_words

from mio_export.sources import list_sources
from mio_export.store import read_rows

pytestmark = pytest.mark.slow
MOST_BYTES = 1 << 30
MEASURED = """
import atexit, resource, sys
def peak(path=sys.argv.pop(1)):
    own = int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
    kib = max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    open(path, "w").write(str(kib * 1024))
atexit.register(peak)
from mio_export.cli.main import main
main()
"""
"""``mio`` with a file that tells the most memory that it, or a process that it started, has had."""


@pytest.fixture(scope="module")
def odd_images(tmp_path_factory):
    """Pillow's test images from the source distribution of the version that is installed."""
    folder = tmp_path_factory.mktemp("pillow")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "pillow", "--dest", folder, f"pillow=={PIL.__version__}"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot fetch Pillow's sources: {done.stderr.strip().splitlines()[-1:]}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        chosen = [member for member in tar if "/Tests/images/" in member.name]
        tar.extractall(folder, chosen, filter="data")
    (images,) = folder.glob("*/Tests/images")
    return images


def run(tiny, images, out, peak):
    arguments = ["embed", tiny, images, "-o", out, "--runtime", "onnxruntime", "--decode", "full", "--json"]
    command = [sys.executable, "-c", MEASURED, peak, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


def test_no_image_hangs_or_ends_in_a_traceback(tiny, tiny_store, odd_images, memory_folder):
    count = len(list_sources([odd_images]).files)
    assert count > 500
    found = fuzz_block(f"folder={odd_images}", 0, count, (tiny, tiny_store), memory_folder, 10)
    names = [file.key for file in list_sources([odd_images]).files]
    assert not found, in_words([(number, f"{names[number]}: {what}") for number, what in found])


def test_each_has_one_row_and_each_failed_row_a_reason(tiny, odd_images, tmp_path):
    keys = {file.key for file in list_sources([odd_images]).files}
    result = run(tiny, odd_images, tmp_path / "out", tmp_path / "peak")
    rows = read_rows(tmp_path / "out")
    assert sorted(row.key for row in rows) == sorted(keys)
    failed = [row for row in rows if row.status == "failed"]
    for row in failed:
        assert row.stage in ("read", "decode", "embed"), row
        assert row.reason, row
        assert "\n" not in row.reason, row
    peak = int((tmp_path / "peak").read_text())
    print(f"{len(rows)} files, {len(failed)} failed, at most {peak / 2**20:,.0f} MiB")  # noqa: T201
    assert len(failed) < len(rows) / 2
    assert peak <= MOST_BYTES
    assert result["num_embedded"] == len(rows)
    assert run(tiny, odd_images, tmp_path / "out", tmp_path / "peak")["num_embedded"] == 0

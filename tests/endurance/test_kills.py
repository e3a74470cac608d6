"""``kill -9`` at random moments, one command alone and two at once: nothing is lost and nothing mixed.

MIO_KILLS says how often each, 20 times without it. What a kill leaves is looked at, the command is run again, and the
end must be that of a run which nobody disturbed.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mio_export.bundle import load_bundle
from mio_export.embedding import embed, merge
from mio_export.parity import verify
from mio_export.store import load_embeddings, read_rows, shard_paths

pytestmark = pytest.mark.slow
NUM_KILLS = int(os.environ.get("MIO_KILLS", "20"))
OPTIONS = {"runtime": "onnxruntime", "decode": "full", "batch_size": 3, "shard_size": 5}
NUM_IMAGES, NUM_PARTS = 150, 3


class Commands:
    """Starts ``mio`` in processes that have imported everything."""

    def __init__(self, errors):
        self.errors = errors
        program = Path(__file__).with_name("commands.py")
        with errors.open("wb") as file:
            self._server = subprocess.Popen(
                [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
            )
        assert json.loads(self._server.stdout.readline()) == "ready"

    def _ask(self, **plan):
        print(json.dumps(plan), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def start(self, *arguments, without=()):
        return self._ask(run=list(map(str, arguments)), without=list(without))

    def wait(self, process):
        return self._ask(wait=process)

    def duration(self, *arguments, without=()):
        """The time that a command takes when nobody disturbs it."""
        start = time.monotonic()
        status = self.wait(self.start(*arguments, without=without))
        assert status == 0, self.errors.read_text()
        return time.monotonic() - start

    def killed(self, process, delay_s):
        """Kill a process after some time; whether it was still at work."""
        time.sleep(delay_s)
        os.kill(process, signal.SIGKILL)
        return self.wait(process) == -signal.SIGKILL

    def close(self):
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()
        assert "Traceback" not in self.errors.read_text(), self.errors.read_text()


@pytest.fixture
def commands(tmp_path):
    """Whose commands must never leave a traceback."""
    started = Commands(tmp_path / "errors")
    yield started
    started.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Different images, some copies, and broken files among them; the same folder with all files whole; and a part."""
    whole = tmp_path_factory.mktemp("kills") / "whole"
    whole.mkdir()
    rng = np.random.default_rng(0)
    for index in range(NUM_IMAGES):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(whole / f"{index:03d}.png")
    for index in range(0, NUM_IMAGES, 10):
        shutil.copy(whole / f"{index:03d}.png", whole / f"{index:03d}-copy.png")
    broken, fewer = whole.parent / "broken", whole.parent / "fewer"
    for folder in (broken, fewer):
        shutil.copytree(whole, folder)
    for index in range(3, NUM_IMAGES, 4):
        path = broken / f"{index:03d}.png"
        data, times = path.read_bytes(), path.stat()
        path.write_bytes(bytes(8) + data[8:])  # of the same size and time, so that nothing but its row tells it
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    for path in sorted(fewer.iterdir())[::2]:
        path.unlink()
    return whole.parent


def contents(out):
    return {path.name: path.read_bytes() for path in [*shard_paths(out), out / "store.json"]}


def vectors(out):
    store = load_embeddings(out)
    return dict(zip(store.keys, map(bytes, store.vectors), strict=True))


def rows(out):
    return {row.key: (row.status, row.sha256) for row in read_rows(out)}


def moments(name, duration):
    """When to kill, spread evenly over the whole of a run."""
    draw = random.Random(name)
    return [duration * (number + draw.random()) / NUM_KILLS for number in range(NUM_KILLS)]


def disturb(commands, command, prepare, check, finish, *, name, two=False):
    """Kill a command again and again, alone or beside another; what is left is checked, and finished, and checked.

    Args:
        commands: starts them.
        command: returns the arguments for a folder.
        prepare: makes a folder to work in, by number.
        check: looks at what a kill left.
        finish: runs the command to its end, and looks at that.
        name: of the draw.
        two: whether another process runs the same command at the same time.
    """
    duration = min(commands.duration(*command(prepare(at))) for at in ("first", "again"))
    hits = 0
    for number, moment in enumerate(moments(name, duration)):
        folder = prepare(number)
        process = commands.start(*command(folder))
        if not two:
            hits += commands.killed(process, moment)
        else:
            other = commands.start(*command(folder))
            hits += commands.killed((process, other)[number % 2], moment)
            commands.wait((other, process)[number % 2])
        check(folder)
        finish(folder)
        shutil.rmtree(folder)
    print(f"{name}: {hits} of {NUM_KILLS} kills met the command at work, {duration:.2f} s long")  # noqa: T201
    assert hits >= NUM_KILLS // (6 if two else 2)  # beside another, half of them only wait for its lock and leave


@pytest.mark.parametrize("two", [False, True], ids=["alone", "two at once"])
def test_a_killed_merge_leaves_nothing_or_all_and_its_parts_as_they_were(commands, tiny, images, tmp_path, two):
    parts = [tmp_path / f"part-{index}" for index in range(1, NUM_PARTS + 1)]
    for index, part in enumerate(parts, 1):
        embed(tiny, images / "broken", part, shard=f"{index}/{NUM_PARTS}", **OPTIONS)
    given = [contents(part) for part in parts]
    merge(parts, tmp_path / "undisturbed")
    wanted = contents(tmp_path / "undisturbed")

    def prepare(number):
        (tmp_path / f"merged-{number}").mkdir()
        return tmp_path / f"merged-{number}"

    def check(folder):
        assert [contents(part) for part in parts] == given
        if (folder / "out" / "store.json").exists():
            assert contents(folder / "out") == wanted

    def finish(folder):
        if not (folder / "out" / "store.json").exists():
            merge(parts, folder / "out")
        check(folder)

    def command(folder):
        return ("merge", *parts, "-o", folder / "out")

    disturb(commands, command, prepare, check, finish, name=f"merge{', two at once' * two}", two=two)


@pytest.mark.parametrize("two", [False, True], ids=["alone", "two at once"])
def test_a_killed_prune_keeps_every_row_whose_file_is_there(commands, tiny, images, tmp_path, two):
    embed(tiny, images / "whole", tmp_path / "store", **OPTIONS)
    before = vectors(tmp_path / "store")
    kept = {path.name for path in (images / "fewer").iterdir()}

    def prepare(number):
        return shutil.copytree(tmp_path / "store", tmp_path / f"pruned-{number}")

    def check(folder):
        found = vectors(folder)
        assert found.keys() >= kept
        assert found.items() <= before.items()

    def finish(folder):
        embed(tiny, images / "fewer", folder, prune_vanished=True)
        assert vectors(folder) == {key: before[key] for key in kept}
        assert embed(tiny, images / "fewer", folder).num_embedded == 0

    def command(folder):
        return ("embed", tiny, images / "fewer", "-o", folder, "--prune")

    disturb(commands, command, prepare, check, finish, name=f"prune{', two at once' * two}", two=two)


@pytest.mark.parametrize("two", [False, True], ids=["alone", "two at once"])
def test_a_killed_retry_keeps_what_was_there_and_ends_with_all(commands, tiny, images, tmp_path, two):
    embed(tiny, images / "broken", tmp_path / "store", **OPTIONS)
    before = vectors(tmp_path / "store")
    embed(tiny, images / "whole", tmp_path / "clean", **OPTIONS)
    clean, wanted = vectors(tmp_path / "clean"), rows(tmp_path / "clean")

    def prepare(number):
        return shutil.copytree(tmp_path / "store", tmp_path / f"retried-{number}")

    def check(folder):
        found = vectors(folder)
        assert found.keys() >= before.keys()
        assert all(close(found[key], clean[key]) for key in found)

    def finish(folder):
        embed(tiny, images / "whole", folder, retry_failed=True)
        check(folder)
        assert {key: row[1] for key, row in rows(folder).items()} == {key: row[1] for key, row in wanted.items()}
        assert all(row[0] != "failed" for row in rows(folder).values())
        assert embed(tiny, images / "whole", folder, retry_failed=True).num_embedded == 0

    def command(folder):
        return ("embed", tiny, images / "whole", "-o", folder, "--retry-failed")

    disturb(commands, command, prepare, check, finish, name=f"retry{', two at once' * two}", two=two)


def close(found, wanted):
    """Whether two vectors are one up to the rounding of another batch."""
    first, second = (np.frombuffer(vector, np.float32) for vector in (found, wanted))
    return bool(np.abs(first - second).max() <= 1e-4 * np.abs(second).max())


UNPROVEN = """
import sys
from pathlib import Path
for name in ("onnxruntime", "openvino"):
    sys.modules[name] = None
from mio_export.exporting import export, plan
from mio_export.models import load_encoder
plan.check_installed = lambda format: None  # an artifact may be written where its library is not
folder, images, out = map(Path, sys.argv[1:])
export(load_encoder(folder), out, formats=("onnx", "openvino"), images=images, max_batch=4, limit=24)
"""


@pytest.fixture(scope="module")
def unproven(tmp_path_factory, tiny, photos):
    """A bundle with two artifacts, written where neither could run."""
    path = tmp_path_factory.mktemp("unproven") / "encoder.mio"
    program = [sys.executable, "-c", UNPROVEN, tiny, photos, path]
    subprocess.run(list(map(str, program)), check=True, capture_output=True)
    assert verdicts(path) == {"onnx": "unproven", "openvino": "unproven"}
    return path


def verdicts(path):
    return {artifact.format: artifact.parity.verdict for artifact in load_bundle(path).manifest.artifacts}


def test_a_killed_proof_leaves_a_whole_bundle_and_the_next_one_ends_it(commands, unproven, photos, tmp_path):
    def prepare(number):
        return shutil.copytree(unproven, tmp_path / f"{number}.mio")

    def check(folder):
        found = verify(folder)
        assert found.passed, found
        assert set(verdicts(folder).values()) <= {"unproven", "proved"}

    def finish(folder):
        assert commands.wait(commands.start(*command(folder))) == 0
        check(folder)
        assert verdicts(folder) == {"onnx": "proved", "openvino": "proved"}

    def command(folder):
        return ("verify", folder, "--images", photos, "--limit", "24")

    disturb(commands, command, prepare, check, finish, name="verify")


def test_two_proofs_at_once_end_with_both_verdicts(commands, unproven, photos, tmp_path):
    """Each where the other's library is missing, as on two machines with one disk; every third is killed and redone."""
    pairs = (("onnxruntime",), ("openvino",))
    draw, duration = random.Random(0), None
    for number in range(NUM_KILLS):
        folder = shutil.copytree(unproven, tmp_path / f"{number}.mio")
        command = ("verify", folder, "--images", photos, "--limit", "24")
        start = time.monotonic()
        first, second = (commands.start(*command, without=without) for without in pairs)
        if number % 3 == 2:
            commands.killed(first, draw.random() * duration)
            commands.wait(commands.start(*command, without=pairs[0]))
        else:
            assert commands.wait(first) == 0
        assert commands.wait(second) == 0
        duration = duration or time.monotonic() - start
        assert verdicts(folder) == {"onnx": "proved", "openvino": "proved"}
        assert verify(folder).passed
        shutil.rmtree(folder)

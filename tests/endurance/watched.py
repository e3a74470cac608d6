"""Runs blocks of ``fuzz_block.py`` under a watch: what hangs or dies is named by its number, and the rest goes on."""

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from mio_export.runtimes.devices import num_threads

PROGRAM = Path(__file__).with_name("fuzz_block.py")
BLOCK = 500
PATIENCE_S = 10.0
_START_S, _EMBED_S = 120.0, 240.0


@dataclass
class Run:
    """What a block's process said; ``at`` is the mutant that it was at: None before the first, -1 for the last step."""

    found: list[tuple[int, str]] = field(default_factory=list)
    at: int | None = None
    done: bool = False
    hung: bool = False


def run_block(arguments, folder, patience_s):
    """Run a process until it is done, dies, or is silent for too long; then end it and all that it started."""
    run, pending = Run(), b""
    command = [sys.executable, PROGRAM, *map(str, arguments), folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder.parent / f"{folder.name}.err").open("wb") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, env=environment, start_new_session=True
        )
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not run.done:
            patience = _START_S if run.at is None else _EMBED_S if run.at == -1 else patience_s
            if not selector.select(patience):
                run.hung = True
                break
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in map(json.loads, lines):
                run.at = line.get("at", run.at)
                run.done = line.get("done", False)
                if "found" in line:
                    run.found.append((line["found"], line["what"]))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    process.wait()
    return run


def fuzz_block(kind, first, count, given, folder, patience_s):
    """Work through a block, beginning again behind a mutant that hangs or kills; return what was found."""
    found, end = [], first + count
    while first < end:
        part = folder / f"{kind.partition('=')[0]}-{first}"
        part.mkdir(parents=True)
        run = run_block((kind, first, end - first, *given), part, patience_s)
        found += run.found
        if run.done or run.at == -1:
            if run.hung or not run.done:
                found.append((-1, f"embedding mutants from {first} {'hangs' if run.hung else 'kills the process'}"))
            shutil.rmtree(part)
            return found
        if run.at is None:
            raise RuntimeError((folder / f"{part.name}.err").read_text(errors="replace"))
        if run.hung:
            found.append((run.at, f"no answer in {patience_s:g} s"))
        elif not any(number == run.at for number, _ in run.found):
            found.append((run.at, "the process died"))
        shutil.rmtree(part)
        first = run.at + 1
    return found


def fuzz(kind, count, given, folder, *, block=BLOCK, patience_s=PATIENCE_S):
    """Return what was found of ``count`` mutants of a kind."""
    with ThreadPoolExecutor(num_threads()) as pool:
        starts = range(0, count, block)
        runs = [
            pool.submit(fuzz_block, kind, start, min(block, count - start), given, folder, patience_s)
            for start in starts
        ]
        return [finding for run in runs for finding in run.result()]


def in_words(found):
    """Findings grouped by what they say, each with its first mutants."""
    groups = {}
    for number, what in found:
        groups.setdefault(what.partition(": ")[0], []).append((number, what))
    counts = Counter({name: len(group) for name, group in groups.items()})
    return "\n".join(
        f"{count} x {groups[name][0][1]} (mutants {', '.join(str(number) for number, _ in groups[name][:5])})"
        for name, count in counts.most_common(40)
    )

"""What long work tells the person who waits for it: a bar on a terminal, plain lines elsewhere, nothing by default."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

_PLAIN_INTERVAL_S = 10.0


class Task(Protocol):
    """One piece of work with a known amount."""

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        """Say that ``amount`` more is done; ``note``, if there is one, is shown behind it from now on."""


class Progress:
    """Says nothing; the base of those that do."""

    def line(self, text: str) -> None:
        """Say one thing."""

    @contextmanager
    def task(self, description: str, total: int, *, unit: str = "images") -> Iterator[Task]:
        """Follow a piece of work."""
        yield _Silent()


class _Silent:
    def advance(self, amount: int = 1, *, note: str = "") -> None:
        """Do nothing."""


class PlainProgress(Progress):
    """Lines on standard error, one every ten seconds of work."""

    def line(self, text: str) -> None:
        """Print a line."""
        print(text, file=sys.stderr, flush=True)  # noqa: T201

    @contextmanager
    def task(self, description: str, total: int, *, unit: str = "images") -> Iterator[Task]:
        """Print how far the work is, now and then and at its end."""
        task = _PlainTask(self, description, total, unit)
        yield task
        task.report()


class _PlainTask:
    def __init__(self, progress: PlainProgress, description: str, total: int, unit: str) -> None:
        self._progress, self._description, self._total, self._unit = progress, description, total, unit
        self._done, self._note = 0, ""
        self._start = self._last = time.monotonic()

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        self._done += amount
        self._note = note or self._note
        if time.monotonic() - self._last >= _PLAIN_INTERVAL_S:
            self._last = time.monotonic()
            self.report()

    def report(self) -> None:
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        note = f", {self._note}" if self._note else ""
        self._progress.line(f"{self._description}: {self._done:,} of {self._total:,} {self._unit}, {rate:,.0f}/s{note}")


class TerminalProgress(PlainProgress):
    """Bars on a terminal's standard error."""

    @contextmanager
    def task(self, description: str, total: int, *, unit: str = "images") -> Iterator[Task]:
        """Show a bar with count, rate and time left."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bars(*columns, console=Console(stderr=True)) as bars:
            yield _BarTask(bars, bars.add_task(description, total=total, rate="", note=""), unit)


class _BarTask:
    def __init__(self, bars: Any, task_id: Any, unit: str) -> None:
        self._bars, self._task_id, self._unit = bars, task_id, unit
        self._done, self._start = 0, time.monotonic()

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        self._done += amount
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        changes = {"rate": f"{rate:,.0f} {self._unit}/s"} | ({"note": note} if note else {})
        self._bars.update(self._task_id, advance=amount, **changes)


def is_first_process() -> bool:
    """Whether this is the first of the processes that train together, or the only one, by what launchers tell them."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "NODE_RANK", "LOCAL_RANK", "SLURM_PROCID"))


def stderr_progress() -> Progress:
    """Return bars if standard error is a terminal, plain lines otherwise, nothing in any process but the first."""
    if not is_first_process():
        return Progress()
    return TerminalProgress() if sys.stderr.isatty() else PlainProgress()


__all__ = ["PlainProgress", "Progress", "Task", "TerminalProgress", "is_first_process", "stderr_progress"]

"""What long work tells the person who waits for it: a bar on a terminal, plain lines elsewhere, nothing by default."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from mio_export.console.terminal import json_text, printable
from mio_export.errors import UsageError

_INTERVAL_S = 10.0


class Task(Protocol):
    """One piece of work with a known amount."""

    def advance(self, amount: int = 1, *, failed: int = 0, limited_by: str = "", note: str = "") -> None:
        """Report ``amount`` more units done, of which ``failed`` failed.

        Args:
            amount: of the task's unit.
            failed: of the amount.
            limited_by: what the work waits for, from now on; empty: as before.
            note: what is shown behind it, from now on; empty: as before.
        """


class Progress:
    """Base class; reports nothing."""

    def line(self, text: str) -> None:
        """Say one thing."""

    @contextmanager
    def task(self, description: str, total: int, *, unit: str = "images") -> Iterator[Task]:
        """Follow a piece of work."""
        yield _Counts(description, total, unit)


class _Counts:
    """What is known of a piece of work; what shows it says so in ``show``."""

    def __init__(self, description: str, total: int, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self.failed, self.limited_by, self.note = 0, 0, "", ""
        self._start = time.monotonic()

    def advance(self, amount: int = 1, *, failed: int = 0, limited_by: str = "", note: str = "") -> None:
        self.done += amount
        self.failed += failed
        self.limited_by = limited_by or self.limited_by
        self.note = note or self.note
        self.show(amount)

    def show(self, amount: int) -> None:
        """Show the state, after ``amount`` more."""

    @property
    def rate(self) -> float:
        return self.done / max(time.monotonic() - self._start, 1e-9)

    @property
    def remarks(self) -> str:
        limit = f"limited by {self.limited_by}" if self.limited_by else ""
        failures = f"{self.failed:,} failed" if self.failed else ""
        return ", ".join(filter(None, (failures, limit, self.note)))


class PlainProgress(Progress):
    """Lines on standard error, one every ten seconds of work."""

    def line(self, text: str) -> None:
        """Print a line."""
        print(printable(text), file=sys.stderr, flush=True)  # noqa: T201

    @contextmanager
    def task(self, description: str, total: int, *, unit: str = "images") -> Iterator[Task]:
        """Print how far the work is, now and then and at its end."""
        task = _SeldomShown(self._report, description, total, unit)
        yield task
        self._report(task)

    def _report(self, task: _Counts) -> None:
        remarks = f", {task.remarks}" if task.remarks else ""
        self.line(f"{task.description}: {task.done:,} of {task.total:,} {task.unit}, {task.rate:,.0f}/s{remarks}")


class JsonProgress(PlainProgress):
    """The same as JSON, an object a line: either ``{"message": …}`` or the state of a task."""

    def line(self, text: str) -> None:
        """Print an object with a message."""
        self._print({"message": text})

    def _report(self, task: _Counts) -> None:
        left = (task.total - task.done) / task.rate if task.rate else None
        self._print(
            {
                "task": task.description,
                "unit": task.unit,
                "done": task.done,
                "total": task.total,
                "failed": task.failed,
                "per_s": round(task.rate, 1),
                "eta_s": None if left is None else round(left, 1),
                "limited_by": task.limited_by or None,
                "note": task.note or None,
            }
        )

    def _print(self, content: dict[str, Any]) -> None:
        print(json_text(content), file=sys.stderr, flush=True)  # noqa: T201


class _SeldomShown(_Counts):
    def __init__(self, report: Callable[[_Counts], None], description: str, total: int, unit: str) -> None:
        super().__init__(description, total, unit)
        self._report, self._last = report, time.monotonic()

    def show(self, amount: int) -> None:
        if time.monotonic() - self._last >= _INTERVAL_S:
            self._last = time.monotonic()
            self._report(self)


class TerminalProgress(PlainProgress):
    """Bars on a terminal's standard error."""

    @contextmanager
    def task(self, description: str, total: int, *, unit: str = "images") -> Iterator[Task]:
        """Show a bar with count, rate and time left."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[remarks]}", markup=False),
        )
        with Bars(*columns, console=Console(stderr=True)) as bars:
            yield _Bar(bars, description, total, unit)


class _Bar(_Counts):
    def __init__(self, bars: Any, description: str, total: int, unit: str) -> None:
        super().__init__(description, total, unit)
        self._bars, self._id = bars, bars.add_task(printable(description), total=total, rate="", remarks="")

    def show(self, amount: int) -> None:
        self._bars.update(
            self._id, advance=amount, rate=f"{self.rate:,.0f} {self.unit}/s", remarks=printable(self.remarks)
        )


def is_first_process() -> bool:
    """Whether this is the first of the processes that train together, or the only one, by what launchers tell them."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "NODE_RANK", "LOCAL_RANK", "SLURM_PROCID"))


def stderr_progress(style: str = "auto") -> Progress:
    """Return what shows progress on standard error, nothing in any process but the first.

    Args:
        style: ``json``, or ``auto``: bars if standard error is a terminal, plain lines otherwise.

    Raises:
        UsageError: another style.
    """
    if style not in ("auto", "json"):
        raise UsageError(f"progress must be auto or json, got {style!r}")
    if not is_first_process():
        return Progress()
    if style == "json":
        return JsonProgress()
    return TerminalProgress() if sys.stderr.isatty() else PlainProgress()


__all__ = [
    "JsonProgress",
    "PlainProgress",
    "Progress",
    "Task",
    "TerminalProgress",
    "is_first_process",
    "stderr_progress",
]

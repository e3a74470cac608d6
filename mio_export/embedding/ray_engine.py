"""The Ray engine: Ray Data reads, decodes and embeds whole shards on any machine; the caller consumes them in order.

Each shard is a stateless task, not a call of an actor: the task of a machine that is lost goes to another one, while
that of an actor would wait for a place to start the actor anew, and a full cluster has none.
"""

import importlib.util
import logging
import os
import pickle
import signal
import socket
import threading
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from mio_export.bundle import Bundle
from mio_export.console.progress import Task
from mio_export.decoding import Decoder
from mio_export.embedding.options import EmbedOptions
from mio_export.embedding.pipeline import Embedded, Embedder, StageTimer
from mio_export.embedding.versions import difference, versions_here
from mio_export.errors import MioError, MissingBackendError, SpaceError, UsageError, one_line
from mio_export.extras import install_command
from mio_export.runtimes import Choice
from mio_export.runtimes.devices import limit_threads, num_threads
from mio_export.runtimes.opening import open_choice
from mio_export.sources import SourceFile
from mio_export.store import FAILED, StoreInfo

_CONNECT_S = 10
_RETRIES = 3
"""How often a shard is given to another worker when its own is gone; an image may be what kills them."""


def check_engine(name: str, *, address: str | None, cache: object) -> None:
    """Refuse an engine that cannot be used, before anything is listed.

    Raises:
        UsageError: the name is not known, or something is given that the engine does not have.
        MissingBackendError: Ray Data is not installed; the message has the command that installs it.
    """
    if name not in ("local", "ray"):
        raise UsageError(f"engine must be local or ray, got {name!r}")
    if name == "local" and address is not None:
        raise UsageError(f"--address joins a Ray cluster, so it needs --engine ray; got {address!r} alone")
    if name == "ray" and cache is not None:
        raise UsageError("--cache is a file of one machine, which --engine ray does not use; leave one of them out")
    if name == "ray" and any(importlib.util.find_spec(module) is None for module in ("ray", "pandas")):
        raise MissingBackendError(f"--engine ray needs Ray Data, which is not installed: {install_command('ray')}")


def embedded_by_ray(
    bundle: Bundle,
    choice: Choice,
    info: StoreInfo,
    shards: Sequence[Sequence[SourceFile]],
    *,
    options: EmbedOptions,
    task: Task,
) -> Generator[Embedded]:
    """Yield each shard embedded by a worker of a Ray cluster, in order.

    A worker computes each content of its shard once; one that lies in several shards it computes again.

    Args:
        bundle: read by every machine at this same path.
        choice: what embeds: a worker for each processor core or, where that is a GPU, for each GPU.
        info: says how large batches are, and how images are decoded.
        shards: their files; every machine reads them at these same places.
        options: what one file may cost, and the ``address`` of a Ray cluster to join; None: the one that this process
            is in already, else this machine alone.
        task: is told of each shard.

    Raises:
        SpaceError: a worker has other versions of what decodes and embeds than this process.
        MioError: the cluster cannot be joined, a worker cannot read what this process can, or the workers of a shard
            died again and again.
    """
    import ray
    from ray.data import DataContext
    from ray.exceptions import RayError

    settings = pickle.dumps((bundle, choice, info, options.limits, str(Path.cwd()), versions_here(choice.runtime)))
    items = [{"files": pickle.dumps(shard)} for shard in shards]
    with cluster(options.address):
        context = DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = context.print_on_execution_start = False
        try:
            with DataContext.current(context), warnings.catch_warnings():
                # Ray Data retries without end, and has deprecated the one way to bound that, with no other yet
                warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
                done = ray.data.from_items(items, override_num_blocks=len(items)).map(
                    _embed_shard, fn_kwargs={"settings": settings}, max_retries=_RETRIES, **_share(choice)
                )
            for shard, row in zip(shards, done.iter_rows(), strict=True):
                embedded, limited_by = _received(row["reply"])
                _check_same_files(shard, embedded, options.limits.max_file_bytes)
                num_failed = sum(file.status == FAILED for file in embedded.rows)
                task.advance(len(embedded.rows), failed=num_failed, limited_by=limited_by)
                yield embedded
        except RayError as error:
            reason = next(filter(None, map(str.strip, str(error).splitlines())), "")
            raise MioError(
                f"Ray gave up: {type(error).__name__}: {reason[:300]}\nwhat was finished is kept, run it again to go on"
            ) from None


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Be in a cluster; one that was joined or started here is left or stopped at the end, whatever happened."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read once, when Ray is imported
    import ray

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what matters comes as an exception
    if ray.is_initialized():
        yield
        return
    own: dict[str, Any] = {"address": "local", "num_cpus": num_threads(), "include_dashboard": False}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        try:
            if address:
                _check_reachable(address)
            ray.init(
                **({"address": address} if address else own),
                log_to_driver=False,
                logging_level=logging.CRITICAL,
            )
        except (OSError, RuntimeError, ValueError) as error:
            reason = one_line(error)
            raise MioError(f"the Ray cluster {address or 'on this machine'} cannot be used: {reason}") from None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own leaves without a word
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuse a port that nobody listens at; Ray itself would wait for minutes and fill the terminal."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()


def _share(choice: Choice) -> dict[str, float]:
    """Return what one worker takes of the cluster."""
    import ray

    if choice.device == "cpu":
        return {"num_cpus": 1}
    held = ray.cluster_resources()
    return {"num_cpus": max(1, held.get("CPU", 0) // max(1, held.get("GPU", 0))), "num_gpus": 1}


def _embed_shard(row: dict[str, Any], settings: bytes) -> dict[str, Any]:
    """Embed a shard, in a worker; our own errors travel as values, as Ray would wrap them and try again."""
    try:
        embedder, timer = _opened(settings)
        reply: object = (embedder.embed(pickle.loads(row["files"])), timer.bottleneck)
    except MioError as error:
        reply = error
    return {"reply": pickle.dumps(reply)}


@lru_cache(maxsize=1)
def _opened(settings: bytes) -> tuple[Embedder, StageTimer]:
    """Open the runtime, once for all shards that this process is given."""
    import ray

    bundle, choice, info, limits, folder, versions = pickle.loads(settings)
    check_versions(versions, versions_here(choice.runtime))
    try:
        os.chdir(folder)  # paths may be relative to it
    except OSError as error:
        raise _elsewhere(f"has no folder {folder} ({error.strerror})") from None
    limit_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    timer = StageTimer()
    embedder = Embedder(
        open_choice(bundle, choice),
        Decoder(bundle.manifest.preprocess, scaled=info.decode == "scaled", limits=limits),
        ThreadPoolExecutor(num_threads()),
        batch_size=info.batch_size,
        timer=timer,
    )
    return embedder, timer


def _received(reply: bytes) -> tuple[Embedded, str]:
    value = pickle.loads(reply)
    if isinstance(value, MioError):
        raise value
    embedded, limited_by = value
    return embedded, limited_by


def _check_same_files(shard: Sequence[SourceFile], embedded: Embedded, max_bytes: int) -> None:
    """Refuse a shard of which a worker could read nothing, though this process can: its machine lacks the files."""
    if any(row.stage != "read" for row in embedded.rows):
        return
    for file in shard:
        if file.problem is None:
            try:
                file.read(max_bytes)
            except OSError:
                return
            reason = next(row.reason for row in embedded.rows if row.key == file.key)
            raise _elsewhere(f"read none of {len(shard):,} files, such as {file.key!r} ({reason})")


def check_versions(caller: Mapping[str, str], worker: Mapping[str, str]) -> None:
    """Refuse a worker whose vectors may have other last bits than those of the machine that called."""
    if worker != caller:
        raise SpaceError(
            f"a worker on {socket.gethostname()} of the Ray cluster has other versions than this machine:"
            f" {difference(caller, worker)}; install the same on all of them"
        )


def _elsewhere(what: str) -> MioError:
    return MioError(f"a machine of the Ray cluster {what}; all of them must have the same files at the same paths")

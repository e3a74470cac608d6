"""The application as replicas of Ray Serve, on this machine or a cluster; Ray replaces those that die."""

import logging
import os
import socket
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from mio_export.bundle import Bundle, broken_files, load_bundle
from mio_export.console.progress import Progress
from mio_export.embedding.ray_engine import check_engine, check_versions, cluster
from mio_export.embedding.versions import versions_here
from mio_export.errors import GateError, Interrupted, MioError, UsageError
from mio_export.runtimes import Choice
from mio_export.runtimes.devices import limit_threads
from mio_export.serving.options import ServeOptions
from mio_export.serving.server import Server

_NAME = "mio-export"
_START_S = 120.0
_POLL_S = 0.2


class _Replica:
    """What Ray Serve starts, on any machine of its cluster."""

    def __init__(self, path: str, choice: Choice, options: ServeOptions, versions: Mapping[str, str]) -> None:
        import ray

        from mio_export.serving.engine import Engine
        from mio_export.serving.metrics import Journal

        bundle = load_bundle(path)
        if broken := broken_files(bundle):
            raise GateError(f"{path} is not served; it was changed: {broken[0]}")
        check_versions(versions, versions_here(choice.runtime))
        limit_threads(int(ray.get_runtime_context().get_assigned_resources()["CPU"]))
        self._options, self._journal = options, Journal(access_log=options.access_log)
        self._engine = Engine(bundle, choice, options, self._journal)

    def __serve_build_asgi_app__(self) -> Any:
        from mio_export.serving.http import http_app

        return http_app(self._engine, self._options, self._journal)

    def check_health(self) -> None:
        """Tell Ray to replace this replica, by an error, when it is ready no more."""
        if not self._engine.is_ready:
            raise RuntimeError("the runtime is dead")

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()
            self._journal.close()


def serve_with_ray(
    bundle: str | Path | Bundle,
    options: ServeOptions,
    *,
    address: str | None = None,
    replicas: int = 1,
    progress: Progress | None = None,
) -> None:
    """Serve over HTTP with Ray Serve until a signal comes; then the open requests are answered.

    There is no gRPC: Ray's proxy for it listens at every address of its machine. The metrics are those of the replica
    that answers, and the access log is among Ray's own logs.

    Args:
        bundle: every machine reads it at this same path.
        options: as without Ray; ``max_queue`` is for each replica.
        address: of a Ray cluster to join; None: the one that this process is in already, else this machine alone.
        replicas: number of runtimes; they share the processors of the cluster.
        progress: is told when it is ready.

    Raises:
        UsageError: an option does not go with Ray, the port is taken, or the cluster serves something already.
        GateError: the bundle was changed.
        MissingBackendError: Ray is not installed.
        MioError: the cluster cannot be joined, no replica starts, or not all open requests were answered in time.
    """
    if options.grpc_port != ServeOptions.grpc_port or options.workers != 1 or replicas < 1:
        raise UsageError("--engine ray takes --replicas, 1 or more, and neither --grpc-port nor --workers")
    check_engine("ray", address=address, cache=None)  # it may not be installed
    progress = progress or Progress()
    server = Server(bundle, options, progress=progress)  # checks all that can be checked, and listens nowhere
    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        socket.create_server((options.host, options.http_port), family=family).close()
    except OSError as error:
        raise UsageError(
            f"cannot listen at {options.host} port {options.http_port}: {os.strerror(error.errno or 0)}; choose another"
            " --http-port"
        ) from None
    with cluster(address):
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # what matters comes as an exception
        if serve.status().proxies:
            raise UsageError("this Ray cluster serves something already; end that first: serve shutdown")
        try:
            _start(server.bundle, server.choice, options, replicas)
            progress.line(f"{replicas} replicas in Ray Serve:")
            for line in server.description().split("\n"):
                if not line.startswith("  gRPC"):
                    progress.line(line)
            _wait()
            _drain(options.timeout_s)
        finally:
            with redirect_stdout(StringIO()):  # Ray prints there that the controller it ends has ended
                serve.shutdown()
    progress.line("server stopped; all open requests were answered")


def _start(bundle: Bundle, choice: Choice, options: ServeOptions, replicas: int) -> None:
    """Start proxies and replicas, and wait until all are ready."""
    import ray
    from ray import serve

    place = {"host": options.host, "port": options.http_port}
    tls = {"ssl_certfile": options.tls_cert, "ssl_keyfile": options.tls_key}
    longest_s = options.timeout_s + options.max_wait_s
    serve.start(http_options={**place, **tls, "request_timeout_s": longest_s, "keep_alive_timeout_s": 75})
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    # the most for each that so many of them fit
    share = next((most for most in range(max(cpus), 0, -1) if sum(num // most for num in cpus) >= replicas), None)
    if share is None:
        raise UsageError(f"--replicas must be at most {sum(cpus)}, the processors of the Ray cluster; got {replicas}")
    deployment = serve.deployment(
        serve.ingress()(_Replica),
        name=_NAME,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": share, "num_gpus": int(choice.device != "cpu")},
        max_ongoing_requests=options.max_queue,
        max_queued_requests=options.max_queue,
        max_constructor_retry_count=1,
        health_check_period_s=1,
        health_check_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=options.timeout_s,
    )
    application = deployment.bind(str(bundle.path.resolve()), choice, options, versions_here(choice.runtime))
    serve.run_many([serve.RunTarget(application, name=_NAME)], wait_for_applications_running=False)
    end = time.monotonic() + _START_S
    while (state := serve.status().applications[_NAME]).status != "RUNNING":
        if state.status == "DEPLOY_FAILED" or time.monotonic() > end:
            said = next((d.message for d in state.deployments.values() if d.message), state.message)
            reason = (said.strip().splitlines() or [state.status.value])[-1]
            raise MioError(f"Ray Serve does not start: {reason[-300:].removeprefix('mio_export.errors.')}")
        time.sleep(_POLL_S)


def _wait() -> None:
    try:
        while True:
            time.sleep(_POLL_S)
    except (Interrupted, KeyboardInterrupt):
        return


def _drain(timeout_s: float) -> None:
    from ray import serve

    start = time.monotonic()
    serve.delete(_NAME, _blocking=False)
    while _NAME in serve.status().applications:
        time.sleep(_POLL_S)
    if time.monotonic() - start > timeout_s:
        raise MioError(f"not all open requests were answered within {timeout_s:g} s")


__all__ = ["serve_with_ray"]

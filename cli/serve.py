"""``mio serve``."""

from pathlib import Path
from typing import Annotated

import typer

from mio_export.cli.output import echo
from mio_export.errors import MioError, UsageError


def run(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.mio", help="A bundle.")],
    runtime: Annotated[
        str, typer.Option(help="auto (the fastest proved), onnxruntime, openvino, pt2, torchscript, …")
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="auto (fp32), fp16, bf16 or int8, if the bundle has it proved.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or tensorrt of ONNX Runtime.")] = "auto",
    decode: Annotated[
        str, typer.Option(help="full, or scaled: large JPEGs at a fraction of their size. Take that of your store.")
    ] = "full",
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 opens it to everybody who reaches this machine.")
    ] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="Port for HTTP.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Port for gRPC.")] = 8001,
    workers: Annotated[int, typer.Option(help="Processes, each with a runtime of its own.")] = 1,
    max_batch: Annotated[
        int | None, typer.Option(help="Most images in a request and in a batch.  [default: as proved]")
    ] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(help="Longest request.  [default: 64 MiB, or more where pixels need it]")
    ] = None,
    max_file_bytes: Annotated[int, typer.Option(help="Longest encoded image.")] = 32_000_000,
    max_pixels: Annotated[int, typer.Option(help="Most pixels of an encoded image.")] = 50_000_000,
    max_decode_seconds: Annotated[float, typer.Option(help="Longest time to decode an image.")] = 10,
    max_queue: Annotated[int, typer.Option(help="Most images that wait, in each process; more are refused.")] = 1024,
    max_wait_seconds: Annotated[float, typer.Option(help="A request that would wait longer is refused.")] = 10,
    timeout_seconds: Annotated[
        float, typer.Option(help="Longest time to receive a request, and to answer open ones at the end.")
    ] = 30,
    api_key: Annotated[
        str | None, typer.Option(envvar="MIO_API_KEY", show_envvar=True, help="What every client must send.")
    ] = None,
    tls_cert: Annotated[str | None, typer.Option(help="PEM file of the certificate and its chain.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="PEM file of its key.")] = None,
    allow_url_host: Annotated[
        list[str] | None, typer.Option(help="Host that images may be fetched from; repeat it for more.")
    ] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log/--no-access-log", help="A JSON line for each request, on standard output.")
    ] = True,
    engine: Annotated[str, typer.Option(help="local, or ray: replicas in Ray Serve, without gRPC.")] = "local",
    address: Annotated[str | None, typer.Option(help="With ray: the cluster to join.  [default: a new one]")] = None,
    replicas: Annotated[int, typer.Option(help="With ray: number of runtimes.")] = 1,
) -> None:
    """Serve a bundle over HTTP and gRPC.

    Two models: NAME takes the bytes of image files, NAME_pixels uint8 images. SIGTERM or Ctrl-C: open requests are
    answered, then it ends.

    Example:  mio serve encoder.mio

    Example:  mio serve encoder.mio --host 0.0.0.0 --api-key "$KEY" --tls-cert cert.pem --tls-key key.pem
    """
    from mio_export.console.progress import stderr_progress
    from mio_export.serving import ServeOptions, Server

    if engine not in ("local", "ray"):
        raise UsageError(f"engine must be local or ray, got {engine!r}")
    if engine == "local" and (address is not None or replicas != 1):
        raise UsageError("--address and --replicas need --engine ray; for more processes on this machine: --workers")
    options = ServeOptions(
        runtime=runtime,
        precision=precision,
        device=device,
        decode=decode,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        workers=workers,
        max_batch=max_batch,
        max_body_bytes=max_body_bytes,
        max_file_bytes=max_file_bytes,
        max_pixels=max_pixels,
        max_decode_s=max_decode_seconds,
        max_queue=max_queue,
        max_wait_s=max_wait_seconds,
        timeout_s=timeout_seconds,
        api_key=api_key,
        tls_cert=tls_cert,
        tls_key=tls_key,
        allow_url_hosts=tuple(allow_url_host or ()),
        access_log=access_log,
    )
    if engine == "ray":
        from mio_export.serving.ray_serve import serve_with_ray

        serve_with_ray(bundle, options, address=address, replicas=replicas, progress=stderr_progress())
        return
    with Server(bundle, options, progress=stderr_progress()) as server:
        echo(*server.description().split("\n"), err=True)
        num_open = server.wait()
    if num_open:
        raise MioError(f"{num_open} open requests were not answered within {timeout_seconds:g} s")
    echo("server stopped; all open requests were answered", err=True)

"""``mio serve``."""

from pathlib import Path
from typing import Annotated

import typer

from mio_export.cli.output import echo


def run(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.mio", help="A bundle.")],
    runtime: Annotated[
        str, typer.Option(help="auto (the fastest proved), onnxruntime, openvino, pt2, torchscript, …")
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="auto (fp32), fp16, bf16 or int8, if the bundle has it proved.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or tensorrt of ONNX Runtime.")] = "auto",
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 opens it to everybody who reaches this machine.")
    ] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="Port for HTTP.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Port for gRPC.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Port for Prometheus.")] = 8002,
    max_batch: Annotated[
        int | None, typer.Option(help="Most images in a request and in a batch.  [default: as proved]")
    ] = None,
    max_image_bytes: Annotated[int, typer.Option(help="Longest encoded image.")] = 32_000_000,
    max_pixels: Annotated[int, typer.Option(help="Most pixels of an encoded image.")] = 50_000_000,
    timeout_s: Annotated[float, typer.Option(help="Longest wait for open requests at the end.")] = 30,
) -> None:
    """Serve a bundle with the Triton Inference Server.

    Two models: NAME takes uint8 images, NAME_jpeg the bytes of image files. SIGTERM or Ctrl-C: open requests are
    answered, then it ends.

    Example:  mio serve encoder.mio
    """
    from mio_export.progress import stderr_progress
    from mio_export.serving import ServeOptions, Server

    options = ServeOptions(
        runtime=runtime,
        precision=precision,
        device=device,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        max_batch=max_batch,
        max_image_bytes=max_image_bytes,
        max_pixels=max_pixels,
        timeout_s=timeout_s,
    )
    with Server(bundle, options, progress=stderr_progress()) as server:
        echo(*server.description().split("\n"))
        server.wait()
    echo("open requests were answered; the server has ended")

"""``mio embed``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mio_export.cli.output import Json, echo, print_json
from mio_export.errors import GateError


def run(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.mio", help="A bundle.")],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC...", help="Folders, lists (.txt), .tar, .zip, .parquet of images, or URLs of such."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the embedding store.")],
    runtime: Annotated[
        str, typer.Option(help="auto (the fastest proved), onnxruntime, openvino, pt2, torchscript, …")
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="auto (fp32), fp16, bf16 or int8, if the bundle has it proved.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or tensorrt of ONNX Runtime.")] = "auto",
    batch_size: Annotated[int | None, typer.Option(help="Images embedded at once.  [default: 32]")] = None,
    shard_size: Annotated[int | None, typer.Option(help="Rows in a Parquet shard.  [default: 4096]")] = None,
    decode: Annotated[
        str,
        typer.Option(help="full, or scaled: large JPEGs at a fraction of their size; auto: if your images allow it."),
    ] = "auto",
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only the I-th of N parts, for mio merge to join.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep vectors by content here, for other stores to use.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray: the workers of a Ray cluster, to the same rows.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster to join; without it, Ray runs on this machine.")
    ] = None,
    max_failures: Annotated[
        str | None, typer.Option(metavar="N|P%", help="More failed files than this: exit status 3.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try files again that failed before.")] = False,
    rehash: Annotated[bool, typer.Option("--rehash", help="Read every file again, to find changed bytes.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove the rows of files that are gone.")] = False,
    max_file_bytes: Annotated[
        int, typer.Option(metavar="N", help="A file of more bytes fails; counted unpacked, in archives too.")
    ] = 256 * 1024**2,
    max_pixels: Annotated[
        int | None,
        typer.Option(metavar="N", help="An image of more pixels fails.  [default: what the encoder's contract allows]"),
    ] = None,
    max_decode_seconds: Annotated[
        float, typer.Option(metavar="S", help="A file that takes longer to decode fails.")
    ] = 60.0,
    progress: Annotated[str, typer.Option(help="On standard error: auto, or json, an object a line.")] = "auto",
    as_json: Json = False,
) -> None:
    """Embed images, resumably.

    Writes a Parquet store with a row for every file, failed ones with the reason. The same command goes on after an
    interruption, and embeds only what is new or changed.

    Example:  mio embed encoder.mio photos -o embeddings

    Example:  mio embed encoder.mio photos -o part-1 --shard 1/2
    """
    from mio_export.console.progress import stderr_progress
    from mio_export.embedding import embed
    from mio_export.limits import Limits

    result = embed(
        bundle,
        sources,
        out,
        runtime=runtime,
        precision=precision,
        device=device,
        batch_size=batch_size,
        shard_size=shard_size,
        decode=decode,
        shard=shard,
        cache=cache,
        engine=engine,
        address=address,
        max_failures=max_failures,
        retry_failed=retry_failed,
        rehash=rehash,
        prune_vanished=prune,
        limits=Limits(max_file_bytes=max_file_bytes, max_pixels=max_pixels, decode_s=max_decode_seconds),
        progress=stderr_progress(progress),
    )
    for note in result.notes:
        echo(f"note: {note}", err=True)
    if as_json:
        print_json(asdict(result))
    else:
        echo(*result.summary(out))
    if result.num_failed and result.num_ok == 0:
        raise GateError(f"all {result.num_failed:,} files failed; their reasons: mio inspect {out}")

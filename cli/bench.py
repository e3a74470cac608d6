"""``mio bench``."""

from pathlib import Path
from typing import Annotated

import typer

from mio_export.cli.output import Json, echo, print_json, print_table


def run(
    bundle: Annotated[Path, typer.Argument(metavar="NAME.mio", help="A bundle.")],
    batch_size: Annotated[int, typer.Option(help="Images embedded at once.")] = 32,
    seconds: Annotated[float, typer.Option(help="How long to measure, all artifacts together.")] = 10.0,
    images: Annotated[
        str | None, typer.Option(metavar="SRC", help="Your images: also measure decoding, and all of mio embed.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    runtimes: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime",
            metavar="NAME",
            help="Measure this runtime only; repeatable.  [default: all but pt2, torchscript]",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how fast a bundle's artifacts are here.

    Every artifact that runs on this machine beside the encoder in eager PyTorch, in turns, so that what else the
    machine does hits all alike.

    Example:  mio bench encoder.mio --seconds 2

    Example:  mio bench encoder.mio --images photos --seconds 2
    """
    from mio_export.benchmark import bench
    from mio_export.embedding import measure

    result = bench(bundle, batch_size=batch_size, seconds=seconds, device=device, runtimes=runtimes)
    throughput = measure(bundle, images, batch_size=batch_size, seconds=seconds, device=device) if images else None
    if as_json:
        print_json(result.to_dict() | ({"images": throughput.to_dict()} if throughput else {}))
        return
    print_table(f"images/s at batch {batch_size}: median of {result.num_rounds} rounds", *result.table())
    lines = [*result.findings(), *(throughput.lines() if throughput else []), result.machine.describe()]
    echo("", *lines)

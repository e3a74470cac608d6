"""``mio``: the commands, and the one place where errors become exit codes."""

import signal
import sys
import traceback
import warnings
from types import FrameType
from typing import Annotated, Any

import typer

from mio_export.cli import (
    bench,
    deploy,
    doctor,
    embed,
    evaluate,
    export,
    inspect,
    merge,
    quickstart,
    search,
    serve,
    sign,
    train,
    verify,
)
from mio_export.console.terminal import discard_output, printable, printable_lines, reader_is_gone, tolerate_encodings
from mio_export.errors import Interrupted, MioError, one_line
from mio_export.extras import missing_extra

app = typer.Typer(
    name="mio",
    help="Train a self-supervised image encoder, export it with proof, embed folders of images.\n\n"
    "Start with:  mio quickstart",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)
for command in (quickstart, train, evaluate, export, verify, sign, bench, embed, merge, search, serve, inspect, doctor):
    app.command(command.__name__.rsplit(".", 1)[-1])(command.run)
app.add_typer(deploy.app, name="deploy")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"mio-export {version('mio-export')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of an error, after any command too.")
    ] = False,
) -> None:
    del version, debug


def main() -> None:
    """Run the command line; leave with the exit status that the error stands for."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    tolerate_encodings()
    # the decode contract has limits of its own; what Pillow finds odd below them is noise
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*")
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        sys.exit(app(standalone_mode=False))
    except (Exception, Interrupted) as error:  # noqa: BLE001 - the last line of defence prints one line
        sys.exit(_failed(error, debug=debug))
    except SystemExit as leave:  # what Typer makes of every broken pipe, a network's too
        if isinstance(leave.__context__, BrokenPipeError):
            sys.exit(_failed(leave.__context__, debug=debug))
        raise


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


def _failed(error: BaseException, *, debug: bool) -> int:
    """Report an error; return the exit status."""
    if isinstance(error, BrokenPipeError) and reader_is_gone():  # "mio … | head" has what it wanted
        discard_output()
        return 128 + signal.SIGPIPE
    if debug:
        sys.stderr.write("".join(f"{printable(line)}\n" for line in traceback.format_exc().splitlines()))
    try:
        return _report(error)
    except BrokenPipeError:
        discard_output()
        return 128 + signal.SIGPIPE


def _report(error: BaseException) -> int:
    """Print an error in a line or two; return the exit status."""
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # a wrong command line; Typer knows how to say so
        wrong: Any = error
        wrong.message = "\n".join(map(printable, str(getattr(error, "message", "")).split("\n")))
        wrong.show()
        return int(wrong.exit_code)
    if isinstance(error, Interrupted):
        return _say(
            "interrupted; what was finished is kept, run it again to go on (train: with --resume)", error.exit_code
        )
    if isinstance(error, ModuleNotFoundError):
        error = missing_extra(error) or error
    if isinstance(error, MioError):
        return _say(str(error), error.exit_code)
    if isinstance(error, OSError) and error.strerror:
        return _say(f"{error.strerror}: {error.filename}" if error.filename else error.strerror, 1)
    kind = type(error).__name__
    return _say(f"unexpected {kind}: {one_line(error)}\nrun it again with --debug for the traceback", 1)


def _say(message: str, exit_code: int) -> int:
    print(printable_lines(f"mio: {message}"), file=sys.stderr)  # noqa: T201
    return exit_code

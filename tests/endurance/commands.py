"""Run ``mio`` in forked processes: what it imports is there already, so a kill meets its work and not its start.

Each line on standard input is a request in JSON, each line on standard output its answer: ``{"run": [ARGUMENTS],
"without": [MODULES]}`` starts the command as if the modules were not installed and gives its process, ``{"wait":
PROCESS}`` waits for its end and gives its status, the number of the signal below zero if it was killed.
"""

import importlib
import json
import os
import sys
import traceback
import warnings

IMPORTED = ("mio_export.cli.main", "mio_export.embedding", "mio_export.parity", "mio_export.parity.gate")
IMPORTED += ("mio_export.models", "mio_export.console.progress", "pyarrow.parquet", "filelock", "pydantic", "torch")


def say(answer: object) -> None:
    """Write an answer."""
    os.write(1, json.dumps(answer).encode() + b"\n")


def run(arguments: list[str], without: list[str]) -> None:
    """Be the command, and end."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nowhere, descriptor)
    for name in [name for name in sys.modules if name.partition(".")[0] in without]:
        del sys.modules[name]
    sys.modules |= dict.fromkeys(without)
    sys.argv = ["mio", *arguments]
    status = 1
    try:
        sys.modules["mio_export.cli.main"].main()
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # noqa: BLE001 - a traceback is what is looked for
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    """Answer requests until there are none."""
    warnings.simplefilter("ignore")
    for name in IMPORTED:
        importlib.import_module(name)
    say("ready")
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            answer = os.fork()
            if not answer:
                run(request["run"], request["without"])
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        say(answer)


if __name__ == "__main__":
    main()

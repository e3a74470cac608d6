"""``mio doctor``."""

from dataclasses import asdict

from mio_export.cli.output import Json, print_json, print_pairs


def run(as_json: Json = False) -> None:
    """Say what this machine can run.

    Runtimes, devices and extras, and how to get the missing ones.

    Example:  mio doctor
    """
    from mio_export.runtimes.environment import diagnose

    findings = diagnose()
    if as_json:
        print_json([asdict(finding) for finding in findings])
        return
    marks = {True: "yes", False: "no "}
    print_pairs(
        (f"{marks[f.available]}  {f.name}", f.detail + (f"  ({f.remedy})" if f.remedy else "")) for f in findings
    )

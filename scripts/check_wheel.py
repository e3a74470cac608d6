"""Build the wheel, install it into a clean environment, and run the example of ``mio quickstart --help`` there.

In two epochs instead of thirty-six: what is tested is what the wheel carries; ``benchmarks/quickstart.py`` runs all.
"""

import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
UV = Path(sys.executable).parent / "uv"
SHORT = """
import sys
import mio_export.quickstart as quickstart
from mio_export.cli.main import main
from mio_export.train import recipe_from_dict
quickstart.recipe_from_dict = lambda values: recipe_from_dict({**values, "epochs": 2})
sys.argv[0] = "mio"
main()
"""


def run(*command: object, cwd: Path) -> str:
    """Run a command outside the project's folder; its standard output."""
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def main() -> None:
    """Fail if the wheel puts anything but ``mio_export`` into site-packages, or if quickstart fails in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(UV, "build", "--quiet", "--wheel", "--python", sys.executable, "--out-dir", folder, ROOT, cwd=folder)
        (wheel,) = folder.glob("*.whl")
        environment = folder / "environment"
        venv.create(environment, with_pip=False)
        python = environment / "bin" / "python"
        install = (UV, "pip", "install", "--quiet", "--python", python)
        run(*install, "--no-deps", wheel, cwd=folder)
        site = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
        found = sorted(
            path.name for path in site.iterdir() if not path.name.endswith(".dist-info") and path.name[0] != "_"
        )
        assert found == ["mio_export"], found
        run(*install, "--constraint", ROOT / "constraints.txt", f"{wheel}[all]", cwd=folder)
        mio = environment / "bin" / "mio"
        (example,) = re.findall(r"Example:  mio (.*)", run(mio, "quickstart", "--help", cwd=folder))
        start = time.monotonic()
        table = run(python, "-c", SHORT, *example.split(), cwd=folder)
        print(table)
        print(
            f"wheel {wheel.stat().st_size:,} bytes, quickstart in a clean environment {time.monotonic() - start:.0f} s"
        )


if __name__ == "__main__":
    main()

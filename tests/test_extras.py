"""What is imported is declared, and what a plain installation lacks is named by its extra."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from mio_export import open_runtime
from mio_export.embedding.inference_queue import InferenceQueue
from mio_export.errors import MissingBackendError
from mio_export.extras import EXTRAS, naming_extras

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {
    "PIL": "pillow",
    "google": "protobuf",
    "grpc": "grpcio",
    "sklearn": "scikit-learn",
    "tensorrt_rtx": "tensorrt-rtx-cu13",
    "yaml": "pyyaml",
}
"""Where a module's distribution has another name than the module."""
NOT_IMPORTED = {
    "httptools": "uvicorn reads HTTP with it",
    "onnxscript": "torch.onnx exports with it",
    "onnxruntime-gpu": "another build of onnxruntime",
    "pandas": "Ray Data hands batches over in it",
    "pyopenssl": "model-signing imports it",
    "tensorrt": "imported by name",
    "tensorrt-rtx-cu13": "imported by name",
    "model-signing": "imported by name",
}
PROVIDED = {"triton_python_backend_utils": "Triton brings it"}


def distribution(module):
    return DISTRIBUTIONS.get(module, module.replace("_", "-"))


def declared(requirements):
    """The distributions that requirements name, those of other extras of ours included."""
    found = set()
    for text in requirements:
        name = re.match(r"[A-Za-z0-9-]+", text).group()
        if name != "mio-export":
            found.add(name)
            continue
        for extra in re.search(r"\[(.*)\]", text).group(1).split(","):
            found |= declared(PROJECT["optional-dependencies"][extra])
    return found


def imported():
    found = {"fsspec"}  # by name
    for folder in ("mio_export", "cli", "models", "train"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module.partition(".")[0])
    return {module for module in found if module not in sys.stdlib_module_names and module != "mio_export"}


def test_what_is_imported_is_declared_and_nothing_else_is():
    base = declared(PROJECT["dependencies"])
    extras = set().union(*map(declared, PROJECT["optional-dependencies"].values()))
    needed = {distribution(module) for module in imported() - PROVIDED.keys()}
    assert needed - base - extras == set()
    assert (base | extras) - needed == set(NOT_IMPORTED) - needed
    assert base & {distribution(module) for modules in EXTRAS.values() for module in modules} == set()


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_table_of_extras_is_the_projects(extra):
    supports = {"pandas", "pyopenssl"}
    theirs = declared(PROJECT["optional-dependencies"][extra]) - supports
    ours = {distribution(module) for module in EXTRAS[extra]}
    torch = {distribution(module) for module in EXTRAS["torch"]}
    assert theirs - ours <= torch
    assert ours <= theirs


def test_everything_that_an_extra_installs_is_in_all_but_one_of_two_builds_and_what_needs_a_gpu():
    extras = PROJECT["optional-dependencies"]
    everything = declared(extras["all"])
    rest = set().union(*(declared(extras[e]) for e in extras if e not in ("gpu", "tensorrt", "tensorrt-rtx")))
    assert everything == rest
    assert "onnxruntime-gpu" not in everything


def run_without(modules, *arguments):
    """Run the command line in a process in which modules are not installed; its result, and what it imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({sorted(modules)!r}))\n"
        f"sys.argv = ['mio', *{[str(a) for a in arguments]!r}]\n"
        "import atexit\n"
        "atexit.register(lambda: print('LOADED', *{m.partition('.')[0] for m, v in sys.modules.items() if v}))\n"
        "from mio_export.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done, set(done.stdout.rpartition("LOADED")[2].split())


OPTIONAL = {module for modules in EXTRAS.values() for module in modules}
LIGHT = OPTIONAL - {"onnxruntime"}


def test_images_are_embedded_and_bundles_checked_without_any_extra_but_cpu(bundle, photos, tmp_path):
    done, loaded = run_without(LIGHT, "embed", bundle.path, photos, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "0 failed" in done.stdout
    assert loaded & (OPTIONAL | {"scipy", "jinja2", "grpc", "starlette"}) == {"onnxruntime"}
    for command in (("verify", bundle.path), ("inspect", tmp_path / "out"), ("doctor",)):
        done, loaded = run_without(OPTIONAL, *command)
        assert done.returncode == 0, done.stderr
        assert loaded & OPTIONAL == set()


def test_speed_is_measured_without_torch(bundle):
    done, _ = run_without(LIGHT, "bench", bundle.path, "--seconds", "0.1", "--batch-size", "1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"fastest proved: onnxruntime fp32, [\d,.]+ images/s\n", done.stdout)
    assert "torch fp32 does not run here: torch is not installed: pip install 'mio-export[torch]'" in done.stdout
    done, _ = run_without(OPTIONAL, "bench", bundle.path, "--seconds", "0.1", "--batch-size", "1")
    assert done.returncode == 5
    assert "'mio-export[cpu]'" in done.stderr


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("train --data {photos} -o {out}", "torch is not installed: pip install 'mio-export[train]'"),
        ("evaluate {out} --data {photos}", "torch is not installed: pip install 'mio-export[train]'"),
        ("export {out} -o {out}.mio", "onnx is not installed: pip install 'mio-export[export]'"),
        ("quickstart -o {out}", "onnx is not installed: pip install 'mio-export[all]'"),
        ("verify {bundle} --images {photos}", "torch is not installed: pip install 'mio-export[torch]'"),
        (
            "embed {bundle} {photos} -o {out} --runtime torch",
            "torch is not installed: pip install 'mio-export[torch]'",
        ),
        (
            "embed {bundle} {photos} -o {out} --runtime torchscript",
            "torch is not installed: pip install 'mio-export[torch]'",
        ),
    ],
)
def test_a_command_whose_extra_is_missing_names_it_in_one_line(bundle, photos, tmp_path, command, told):
    arguments = command.format(bundle=bundle.path, photos=photos, out=tmp_path / "out").split()
    done, loaded = run_without(LIGHT, *arguments)
    assert done.stderr.splitlines()[-1] == f"mio: {told}"
    assert "Traceback" not in done.stderr
    assert done.returncode == 5
    assert loaded & LIGHT == set()


def test_a_runtime_that_is_not_installed_is_named(bundle, photos, tmp_path):
    done, _ = run_without(OPTIONAL, "embed", bundle.path, photos, "-o", tmp_path, "--runtime", "onnxruntime")
    assert done.stderr.splitlines()[-1].endswith(
        "pip install 'mio-export[cpu]', or 'mio-export[gpu]' for an NVIDIA GPU"
    )
    assert done.returncode == 5


def test_the_library_names_the_extra_too(monkeypatch):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx')))\n"
        "import mio_export\n"
        "from mio_export.errors import MissingBackendError\n"
        "try: mio_export.export\n"
        "except MissingBackendError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "onnx is not installed: pip install 'mio-export[export]'\n"
    monkeypatch.setitem(sys.modules, "timm", None)
    told = pytest.raises(MissingBackendError, match=r"^timm is not installed: pip install 'mio-export\[timm\]'$")
    with told, naming_extras():
        import timm  # noqa: F401


def test_a_module_of_no_extra_keeps_its_own_error():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), naming_extras():
        import no_such_module  # noqa: F401


def test_batches_are_queued_for_a_gpu_without_torch(monkeypatch, bundle):
    monkeypatch.setitem(sys.modules, "torch", None)
    with open_runtime(bundle.path, "onnxruntime") as runtime, InferenceQueue(runtime, 2, ahead=True) as queue:
        queue.submit({"a": np.zeros(runtime.image_shape, np.uint8)})
        ((names, embeddings),) = queue.drain()
    assert (names, embeddings.shape) == (["a"], (1, runtime.embedding_dim))

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mio_export
from mio_export import errors

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"errors", "memory"},
    {"console", "extras", "files", "limits", "metrics", "settings"},
    {"image_formats", "schema"},
    {"preprocess", "sources", "store"},
    {"bundle", "decoding", "layouts", "pages", "sample"},
    {"evidence", "models"},
    {"inspection", "runtimes"},
    {"benchmark", "parity", "searching", "train"},
    {"embedding", "exporting"},
    {"quickstart", "serving"},
    {"cli"},
]
"""Rooms from the ground up; a room imports from floors below it only."""


def modules():
    for folder in ("mio_export", "models", "train", "cli"):
        yield from sorted((ROOT / folder).rglob("*.py"))  # rglob does not follow the links


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(path):
    relative = path.relative_to(ROOT)
    parts = relative.parts[1:] if relative.parts[0] == "mio_export" else relative.parts
    return parts[0].removesuffix(".py")


def test_rooms_import_downwards_only():
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    wrong = []
    for path in modules():
        name = room(path)
        if name == "__init__":
            continue
        for module in imports(path):
            if module.startswith("mio_export."):
                other = module.split(".")[1]
                if other != name and floor_of[other] >= floor_of[name]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert wrong == []


def test_the_root_stays_small():
    assert len(list((ROOT / "mio_export").glob("*.py"))) <= 13


@pytest.mark.parametrize(("library", "rooms"), [("pytorch_lightning", {"train"}), ("typer", {"cli"})])
def test_a_framework_stays_in_its_room(library, rooms):
    users = {room(path) for path in modules() if any(m.split(".")[0] == library for m in imports(path))}
    assert users == rooms


def test_every_import_is_absolute():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path


def test_the_three_rooms_are_links():
    for name in ("models", "train", "cli"):
        assert (ROOT / "mio_export" / name).is_symlink()
        assert (ROOT / "mio_export" / name).readlink() == Path("..") / name


@pytest.mark.parametrize("name", ["models", "train", "cli"])
def test_nothing_generic_can_be_imported(name, tmp_path):
    result = subprocess.run(
        [sys.executable, "-I", "-c", f"import {name}"], cwd=tmp_path, capture_output=True, check=False
    )
    assert result.returncode == 1
    assert b"ModuleNotFoundError" in result.stderr


@pytest.mark.parametrize("statement", ["import mio_export", "import mio_export.cli.main"])
def test_importing_it_loads_nothing_heavy(statement):
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "numpy", "onnxruntime", "onnx", "pyarrow", "pydantic", "PIL", "sklearn", "rich"}
    assert heavy & set(loaded) == set()


PUBLIC = [
    "GateError",
    "MINCLoss",
    "MIOLoss",
    "MioError",
    "MissingBackendError",
    "OutOfMemoryError",
    "Preprocess",
    "RemoteEncoder",
    "SpaceError",
    "SpectralContrastiveLoss",
    "UsageError",
    "answer",
    "bench",
    "embed",
    "evaluate",
    "export",
    "load_bundle",
    "load_embeddings",
    "load_encoder",
    "load_images",
    "merge",
    "open_data",
    "open_runtime",
    "search",
    "train",
    "verify",
    "write_gallery",
    "write_layout",
]


def test_public_names_are_these():
    assert mio_export.__all__ == PUBLIC
    for name in PUBLIC:
        assert callable(getattr(mio_export, name)), name
        assert name == "train" or getattr(mio_export, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mio_export.nothing


def test_the_whole_tree_of_errors_is_public():
    tree = [errors.MioError]
    for error in tree:
        tree += error.__subclasses__()
    assert {error.__name__ for error in tree if error.__module__ == errors.__name__} <= {*PUBLIC}


@pytest.mark.parametrize("first", ["", "import mio_export.train; ", "from mio_export import evaluate; "])
def test_train_is_a_package_that_can_be_called(first):
    code = f"{first}from mio_export import MioError, train; import mio_export; assert train is mio_export.train; "
    code += (
        "from mio_export.train import Recipe\ntry: train('none.yaml', 'none', 'run')\nexcept MioError: print('told')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "told\n", done.stderr


def test_the_docs_use_public_names_only():
    found = set()
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "mio_export").rglob("*.json")):
        text = path.read_text()
        for module, names in re.findall(r"from (mio_export[\w.]*) import ([\w, ]+)", text):
            assert module == "mio_export", f"{path}: from {module} import {names}"
            found |= {name.strip() for name in names.split(",")}
        found |= set(re.findall(r"`mio_export\.(\w[\w.]*)", text))
    assert len(found) > 15
    assert found <= {*PUBLIC}

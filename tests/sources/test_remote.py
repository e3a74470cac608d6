"""Files behind URLs: real servers on this machine, and fsspec's file system in memory."""

import os
import re
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mio_export.errors import UsageError
from mio_export.sources import list_sources
from mio_export.sources.remote import _without_dots


class Web(ThreadingHTTPServer):
    """A server of files, which counts requests and can refuse them."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.files, self.tags, self.refuses, self.adds, self.requests = {}, {}, None, b"", []
        self.knows_ranges = True

    def handle_error(self, request, client_address):
        """Say nothing of clients that hang up, as they do when they have read enough."""

    def url(self, path, user=""):
        return f"http://{user}127.0.0.1:{self.server_port}{path}"


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(has_body=False)

    def do_GET(self):
        self.answer(has_body=True)

    def answer(self, *, has_body):
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path))
        data, asked = self.server.files.get(path), self.headers.get("Range")
        refused = self.server.refuses if has_body else None
        if data is None or refused:
            self.send_response(refused or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = asked if self.server.knows_ranges else None
        first, last = (int(end) for end in asked.removeprefix("bytes=").split("-")) if asked else (0, len(data) - 1)
        body = data[first : last + 1] + (self.server.adds if has_body else b"")
        self.send_response(206 if asked else 200)
        if path in self.server.tags:
            self.send_header("ETag", self.server.tags[path])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if has_body:
            self.wfile.write(body)


@pytest.fixture
def web():
    server = Web()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def memory():
    """The file system in memory, empty again afterwards."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def tar_of(files, **options):
    out = BytesIO()
    with tarfile.open(fileobj=out, mode=options.pop("mode", "w")) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return out.getvalue()


def zip_of(files):
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()


def problems(listing):
    return {file.key: file.problem for file in listing.files if file.problem}


def test_a_list_behind_http_names_files_beside_it(web):
    web.files |= {
        "/photos/0.png": b"0",
        "/photos/sub//1.png": b"1",
        "/up.png": b"up",
        "/photos/a%20b%23%2520%FF.png": b"odd",
    }
    lines = [b"0.png", b"sub//1.png", b"../up.png", b"../../../up.png", b"/up.png", b"a b#%20\xff.png", b"gone.png"]
    web.files["/photos/list.txt"] = b"\n".join(lines)
    listing = list_sources([web.url("/photos/list.txt?sig=SECRET", user="user:SECRET@")])
    assert {file.key: file.read(100)[0] for file in listing.files if not file.problem} == {
        "0.png": b"0",
        "sub//1.png": b"1",
        "../up.png": b"up",
        "../../../up.png": b"up",
        "/up.png": b"up",
        "a b#%20\\xff.png": b"odd",
    }
    assert list(problems(listing)) == ["gone.png"]
    assert "SECRET" not in problems(listing)["gone.png"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/a/../b", "/b"),
        ("/../b", "/b"),
        ("a/../../b", "b"),
        ("/a//b/./c", "/a//b/c"),
        ("/..", ""),
    ],
)
def test_dots_in_a_path_never_lead_above_its_root(path, expected):
    assert _without_dots(path) == expected


def test_what_is_secret_in_a_url_reaches_neither_rows_nor_notes_nor_errors(web):
    web.files["/photos.zip"] = zip_of({"a.png": b"a"})
    url = web.url("/photos.zip?sig=SECRET", user="user:SECRET@")
    (file,) = list_sources([url]).files
    web.refuses = 403
    with pytest.raises(OSError, match="403, message='Forbidden'") as caught:
        file.read()
    assert "SECRET" not in f"{caught.value!r} {caught.value.__context__!r} {caught.value.__cause__!r}"
    listing = list_sources([url])
    assert "403, message='Forbidden'" in problems(listing)["photos.zip"]  # and not that it is no zip file
    assert "SECRET" not in f"{problems(listing)} {listing.notes()}"
    web.refuses = None
    with pytest.raises(UsageError, match=r"^http://127.0.0.1:\d+/gone.zip cannot be read: ") as missing:
        list_sources([web.url("/gone.zip?sig=SECRET", user="user:SECRET@")])
    assert "SECRET" not in f"{missing.value!r} {missing.value.__context__!r} {missing.value.__cause__!r}"
    with pytest.raises(UsageError) as odd:
        list_sources(["http://user:SECRET@[bad/photos.zip?sig=SECRET"])
    assert "SECRET" not in str(odd.value)


@pytest.mark.parametrize("scheme", ["my_http", " http", "cached:http"])
def test_a_url_with_a_slip_in_it_shows_no_secret_either(scheme):
    with pytest.raises(UsageError, match=re.escape(f"{scheme}://h/a.zip is not a folder of images")) as caught:
        list_sources([f"{scheme}://u:SECRET@h/a.zip?sig=SECRET"])
    assert "SECRET" not in str(caught.value)


def test_a_server_that_refuses_or_is_down_is_not_called_a_missing_file(web):
    with pytest.raises(UsageError, match=r"/a\.zip cannot be read: 404, message='Not Found'"):
        list_sources([web.url("/a.zip")])
    with pytest.raises(UsageError, match=r"/a\.zip cannot be read: Cannot connect to host"):
        list_sources(["http://127.0.0.1:1/a.zip"])


def test_a_url_behind_a_cache_of_fsspecs_is_a_source(web):
    web.files["/a.zip"] = zip_of({"a.png": b"content"})
    listing = list_sources(["simplecache::" + web.url("/a.zip")])
    assert [(file.key, file.read()[0]) for file in listing.files] == [("a.png", b"content")]


@pytest.mark.parametrize(("name", "pack"), [("a.tar", tar_of), ("a.zip", zip_of)])
def test_an_archive_behind_a_url_that_changed_is_not_read_at_old_positions(web, memory, name, pack):
    """Of the same length, and with the same times within."""
    old, new = pack({"a.bmp": b"red ", "b.bmp": b"blue"}), pack({"a.bmp": b"blue", "b.bmp": b"red "})
    memory.pipe_file(f"/{name}", old)
    web.files[f"/{name}"], web.tags[f"/{name}"] = old, '"1"'
    for url in (f"memory://{name}", web.url(f"/{name}")):
        files = list_sources([url]).files
        assert files[0].read()[0] == b"red "
        memory.pipe_file(f"/{name}", new)
        web.files[f"/{name}"], web.tags[f"/{name}"] = new, '"2"'
        for file in files:
            with pytest.raises(
                OSError, match=rf"^({name} changed since it was listed; run it again|damaged in the zip)"
            ):
                file.read()
        memory.pipe_file(f"/{name}", old)
        web.files[f"/{name}"], web.tags[f"/{name}"] = old, '"1"'


def test_a_compressed_tar_is_looked_at_again_only_when_it_is_read(web):
    web.files["/a.tar.gz"], web.tags["/a.tar.gz"] = (
        tar_of({f"{n}.png": b"x" * 9 for n in range(50)}, mode="w:gz"),
        '"1"',
    )
    listing = list_sources([web.url("/a.tar.gz")])
    web.requests.clear()
    for file in listing.files:
        file.read()
    assert len(web.requests) <= 2
    web.tags["/a.tar.gz"] = 'W/"weak tags differ from server to server"'
    assert len(list_sources([web.url("/a.tar.gz")]).files) == 50


def test_a_file_behind_a_url_has_the_time_of_what_was_read(memory):
    memory.pipe_file("/photos/a.png", b"old")
    (file,) = list_sources(["memory://photos"]).files
    memory.pipe_file("/photos/a.png", b"new")
    data, mtime_ns = file.read()
    assert data == b"new"
    assert list_sources(["memory://photos"]).files[0].mtime_ns == mtime_ns > file.mtime_ns


def test_no_more_is_read_of_a_server_than_the_limit(web, memory):
    web.files |= {"/list.txt": b"a.png\nb.png", "/a.png": b"x" * 1000, "/b.png": b""}
    file, empty = list_sources([web.url("/list.txt")]).files
    assert file.read(1000) == (b"x" * 1000, 0)
    assert empty.read(1000) == (b"", 0)
    with pytest.raises(OSError, match=r"has 1,000 bytes, more than the limit of 999 \(--max-file-bytes\)"):
        file.read(999)
    web.adds = b"x" * 1_000_000
    with pytest.raises(OSError, match="more than the limit of 1,000 "):
        file.read(1000)
    memory.pipe_file("/photos/a.png", b"x" * 1000)
    (file,) = list_sources(["memory://photos"]).files
    assert file.read(1000)[0] == b"x" * 1000
    memory.pipe_file("/photos/a.png", b"x" * 2000)
    assert len(file.read(5000)[0]) == 2000
    with pytest.raises(OSError, match="more than the limit of 1,500 "):
        file.read(1500)


def test_an_archive_of_a_server_that_knows_no_ranges_is_one_failed_row(web):
    web.files["/a.zip"], web.knows_ranges = zip_of({"a.png": bytes(30_000_000)}), False
    (file,) = list_sources([web.url("/a.zip")]).files
    assert re.match(r"cannot be listed: a.zip: asked for .* bytes, got .*; it must serve ranges", file.problem)


class Closed(MemoryFileSystem):
    """Some of whose folders cannot be listed."""

    protocol = "closed"
    store: dict = {}  # noqa: RUF012 - as its parent has it
    cachable = False
    errors: dict = {}  # noqa: RUF012 - as above

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("closed://", "memory://"))

    def ls(self, path, detail=True, **options):
        if error := self.errors.get(path.rstrip("/").rpartition("/")[2]):
            raise error
        return super().ls(path, detail, **options)


def test_a_folder_behind_a_url_that_cannot_be_listed_is_named(memory):
    fsspec.register_implementation("closed", Closed, clobber=True)
    for name in ("open/a.png", "first/b.png", "second/c.png", "second/deep/d.png"):
        Closed().pipe_file(f"/photos/{name}", b"x")
    try:
        Closed.errors |= {
            "first": PermissionError(13, "Permission denied"),
            "second": RuntimeError("no s3://k:SECRET@b"),
        }
        listing = list_sources(["closed://photos"])
        assert [file.key for file in listing.files] == ["open/a.png"]
        assert listing.unlisted == [
            "first: cannot be listed (Permission denied)",
            "second: cannot be listed (no s3://b)",
        ]
        Closed.errors["photos"] = PermissionError(13, "Permission denied")
        with pytest.raises(UsageError, match=r"^photos cannot be listed: Permission denied$"):
            list_sources(["closed://photos"])
    finally:
        Closed.errors.clear()
        Closed.store.clear()


def test_links_behind_a_url_are_followed_to_files_and_named_to_folders(tmp_path):
    (tmp_path / "photos" / "real").mkdir(parents=True)
    (tmp_path / "photos" / "real" / "a.png").write_bytes(b"a")
    (tmp_path / "photos" / "b.png").symlink_to("real/a.png")
    (tmp_path / "photos" / "c").symlink_to("real")
    (tmp_path / "photos" / "d.png").symlink_to("gone.png")
    os.utime(tmp_path / "photos" / "real" / "a.png", (1, 11_000_000_000))
    listing = list_sources([f"local://{tmp_path}/photos"])
    assert {file.key: file.read() for file in listing.files if not file.problem} == {
        "b.png": (b"a", 0),
        "real/a.png": (b"a", 0),
    }
    assert list(problems(listing)) == ["d.png"]
    assert listing.circles == ["c: a link to a folder behind a URL, not followed"]

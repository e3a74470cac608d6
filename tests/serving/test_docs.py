"""The server's own page and description, against the application that they describe."""

import asyncio
import json
import re

import pytest

from mio_export.runtimes import choose
from mio_export.serving.engine import Engine
from mio_export.serving.http import http_app
from mio_export.serving.metrics import Journal
from mio_export.serving.options import ServeOptions


@pytest.fixture(scope="module")
def ask(bundle):
    """Call the application: status, headers and body."""
    options, journal = ServeOptions(access_log=False), Journal(access_log=False)
    engine = Engine(bundle, choose(bundle, "onnxruntime"), options, journal)
    app = http_app(engine, options, journal)

    async def answered(method, path, body):
        sent, received = [], [{"type": "http.request", "body": body}]
        scope = {"type": "http", "http_version": "1.1", "method": method, "scheme": "http", "server": ("here", 80)}
        scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": []}

        async def receive():
            return received.pop() if received else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:])

    yield lambda method, path, body=b"": asyncio.run(answered(method, path, body))
    engine.close()


@pytest.fixture(scope="module")
def description(ask):
    return json.loads(ask("GET", "/openapi.json")[2])


def test_every_reference_of_the_description_leads_somewhere(description):
    for reference in set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(description))):
        place = description
        for step in reference.split("/"):
            place = place[step]


def test_every_call_is_answered_as_it_is_described(ask, description):
    for path, item in description["paths"].items():
        for method in {"get", "post"} & item.keys():
            responses = item[method]["responses"]
            for place in {path.replace("{model}", "encoder"), path.replace("{model}", "encoder/versions/1")}:
                status, headers, body = ask(method.upper(), place, b"{" if method == "post" else b"")
                assert str(status) in responses, place
                if method == "post":
                    assert status == 400, "the body is no JSON"
                    continue
                described = responses[str(status)].get("content", {})
                assert headers.get("content-type", "").partition(";")[0] in (*described, ""), place
                if "application/json" in described and path != "/openapi.json":
                    assert_fits(description, described["application/json"]["schema"], json.loads(body))


def assert_fits(description, schema, value):
    if "$ref" in schema:
        schema = description["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if "properties" in schema:
        assert value.keys() <= schema["properties"].keys()
        for name, inner in value.items():
            assert_fits(description, schema["properties"][name], inner)
    for item in value if "items" in schema else ():
        assert_fits(description, schema["items"], item)


def test_what_is_not_there_is_not_described(ask, description):
    assert ask("GET", "/v3")[0] == 404
    assert ask("GET", "/v2/models/other")[0] == 404
    (model,) = description["paths"]["/v2/models/{model}/infer"]["parameters"]
    assert model["schema"]["enum"] == ["encoder", "encoder_pixels"], "of this very bundle"


def test_the_page_needs_nothing_from_elsewhere(ask):
    status, headers, page = ask("GET", "/docs")
    assert (status, headers["content-security-policy"]) == (200, "default-src 'self'")
    assert "NAME" not in page.decode()
    named = re.findall(r'(?:src|href)="([^"#]+)"', page.decode())
    assert {"docs.css", "docs.js", "openapi.json"} <= set(named)
    for name in named:
        status, headers, body = ask("GET", f"/{name}")
        assert status == 200, name
        links = re.findall(rb"https?://[^\s\"'\\)/]+", body)
        assert {*links} <= {b"http://127.0.0.1:8000"}, name
    assert not re.search(r"<script(?! src)|<style|style=|onclick=", page.decode()), "the policy forbids it"

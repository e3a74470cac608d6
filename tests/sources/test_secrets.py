import pytest

from mio_export.sources.secrets import without_secrets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "403, message='Forbidden', url='http://h:8/photos.zip?sig=SECRET'",
            "403, message='Forbidden', url='http://h:8/photos.zip'",
        ),
        ("http://user:SECRET@h:80/a.zip?sig=SECRET#SECRET cannot be read", "http://h:80/a.zip cannot be read"),
        ("(s3://key:SEC/SECRET@bucket/a.jpg)", "(s3://bucket/a.jpg)"),
        ("http://u@h:SECRET@host/a", "http://host/a"),
        ("zip://a.png::http://u:SECRET@h/a.zip?SECRET", "zip://a.png::http://h/a.zip"),
        ("http://[fe80::1]:80/a?x=SECRET", "http://[fe80::1]:80/a"),
        ("http://h/my photo.jpg?sig=SECRET&x=SECRET", "http://h/my photo.jpg"),
        ("URL('https://h/a?X-Amz-Signature=SECRET')", "URL('https://h/a')"),
        ("http%3A%2F%2Fh%2Fa%3Fsig%3DSECRET", "http%3A%2F%2Fh%2Fa%3Fsig%3D***"),
        ("//u:SECRET@host/a", "//host/a"),
        ("{'Authorization': 'Bearer SECRET', 'Range': 'bytes=0-1'}", "{'Authorization': '***', 'Range': 'bytes=0-1'}"),
        ("Authorization: Basic SECRET==", "Authorization: ***"),
        (
            "'Cookie': 'a=SECRET; b=SECRET', 'X-Amz-Security-Token': 'SECRET'",
            "'Cookie': '***', 'X-Amz-Security-Token': '***'",
        ),
        ("AccountKey=SECRET;x", "AccountKey=***"),
        ("token=SECRET, next", "token=***, next"),
        ("Bearer SECRETSECRETSECRET", "Bearer ***"),
    ],
)
def test_what_is_secret_in_a_text_about_a_url_is_taken_out(text, expected):
    assert without_secrets(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a.jpg cannot be read: no such key",
        "http://h/a/b@2x.png is missing (404)",
        "basic authentication failed; a token is missing",
        "C:\\photos: what? nothing",
        "[Errno 2] No such file or directory: '/photos/a.jpg'",
    ],
)
def test_other_text_stays_as_it_is(text):
    assert without_secrets(text) == text


def test_a_long_text_costs_no_more_than_its_length():
    for text in ("a" * 200_000 + "://" + "b@" * 100_000, "x-" * 100_000, "token" * 50_000, "http://" * 50_000):
        # a pattern that goes back would take minutes
        assert without_secrets(text + " http://h/a?sig=SECRET").endswith(" http://h/a")

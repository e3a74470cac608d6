"""What may be secret in a text about a URL, taken out before the text reaches a row, a log, an error or a page."""

import re

_SCHEME = r"(?<![a-z0-9])[a-z][a-z0-9+.\-]{0,30}://"
_URL = re.compile(rf"({_SCHEME})((?:(?!::[a-z][a-z0-9+.\-]{{0,30}}:)\S)*)", re.IGNORECASE)
"""Up to white space, or to the next of the URLs that fsspec joins with two colons."""
_HOST = re.compile(r"\[[0-9a-f:.%]*\](?::\d*)?|[^:\[\]]*(?::\d*)?", re.IGNORECASE)
_USER = re.compile(r"//[^\s/@]{1,500}:[^\s/@]{0,500}@")
_QUERY = re.compile(r"\?[\w.%~\-\[\]$]{1,200}=\S*")
"""A query, also where a blank in the URL's path hides what it belongs to."""
_WORDS = (
    "authorization|signature|credentials?|token|secret|password|passwd|cookie|api[_-]?key|access[_-]?key(?:id)?"
    "|account[_-]?key|private[_-]?key|session[_-]?(?:id|key)"
)
_NAMED = re.compile(
    rf"(?:(?<![\w\-])|(?<=%3F)|(?<=%26))([\w\-]{{0,40}}(?:{_WORDS})|pwd|sig|sas|x-(?:amz|goog|ms)-[\w\-]{{1,60}})"
    r"([\"']?\s{0,9}(?:=|:(?!:)|%3D)\s{0,9})"
    r"(\"[^\"]*\"|'[^']*'|(?:(?:bearer|basic|digest|token|aws4-hmac-sha256|sharedkey(?:lite)?)\s{1,9})?[^\s\"'<>]+)",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(bearer)\s{1,9}[\w\-.~+/]{12,}=*", re.IGNORECASE)
_CLOSING = "\"')]}>,.;:"
_HIDDEN = "***"


def without_secrets(text: str) -> str:
    """Return a text without user, password, query and fragment of every URL, and without the values of secret fields.

    Such fields are headers and parameters like ``Authorization``, ``X-Amz-Signature``, ``sig``, ``token``; their names
    stay. Anything that a library says of a URL passes through here.
    """
    text = _URL.sub(lambda match: match[1] + _place(match[2]), text)
    text = _USER.sub("//", text)
    text = _QUERY.sub(lambda match: _closing(match[0]), text)
    text = _NAMED.sub(lambda match: match[1] + match[2] + _hidden(match[3]), text)
    return _BEARER.sub(lambda match: f"{match[1]} {_HIDDEN}", text)


def _place(rest: str) -> str:
    """Return host and path of what comes behind ``://``, and what closes a bracket or a sentence."""
    end = _closing(rest)
    host, slash, below = re.split(r"[?#]", rest.removesuffix(end), maxsplit=1)[0].partition("/")
    host = host.rpartition("@")[2]
    if "@" in rest and not _HOST.fullmatch(host):
        # no host looks like that: a password that holds a slash, a question mark or a hash sign
        return re.split(r"[?#]", rest.rpartition("@")[2], maxsplit=1)[0]
    return host + slash + below + end


def _hidden(value: str) -> str:
    """Hide a value, in its quotes, or before what closes a bracket or a sentence."""
    if value[0] in "\"'":
        return value[0] + _HIDDEN + value[0]
    return _HIDDEN + _closing(value)


def _closing(text: str) -> str:
    return text[len(text.rstrip(_CLOSING)) :]


__all__ = ["without_secrets"]

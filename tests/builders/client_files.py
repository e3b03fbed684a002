"""Builds the content of clients' files, and the forms that upload them."""

import json
from typing import Any

REQUEST: dict[str, Any] = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "tuned", "messages": []},
}


def batch_line(**changes: Any) -> bytes:
    """Return a request's line. A change to None removes the field."""
    return json.dumps({key: value for key, value in (REQUEST | changes).items() if value is not None}).encode() + b"\n"


EXAMPLE = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
CONTENT = b'{"messages": [{"role": "user", "content": "\xc3\xa9"}]}\n'
BOUNDARY = "b0und"
END = f"--{BOUNDARY}--\r\n".encode()
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def part(name: str, content: bytes, filename: bytes | None = None) -> bytes:
    """Return one part of a form."""
    quoted = b"" if filename is None else b'; filename="' + filename + b'"'
    head = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"'.encode()
    return head + quoted + b"\r\n\r\n" + content + b"\r\n"


def form(filename: bytes | None = b"a.jsonl", content: bytes = CONTENT, purpose: bytes = b"fine-tune") -> bytes:
    """Return a complete form."""
    return part("purpose", purpose) + part("file", content, filename) + END

"""Checks for HEALTHCHECK whether the server of `$SVC_HOME` is alive; the exit code is 0 or 1.

It connects to the socket in the home, independently of port, certificate and keys. It uses only the
standard library, because it runs every 30 seconds.
"""

import json
import os
import socket
import sys
from http.client import HTTPConnection
from pathlib import Path


class _Local(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=5)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def main() -> int:
    try:
        lock = json.loads((Path(os.environ["SVC_HOME"]) / "serve.lock").read_text("utf-8"))
        connection = _Local(lock["socket"])
        connection.request("GET", "/health/live")
        return 0 if connection.getresponse().status == 200 else 1
    except (OSError, ValueError, KeyError) as error:
        print(f"the server is not responding: {error!r}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

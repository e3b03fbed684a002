"""Whether the server of `$SVC_HOME` is alive, for HEALTHCHECK: asks through the socket in the home, whatever the port,
the certificate and the keys are. Standard library only: it runs every half minute. Exit code 0 or 1."""

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
        held = json.loads((Path(os.environ["SVC_HOME"]) / "serve.lock").read_text("utf-8"))
        connection = _Local(held["socket"])
        connection.request("GET", "/health/live")
        return 0 if connection.getresponse().status == 200 else 1
    except (OSError, ValueError, KeyError) as error:
        print(f"the server does not answer: {error!r}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""A fast-starting, standard-library fake of vLLM's server in a child process: `fake_server.py MODE SOCKET`.

Modes: ready, crash, hang (never listens), stubborn (ignores SIGTERM), family (has a child of its own),
late (begins its child while it is being ended).
"""

import http.server
import signal
import socketserver
import subprocess
import sys
import time


class Handler(http.server.BaseHTTPRequestHandler):
    """A handler that reports healthy for every request."""

    protocol_version = "HTTP/1.1"  # as vLLM's

    def do_GET(self) -> None:
        """Respond with status 200."""
        self.send_response(200)
        self.send_header("content-length", "0")
        self.send_header("connection", "close")  # one connection at a time
        self.end_headers()

    def address_string(self) -> str:
        """Return a fixed text, because a Unix socket has no address."""
        return "socket"


def begin_child() -> None:
    """Start a child process that outlives this one and inherits its open files."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    print(f"child {child.pid}", flush=True)


def begin_child_and_end(*_: object) -> None:
    """Exit like an engine that is killed during startup, after starting a child."""
    begin_child()
    sys.exit()


def main(mode: str, socket: str) -> None:
    """Print vLLM's log lines and start listening."""
    print("non-default args: {}", flush=True)
    if mode == "crash":
        print("INFO loading\nValueError: bad weights\nshutting down", flush=True)
        sys.exit(3)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode == "family":
        begin_child()
    if mode == "late":
        signal.signal(signal.SIGTERM, begin_child_and_end)
    if mode == "hang":
        time.sleep(60)
    print("Starting to load model", flush=True)
    with socketserver.UnixStreamServer(socket, Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A connection between a server and PostgreSQL that a test can cut, as when a machine loses its network."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_NAME = ".s.PGSQL.5432"


@dataclass
class Link:
    """Passes on the connections that are made to a socket in its folder. While it is cut, there are none.

    Attributes:
        folder: folder of the socket for clients. As in libpq's `host`, its name identifies the server.
        to: folder of PostgreSQL's own socket.
    """

    folder: Path
    to: Path
    _is_cut: bool = field(default=False, init=False)
    _open: set[socket.socket] = field(default_factory=set, init=False)

    @contextmanager
    def running(self) -> Iterator["Link"]:
        """Pass on connections during the `with` block."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.folder / _NAME))
            listener.listen()
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
            try:
                yield self
            finally:
                with suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)
                self._close_all()
                os.unlink(self.folder / _NAME)

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Break all connections and refuse new ones during the `with` block."""
        self._is_cut = True
        self._close_all()
        try:
            yield
        finally:
            self._is_cut = False

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # closed
                return
            if self._is_cut:
                client.close()
                continue
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(str(self.to / _NAME))
            except OSError:
                client.close()
                server.close()
                continue
            self._open |= {client, server}
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(65536):
                target.sendall(content)
        self._close(source, target)

    def _close_all(self) -> None:
        self._close(*list(self._open))

    def _close(self, *sockets: socket.socket) -> None:
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
            self._open.discard(each)

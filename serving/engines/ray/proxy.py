"""Passes bytes between TLS connections and an engine's Unix socket, without inspecting them.

When one side closes its connection, the other side's connection is closed too, so that an engine stops working on an
answer whose client has disconnected.
"""

import asyncio
from pathlib import Path

from svc.engine.address import connect_to_socket

_PIECE = 2**16  # bytes


async def pass_bytes(socket: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Open a separate connection to the engine for an incoming connection from the server, and pass bytes in both
    directions until one side closes.

    Args:
        socket: the engine's Unix socket.
    """
    try:
        back_reader, back_writer = await asyncio.open_unix_connection(sock=await connect_to_socket(str(socket)))
    except OSError:
        writer.transport.abort()
        return
    await asyncio.gather(_pass(reader, back_writer), _pass(back_reader, writer))


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(_PIECE):
            writer.write(data)
            await writer.drain()
        writer.close()  # sends the rest of an answer first
    except OSError:
        writer.transport.abort()

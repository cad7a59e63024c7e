"""A network with a delay between an engine and its drafter, where there is none.

``python -m cluster.bench.delayed_link HOST:PORT SECONDS`` prints a port of its own, and passes on
what comes there, both ways, each byte so many seconds later, until its standard input ends. Nothing
bounds the bytes under way: a delay is no lack of bandwidth.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time

from cluster.bench.port_process import HOST, PortProcess

_CHUNK_BYTES = 1 << 16


class DelayedLink(PortProcess):
    """A detour to an address while a ``with`` block runs.

    Args:
        address: ``host:port`` that it leads to.
        delay_s: seconds each way, not negative.

    Attributes:
        address: ``host:port`` of its beginning.

    Raises:
        DsparkError: it does not start.
    """

    def __init__(self, address: str, delay_s: float) -> None:
        super().__init__("the delayed link", "cluster.bench.delayed_link", address, str(delay_s))


async def serve_link(address: str, delay_s: float) -> asyncio.Server:
    """Listens on a free port of this machine for what is to be passed on to ``address``."""
    host, _, port = address.rpartition(":")

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(
            _pass_on(reader, there_writer, delay_s), _pass_on(there_reader, writer, delay_s)
        )

    return await asyncio.start_server(connect, HOST, 0)


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float
) -> None:
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    delivery = asyncio.create_task(_deliver(queue, writer))
    data = b"-"
    while data:
        try:
            data = await reader.read(_CHUNK_BYTES)
        except ConnectionError:
            data = b""
        queue.put_nowait((time.monotonic() + delay_s, data))
    await delivery


async def _deliver(queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
    """Writes each piece when it is due; an empty one is the end."""
    with contextlib.suppress(ConnectionError):
        while True:
            due, data = await queue.get()
            await asyncio.sleep(max(due - time.monotonic(), 0.0))
            if not data:
                break
            writer.write(data)
            await writer.drain()
    writer.close()


async def _serve(address: str, delay_s: float) -> None:
    server = await serve_link(address, delay_s)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until whoever started this is gone
    server.close()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], float(sys.argv[2])))

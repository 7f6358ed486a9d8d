"""A network link of chosen latency and bandwidth between two ports of this machine."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

from shadowpeft.errors import ConfigError

HOST = "127.0.0.1"


class Link:
    """Passes TCP connections on, late and at limited speed, and counts what passes.

    Every byte arrives half a round trip after it was sent, plus the time it takes on the wire behind all bytes before
    it; a new connection costs one round trip before anything passes, as TCP's handshake does.

    Args:
        target: port to pass on to.
        round_trip_ms: of the link alone.
        megabits: a second, for each direction; None: unlimited.
    """

    def __init__(self, target: int, *, round_trip_ms: float = 0.0, megabits: float | None = None) -> None:
        if round_trip_ms < 0 or (megabits is not None and megabits <= 0):
            raise ConfigError(f"a link of {round_trip_ms} ms and {megabits} Mbit/s cannot be; expected 0 ms or more")
        self._target, self._half = target, round_trip_ms / 2000
        self._seconds_a_byte = 0.0 if megabits is None else 8 / (megabits * 1e6)
        self._is_free = {"up": 0.0, "down": 0.0}
        self.num_bytes = {"up": 0, "down": 0}
        self.num_connections = 0

    async def serve(self) -> asyncio.Server:
        """Listens on a free port of this machine."""
        return await asyncio.start_server(self._connect, HOST, 0)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        writers = [writer]
        try:
            await asyncio.sleep(2 * self._half)
            far_reader, far_writer = await asyncio.open_connection(HOST, self._target)
            writers.append(far_writer)
            await asyncio.gather(self._pump(reader, far_writer, "up"), self._pump(far_reader, writer, "down"))
        except (OSError, asyncio.CancelledError):
            # Nobody listens behind the link: the near side sees its connection closed. Or the link is taken down:
            # asyncio's own callback on this task would print a traceback if it ended as cancelled.
            pass
        finally:
            for one in writers:
                one.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sending = asyncio.create_task(self._send(queue, writer))
        data = b"-"
        while data:
            try:
                data = await reader.read(65536)
            except OSError:
                data = b""
            self.num_bytes[way] += len(data)
            self._is_free[way] = max(self._is_free[way], time.monotonic()) + len(data) * self._seconds_a_byte
            queue.put_nowait((self._is_free[way] + self._half, data))
        await sending

    async def _send(self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        data = b"-"
        with contextlib.suppress(OSError):
            while data:
                due, data = await queue.get()
                await asyncio.sleep(max(due - time.monotonic(), 0))
                writer.write(data)
                await writer.drain()
        writer.close()


@contextlib.contextmanager
def running_link(link: Link) -> Iterator[int]:
    """The link in a thread of its own, as the port it listens on."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="link", daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(link.serve(), loop).result(10)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(_stop(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _stop(server: asyncio.Server) -> None:
    server.close()
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0.05)  # closed transports let go of their sockets in the next rounds of the loop

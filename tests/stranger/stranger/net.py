"""Ports, a TCP proxy that misbehaves on request, HTTP GET, and the bytes of Redis's protocol."""

import asyncio
import random
import socket

# Below Linux's ephemeral range, so that no outgoing connection takes one meanwhile.
PORTS = range(20_000, 32_000)
_given: set[int] = set()


def free_port(above: int = 0) -> int:
    """A port that nobody listens on and that this process was not given before."""
    for _ in range(10_000):
        port = random.SystemRandom().choice(PORTS)
        # `above`: Redis Cluster listens on port + 10,000 as well.
        if all(_is_free(p) for p in {port, port + above}) and port not in _given:
            _given.add(port)
            return port
    raise RuntimeError("no free port")


def _is_free(port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


class Proxy:
    """Forwards a port to `target`. `hold` is a half-open link: connections stand, new ones are taken, and
    no byte passes in the directions that it names, for as long as it is set. `refuse` closes new ones."""

    def __init__(self, target: int):
        self.target = target
        self.port = free_port()
        self.hold: frozenset[str] = frozenset()
        self.refuse = False
        self._moved = asyncio.Event()
        self._server = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task] = set()

    async def start(self) -> "Proxy":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1024)
        return self

    def set_hold(self, *directions: str) -> None:
        """`up` is from the client to the server, `down` the other way; none opens the link again."""
        self.hold = frozenset(directions)
        self._moved.set()
        self._moved = asyncio.Event()

    def cut(self) -> None:
        """Resets all connections."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def stop(self) -> None:
        if self._server:
            self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader, writer):
        task = asyncio.current_task()
        self._tasks.add(task)
        self._writers.add(writer)
        far = None
        try:
            if self.refuse:
                return
            there, far = await asyncio.open_connection("127.0.0.1", self.target)
            self._writers.add(far)
            await asyncio.gather(self._pass(reader, far, "up"), self._pass(there, writer, "down"))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for w in (writer, far):
                if w is not None:
                    self._writers.discard(w)
                    w.transport.abort()
            self._tasks.discard(task)

    async def _pass(self, reader, writer, direction):
        while True:
            data = await reader.read(65_536)
            while direction in self.hold:
                await self._moved.wait()
            if not data:
                # A close passes as one; a half-closed link is not what is tested here.
                writer.close()
                return
            writer.write(data)
            await writer.drain()


async def http_get(port: int, path: str, limit: float = 3.0) -> tuple[int, str]:
    """Status and body; (0, why) without an answer."""
    try:
        async with asyncio.timeout(limit):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                answer = await reader.read(-1)
            finally:
                writer.transport.abort()
    except (OSError, TimeoutError) as error:
        return 0, str(error) or "no answer"
    head, _, body = answer.partition(b"\r\n\r\n")
    parts = head.split(b" ", 2)
    return (int(parts[1]) if len(parts) > 1 else 0), body.decode("utf-8", "replace")


class RedisError(Exception):
    """An error that Redis answered."""


async def redis(port: int, *words, limit: float = 5.0):
    """One command on a connection of its own."""
    async with asyncio.timeout(limit):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(_command(words))
            return await _answer(reader)
        finally:
            writer.transport.abort()


def _command(words) -> bytes:
    parts = [w if isinstance(w, bytes) else str(w).encode() for w in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts)


async def _answer(reader):
    line = (await reader.readline()).rstrip(b"\r\n")
    if not line:
        raise ConnectionError("Redis closed the connection")
    kind, rest = line[:1], line[1:]
    if kind == b"-":
        raise RedisError(rest.decode())
    if kind == b"+":
        return rest.decode()
    if kind == b":":
        return int(rest)
    if kind == b"$":
        size = int(rest)
        return None if size < 0 else (await reader.readexactly(size + 2))[:-2].decode("utf-8", "replace")
    if kind == b"*":
        return [await _answer(reader) for _ in range(max(0, int(rest)))]
    raise RedisError(f"unknown answer {line!r}")

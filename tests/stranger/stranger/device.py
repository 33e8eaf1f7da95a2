"""A device that does what docs/protocol.md asks of a client, and writes down what its application saw."""

import asyncio
import base64
import collections
import contextlib
import hashlib
import hmac
import json
import random
import time
import zlib

import websockets
from websockets.asyncio.client import connect

from .trace import Trace

APP = "stranger"
# How often a careful device asks to be pinged; it gives a connection up that was silent for so long and 15 s.
PING_MS, SILENCE_S = 5_000, 15
SECRET = b"a stranger's secret of thirty-two bytes and some"


def token(user: str, lifetime_s: int = 3600) -> str:
    """A JWT (HS256) as docs/protocol.md describes it."""

    def part(value: bytes) -> bytes:
        return base64.urlsafe_b64encode(value).rstrip(b"=")

    head = part(b'{"alg":"HS256","typ":"JWT"}')
    claims = {"app": APP, "sub": user, "exp": int(time.time()) + lifetime_s}
    signed = head + b"." + part(json.dumps(claims).encode())
    return (signed + b"." + part(hmac.digest(SECRET, signed, "sha256"))).decode()


def chain_after(chain: int, message_id: str) -> int:
    x = chain ^ zlib.crc32(message_id.encode())
    return (((x << 13 | x >> 19) & 0xFFFFFFFF) * 5 + 0xE6546B64) & 0xFFFFFFFF


def body_hash(message: dict) -> str:
    """Of the body's meaning: JSON may be written in several ways."""
    if "text" in message:
        body = b"t" + message["text"].encode("utf-8", "surrogatepass")
    elif "json" in message:
        body = b"j" + json.dumps(message["json"], sort_keys=True).encode()
    else:
        body = b"d" + base64.b64decode(message.get("data", ""))
    return hashlib.sha1(body).hexdigest()[:12]


class Device:
    """`kind`:
    careful  names its positions with the chain, and the generation in its acks;
    plain    names neither, acknowledges each frame at once, and takes some time to handle it;
    mute     never acknowledges."""

    def __init__(self, user: str, name: str, kind: str, urls, trace: Trace, rng: random.Random, remembers=500):
        self.user, self.name, self.kind = user, name, kind
        self.key = f"{user}/{name}"
        self.urls, self.trace, self.rng = urls, trace, rng
        self.remembers = remembers
        self.memory: collections.OrderedDict[str, None] = collections.OrderedDict()
        # What it remembered when positions started anew.
        self.aside: set[str] = set()
        self.seen: set[str] = set()
        self.registered = False
        self.connected = False
        self.stopped: int | None = None
        self.clock_ms = 0
        self.attempt = 0
        self.position: dict | None = None
        self.session = ""
        self.failures = 0
        self.ended_4001 = 0
        # Of a plain device: how long its application takes over a frame, and whether it then ends.
        self.handle_s, self.dies_after_ack = 0.01, False
        self._wanted = False
        self._wake = asyncio.Event()
        self._socket = None
        self._not_before = 0.0
        self._task: asyncio.Task | None = None

    # What the scenario says.

    def come(self) -> None:
        self._wanted = True
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=self.key)

    async def leave(self) -> None:
        """Closes the connection and stays away until `come`."""
        self._wanted = False
        self._wake.set()
        if self._socket is not None:
            await self._socket.close()
        while self.connected:
            await asyncio.sleep(0.01)

    async def end(self) -> None:
        await self.leave()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def drop(self) -> None:
        """The network breaks under the connection."""
        if self._socket is not None:
            self._dropped = True
            self._socket.transport.abort()

    def hurry(self) -> None:
        """Connects now instead of after its back-off, as when the user opens the application."""
        self.failures = 0
        self._not_before = 0.0
        self._wake.set()

    def reboot(self, clock_ms: int) -> None:
        """Forgets what attempt it made last; its clock is wrong by `clock_ms`."""
        self.attempt, self.clock_ms = 0, clock_ms
        self.drop()

    # The loop.

    async def _run(self):
        while self.stopped is None:
            self._wake.clear()
            wait = self._not_before - time.monotonic()
            if not self._wanted or wait > 0:
                # Not wait_for: of Python 3.11 it may swallow the cancellation that ends this task.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait if self._wanted else None):
                        await self._wake.wait()
                continue
            await self._connection()

    def _back_off(self, floor_s: float = 0.0) -> None:
        """Full jitter between 0 and min(20 s, 0.5 s · 2^n), and not before what the node said."""
        most = min(20.0, 0.5 * 2**self.failures)
        self.failures = min(self.failures + 1, 10)
        self._not_before = time.monotonic() + max(floor_s, self.rng.uniform(0, most))

    async def _connection(self):
        headers = {"Authorization": f"Bearer {token(self.user)}"}
        url = self.rng.choice(self.urls())
        floor_s, code, by = 0.0, 1006, "accident"
        self._go_away_s: float | None = None
        self._dropped = False
        try:
            # Careful devices watch for the node's pings, as the page asks for; for plain ones the library pings.
            pings = None if self.kind == "careful" else 6
            async with connect(
                url,
                subprotocols=["barid.v1.json"],
                additional_headers=headers,
                compression=None,
                open_timeout=8,
                ping_interval=pings,
                ping_timeout=6,
                close_timeout=2,
                proxy=None,
            ) as socket:
                if not self._wanted:
                    return
                self._socket = socket
                self.trace.write("open", dev=self.key, url=url)
                code, by = await self._talk(socket)
        except websockets.InvalidStatus as refused:
            status = refused.response.status_code
            self.trace.write("refused", dev=self.key, status=status)
            try:
                floor_s = float(refused.response.headers.get("Retry-After", "0"))
            except ValueError:
                pass
            self._back_off(min(floor_s, 20.0))
            return
        except (OSError, TimeoutError, websockets.WebSocketException) as error:
            if self._socket is None:
                self.trace.write("unreached", dev=self.key, why=type(error).__name__)
                self._back_off()
                return
        finally:
            self._socket, self.connected = None, False
        # `by` is node, accident, or whoever wanted it: the device, or the scenario.
        by = "scenario" if self._dropped else by
        self.trace.write("close", dev=self.key, sess=self.session, code=code, by=by)
        self.ended_4001 += code == 4001
        if 4500 <= code <= 4999 and by == "node":
            self.stopped = code
            self.trace.write("stopped", dev=self.key, code=code)
        elif self._go_away_s is not None:
            self._not_before = time.monotonic() + self._go_away_s
        elif by != "device":
            self._back_off()

    async def _talk(self, socket) -> tuple[int, str]:
        self.attempt = max(self.attempt + 1, int(time.time() * 1000) + self.clock_ms)
        hello = {"device": self.name, "platform": "python", "attempt": self.attempt}
        if self.kind == "careful":
            hello |= {"visiblePings": True, "pingIntervalMs": PING_MS}
        if self.kind != "plain" and self.position is not None:
            hello["positions"] = [self.position]
        self.last = self.generation = self.epoch = self.chain = 0
        self.welcomed = False
        self.acked = 0
        self.ack_interval = 0.1
        self.silence_s = PING_MS / 1000 + SILENCE_S
        acks = asyncio.create_task(self._pace_acks(socket))
        self.ack_wanted = asyncio.Event()
        timers = [acks]
        self.heard = time.monotonic()
        if self.kind == "careful":
            timers.append(asyncio.create_task(self._listen_for_silence(socket)))
        try:
            await socket.send(json.dumps({"hello": hello}))
            self.trace.write("hello", dev=self.key, position=hello.get("positions", [None])[0])
            async for text in socket:
                if self._dropped:  # what was received and not read dies with the application
                    break
                ((kind, frame),) = json.loads(text).items()
                self.heard = time.monotonic()
                if kind == "deliver":
                    await self._deliver(socket, frame)
                elif kind == "welcome":
                    self._welcome(frame)
                elif kind == "skip":
                    self._skip(frame)
                elif kind == "goAway":
                    self._go_away_s = frame.get("reconnectAfterMs", 0) / 1000
                    self.trace.write("goaway", dev=self.key, why=frame.get("why"), ms=self._go_away_s * 1000)
                    timers.append(asyncio.create_task(self._move(socket)))
                elif kind == "ping":
                    await socket.send('{"pong":{}}')
                elif kind == "error":
                    # A 4005 that refuses a Hello names the attempt that is known.
                    self.attempt = max(self.attempt, frame.get("attempt", 0))
                    self.trace.write("error", dev=self.key, code=frame.get("code", 0), text=frame.get("text", ""))
                else:
                    self.trace.write("frame", dev=self.key, kind=kind)
        except websockets.ConnectionClosed:
            pass
        finally:
            for timer in timers:
                timer.cancel()
            await asyncio.gather(*timers, return_exceptions=True)
        received, sent = socket.protocol.close_rcvd, socket.protocol.close_sent
        if received is not None and socket.protocol.close_rcvd_then_sent is not False:
            return received.code, "node"
        if sent is not None and sent.code == 1000:
            return 1000, "device"
        return (sent.code if sent else 1006), "accident"

    async def _listen_for_silence(self, socket):
        while True:
            await asyncio.sleep(1)
            if time.monotonic() - self.heard > self.silence_s:
                self.trace.write("silence", dev=self.key, sess=self.session)
                socket.transport.abort()

    async def _move(self, socket):
        """Leaves for another node when the node asked to."""
        await asyncio.sleep(self._go_away_s)
        self._go_away_s = 0.0
        await socket.close()

    def _welcome(self, frame):
        own = next((p for p in frame.get("positions", []) if not p.get("mailbox")), {})
        before = self.position or {}
        if (own.get("epoch", 0), own.get("generation", 0)) != (before.get("epoch"), before.get("generation")):
            self.aside = set(self.memory)
        self.session = frame.get("session", "")
        self.last, self.epoch = own.get("seq", 0), own.get("epoch", 0)
        self.generation, self.chain = own.get("generation", 0), own.get("chain", 0)
        self.ack_interval = frame.get("ackIntervalMs", 0) / 1000
        self.silence_s = frame.get("pingIntervalMs", PING_MS) / 1000 + SILENCE_S
        self.acked = self.last
        self.trace.write(
            "welcome",
            dev=self.key,
            sess=self.session,
            ep=self.epoch,
            gen=self.generation,
            seq=self.last,
            chain=self.chain,
            again=self.welcomed,
        )
        self.welcomed = self.registered = self.connected = True
        self.failures = 0
        self._remember_position()

    def _skip(self, frame):
        if frame.get("mailbox"):
            return
        to = frame.get("to", 0)
        self.trace.write(
            "skip", dev=self.key, sess=self.session, ep=self.epoch, frm=self.last, to=to, why=frame.get("why", "")
        )
        if to > self.last:
            self.last, self.chain = to, frame.get("chain", 0)
            self._remember_position()

    async def _deliver(self, socket, frame):
        mailbox = frame.get("mailbox", "")
        if mailbox:
            return
        if frame.get("generation", 0) != self.generation:
            self.trace.write(
                "strange", dev=self.key, what="generation", of=frame.get("generation", 0), was=self.generation
            )
        for message in frame["messages"]:
            seq, name = message.get("seq", 0), message["id"]
            sign = body_hash(message)
            about = {
                "dev": self.key,
                "sess": self.session,
                "ep": self.epoch,
                "gen": self.generation,
                "seq": seq,
                "id": name,
            }
            self.trace.write("recv", **about, last=self.last)
            if seq <= self.last:
                continue
            self.last = seq
            self.chain = chain_after(self.chain, name)
            if name not in self.memory and name not in self.aside:
                self.trace.write("show", **about, h=sign)
                self.seen.add(name)
            self.memory[name] = None
            self.memory.move_to_end(name)
            while len(self.memory) > self.remembers:
                self.memory.popitem(last=False)
            self._remember_position()
        if self.kind == "plain":
            await asyncio.sleep(self.handle_s)
            await self._ack(socket)
            if self.dies_after_ack:
                self.dies_after_ack = False
                await asyncio.sleep(0.2)
                self.drop()
        elif self.kind == "careful":
            self.ack_wanted.set()

    def _remember_position(self):
        self.position = {"epoch": self.epoch, "generation": self.generation, "seq": self.last, "chain": self.chain}

    async def _pace_acks(self, socket):
        """At once, but not more often than the node asks for."""
        while True:
            await self.ack_wanted.wait()
            self.ack_wanted.clear()
            if self.last > self.acked:
                await self._ack(socket)
            await asyncio.sleep(self.ack_interval)

    async def _ack(self, socket):
        ack = {"seq": self.last}
        if self.kind == "careful":
            ack["generation"] = self.generation
        self.acked = self.last
        self.trace.write("ack", dev=self.key, sess=self.session, ep=self.epoch, gen=self.generation, seq=self.last)
        try:
            await socket.send(json.dumps({"ack": ack}))
        except websockets.ConnectionClosed:
            pass

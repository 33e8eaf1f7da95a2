"""Redis forgets: everything, one master, or its last seconds."""

import asyncio
import base64
import os
from collections.abc import Awaitable, Callable

from ..checker import Expected
from ..world import World
from .registry import scenario


async def _one_each(w: World):
    """A message to each user."""
    for user in w.business.users:
        w.business.produce("push", [user], {"text": "after"})
    await w.business.flush()


@scenario("flush-all", "FLUSHALL while messages flow", Expected(forgets=True), short=True)
async def flush_all(w: World):
    async with w.flow():
        await w.sleep(4)
        with w.fault("flushall", "redis"):
            await w.redis.masters[0].call("FLUSHALL")
        await w.sleep(5)


@scenario(
    "flush-quiet",
    "FLUSHALL when nothing flows, and a message to each user 5 s later",
    Expected(forgets=True),
    patience=40,
)
async def flush_quiet(w: World):
    async with w.flow():
        await w.sleep(4)
    await w.sleep(3)
    with w.fault("flushall", "redis"):
        await w.redis.masters[0].call("FLUSHALL")
        await w.sleep(5)
    await _one_each(w)


@scenario(
    "flush-master",
    "FLUSHALL of one of three masters, connections standing, nothing flows; a message to each user 8 s later",
    Expected(forgets=True),
    short=True,
    redis="cluster",
    patience=40,
)
async def flush_master(w: World):
    async with w.flow():
        await w.sleep(4)
    await w.sleep(2)
    with w.fault("flushall", "master 2 of 3"):
        await w.redis.masters[1].call("FLUSHALL")
        await w.sleep(8)
    await _one_each(w)


@scenario(
    "flush-master-flow", "FLUSHALL of one of three masters while messages flow", Expected(forgets=True), redis="cluster"
)
async def flush_master_flow(w: World):
    async with w.flow():
        await w.sleep(4)
        with w.fault("flushall", "master 2 of 3"):
            await w.redis.masters[1].call("FLUSHALL")
        await w.sleep(5)


@scenario(
    "flush-long",
    "FLUSHALL behind 400 messages a user, not more than a device remembers",
    Expected(forgets=True, shown=2000),
    users=6,
    patience=60,
)
async def flush_long(w: World):
    with w.fault("load", "2400 messages"):
        for n in range(2400):
            w.business.produce_any(plain=True)
            w.business.producer.poll(0)
            if n % 10 == 9:
                await w.sleep(0.02)
        await w.business.flush()
        await w.until(w.all_there, 40, "all is there")
    with w.fault("flushall", "redis"):
        await w.redis.masters[0].call("FLUSHALL")
    async with w.flow(50, plain=True):
        await w.sleep(4)


@scenario(
    "flush-away",
    "FLUSHALL while one of a user's two devices is away; the other goes on; what it misses is told",
    Expected(forgets=True, skips=("otherDevice", "collapsed", "acknowledged", "evicted")),
)
async def flush_away(w: World):
    away = [d for d in w.devices.values() if d.name == "d1"]
    async with w.flow():
        await w.sleep(2)
        for device in away:
            await device.leave()
        await w.sleep(2)
        with w.fault("flushall", "redis"):
            await w.redis.masters[0].call("FLUSHALL")
        await w.sleep(5)


@scenario(
    "flush-first",
    "FLUSHALL; the first message behind it is a user's first of that topic; one device is back at once, the other later",
    Expected(forgets=True, shown=20),
    users=10,
    lease_ms=10_000,
    patience=30,
)
async def flush_first(w: World):
    back, away = w.devices["u06/d0"], w.devices["u06/d1"]
    await w.sleep(1)
    await away.leave()
    for n in range(20):
        for user in w.business.users:
            w.business.produce("push", [user], {"text": f"before {n}"})
    await w.business.flush()
    await w.until_committed()
    await w.sleep(3)
    with w.fault("flushall", "redis"):
        await w.redis.masters[0].call("FLUSHALL")
        first = w.business.produce("high", ["u06"], {"text": "first"})
        await w.business.flush()
        back.drop()
        back.hurry()
        await w.until(lambda: first in back.seen, 20, "it is shown to the device that is back")
        await w.sleep(1)
    await w.sleep(20)
    away.come()


@scenario(
    "flush-twice",
    "devices are away with unread messages; FLUSHALL, and again 0.05 to 0.9 s later, six times",
    Expected(faults=6, forgets=True, shown=20),
    users=60,
    lease_ms=10_000,
    patience=30,
)
async def flush_twice(w: World):
    away = [d for d in w.devices.values() if d.name == "d1"]
    for gap in (0.05, 0.15, 0.3, 0.45, 0.65, 0.9):
        for device in away:
            await device.leave()
        async with w.flow(60, plain=True):
            await w.sleep(2)
            with w.fault("flushall", f"redis, again after {gap} s"):
                await w.redis.masters[0].call("FLUSHALL")
                await w.sleep(gap)
                await w.redis.masters[0].call("FLUSHALL")
            await w.sleep(4)
        for device in away:
            device.come()
        await w.sleep(5)


@scenario(
    "flush-full",
    "FLUSHALL behind 14 MB that everybody has, with memory for three times what is in use",
    Expected(forgets=True, shown=500),
    users=30,
    patience=30,
)
async def flush_full(w: World):
    for device in w.devices.values():
        device.come()
    for _ in range(40):
        for user in w.business.users:
            w.business.produce("push", [user], {"data": base64.b64encode(os.urandom(12_000)).decode()})
        w.business.producer.poll(0)
        await w.sleep(0.05)
    await w.business.flush()
    await w.until(w.all_there, 60, "all is there")
    await w.sleep(2)
    redis = w.redis.masters[0]
    memory = await redis.call("INFO", "memory")
    used = next(line for line in memory.splitlines() if line.startswith("used_memory:")).split(":")[1]
    await redis.call("CONFIG", "SET", "maxmemory", str(int(used) * 3))
    with w.fault("flushall", "redis"):
        await redis.call("FLUSHALL")
        await _one_each(w)
        await w.until(w.all_there, 60, "all is there")


@scenario(
    "flush-ahead",
    "FLUSHALL while messages of 600 s wait for a device that is away, the purgers' clocks an hour ahead",
    Expected(forgets=True, shown=20),
    users=10,
    clocks=("roles",),
    patience=30,
)
async def flush_ahead(w: World):
    away = w.devices["u00/d0"]
    await away.leave()
    for role in w.cluster.named("purger"):
        role.set_clock(3600)
    names = [
        w.business.produce("push", [user], {"text": f"{n}", "ttlSeconds": 600})
        for n in range(10)
        for user in w.business.users
    ]
    await w.business.flush()
    await w.until_committed()
    await w.sleep(2)
    with w.fault("flushall", "redis"):
        await w.redis.masters[0].call("FLUSHALL")
        await w.sleep(12)
    away.come()
    # The checker does not miss what has a time to live.
    await w.until(lambda: sum(name in away.seen for name in names) == 10, 20, "the device has its ten")


@scenario(
    "flush-expired",
    "FLUSHALL when messages of 2 s have been over for 20 s, a device of theirs being away",
    Expected(forgets=True, shown=50, skips=("otherDevice", "collapsed", "acknowledged", "expired")),
    users=10,
)
async def flush_expired(w: World):
    away = w.devices["u00/d0"]
    await away.leave()
    for user in w.business.users:
        for _ in range(10):
            w.business.produce("push", [user], {"text": "soon", "ttlSeconds": 2})
            w.business.produce("push", [user], {"text": "long"})
    await w.business.flush()
    # Who is away does not get what is over, nor does who comes late.
    await w.sleep(20)
    with w.fault("flushall", "redis"):
        await w.redis.masters[0].call("FLUSHALL")
        await w.sleep(1)
    away.come()
    await _one_each(w)


async def _go_back(w: World, between: Callable[[World], Awaitable[None]] | None = None, seconds: float = 4):
    """Redis goes back to what it held `seconds` ago, in all its masters; `between` runs while it is away."""
    async with w.flow():
        await w.sleep(4)
        held = [await server.snapshot() for server in w.redis.masters]
        await w.sleep(seconds)
    # Everything is committed: only what Redis knew is gone.
    await w.until_committed()
    await w.sleep(1)
    with w.fault("back", f"redis by {seconds} s"):
        if between:
            await between(w)
        for server, snapshot in zip(w.redis.masters, held):
            await server.back_to(snapshot)
        if between:
            w.launch("purger")
            await w.until_ready(30)
    async with w.flow():
        await w.sleep(4)


@scenario("back-alive", "Redis back by 4 s behind the commit, purgers alive", Expected(forgets=True))
async def back_alive(w: World):
    await _go_back(w)


@scenario(
    "back-killed", "Redis back by 4 s behind the commit, both purgers killed before", Expected(forgets=True), short=True
)
async def back_killed(w: World):
    async def killed(w):
        w.kill("purger")

    await _go_back(w, killed)


@scenario("back-rolled", "Redis back by 4 s behind the commit, both purgers drained before", Expected(forgets=True))
async def back_rolled(w: World):
    async def rolled(w):
        await asyncio.gather(*(w.drain(r) for r in w.cluster.named("purger")))

    await _go_back(w, rolled)


@scenario(
    "back-quiet",
    "Redis back by 4 s behind the commit, purgers killed, and nothing produced after",
    Expected(forgets=True),
)
async def back_quiet(w: World):
    async with w.flow():
        await w.sleep(4)
        held = await w.redis.masters[0].snapshot()
        await w.sleep(4)
    await w.until_committed()
    with w.fault("back", "redis by 4 s"):
        w.kill("purger")
        await w.redis.masters[0].back_to(held)
        w.launch("purger")


@scenario(
    "back-master",
    "one of three masters back by 4 s behind the commit, purgers killed before",
    Expected(forgets=True),
    redis="cluster",
)
async def back_master(w: World):
    async with w.flow():
        await w.sleep(4)
        held = await w.redis.masters[0].snapshot()
        await w.sleep(4)
    await w.until_committed()
    with w.fault("back", "master 1 of 3 by 4 s"):
        w.kill("purger")
        await w.redis.masters[0].back_to(held)
        w.launch("purger")
        await w.until_ready(30)
    async with w.flow():
        await w.sleep(4)


@scenario("back-flow", "Redis back by 2 s while messages flow, twice", Expected(faults=2, forgets=True))
async def back_flow(w: World):
    async with w.flow():
        for _ in range(2):
            await w.sleep(3)
            held = await w.redis.masters[0].snapshot()
            await w.sleep(2)
            with w.fault("back", "redis by 2 s"):
                await w.redis.masters[0].back_to(held)
        await w.sleep(4)


@scenario(
    "late-ack",
    "an application handles a message while Redis goes back, then acknowledges without a generation and dies",
    Expected(forgets=True, shown=100),
    short=True,
    users=10,
    retry_base_ms=2000,
)
async def late_ack(w: World):
    device = w.devices["u05/d0"]

    async def shown(kind: str, body: str):
        name = w.business.produce(kind, ["u05"], {"text": body})
        await w.business.flush()
        await w.until(lambda: name in device.seen, 20, f"{body} is shown")
        await w.sleep(0.3)

    async with w.flow(users=[u for u in w.business.users if u != "u05"], plain=True):
        await shown("push", "A0")
        held = await w.redis.masters[0].snapshot()
        await shown("push", "A1")
        await shown("push", "A2")
        device.handle_s, device.dies_after_ack = 14, True
        await shown("push", "A3")
        with w.fault("back", "redis to A0"):
            await w.redis.masters[0].back_to(held)
            await w.sleep(0.5)
            # Of another topic: nothing before it is missing, so it is accepted at once.
            w.business.produce("high", ["u05"], {"text": "B1"})
            await w.business.flush()
            await w.sleep(14)
        device.handle_s = 0.01

"""Processes of the cluster are killed, stopped and rolled; and no fault at all."""

import asyncio
import signal

from ..checker import Expected
from ..world import World
from .registry import scenario

# Nothing wrong, and the formats.


@scenario("calm", "no fault at all", Expected(faults=0))
async def calm(w: World):
    async with w.flow():
        await w.sleep(8)


@scenario("codecs", "batches compressed with gzip, snappy, lz4 and zstd", Expected(faults=4, shown=150), short=True)
async def codecs(w: World):
    for codec in ("gzip", "snappy", "lz4", "zstd"):
        w.business.codec(codec)
        with w.fault("compression", codec):
            async with w.flow(200):
                await w.sleep(2)


# Killed.


def _kill(names: tuple[str, ...], away: float):
    async def run(w: World):
        async with w.flow():
            await w.sleep(3)
            with w.fault("kill", " ".join(names)):
                w.kill(*names)
                await w.sleep(away)
                w.launch(*names)
            await w.sleep(3)
            # And one at a time, with the other left.
            for name in [r.name for r in w.cluster.named(*names)]:
                with w.fault("kill", name):
                    w.kill(name)
                    await w.sleep(1)
                    w.launch(name)
                await w.sleep(2)

    return run


for _role in ("purger", "dispatcher", "access", "delayer"):
    scenario(f"kill-{_role}", f"both of role {_role} killed for 3 s, then each alone", Expected(faults=3))(
        _kill((_role,), 3)
    )


@scenario("kill-redis", "Redis killed, back after 3 s with all that it had", Expected())
async def kill_redis(w: World):
    async with w.flow():
        await w.sleep(3)
        with w.fault("kill", "redis"):
            server = w.redis.masters[0]
            # What a disk with appendfsync always keeps: the state at the kill. Nothing runs between the two.
            for role in w.cluster.roles.values():
                role.redis.set_hold("up", "down")
            held = await server.snapshot()
            server.kill()
            await w.sleep(3)
            await server.back_to(held)
            for role in w.cluster.roles.values():
                role.redis.set_hold()
                role.redis.cut()
        await w.sleep(4)


@scenario("kill-kafka", "Kafka killed for 4 s", Expected(), alone=True)
async def kill_kafka(w: World):
    async with w.flow():
        await w.sleep(3)
        with w.fault("kill", "kafka"):
            w.kafka.process.kill()
            await w.sleep(4)
            await w.kafka.restart()
        await w.sleep(5)


@scenario(
    "kill-all",
    "all eight processes, Redis and Kafka killed at once; Redis is back with all that it had",
    Expected(),
    alone=True,
    short=True,
)
async def kill_all(w: World):
    async with w.flow():
        await w.sleep(3)
        with w.fault("kill", "everything"):
            server = w.redis.masters[0]
            w.kill("roles")
            held = await server.snapshot()
            server.kill()
            w.kafka.process.kill()
            await w.sleep(2)
            await server.back_to(held)
            w.launch("roles")
            await w.kafka.restart()
        await w.sleep(4)


# Stopped and rolled.


def _freeze(names: tuple[str, ...], seconds: float):
    async def run(w: World):
        async with w.flow():
            await w.sleep(3)
            for name in names:
                with w.fault("stop", name):
                    w.freeze(name)
                    await w.sleep(seconds)
                    w.thaw(name)
                await w.sleep(3)

    return run


scenario(
    "stop-access", "an access node stopped for 8 s, its lease is 3 s; then the other", Expected(faults=2), short=True
)(_freeze(("access-1", "access-2"), 8))
scenario("stop-dispatcher", "a dispatcher stopped for 8 s, its lease is 3 s; then the other", Expected(faults=2))(
    _freeze(("dispatcher-1", "dispatcher-2"), 8)
)
scenario("stop-purger", "a purger stopped for 10 s, past its session of 6 s; then the other", Expected(faults=2))(
    _freeze(("purger-1", "purger-2"), 10)
)
scenario("stop-delayer", "both delayers stopped for 6 s", Expected(faults=1))(_freeze(("delayer",), 6))
scenario("stop-roles", "all eight processes stopped for 8 s at once", Expected(faults=1))(_freeze(("roles",), 8))


@scenario("stop-redis", "Redis stopped for 8 s", Expected())
async def stop_redis(w: World):
    async with w.flow():
        await w.sleep(3)
        with w.fault("stop", "redis"):
            w.redis.masters[0].signal(signal.SIGSTOP)
            await w.sleep(8)
            w.redis.masters[0].signal(signal.SIGCONT)
        await w.sleep(4)


@scenario("stop-kafka", "Kafka stopped for 8 s", Expected(), alone=True)
async def stop_kafka(w: World):
    async with w.flow():
        await w.sleep(3)
        with w.fault("stop", "kafka"):
            w.kafka.process.signal(signal.SIGSTOP)
            await w.sleep(8)
            w.kafka.process.signal(signal.SIGCONT)
        await w.sleep(4)


@scenario(
    "roll", "each of the eight processes drained and started, one after the other", Expected(faults=1), short=True
)
async def roll(w: World):
    async with w.flow(60):
        await w.sleep(2)
        with w.fault("roll", "roles"):
            await w.roll("roles")
        await w.sleep(2)


@scenario("roll-all", "all eight processes drained at once and started", Expected(faults=1))
async def roll_all(w: World):
    async with w.flow(60):
        await w.sleep(2)
        with w.fault("roll", "roles at once"):
            await asyncio.gather(*(w.drain(r) for r in w.cluster.named("roles")))
            w.launch("roles")
        await w.sleep(3)

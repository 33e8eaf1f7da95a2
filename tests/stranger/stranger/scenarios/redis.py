"""Redis is full, rude, partly away, or fails over."""

import signal
import time

from ..checker import Expected
from ..world import World
from .registry import scenario

# Redis is full, or rude.


@scenario("full", "Redis full (maxmemory below what it uses) for 6 s", Expected(), short=True)
async def full(w: World):
    async with w.flow():
        await w.sleep(3)
        with w.fault("maxmemory", "redis"):
            await w.redis.masters[0].call("CONFIG", "SET", "maxmemory", "1mb")
            await w.sleep(6)
            await w.redis.masters[0].call("CONFIG", "SET", "maxmemory", "0")
        await w.sleep(3)


@scenario("script-flush", "SCRIPT FLUSH ten times a second for 8 s", Expected())
async def script_flush(w: World):
    async with w.flow():
        await w.sleep(2)
        with w.fault("script flush", "redis"):
            end = time.monotonic() + 8
            while time.monotonic() < end:
                await w.everywhere("SCRIPT", "FLUSH")
                await w.sleep(0.1)
        await w.sleep(2)


@scenario("client-kill", "all Redis clients killed every 0.4 s for 8 s, and scripts flushed", Expected())
async def client_kill(w: World):
    async with w.flow():
        await w.sleep(2)
        with w.fault("client kill", "redis"):
            end = time.monotonic() + 8
            while time.monotonic() < end:
                await w.everywhere("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                await w.everywhere("CLIENT", "KILL", "TYPE", "pubsub")
                await w.everywhere("SCRIPT", "FLUSH")
                await w.sleep(0.4)
        await w.sleep(3)


@scenario(
    "master-away",
    "one of three masters stopped for 10 s, leases are 3 s; then the next",
    Expected(faults=3, flows=0.3),
    redis="cluster",
)
async def master_away(w: World):
    async with w.flow():
        await w.sleep(3)
        for n, server in enumerate(w.redis.masters):
            with w.fault("stop", f"master {n + 1} of 3"):
                server.signal(signal.SIGSTOP)
                await w.sleep(10)
                server.signal(signal.SIGCONT)
            await w.sleep(3)


@scenario(
    "master-blind",
    "one of three masters stopped for 10 s, and one process of each role killed and started in that time",
    Expected(faults=2),
    redis="cluster",
)
async def master_blind(w: World):
    async with w.flow():
        await w.sleep(3)
        for server in w.redis.masters[:2]:
            with w.fault("stop", f"{server.name}, and start processes"):
                server.signal(signal.SIGSTOP)
                await w.sleep(2)
                for role in w.cluster.roles.values():
                    if role.number == 1:
                        role.kill()
                        role.start()
                await w.sleep(8)
                server.signal(signal.SIGCONT)
            await w.sleep(3)


# Failover.


async def _fail_over(w: World, pick: int):
    async with w.flow():
        await w.sleep(4)
        master = w.redis.masters[pick]
        with w.fault("failover", f"{master.name}, its replica 3 s behind"):
            await master.cut_replicas()
            await w.sleep(3)
            master.kill()
            await w.sleep(8)
        await w.sleep(4)


@scenario(
    "failover-pair",
    "a master killed whose replica was cut off 3 s before, under Sentinel",
    Expected(forgets=True),
    short=True,
    redis="pair",
)
async def failover_pair(w: World):
    await _fail_over(w, 0)


@scenario(
    "failover-cluster",
    "one of three masters killed whose replica was cut off 3 s before",
    Expected(forgets=True),
    redis="cluster",
    replicas=True,
)
async def failover_cluster(w: World):
    await _fail_over(w, 1)


@scenario(
    "failover-purger",
    "a master killed whose replica was cut off, under Sentinel, and the purgers with it",
    Expected(forgets=True),
    redis="pair",
)
async def failover_purger(w: World):
    async with w.flow():
        await w.sleep(4)
        master = w.redis.masters[0]
        await master.cut_replicas()
        await w.sleep(3)
    await w.until_committed()
    with w.fault("failover", f"{master.name} and both purgers"):
        w.kill("purger")
        master.kill()
        await w.sleep(6)
        w.launch("purger")
    async with w.flow():
        await w.sleep(4)


async def _fail_over_waiting(w: World, pick: int):
    """The replica is cut off and its master killed; the old master comes back as a replica of the new one."""
    async with w.flow():
        await w.sleep(4)
        master = w.redis.masters[pick]
        with w.fault("failover", f"{master.name}, its replica 3 s behind"):
            await master.cut_replicas()
            await w.sleep(3)
    with w.fault("kill", f"{master.name} and both purgers"):
        w.kill("purger")
        master.kill()
        await w.sleep(6)
        await master.up()
        w.launch("purger")
    async with w.flow():
        await w.sleep(6)


@scenario(
    "wait-pair",
    "as failover-purger, with wait_replicas = 1: what the replica lacks was never committed",
    Expected(faults=2, forgets=True),
    redis="pair",
    wait_replicas=1,
    patience=60,
)
async def wait_pair(w: World):
    await _fail_over_waiting(w, 0)


@scenario(
    "wait-cluster",
    "the same with one of three masters of a Redis Cluster",
    Expected(faults=2, forgets=True),
    redis="cluster",
    replicas=True,
    wait_replicas=1,
    patience=60,
)
async def wait_cluster(w: World):
    await _fail_over_waiting(w, 1)

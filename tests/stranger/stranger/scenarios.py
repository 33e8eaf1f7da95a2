"""What is done to the cluster. Each scenario is what it says, from its first fault to its last."""

import asyncio
import dataclasses
import signal
import time
from collections.abc import Awaitable, Callable

from .checker import Expected
from .cluster import step_clock
from .world import World


@dataclasses.dataclass
class Scenario:
    name: str
    about: str
    run: Callable[[World], Awaitable[None]]
    expected: Expected
    short: bool = False
    redis: str = "single"
    replicas: bool = False
    users: int = 30
    rate: float = 100
    partitions: int = 4
    lease_ms: int = 3000
    retry_base_ms: int = 500
    redis_options: dict = dataclasses.field(default_factory=dict)
    # Whose wall clocks can be stepped: roles, redis.
    clocks: tuple[str, ...] = ()
    # How long after the last fault everything has to arrive, seconds.
    patience: float = 45
    # Does something to Kafka, which scenarios that run at once share.
    alone: bool = False
    linger: float = 1.0


SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str, about: str, expected: Expected | None = None, **options):
    def register(run):
        SCENARIOS[name] = Scenario(name, about, run, expected or Expected(), **options)
        return run

    return register


# Nothing wrong, and the formats.


@scenario("calm", "no fault at all", Expected(faults=0))
async def calm(w: World):
    async with w.flow():
        await w.sleep(8)


@scenario("codecs", "batches compressed with gzip, snappy, lz4 and zstd", Expected(faults=4, shown=300), short=True)
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


# Redis forgets.


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
    for user in w.business.users:
        w.business.produce("push", [user], {"text": "after"})
    await w.business.flush()


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
    for user in w.business.users:
        w.business.produce("push", [user], {"text": "after"})
    await w.business.flush()


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
    "FLUSHALL behind 500 messages a user, more than a device remembers",
    Expected(forgets=True, shown=2500),
    users=6,
    patience=60,
)
async def flush_long(w: World):
    with w.fault("load", "3000 messages"):
        for n in range(3000):
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


@scenario("flush-away", "FLUSHALL while one of a user's two devices is away; the other goes on", Expected(forgets=True))
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
    "flush-expired",
    "FLUSHALL when messages of 2 s have been over for 20 s, a device of theirs being away",
    Expected(forgets=True, shown=50, skips=("otherDevice", "collapsed", "expired")),
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
    for user in w.business.users:
        w.business.produce("push", [user], {"text": "after"})
    await w.business.flush()


async def _go_back(w: World, between: Callable[[World], Awaitable[None]] | None = None, seconds: float = 4):
    """Redis goes back to what it held `seconds` ago, in all its masters; `between` runs while it is away."""
    async with w.flow():
        await w.sleep(4)
        held = [await server.snapshot() for server in w.redis.masters]
        await w.sleep(seconds)
    # Everything is committed: only what Redis knew is gone.
    await w.until(lambda: not w.uncommitted(), 20, "all is committed")
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
    await w.until(lambda: not w.uncommitted(), 20, "all is committed")
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
    await w.until(lambda: not w.uncommitted(), 20, "all is committed")
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
    await w.until(lambda: not w.uncommitted(), 20, "all is committed")
    with w.fault("failover", f"{master.name} and both purgers"):
        w.kill("purger")
        master.kill()
        await w.sleep(6)
        w.launch("purger")
    async with w.flow():
        await w.sleep(4)


# Kafka moves.


@scenario("partitions", "topics grow from 4 to 9 partitions", Expected())
async def partitions(w: World):
    async with w.flow():
        await w.sleep(3)
        with w.fault("partitions", "9"):
            await w.topics.add_partitions(9)
        await w.sleep(12)


@scenario("recreated", "barid.push deleted and created again once all of it was committed", Expected(), partitions=2)
async def recreated(w: World):
    async with w.flow():
        await w.sleep(5)
    await w.until(lambda: not w.uncommitted(), 20, "all is committed")
    with w.fault("recreate", "push topics"):
        await w.topics.recreate("push", "high", "bulk")
        for place in list(w.business.ends):
            w.business.ends[place] = 0
            w.watch.committed.pop(place, None)
        # A new producer: the old one holds the former topic's ids and numbers.
        w.business.codec("none")
    async with w.flow():
        await w.sleep(6)


@scenario(
    "rebalance", "purgers join, leave and are killed every second or two, for 20 s", Expected(faults=6), short=True
)
async def rebalance(w: World):
    async with w.flow():
        await w.sleep(2)
        for number in range(3, 9):
            extra = await w.cluster.add("purger", number)
            await w.sleep(w.chance.uniform(0.5, 1.5))
            victim = w.chance.choice(w.cluster.named("purger-1", "purger-2", extra.name))
            with w.fault("leave", victim.name):
                if w.chance.random() < 0.5:
                    victim.kill()
                else:
                    await w.drain(victim)
            await w.sleep(w.chance.uniform(0.5, 1.5))
            w.launch("purger-1", "purger-2")
            if extra.alive():
                await w.drain(extra)
        await w.sleep(3)


# Links that are half-open.


def _hold(pick: Callable[[World], list], *directions: str, seconds: float):
    async def run(w: World):
        async with w.flow():
            await w.sleep(3)
            with w.fault("half-open", " ".join(directions)):
                links = pick(w)
                for link in links:
                    link.set_hold(*directions)
                await w.sleep(seconds)
                for link in links:
                    link.set_hold()
            await w.sleep(4)

    return run


scenario(
    "half-open-devices",
    "the links between an access node and its devices hold all bytes for 15 s",
    Expected(),
    short=True,
)(_hold(lambda w: [w.cluster.roles["access-1"].devices], "up", "down", seconds=15))
scenario("half-open-acks", "what devices send to an access node is held for 12 s, what they get is not", Expected())(
    _hold(lambda w: [w.cluster.roles["access-1"].devices], "up", seconds=12)
)
scenario("half-open-mesh", "the links to a dispatcher and to an access node hold all bytes for 12 s", Expected())(
    _hold(lambda w: [w.cluster.roles["access-1"].grpc, w.cluster.roles["dispatcher-1"].grpc], "up", "down", seconds=12)
)
scenario("half-open-redis", "the links of one process of each role to Redis hold all bytes for 12 s", Expected())(
    _hold(lambda w: [r.redis for r in w.cluster.roles.values() if r.number == 1], "up", "down", seconds=12)
)
scenario("half-open-answers", "Redis's answers to all processes are held for 8 s; what they ask is done", Expected())(
    _hold(lambda w: [r.redis for r in w.cluster.roles.values()], "down", seconds=8)
)
scenario("half-open-kafka", "the links of all processes to Kafka hold all bytes for 12 s", Expected(), alone=True)(
    _hold(lambda w: [w.kafka.proxy], "up", "down", seconds=12)
)


# Clocks.


@scenario(
    "clock-roles",
    "the wall clocks of one process of each role step an hour ahead, then two back",
    Expected(faults=2),
    clocks=("roles",),
)
async def clock_roles(w: World):
    async with w.flow():
        for step in (3600, -3600):
            await w.sleep(3)
            with w.fault("clock", f"{step} s"):
                for role in w.cluster.roles.values():
                    if role.number == 1:
                        role.set_clock(step)
                await w.sleep(5)
        await w.sleep(3)


@scenario("clock-redis", "Redis's clock steps a minute ahead, then an hour back", Expected(faults=2), clocks=("redis",))
async def clock_redis(w: World):
    async with w.flow():
        for step in (60, -3600):
            await w.sleep(3)
            with w.fault("clock", f"redis {step} s"):
                step_clock(w.redis_clock, step)
                told = int((await w.redis.masters[0].call("TIME"))[0])
                assert abs(told - time.time() - step) < 5, "Redis's clock does not step"
                await w.sleep(6)
        await w.sleep(3)


@scenario("clock-devices", "devices reboot with a clock a day ahead, then a day back", Expected(faults=2))
async def clock_devices(w: World):
    devices = [d for d in w.devices.values() if d not in w.latecomers]
    async with w.flow():
        for day in (1, -1):
            await w.sleep(3)
            with w.fault("clock", f"devices {day} d"):
                for device in devices[::3]:
                    device.reboot(day * 86_400_000)
                await w.sleep(3)
        await w.sleep(3)


@scenario("clock-records", "records stamped 1970, a day ago, in a day and in the year 2286", Expected(faults=4))
async def clock_records(w: World):
    now = int(time.time() * 1000)
    async with w.flow():
        for stamp in (1, now - 86_400_000, now + 86_400_000, 9_999_999_999_000):
            w.business.timestamp_ms = stamp
            with w.fault("clock", f"records {stamp}"):
                await w.sleep(2)
        w.business.timestamp_ms = 0
        await w.sleep(2)


# Anything.


def _faults(w: World, forgets: bool):
    """Kinds of faults, each a coroutine function of its length."""

    def roles():
        return w.chance.choice([r.name for r in w.cluster.named("roles")])

    async def kill(seconds):
        name = roles()
        with w.fault("kill", name):
            w.kill(name)
            await w.sleep(seconds)
            w.launch(name)

    async def freeze(seconds):
        name = roles()
        with w.fault("stop", name):
            w.freeze(name)
            await w.sleep(2 * seconds)
            w.thaw(name)

    async def drain(seconds):
        name = roles()
        with w.fault("roll", name):
            role = w.cluster.roles[name]
            if role.alive():
                await w.drain(role)
            w.launch(name)

    async def hold(seconds):
        role = w.cluster.roles[roles()]
        link = w.chance.choice([role.grpc, role.redis, role.devices])
        directions = w.chance.choice([("up",), ("down",), ("up", "down")])
        with w.fault("half-open", f"{role.name} {' '.join(directions)}"):
            link.set_hold(*directions)
            await w.sleep(2 * seconds)
            link.set_hold()

    async def cut(_):
        role = w.cluster.roles[roles()]
        with w.fault("cut", role.name):
            for link in (role.grpc, role.redis, role.devices):
                link.cut()

    async def rude(_):
        with w.fault("client kill", "redis"):
            await w.everywhere("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await w.everywhere("SCRIPT", "FLUSH")

    async def full(seconds):
        with w.fault("maxmemory", "redis"):
            await w.everywhere("CONFIG", "SET", "maxmemory", "1mb")
            await w.sleep(seconds)
            await w.everywhere("CONFIG", "SET", "maxmemory", "0")

    async def back(seconds):
        held = await w.redis.masters[0].snapshot()
        await w.sleep(seconds)
        with w.fault("back", f"redis by {seconds:.1f} s"):
            await w.redis.masters[0].back_to(held)

    async def flush(_):
        with w.fault("flushall", "redis"):
            await w.everywhere("FLUSHALL")

    return [kill, kill, freeze, drain, hold, hold, cut, rude, full] + ([back, back, flush] if forgets else [])


def _chaos(forgets: bool):
    async def run(w: World):
        faults = _faults(w, forgets)
        async with w.flow():
            end = time.monotonic() + 40
            while time.monotonic() < end:
                await w.sleep(w.chance.uniform(0.5, 2.5))
                await w.chance.choice(faults)(w.chance.uniform(0.5, 3.0))
            for role in w.cluster.roles.values():
                w.launch(role.name)
            await w.sleep(4)

    return run


scenario(
    "chaos", "40 s of faults by chance, one after the other; Redis forgets nothing", Expected(faults=8), patience=60
)(_chaos(False))
scenario(
    "chaos-forget",
    "40 s of faults by chance; Redis goes back and is flushed, too",
    Expected(faults=8, forgets=True),
    patience=60,
)(_chaos(True))


# Devices that misbehave.


@scenario(
    "never-acking",
    "devices that never acknowledge, beside those that do",
    Expected(faults=1),
    short=True,
    retry_base_ms=250,
)
async def never_acking(w: World):
    mutes = [w.add_device(f"m{n}", "d0", "mute") for n in range(4)]
    for device in mutes:
        w.business.audience[device.user] = [device.key]
        device.come()
    await w.until(lambda: all(d.registered for d in mutes), 30, "the mute devices connect")
    with w.fault("never ack", "4 devices"):
        for device in mutes:
            w.business.produce("push", [device.user], {"text": "hello"})
        async with w.flow():
            # 0.25 + 0.5 + 1 + 2 + 4 s of re-sends, 8 s until the close, and 20 % of it.
            await w.sleep(10)
        await w.sleep(8)
        await w.until(lambda: all(d.ended_4001 for d in mutes), 40, "the mute devices are closed with 4001")


@scenario(
    "absent",
    "more messages than a mailbox holds, for a user who is away",
    Expected(faults=1, skips=("evicted",), shown=150),
    users=10,
    redis_options={"entries_max": 60},
)
async def absent(w: World):
    user = "u00"
    device = w.devices["u00/d0"]
    await device.leave()
    with w.fault("away", user):
        async with w.flow(60, plain=True, users=[u for u in w.business.users if u not in ("u00", "u09")]):
            for n in range(150):
                name = w.business.produce("push", [user], {"text": f"{n}"})
                # Of 150 the last 60 stay.
                if n < 90:
                    w.business.replaced.add(name)
            await w.sleep(5)
    device.come()

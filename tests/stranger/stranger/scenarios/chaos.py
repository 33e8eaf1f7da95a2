"""Faults by chance, from a seed."""

import time

from ..checker import Expected
from ..world import World
from .registry import scenario


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

"""Links that are half-open."""

from collections.abc import Callable

from ..checker import Expected
from ..world import World
from .registry import scenario


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
scenario(
    "half-open-long", "the same for 30 s: until the devices have given up and come back to the other node", Expected()
)(_hold(lambda w: [w.cluster.roles["access-1"].devices], "up", "down", seconds=30))
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

"""Kafka grows, is recreated, and rebalances."""

from ..checker import Expected
from ..world import World
from .registry import scenario


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
    await w.until_committed()
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

"""Devices that never acknowledge, or stay away for long."""

from ..checker import Expected
from ..world import World
from .registry import scenario


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

"""Wrong clocks, of roles, Redis, devices and producers."""

import time

from ..checker import Expected
from ..cluster import step_clock
from ..world import World
from .registry import scenario


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

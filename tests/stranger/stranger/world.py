"""One scenario's cluster, devices and business, and the verbs that scenarios are written in."""

import asyncio
import contextlib
import random
import shutil
import signal
import time
from pathlib import Path

from .business import PUSH, Business, Topics, Watch
from .cluster import TARGET, Cluster, Kafka, RedisCluster, RedisPair, RedisSingle
from .device import Device
from .net import RedisError
from .trace import Trace

SHAPES = {"single": RedisSingle, "pair": RedisPair, "cluster": RedisCluster}


class World:
    def __init__(self, scenario, seed: int, kafka: Kafka, directory: Path, say):
        self.scenario, self.seed, self.kafka, self.directory, self.say = scenario, seed, kafka, directory, say
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        # One stream of chances each, so that more load does not change which faults come.
        self.chance = random.Random(f"{seed}/faults")
        self.traces = {n: Trace(directory / f"{n}.jsonl") for n in ("faults", "devices", "producer", "watch")}
        self.faults = self.traces["faults"]
        self.prefix = f"{scenario.name}-{seed}-{random.SystemRandom().randrange(16**4):04x}"
        self.topics = Topics(self.prefix, kafka.brokers, scenario.partitions)
        env, shim = None, None
        if scenario.clocks:
            shim = TARGET / "stranger" / "clock.so"
            if "redis" in scenario.clocks:
                self.redis_clock = directory / "redis.clock"
                self.redis_clock.write_bytes(bytes(8))
                env = {"LD_PRELOAD": str(shim), "STRANGER_CLOCK": str(self.redis_clock)}
        shape = SHAPES[scenario.redis](directory, env, **({"replicas": True} if scenario.replicas else {}))
        self.cluster = Cluster(
            directory,
            kafka,
            self.topics.names,
            f"{self.prefix}-purger",
            shape,
            scenario.lease_ms,
            scenario.retry_base_ms,
            scenario.redis_options,
            shim if "roles" in scenario.clocks else None,
            scenario.wait_replicas,
        )
        self.redis = shape
        self.devices: dict[str, Device] = {}
        self.roamers: list[Device] = []
        self.latecomers: list[Device] = []
        self._make_devices()
        audience: dict[str, list[str]] = {}
        for key, device in self.devices.items():
            audience.setdefault(device.user, []).append(key)
        self.business = Business(
            kafka.brokers, self.topics, self.traces["producer"], random.Random(f"{seed}/load"), audience
        )
        self.watch: Watch | None = None
        self._background: list[asyncio.Task] = []

    def _make_devices(self):
        """Of ten users five have one device, one a plain one, two have two, one comes and goes, and one comes
        only when everything was produced."""
        for n in range(self.scenario.users):
            user, slot = f"u{n:02}", n % 10
            kinds = ["careful"]
            if slot == 5:
                kinds = ["plain"]
            elif slot in (6, 7):
                kinds = ["careful", "careful" if slot == 6 else "plain"]
            made = [self.add_device(user, f"d{i}", kind) for i, kind in enumerate(kinds)]
            if slot == 8:
                self.roamers += made
            elif slot == 9:
                self.latecomers += made

    def add_device(self, user: str, name: str, kind: str) -> Device:
        rng = random.Random(f"{self.seed}/{user}/{name}")
        device = Device(user, name, kind, self.urls, self.traces["devices"], rng)
        self.devices[device.key] = device
        return device

    def urls(self) -> list[str]:
        return self.cluster.urls()

    async def start(self) -> None:
        await self.topics.create()
        await self.cluster.start()
        self.watch = Watch(self.kafka.brokers, self.topics, self.cluster.group, self.traces["watch"])
        for device in self.devices.values():
            if device not in self.latecomers:
                device.come()
        await self.until(
            lambda: all(d.registered for d in self.devices.values() if d not in self.latecomers), 60, "devices connect"
        )
        # Everything has begun once a first message of each topic has gone all the way.
        present = [d.user for d in self.devices.values() if d.registered]
        for kind in PUSH:
            self.business.produce(kind, [present[0]], {"text": "first"})
        await self.business.flush()
        await self.until(self.all_there, 60, "the first messages arrive")
        self.faults.write("begin", scenario=self.scenario.name, seed=self.seed)
        await self.sizes("begin")

    # What scenarios say.

    async def until(self, holds, limit: float, what: str) -> None:
        end = time.monotonic() + limit
        while not holds():
            if time.monotonic() > end:
                raise RuntimeError(f"not within {limit:.0f} s: {what}")
            await asyncio.sleep(0.05)

    async def until_committed(self) -> None:
        """Waits until the purgers have committed everything that was produced."""
        await self.until(lambda: not self.uncommitted(), 20, "all is committed")

    @staticmethod
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds)

    @contextlib.asynccontextmanager
    async def flow(self, per_second: float | None = None, **how):
        """Messages are produced, and some users come and go, while the body runs."""
        rate = per_second or self.scenario.rate
        tasks = [asyncio.create_task(self.business.produce_for(3600, rate, **how)), asyncio.create_task(self._roam())]
        self._background += tasks
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, Exception):
                    raise outcome
            await self.business.flush()

    async def _roam(self):
        rng = random.Random(f"{self.seed}/roam")
        while self.roamers:
            await asyncio.sleep(rng.uniform(0.2, 1.0))
            device = rng.choice(self.roamers)
            if device.connected:
                if rng.random() < 0.3:
                    device.drop()
                    continue
                await device.leave()
                await asyncio.sleep(rng.uniform(0.2, 2.0))
            device.come()

    @contextlib.contextmanager
    def fault(self, kind: str, target: str = ""):
        self.say(f"fault: {kind} {target}")
        self.faults.write("fault", on=True, kind=kind, target=target)
        yield
        self.faults.write("fault", on=False, kind=kind, target=target)

    def kill(self, *names: str) -> None:
        for role in self.cluster.named(*names):
            role.kill()

    def freeze(self, *names: str) -> None:
        for role in self.cluster.named(*names):
            role.signal(signal.SIGSTOP)

    def thaw(self, *names: str) -> None:
        for role in self.cluster.named(*names):
            role.signal(signal.SIGCONT)

    def launch(self, *names: str) -> None:
        for role in self.cluster.named(*names):
            if not role.alive():
                role.start()

    async def drain(self, role) -> None:
        """SIGTERM, as an operator rolls a process: it must end with 0."""
        code = await role.term(25)
        self.faults.write("exit", proc=role.name, code=code)

    async def roll(self, *names: str) -> None:
        for role in self.cluster.named(*names):
            await self.drain(role)
            role.start()
            await self.until_ready(30)

    async def until_ready(self, limit: float) -> None:
        for name, why in (await self.cluster.until_ready(limit)).items():
            self.say(f"not ready: {name}: {why}")
            self.faults.write("unready", proc=name, why=why)

    async def everywhere(self, *words) -> None:
        """A command on each Redis server that answers."""
        for server in self.redis.servers:
            with contextlib.suppress(OSError, RedisError, TimeoutError):
                await server.call(*words)

    async def sizes(self, when: str) -> None:
        keys = 0
        for server in self.redis.masters:
            with contextlib.suppress(OSError, RedisError, TimeoutError):
                keys += await server.call("DBSIZE")
        rss = {r.name: round(r.rss_mb(), 1) for r in self.cluster.roles.values() if r.alive()}
        self.faults.write("size", when=when, keys=keys, users=self.scenario.users, rss=rss)

    # The end.

    def missing(self) -> list[tuple[str, str]]:
        """(device, id) that are still owed; what a newer message with its collapse key replaced is not."""
        excused = self.watch.dead | self.business.replaced
        return [
            (key, name)
            for name, owed in self.business.owed.items()
            if name not in excused
            for key in owed
            if name not in self.devices[key].seen
        ]

    def uncommitted(self) -> list[tuple[str, int]]:
        return [place for place, end in self.business.ends.items() if self.watch.committed.get(place, 0) < end]

    def all_there(self) -> bool:
        return not self.uncommitted() and not self.missing() and self.business.bad <= self.watch.dead

    async def settle(self) -> None:
        """After the last fault everything must arrive, within a time; what then comes only to a new
        connection was stuck, what does not come at all is lost."""
        self.faults.write("mark", what="heal")
        for device in self.devices.values():
            device.come()
        if not await self._arrive(self.scenario.patience):
            missing, uncommitted = self.missing(), self.uncommitted()
            self.say(f"late: {len(missing)} missing, {len(uncommitted)} partitions uncommitted; devices connect again")
            await self.until_ready(0)
            self.faults.write("mark", what="late")
            for device in self.devices.values():
                device.drop()
                device.hurry()
            await self._arrive(30)
        else:
            # What should not come has a moment to come.
            await asyncio.sleep(self.scenario.linger)
        self.faults.write("mark", what="quiet")
        for name in self.cluster.died():
            self.faults.write("died", proc=name)
        await self.sizes("quiet")

    async def _arrive(self, limit: float) -> bool:
        end = time.monotonic() + limit
        while time.monotonic() < end:
            if self.all_there():
                return True
            await asyncio.sleep(0.2)
        return False

    async def stop(self) -> None:
        for task in self._background:
            task.cancel()
        for device in self.devices.values():
            self.faults.write("device", dev=device.key, user=device.user, kind=device.kind)
        self.faults.write("over")
        await asyncio.gather(*(d.end() for d in self.devices.values()), return_exceptions=True)
        if self.watch:
            await asyncio.sleep(0.3)
            await asyncio.to_thread(self.watch.stop)
        await self.cluster.stop()
        with contextlib.suppress(Exception):
            await self.topics.delete()
        for trace in self.traces.values():
            trace.close()

"""Real processes: Apache Kafka, redis-server in several shapes, and two of each of Barid's roles."""

import asyncio
import os
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

from .device import SECRET
from .net import Proxy, RedisError, free_port, http_get, redis

ROOT = Path(__file__).resolve().parents[3]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target").resolve()
BINARIES = Path(os.environ.get("STRANGER_BIN") or TARGET / "debug").resolve()
ROLES = ("purger", "dispatcher", "access", "delayer")
# Whatever ends this suite ends what it started. (A function between fork and exec would do it, too, and may
# deadlock in a process with threads.)
DIE_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")


def step_clock(file: Path, seconds: int) -> None:
    """In place: the file is mapped by who reads it."""
    with file.open("r+b") as f:
        f.write(struct.pack("<q", seconds))


class Process:
    """A process that can be ended, stopped and started again; `died` unless somebody here ended it."""

    def __init__(self, name: str, words: list, directory: Path, env: dict | None = None):
        self.name, self.words, self.directory = name, [str(w) for w in words], directory
        self.env = {**os.environ, **(env or {})}
        self.child: subprocess.Popen | None = None
        self.expected_end = False

    def start(self) -> None:
        assert not self.alive(), f"{self.name} runs already"
        self.expected_end = False
        with (self.directory / f"{self.name}.log").open("ab") as log:
            self.child = subprocess.Popen(
                [*DIE_WITH_US, *self.words],
                cwd=self.directory,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def alive(self) -> bool:
        return self.child is not None and self.child.poll() is None

    def signal(self, number: int) -> None:
        if self.alive():
            self.child.send_signal(number)

    def kill(self) -> None:
        self.expected_end = True
        if self.alive():
            self.child.send_signal(signal.SIGKILL)
            self.child.wait()

    async def term(self, limit: float) -> int | None:
        """SIGTERM. The exit code; None if it had to be killed."""
        self.expected_end = True
        self.signal(signal.SIGTERM)
        end = time.monotonic() + limit
        while self.alive() and time.monotonic() < end:
            await asyncio.sleep(0.05)
        code = self.child.poll()
        self.kill()
        return code

    def rss_mb(self) -> float:
        try:
            pages = Path(f"/proc/{self.child.pid}/statm").read_text().split()[1]
        except (OSError, AttributeError):
            return 0.0
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Kafka:
    """One KRaft node. Its second listener is advertised through a proxy; the roles use that one, so that a
    scenario can hold what they say to Kafka."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.port, self.inner, self.controller = free_port(), free_port(), free_port()
        self.proxy = Proxy(self.inner)
        self.brokers = f"127.0.0.1:{self.port}"
        self.process: Process | None = None

    async def start(self) -> None:
        libs = TARGET / "kafka" / "libs"
        if not (libs / ".complete").exists():
            raise SystemExit(f"no Apache Kafka in {libs}: run scripts/setup.sh test")
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        await self.proxy.start()
        lines = {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.bootstrap.servers": f"127.0.0.1:{self.controller}",
            "listeners": f"PLAIN://127.0.0.1:{self.port},ROLES://127.0.0.1:{self.inner},"
            f"CONTROLLER://127.0.0.1:{self.controller}",
            "advertised.listeners": f"PLAIN://127.0.0.1:{self.port},ROLES://127.0.0.1:{self.proxy.port}",
            "listener.security.protocol.map": "PLAIN:PLAINTEXT,ROLES:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "PLAIN",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": self.directory / "data",
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": 1,
            "offsets.topic.num.partitions": 4,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "group.initial.rebalance.delay.ms": 0,
            # As deploy/README.md advises, so that a killed purger's partitions move soon.
            "group.consumer.min.session.timeout.ms": 5000,
            "group.consumer.session.timeout.ms": 6000,
            "group.consumer.min.heartbeat.interval.ms": 500,
            "group.consumer.heartbeat.interval.ms": 1000,
            "num.io.threads": 2,
            "num.network.threads": 2,
            "log.cleaner.dedupe.buffer.size": 2097152,
        }
        properties = self.directory / "server.properties"
        properties.write_text("".join(f"{k}={v}\n" for k, v in lines.items()))
        java = ["java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto", "-cp", f"{libs}/*"]
        format_ = Process(
            "format",
            [
                *java,
                "kafka.tools.StorageTool",
                "format",
                "--standalone",
                "-t",
                "c3RyYW5nZXItc3VpdGUtMDE",
                "-c",
                properties,
            ],
            self.directory,
        )
        format_.start()
        while format_.alive():
            await asyncio.sleep(0.05)
        if format_.child.returncode:
            raise SystemExit(f"Kafka's storage cannot be formatted: {self.directory}/format.log")
        self.process = Process("kafka", [*java, "kafka.Kafka", properties], self.directory)
        await self.restart()

    async def restart(self) -> None:
        self.process.start()
        for _ in range(1800):
            if (await http_get(self.port, "/", 1.0))[0] or await self._open():
                return
            if not self.process.alive():
                break
            await asyncio.sleep(0.05)
        raise RuntimeError(f"Kafka does not come up: {self.directory}/kafka.log")

    async def _open(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.transport.abort()
        return True

    async def stop(self) -> None:
        if self.process:
            self.process.kill()
        await self.proxy.stop()


# Replicas copy as this user: to take it away cuts the link and nothing else.
COPIES = {
    "masteruser": "copy",
    "masterauth": "copy",
    "user": "copy on >copy +psync +replconf +ping",
    "repl_ping_replica_period": 1,
}


class RedisServer(Process):
    """One redis-server with what deploy/redis/redis.conf asks for, but for its disk: a killed one comes back
    with what the scenario says, not with what its file system kept."""

    def __init__(self, name: str, directory: Path, env: dict | None = None, **options):
        self.port = free_port(above=10_000 if options.get("cluster_enabled") else 0)
        self.data = directory / name
        self.data.mkdir(parents=True, exist_ok=True)
        options = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": self.data,
            "save": '""',
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
            "tracking-table-max-keys": 1_000_000,
            "daemonize": "no",
            **{k.replace("_", "-"): v for k, v in options.items()},
        }
        conf = self.data / "redis.conf"
        conf.write_text("".join(f"{k} {v}\n" for k, v in options.items()))
        super().__init__(name, ["redis-server", conf], directory, env)

    async def up(self) -> "RedisServer":
        self.start()
        for _ in range(400):
            try:
                if await redis(self.port, "PING", limit=1) == "PONG":
                    return self
            except (OSError, RedisError, TimeoutError):
                pass
            await asyncio.sleep(0.05)
        raise RuntimeError(f"redis-server {self.name} does not come up")

    async def call(self, *words, limit: float = 5.0):
        return await redis(self.port, *words, limit=limit)

    async def until_linked(self) -> None:
        for _ in range(300):
            if "master_link_status:up" in await self.call("INFO", "replication"):
                return
            await asyncio.sleep(0.1)
        raise RuntimeError(f"{self.name} does not follow its master")

    async def cut_replicas(self) -> None:
        """Replicas copy as a user of their own: without it they cannot, and everything else goes on."""
        await self.call("ACL", "SETUSER", "copy", "off")
        await self.call("CLIENT", "KILL", "TYPE", "replica")

    async def snapshot(self) -> bytes:
        await self.call("SAVE", limit=20)
        return (self.data / "dump.rdb").read_bytes()

    async def back_to(self, snapshot: bytes | None) -> None:
        """Killed, and started again with what it held at `snapshot` (None: nothing)."""
        self.kill()
        dump = self.data / "dump.rdb"
        dump.unlink(missing_ok=True)
        if snapshot is not None:
            dump.write_bytes(snapshot)
        await self.up()


class RedisSingle:
    """One server. The roles connect through a proxy each."""

    def __init__(self, directory: Path, env: dict | None = None):
        self.masters = [RedisServer("redis", directory, env)]
        self.servers = self.masters

    async def start(self) -> None:
        await self.masters[0].up()

    @property
    def address(self) -> int:
        return self.masters[0].port

    def config(self, port: int) -> str:
        return f'url = "redis://127.0.0.1:{port}"\n'

    async def stop(self) -> None:
        for server in self.servers:
            server.kill()


class RedisPair(RedisSingle):
    """A master, a replica and a Sentinel. The address of the roles follows what Sentinel says, as
    docs/decisions/0010 asks for."""

    def __init__(self, directory: Path, env: dict | None = None):
        self.servers = [RedisServer(name, directory, env, **COPIES) for name in ("redis-1", "redis-2")]
        self.masters = self.servers[:1]
        self.front = Proxy(self.servers[0].port)
        self.sentinel = RedisServer("sentinel", directory)
        (self.sentinel.data / "redis.conf").write_text(
            f"port {self.sentinel.port}\nbind 127.0.0.1\ndir {self.sentinel.data}\n"
            f"sentinel monitor barid 127.0.0.1 {self.servers[0].port} 1\n"
            "sentinel down-after-milliseconds barid 1000\nsentinel failover-timeout barid 6000\n"
        )
        self.sentinel.words.append("--sentinel")
        self._follower: asyncio.Task | None = None

    async def start(self) -> None:
        await self.front.start()
        for server in self.servers:
            await server.up()
        await self.servers[1].call("REPLICAOF", "127.0.0.1", self.servers[0].port)
        await self.servers[1].until_linked()
        await self.sentinel.up()
        for _ in range(300):
            if await self.sentinel.call("SENTINEL", "REPLICAS", "barid"):
                break
            await asyncio.sleep(0.1)
        else:
            raise RuntimeError("Sentinel does not find the replica")
        self._follower = asyncio.create_task(self._follow())

    @property
    def address(self) -> int:
        return self.front.port

    async def _follow(self):
        while True:
            await asyncio.sleep(0.1)
            try:
                _, port = await self.sentinel.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "barid", limit=1)
            except (OSError, RedisError, TimeoutError, TypeError):
                continue
            if int(port) != self.front.target:
                self.front.target = int(port)
                self.masters = [s for s in self.servers if s.port == int(port)]
                self.front.cut()

    async def stop(self) -> None:
        if self._follower:
            self._follower.cancel()
        self.sentinel.kill()
        await super().stop()
        await self.front.stop()


class RedisCluster(RedisSingle):
    """Three masters, and with `replicas` one replica each."""

    def __init__(self, directory: Path, env: dict | None = None, replicas: bool = False):
        self.replicas = replicas
        options = {
            "cluster_enabled": "yes",
            "cluster_node_timeout": 1500,
            "cluster_replica_validity_factor": 0,
            "cluster_require_full_coverage": "no",
        }
        if replicas:
            options |= COPIES
        names = [f"redis-{n}" for n in range(1, 7 if replicas else 4)]
        self.servers = [RedisServer(name, directory, env, **options) for name in names]
        self.masters = self.servers[:3]

    async def start(self) -> None:
        for server in self.servers:
            await server.up()
        bounds = [(0, 5460), (5461, 10922), (10923, 16383)]
        for n, server in enumerate(self.servers):
            await server.call("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
            if n < 3:
                await server.call("CLUSTER", "ADDSLOTSRANGE", *bounds[n])
        for server in self.servers[1:]:
            await server.call("CLUSTER", "MEET", "127.0.0.1", self.servers[0].port)
        await self._all(lambda info: f"cluster_known_nodes:{len(self.servers)}" in info)
        for n, server in enumerate(self.servers[3:]):
            of = await self.servers[n].call("CLUSTER", "MYID")
            await self._retry(lambda: server.call("CLUSTER", "REPLICATE", of))
        await self._all(lambda info: "cluster_state:ok" in info)
        for server in self.servers[3:]:
            await server.until_linked()

    async def _all(self, holds) -> None:
        for server in self.servers:
            for _ in range(300):
                if holds(await server.call("CLUSTER", "INFO")):
                    break
                await asyncio.sleep(0.1)
            else:
                raise RuntimeError("Redis Cluster does not form")

    @staticmethod
    async def _retry(call):
        for _ in range(100):
            try:
                return await call()
            except RedisError:
                await asyncio.sleep(0.1)
        return await call()

    @property
    def address(self) -> int:
        return 0

    def config(self, port: int) -> str:
        urls = ", ".join(f'"redis://127.0.0.1:{s.port}"' for s in self.servers)
        return f"cluster = true\nurls = [{urls}]\n"


class Role(Process):
    """One process of a role, its own addresses, and a proxy before each thing that it speaks to."""

    def __init__(self, role: str, number: int, cluster: "Cluster", extra: str = ""):
        self.role, self.number, self.cluster = role, number, cluster
        self.admin = free_port()
        self.listen = free_port()
        self.grpc = Proxy(free_port())
        self.devices = Proxy(self.listen)
        self.redis = Proxy(cluster.redis.address)
        self.extra = extra
        self.clock = cluster.directory / f"{role}-{number}.clock"
        self.clock.write_bytes(struct.pack("<q", 0))
        config = cluster.directory / f"{role}-{number}.toml"
        env = {"RUST_BACKTRACE": "1", "TOKIO_WORKER_THREADS": "2"}
        if cluster.shim:
            env |= {"LD_PRELOAD": str(cluster.shim), "STRANGER_CLOCK": str(self.clock)}
        super().__init__(f"{role}-{number}", [BINARIES / f"barid-{role}", "--config", config], cluster.directory, env)
        self.config = config

    async def prepare(self) -> None:
        for proxy in (self.grpc, self.devices, self.redis):
            await proxy.start()
        self.config.write_text(self._toml())

    def set_clock(self, seconds: int) -> None:
        step_clock(self.clock, seconds)

    async def ready(self) -> tuple[bool, str]:
        status, body = await http_get(self.admin, "/readyz")
        return status == 200, body

    async def close(self) -> None:
        self.kill()
        for proxy in (self.grpc, self.devices, self.redis):
            await proxy.stop()

    def _toml(self) -> str:
        c = self.cluster
        head = {
            "purger": "drain_seconds = 15\n",
            "delayer": "drain_seconds = 10\n",
            "dispatcher": f'node = "{self.name}"\nlisten = "127.0.0.1:{self.grpc.target}"\n'
            f'advertise = "127.0.0.1:{self.grpc.port}"\nlease_ttl_ms = {c.lease_ms}\ndrain_seconds = 10\n',
            "access": f'node = "{self.name}"\nlisten = "127.0.0.1:{self.listen}"\n'
            f'grpc_listen = "127.0.0.1:{self.grpc.target}"\nadvertise = "127.0.0.1:{self.grpc.port}"\n'
            f"lease_ttl_ms = {c.lease_ms}\ndrain_seconds = 5\n",
        }[self.role]
        text = head + f'\n[admin]\nlisten = "127.0.0.1:{self.admin}"\n\n[redis]\n{c.redis.config(self.redis.port)}'
        text += f"retry_base_ms = {c.retry_base_ms}\n" + "".join(f"{k} = {v}\n" for k, v in c.redis_options.items())
        if self.role == "purger" and c.wait_replicas:
            text += f"wait_replicas = {c.wait_replicas}\n"
        if self.role == "access":
            text += f'\n[[auth.keys]]\nalgorithm = "HS256"\nsecret_file = "{c.secret}"\n'
        if self.role in ("access", "purger"):
            text += f'\n[kafka]\nbrokers = ["127.0.0.1:{c.kafka.proxy.port}"]\ngroup = "{c.group}"\n\n[kafka.topics]\n'
            names = c.topics
            text += "".join(
                f'{key} = "{names[kind]}"\n'
                for key, kind in (
                    ("push_high", "high"),
                    ("push", "push"),
                    ("push_bulk", "bulk"),
                    ("receipts", "receipts"),
                    ("dead", "dead"),
                    ("revocations", "revocations"),
                )
            )
        return text + self.extra


class Cluster:
    """Two of each role over one Redis (of whatever shape) and a Kafka."""

    def __init__(
        self,
        directory: Path,
        kafka: Kafka,
        topics: dict[str, str],
        group: str,
        redis_shape,
        lease_ms=3000,
        retry_base_ms=500,
        redis_options=None,
        shim: Path | None = None,
        wait_replicas=0,
    ):
        self.directory, self.kafka, self.topics, self.group = directory, kafka, topics, group
        self.redis, self.lease_ms, self.retry_base_ms = redis_shape, lease_ms, retry_base_ms
        self.redis_options = redis_options or {}
        self.shim, self.wait_replicas = shim, wait_replicas
        self.secret = directory / "secret"
        self.secret.write_bytes(SECRET)
        self.secret.chmod(0o600)
        self.roles: dict[str, Role] = {}

    async def start(self) -> None:
        await self.redis.start()
        for role in ROLES:
            for number in (1, 2):
                await self.add(role, number)
        wrong = await self.until_ready(60)
        if wrong or self.died():
            raise RuntimeError(f"the cluster does not start: {wrong or self.died()}")

    async def add(self, role: str, number: int) -> Role:
        process = Role(role, number, self)
        await process.prepare()
        self.roles[process.name] = process
        process.start()
        return process

    def named(self, *names: str) -> list[Role]:
        """`access` names both access nodes, `access-1` one process, `roles` all."""
        return [r for r in self.roles.values() if {"roles", r.role, r.name} & set(names)]

    def urls(self) -> list[str]:
        return [f"ws://127.0.0.1:{r.devices.port}/v1/connect" for r in self.roles.values() if r.role == "access"]

    async def until_ready(self, limit: float) -> dict[str, str]:
        """What is wrong, by process; empty once all living processes are ready."""
        end = time.monotonic() + limit
        while True:
            wrong = {}
            for role in self.roles.values():
                if role.alive():
                    good, why = await role.ready()
                    if not good:
                        wrong[role.name] = why.strip()
            if not wrong or time.monotonic() > end:
                return wrong
            await asyncio.sleep(0.2)

    def died(self) -> list[str]:
        """Processes that ended though nobody here ended them."""
        return [r.name for r in self.roles.values() if not r.alive() and not r.expected_end]

    async def stop(self) -> None:
        for role in self.roles.values():
            await role.close()
        await self.redis.stop()

"""The business's side of Kafka: a producer, and a reader of what Barid says back."""

import asyncio
import base64
import json
import random
import threading
import time

import confluent_kafka
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic

from .device import APP, body_hash
from .trace import Trace

PUSH = ("high", "push", "bulk")
# Records that Barid must refuse, with the code that docs/protocol.md gives.
BAD = {
    "bad_json": b'{"id":"x",',
    "unknown_field": b'{"id":"%ID%","app":"stranger","to":{"user":"u00"},"text":"x","colour":"red"}',
    "no_audience": b'{"id":"%ID%","app":"stranger","text":"x"}',
    "two_bodies": b'{"id":"%ID%","app":"stranger","to":{"user":"u00"},"text":"x","data":"AA=="}',
    "negative_ttl": b'{"id":"%ID%","app":"stranger","to":{"user":"u00"},"text":"x","ttlSeconds":-1}',
}


class Topics:
    """The names of one scenario, so that scenarios share a broker and nothing else."""

    def __init__(self, prefix: str, brokers: str, partitions: int):
        self.prefix, self.partitions = prefix, partitions
        self.admin = AdminClient({"bootstrap.servers": brokers, "log_level": 0})
        self.names = {
            "high": f"{prefix}.push.high",
            "push": f"{prefix}.push",
            "bulk": f"{prefix}.push.bulk",
            "receipts": f"{prefix}.receipts",
            "dead": f"{prefix}.dead",
            "revocations": f"{prefix}.revocations",
        }
        # Which life of a topic an offset belongs to.
        self.life = dict.fromkeys(self.names.values(), 0)

    async def create(self, *kinds: str) -> None:
        # A producer's clock may be wrong: Kafka refuses nothing for its timestamp.
        config = dict.fromkeys(PUSH, {"message.timestamp.after.max.ms": str(2**63 - 1)})
        config["revocations"] = {"cleanup.policy": "compact"}
        topics = [
            NewTopic(self.names[k], 1 if k == "revocations" else self.partitions, 1, config=config.get(k, {}))
            for k in kinds or self.names
        ]
        await self._all(self.admin.create_topics(topics))

    async def recreate(self, *kinds: str) -> None:
        names = [self.names[k] for k in kinds]
        await self._all(self.admin.delete_topics(names, operation_timeout=20))
        await asyncio.sleep(1.0)
        await self.create(*kinds)
        for name in names:
            self.life[name] += 1

    async def add_partitions(self, to: int) -> None:
        await self._all(self.admin.create_partitions([NewPartitions(self.names[k], to) for k in PUSH]))
        self.partitions = to

    async def delete(self) -> None:
        await self._all(self.admin.delete_topics(list(self.names.values())))

    @staticmethod
    async def _all(futures) -> None:
        for future in futures.values():
            await asyncio.to_thread(future.result, 30)


class Business:
    """Produces pushes and remembers who is to get each."""

    def __init__(self, brokers: str, topics: Topics, trace: Trace, rng: random.Random, audience: dict[str, list[str]]):
        self.topics, self.trace, self.rng, self.audience = topics, trace, rng, audience
        self.brokers = brokers
        self.users = list(audience)
        self.count = 0
        self.failed = 0
        # id → device keys that must show it, for those that Kafka took.
        self.owed: dict[str, set[str]] = {}
        self.bad: set[str] = set()
        # (user, collapse key) → the newest message; the others may be replaced.
        self.newest: dict[tuple[str, str], str] = {}
        self.replaced: set[str] = set()
        self.ends: dict[tuple[str, int], int] = {}
        self.timestamp_ms = 0
        self.codec("none")

    def codec(self, name: str) -> None:
        """Another producer from here on, with this compression."""
        self.producer = confluent_kafka.Producer(
            {
                "bootstrap.servers": self.brokers,
                "enable.idempotence": True,
                "linger.ms": 5,
                "compression.type": name,
                "message.timeout.ms": 90_000,
                "reconnect.backoff.max.ms": 1_000,
                "log_level": 0,
                "topic.metadata.refresh.interval.ms": 2_000,
            }
        )

    async def produce_for(self, seconds: float, per_second: float, **how) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.produce_any(**how)
            self.producer.poll(0)
            await asyncio.sleep(self.rng.expovariate(per_second))

    async def flush(self) -> None:
        deadline = time.monotonic() + 95
        while len(self.producer) and time.monotonic() < deadline:
            self.producer.poll(0)
            await asyncio.sleep(0.02)

    def produce_any(self, plain: bool = False, users: list[str] | None = None) -> str:
        """One record of the usual mix; `plain`: neither lists, devices, collapse keys nor bad records."""
        draw = self.rng.random()
        if not plain and draw < 0.01:
            return self.produce_bad()
        chosen = [self.rng.choice(users or self.users)]
        push: dict = {}
        device = collapse = None
        if not plain and draw < 0.05:
            chosen = self.rng.sample(self.users, min(5, len(self.users)))
        elif not plain and draw < 0.08:
            device = self.rng.choice(self.audience[chosen[0]]).split("/")[1]
        elif not plain and draw < 0.11:
            collapse = f"key-{self.rng.randrange(3)}"
        if collapse:
            push["collapseKey"] = collapse
        if self.rng.random() < 0.2:
            push["receipts"] = ["accepted", "acked"]
        push |= self._body()
        # What replaces one another goes to one topic: only there is it known which is newer.
        kind = "push" if collapse else self.rng.choices(PUSH, (0.15, 0.7, 0.15))[0]
        return self.produce(kind, chosen, push, device)

    def produce(self, kind: str, users: list[str], push: dict, device: str | None = None) -> str:
        self.count += 1
        name = f"{self.topics.prefix}-{self.count}"
        to = {"user": users[0]} | ({"device": device} if device else {})
        push = {"id": name, "app": APP, "to": to if len(users) == 1 else {"users": users}, **push}
        topic = self.topics.names[kind]
        owed = {key for user in users for key in self.audience[user] if device in (None, key.split("/")[1])}
        life = self.topics.life[topic]
        if "collapseKey" in push:
            older = self.newest.get((users[0], push["collapseKey"]))
            self.replaced |= {older} if older else set()
            self.newest[users[0], push["collapseKey"]] = name
        self.trace.write(
            "send",
            id=name,
            topic=topic,
            life=life,
            users=users,
            device=device,
            h=body_hash(push),
            collapse=push.get("collapseKey"),
            ttl=push.get("ttlSeconds", 0),
            receipts=push.get("receipts", []),
            bad=None,
        )

        def taken(error, message):
            if error is not None:
                self.failed += 1
                self.trace.write("prod", id=name, st="unknown", why=error.str())
                return
            self._taken(name, life, message)
            # What is over is owed to nobody; whether it came in time is for the checker.
            if not push.get("ttlSeconds"):
                self.owed[name] = owed

        value = json.dumps(push).encode()
        # One in a hundred is produced twice, as by a business that does not know whether it was.
        for _ in range(2 if self.rng.random() < 0.01 else 1):
            self.producer.produce(topic, key=users[0], value=value, on_delivery=taken, timestamp=self.timestamp_ms)
        return name

    def produce_bad(self, code: str | None = None) -> str:
        code = code or self.rng.choice(list(BAD))
        self.count += 1
        name = f"{self.topics.prefix}-{self.count}"
        topic = self.topics.names["push"]
        life = self.topics.life[topic]
        self.trace.write(
            "send",
            id=name,
            topic=topic,
            life=life,
            users=[],
            device=None,
            h="",
            collapse=None,
            ttl=0,
            receipts=[],
            bad=code,
        )

        def taken(error, message):
            if error is None:
                self._taken(name, life, message)
                self.bad.add(name)

        value = BAD[code].replace(b"%ID%", name.encode())
        self.producer.produce(topic, key="u00", value=value, headers={"stranger": name}, on_delivery=taken)
        return name

    def _taken(self, name, life, message):
        place = (message.topic(), message.partition())
        self.ends[place] = max(self.ends.get(place, 0), message.offset() + 1)
        self.trace.write(
            "prod", id=name, st="ok", topic=message.topic(), life=life, part=message.partition(), off=message.offset()
        )

    def _body(self) -> dict:
        draw = self.rng.random()
        size = int(20 * 2 ** self.rng.uniform(0, 7))
        if draw < 0.6:
            return {"text": "سلام 👋 " + "".join(self.rng.choices("abcdefghij \n", k=size))}
        if draw < 0.85:
            value = {"n": self.rng.randrange(2**53), "list": [1.5, None, True, "x" * size], "naïve": {"a": "\u2028"}}
            return {"json": value}
        return {"data": base64.b64encode(self.rng.randbytes(size)).decode()}


class Watch:
    """Reads receipts, dead letters and committed offsets in a thread of its own."""

    def __init__(self, brokers: str, topics: Topics, group: str, trace: Trace):
        self.brokers, self.topics, self.group, self.trace = brokers, topics, group, trace
        self.committed: dict[tuple[str, int], int] = {}
        self.dead: set[str] = set()
        self._end = threading.Event()
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._read, self._poll)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(10)

    def _read(self):
        consumer = confluent_kafka.Consumer(
            {
                "bootstrap.servers": self.brokers,
                "group.id": f"{self.group}-stranger",
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "log_level": 0,
                "reconnect.backoff.max.ms": 1_000,
            }
        )
        names = self.topics.names
        consumer.assign(
            [
                confluent_kafka.TopicPartition(names[k], p, confluent_kafka.OFFSET_BEGINNING)
                for k in ("receipts", "dead")
                for p in range(self.topics.partitions)
            ]
        )
        while not self._end.is_set():
            message = consumer.poll(0.2)
            if message is None or message.error():
                continue
            if message.topic() == names["receipts"]:
                receipt = json.loads(message.value())
                self.trace.write("rcpt", **{k: receipt.get(k) for k in ("kind", "id", "user", "device", "seq", "code")})
            else:
                headers = {k: (v or b"").decode() for k, v in message.headers() or []}
                name = headers.get("stranger") or self._id(message.value())
                self.dead.add(name)
                self.trace.write(
                    "dead",
                    id=name,
                    code=headers.get("barid-code"),
                    reason=headers.get("barid-reason"),
                    off=headers.get("barid-offset"),
                )
        consumer.close()

    @staticmethod
    def _id(value) -> str:
        try:
            return json.loads(value)["id"]
        except (ValueError, KeyError, TypeError):
            return ""

    def _poll(self):
        # Not the admin client: librdkafka 2.16 aborts the process if the broker dies under its question.
        consumer = confluent_kafka.Consumer(
            {
                "bootstrap.servers": self.brokers,
                "group.id": self.group,
                "enable.auto.commit": False,
                "log_level": 0,
                "reconnect.backoff.max.ms": 1_000,
            }
        )
        last: dict = {}
        while not self._end.wait(0.3):
            wanted = [
                confluent_kafka.TopicPartition(self.topics.names[k], p)
                for k in PUSH
                for p in range(self.topics.partitions)
            ]
            try:
                answer = consumer.committed(wanted, timeout=3)
            except confluent_kafka.KafkaException:  # the broker is away, as it may be
                continue
            for tp in answer:
                place = (tp.topic, tp.partition)
                if tp.error is None and tp.offset >= 0 and last.get(place) != tp.offset:
                    last[place] = tp.offset
                    self.trace.write(
                        "commit", topic=tp.topic, life=self.topics.life[tp.topic], part=tp.partition, off=tp.offset
                    )
                    self.committed[place] = tp.offset
        consumer.close()

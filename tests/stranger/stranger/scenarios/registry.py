"""What a scenario is, and the list of them."""

import dataclasses
from collections.abc import Awaitable, Callable

from ..checker import Expected
from ..world import World


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
    # Of the purgers: redis.wait_replicas.
    wait_replicas: int = 0
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

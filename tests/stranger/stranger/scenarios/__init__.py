"""What is done to the cluster, a module a kind. Each scenario is what it says, from its first fault to its last."""

from . import processes, forgetting, redis, kafka, links, clocks, devices, chaos  # noqa: F401, I001 (their order)
from .registry import SCENARIOS, Scenario

__all__ = ["SCENARIOS", "Scenario"]

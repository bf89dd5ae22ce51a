"""METERS: genotype -> value of a named objective, known without running the hybrid.

To add one: a builder here, an entry of `OBJECTIVES`, and a test. What a value was counted or timed on is the meter's
identity; an archive keeps it, so values of two kinds are never compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ens.evaluate.cost import CostTable, build_cost_table
from ens.evaluate.latency import LatencyTable
from ens.evaluate.memory import build_peak_tally
from ens.networks.steps import Network
from ens.space import Genotype, SearchSpace, Tally

SIDE_PX = 256
PEAK = "peak_bytes"


@dataclass(frozen=True)
class Meter:
    """`measure` gives the value of a genotype. Nothing is counted before it is asked for: a finished run only compares
    identities.
    """

    identity: str
    measure: Callable[[Genotype], float]
    count: Callable[[], Tally]

    @cached_property
    def tally(self) -> Tally:
        """The numbers a choice that values are made of, so that a search knows what it can reach."""
        return self.count()


@functools.lru_cache(maxsize=1)
def _count_table(network: Network, space: SearchSpace) -> CostTable:
    return build_cost_table(network, space, height=SIDE_PX, width=SIDE_PX)


def _build_counted(name: str, identity: str, network: Network, space: SearchSpace) -> Meter:
    table = functools.partial(_count_table, network, space)
    return Meter(identity, lambda genotype: table().costs(genotype)[name], lambda: table().tally(name))


def _build_macs(network: Network, space: SearchSpace) -> Meter:
    identity = f"multiply-adds, scans included, at {SIDE_PX}×{SIDE_PX} padded to a multiple of {network.size_multiple}"
    return _build_counted("macs", identity, network, space)


def _build_params(network: Network, space: SearchSpace) -> Meter:
    return _build_counted("params", "parameters of the whole network", network, space)


def _build_penalty(network: Network, space: SearchSpace) -> Meter:
    identity = (f"{space.penalty_teacher:g} a stage of {', '.join(space.transformers) or 'the teacher'} by its share, "
                f"{space.penalty_per_block:g} another block, identity 0")
    entries = tuple(tuple(space.price(slot, index) for index in range(len(slot.choices))) for slot in space.slots)
    return Meter(identity, space.penalty, lambda: Tally(0.0, entries))


METERS: Mapping[str, Callable[[Network, SearchSpace], Meter]] = {
    "penalty": _build_penalty,
    "macs": _build_macs,
    "params": _build_params,
}
"""What every measurement holds: it takes no time. The others are built for those who ask for them."""


def build_latency(table: LatencyTable, space: SearchSpace) -> Meter:
    """Milliseconds by a latency table; raises LatencyError where it lacks a choice."""
    table.check_space(space)
    entries = tuple(tuple(table.slots[slot.name][choice.label].ms for choice in slot.choices) for slot in space.slots)
    return Meter(table.identity, functools.partial(table.predict_ms, space), lambda: Tally(table.rest.ms, entries))


def build_peak(network: Network, space: SearchSpace, size: tuple[int, int]) -> Meter:
    """Peak activation memory in bytes for an image of this height and width (`evaluate.memory`)."""
    identity = (f"most bytes of float32 maps alive together in the exported graph at {size[0]}×{size[1]} padded to a "
                f"multiple of {network.size_multiple}")
    count = functools.cache(lambda: build_peak_tally(network, space, height=size[0], width=size[1]))
    return Meter(identity, lambda genotype: count().value(genotype), count)

"""METERS: genotype -> value of a named objective, known without running the hybrid.

To add one: a builder here, an entry of `OBJECTIVES`, and a test. What a value was counted or timed on is the meter's
identity; an archive keeps it, so values of two kinds are never compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ens.evaluate.cost import CostTable, build_cost_table
from ens.evaluate.latency import LatencyTable
from ens.networks.steps import Network
from ens.space import Genotype, SearchSpace

SIDE_PX = 256


@dataclass(frozen=True)
class Meter:
    """`measure` gives the value of a genotype; it may be a sum over slots, a maximum, or anything else."""

    identity: str
    measure: Callable[[Genotype], float]


@functools.lru_cache(maxsize=1)
def _count_table(network: Network, space: SearchSpace) -> CostTable:
    return build_cost_table(network, space, height=SIDE_PX, width=SIDE_PX)


def _build_macs(network: Network, space: SearchSpace) -> Meter:
    identity = f"multiply-adds, scans included, at {SIDE_PX}×{SIDE_PX} padded to a multiple of {network.size_multiple}"
    return Meter(identity, lambda genotype: _count_table(network, space).costs(genotype)["macs"])


def _build_params(network: Network, space: SearchSpace) -> Meter:
    return Meter("parameters of the whole network",
                 lambda genotype: _count_table(network, space).costs(genotype)["params"])


def _build_penalty(network: Network, space: SearchSpace) -> Meter:
    identity = (f"{space.penalty_teacher:g} a stage of {', '.join(space.transformers) or 'the teacher'} by its share, "
                f"{space.penalty_per_block:g} another block, identity 0")
    return Meter(identity, space.penalty)


METERS: Mapping[str, Callable[[Network, SearchSpace], Meter]] = {
    "penalty": _build_penalty,
    "macs": _build_macs,
    "params": _build_params,
}


def build_meters(network: Network, space: SearchSpace, tables: Mapping[str, LatencyTable] | None = None,
                 ) -> dict[str, Meter]:
    """Every meter there is for this network (its weights are not looked at) and space, and one for each latency table,
    by the name of its objective; raises LatencyError where a table lacks a choice.
    """
    for table in (tables or {}).values():
        table.check_space(space)
    return {**{name: build(network, space) for name, build in METERS.items()},
            **{name: Meter(table.identity, functools.partial(table.predict_ms, space))
               for name, table in (tables or {}).items()}}

"""The search space of a network: which of its slots may be filled, and with what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ens.networks.steps import Network, block_slots
from ens.space import Choice, SearchSpace, Slot

GRANULARITIES = ("stage", "block")


def build_space(name: str, network: Network, *, granularity: str = "stage", choices: Sequence[Choice] = (),
                slots: Mapping[str, Sequence[Choice]] | None = None, penalty_teacher: float = 2.0,
                penalty_per_block: float = 0.1) -> SearchSpace:
    """Slots in execution order, the teacher's choice first in each.

    `slots` names slots (stages, or blocks as `stage.index`) with the surrogates of each; without it every slot of the
    granularity offers `choices`. Raises ValueError for a slot the network lacks, listing those it has.
    """
    stages, blocks = list(network.slots), block_slots(network.slots)
    known = {spec.name: spec for spec in (*stages, *blocks)}
    offered = slots or {spec.name: choices for spec in (stages if granularity == "stage" else blocks)}
    for slot in offered:
        if slot not in known:
            raise ValueError(f"{name}: no slot {slot!r}; the network has {', '.join(known)}")
    order = {slot: (network.slot_step(slot), index) for index, slot in enumerate(known)}
    filled = []
    for slot in sorted(offered, key=lambda slot: order[slot]):
        own = Choice(known[slot].family, known[slot].depth, teacher=True)
        # A choice listed for every slot may be what this slot's teacher already is.
        filled.append(Slot(slot, (own, *(choice for choice in offered[slot] if choice.label != own.label))))
    return SearchSpace(name, tuple(filled), penalty_teacher, penalty_per_block)

"""The search space of a network: which of its slots may be filled, and with what."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from ens.blocks import FAMILIES
from ens.networks.steps import Network, SlotSpec, block_slots, check_depth, pair_slots
from ens.space import Choice, SearchSpace, Slot, suggest

GRANULARITIES = ("stage", "pair", "block")


def build_space(name: str, network: Network, *, granularity: str = "stage", choices: Sequence[Choice] = (),
                slots: Mapping[str, Sequence[Choice]] | None = None,
                penalty_teacher: float = SearchSpace.penalty_teacher,
                penalty_per_block: float = SearchSpace.penalty_per_block,
                transformers: Sequence[str] = SearchSpace.transformers) -> SearchSpace:
    """Slots in execution order, the teacher's choice first in each.

    `slots` names slots (stages, blocks as `stage.index`, pairs as `stage.0-1`) with the surrogates of each; without it
    every slot of the granularity offers `choices`. The prices are `SearchSpace`'s. Raises ValueError for a slot the
    network lacks, for slots of which one lies in another, and for a granularity, family or depth that there is not.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"{name}: no granularity {granularity!r}; allowed: {', '.join(GRANULARITIES)}")
    stages, blocks, pairs = list(network.slots), block_slots(network.slots), pair_slots(network.slots)
    known = {spec.name: spec for spec in (*stages, *blocks, *pairs)}
    offered = slots or {spec.name: choices for spec in {"stage": stages, "block": blocks, "pair": pairs}[granularity]}
    for slot in offered:
        if slot not in known:
            raise ValueError(f"{name}: no slot {slot!r}{suggest(slot, known)}; the network has {', '.join(known)}")
    families = (*FAMILIES, *sorted({spec.family for spec in stages} - set(FAMILIES)))
    for family in transformers:
        if family not in families:
            raise ValueError(f"{name}: no block family {family!r}{suggest(family, families)} to price as a "
                             f"transformer; allowed: {', '.join(families)}")
    _check_apart(name, [known[slot] for slot in offered])
    place = {spec.module: index for index, spec in enumerate((*stages, *blocks))}
    order = {slot: (network.slot_step(slot), place[spec.module]) for slot, spec in known.items()}
    filled = []
    for slot in sorted(offered, key=lambda slot: order[slot]):
        own = Choice(known[slot].family, known[slot].depth, teacher=True)
        # A choice listed for every slot may be what this slot's teacher already is.
        filled.append(Slot(slot, (own, *(choice for choice in offered[slot] if choice.label != own.label))))
        for choice in filled[-1].choices[1:]:
            check_depth(slot, choice)
    return SearchSpace(name, tuple(filled), penalty_teacher, penalty_per_block, tuple(transformers))


def _check_apart(name: str, specs: Sequence[SlotSpec]) -> None:
    """Raise ValueError where one slot lies in another: filling both is not defined, and their costs do not add up."""
    for outer, inner in itertools.permutations(specs, 2):
        if any(one == other or one.startswith(f"{other}.") for one in (inner.module, *inner.behind)
               for other in (outer.module, *outer.behind)):
            raise ValueError(f"{name}: slot {inner.name!r} lies in slot {outer.name!r}; a space may have one of them")

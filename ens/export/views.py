"""Reshapes and transposes that lead back to where they began: tokens made of a map, and a map of these tokens again.

A token network whose slots are filled with blocks that work on maps is full of them, and each moves the whole map.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

_MOVES = ("Reshape", "Transpose")
Groups = list[tuple[int, ...]]
"""What each axis of a value is made of: axes of the value where a chain begins, in row-major order."""


def drop_round_trips(graph: ir.Graph) -> None:
    """Let whoever reads the end of a chain of moves that changes nothing read its beginning, in place."""
    for node in list(graph):
        if node.op_type in _MOVES and (source := _find_same(node)) is not None:
            node.outputs[0].replace_all_uses_with(source, replace_graph_outputs=True)


def _find_same(node: ir.Node) -> ir.Value | None:
    """The furthest value above a node that its output equals."""
    chain, found = [node], None
    while (source := chain[0].inputs[0]) is not None:
        if _is_identity(source, chain):
            found = source
        above = source.producer()
        if above is None or above.op_type not in _MOVES:
            break
        chain.insert(0, above)
    return found


def _is_identity(source: ir.Value, chain: Sequence[ir.Node]) -> bool:
    if source.shape is None or (end := chain[-1].outputs[0].shape) is None:
        return False
    sides = [_name(side) for side in source.shape]
    if all(node.op_type == "Reshape" for node in chain):
        return sides == [_name(side) for side in end]
    start: Groups = [(axis,) for axis in range(len(sides))]
    groups = start
    for node in chain:
        if node.op_type == "Transpose":
            order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(groups))[::-1]
            groups = [groups[axis] for axis in order]
        elif regrouped := _regroup([axis for group in groups for axis in group], sides, node.outputs[0].shape):
            groups = regrouped
        else:
            return False
    return groups == start


def _regroup(axes: list[int], sides: Sequence[str], shape: ir.Shape | None) -> Groups | None:
    """How a reshape to `shape` groups axes of these sides: all but one as they are, several in one; None: otherwise."""
    if shape is None:
        return None
    wanted = [_name(side) for side in shape]
    head: Groups = []
    tail: Groups = []
    while axes and wanted and sides[axes[0]] == wanted[0]:
        head.append((axes.pop(0),))
        wanted.pop(0)
    while axes and wanted and sides[axes[-1]] == wanted[-1]:
        tail.insert(0, (axes.pop(),))
        wanted.pop()
    if not axes and not wanted:
        return [*head, *tail]
    return [*head, tuple(axes), *tail] if axes and len(wanted) == 1 else None


def _name(side: int | ir.SymbolicDim) -> str:
    """Equal for sides that are equal; a side that nobody named equals no other."""
    if isinstance(side, int):
        return str(side)
    return side.value if side.value is not None else f"?{id(side)}"

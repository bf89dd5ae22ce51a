"""ONNX: a network as a graph with free height and width, and its file in ONNX Runtime.

Shapes: image (1, C, H, W) in [0, 1], H and W multiples of `size_multiple` -> (1, C, H·upscale, W·upscale).
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.passes import common as passes
from onnxscript import rewriter
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter.rules import common as rules
from torch import Tensor, nn
from torch.export import Dim

from ens.export.graph import tidy_graph
from ens.networks.steps import Network

OPSET = 20
"""GELU is one operator from here on; below it ONNX Runtime is a tenth slower, above it is not faster (measured)."""
_LARGEST_SIDE = 65536
_RULES = (rules.reshape_reshape_rule, rules.transpose_transpose_rule, rules.unsqueeze_unsqueeze_rule,
          rules.no_op_transpose_rule, rules.no_op_cast_rule, rules.no_op_expand_rule, rules.cast_cast_rule,
          rules.collapse_slice_rule, rules.collapse_slice2_rule, rules.slice_split_rule,
          rules.one_reshape_matmul_reshape_rule, rules.two_reshapes_matmul_reshape_rule,
          rules.materialize_reshape_shape_rule)
"""Of the exporter's rewrites those that take shapes away. Its own optimiser also takes a constant near 0 for 0, and an
epsilon under a root is one: a black image became NaN."""


class _Restore(nn.Module):
    """`Network.restore` as the forward that is exported."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network.restore(image)


def write_onnx(network: Network, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the network with `metadata` beside its graph; raises whatever the exporter meets."""
    model = _trace(network)
    simplify_graph(model)
    tidy_graph(model)
    model.metadata_props.update(metadata)
    path.write_bytes(ir.to_proto(model).SerializeToString())


def _trace(network: Network) -> ir.Model:
    multiple = network.size_multiple
    # Two different sides above 1, so that the exporter takes neither for a constant nor one for the other.
    example = torch.zeros(1, network.in_channels, 6 * multiple, 8 * multiple)
    sides = {axis: multiple * Dim(name, min=1, max=_LARGEST_SIDE // multiple) for axis, name in ((2, "h"), (3, "w"))}
    with torch.no_grad(), _hushed():
        program = torch.onnx.export(_Restore(network).eval(), (example,), dynamo=True, opset_version=OPSET,
                                    dynamic_shapes={"image": sides}, input_names=["image"], output_names=["restored"],
                                    verbose=False, optimize=False)
    assert program is not None
    return program.model


def simplify_graph(model: ir.Model) -> None:
    """Fold what is constant, shapes above all, and drop what nothing reads; no value changes."""
    with _hushed():
        passes.InlinePass()(model)
        fold_constants_ir(model)
        passes.RemoveUnusedNodesPass()(model)
        passes.CommonSubexpressionEliminationPass()(model)
        rewriter.rewrite(model, pattern_rewrite_rules=list(_RULES))
        fold_constants_ir(model)
        passes.RemoveUnusedNodesPass()(model)


def open_onnx(path: Path, threads: int | None) -> tuple[onnxruntime.InferenceSession, dict[str, str]]:
    """The file in ONNX Runtime on the CPU, and the metadata beside its graph; raises what the runtime raises.

    FileNotFoundError names the file that other tools put the weights in, where it was left behind.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors share no public class
        lost = re.search(r'External data path does not exist: "([^"]+)"', str(error))
        if lost is None:
            raise
        raise FileNotFoundError(f"its weights are in a file of their own, which is not beside it: {lost[1]}") from None
    return session, dict(session.get_modelmeta().custom_metadata_map)


def run_onnx(session: onnxruntime.InferenceSession, image: Tensor) -> Tensor:
    """One image through an opened file."""
    return torch.from_numpy(session.run(None, {"image": np.ascontiguousarray(image.numpy())})[0])


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """The exporter reports on itself in warnings, log lines and prints; only errors matter here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

"""Histories of graph nodes are shared while a network is built, and torch is left as it was."""

from __future__ import annotations

import copy

import torch
from torch.fx.traceback import NodeSource

from edgedyn.graph.provenance import shared_provenance


def make_source() -> NodeSource:
    (node,) = torch.fx.symbolic_trace(torch.nn.ReLU()).graph.find_nodes(op="placeholder")
    return NodeSource(node, "test")


def test_copy_of_a_history_is_the_history_itself():
    source = make_source()
    with shared_provenance():
        assert copy.deepcopy(source) is source
        with shared_provenance():
            assert copy.deepcopy([source])[0] is source
        assert copy.deepcopy(source) is source

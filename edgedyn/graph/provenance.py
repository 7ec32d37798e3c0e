"""Graph rewrites without copies of every node's history.

torch 2.13 gives each node that it traces a deep copy of the history of the node it came from
(``torch.fx.traceback.NodeSource``), though nothing ever changes one. Export, quantization and lowering trace
a graph dozens of times, and the copies grow with each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.fx.traceback import NodeSource


@contextmanager
def shared_provenance() -> Iterator[None]:
    """Share one history among its copies. Remove this when torch shares it itself (checked: 2.13)."""
    if hasattr(NodeSource, "__deepcopy__"):
        yield
        return
    NodeSource.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del NodeSource.__deepcopy__  # type: ignore[attr-defined]

"""ExecuTorch with XNNPACK: the phone."""

from __future__ import annotations

from importlib.util import find_spec

from edgedyn.targets import Int8Scheme, Target, deferred


def _missing() -> str | None:
    if find_spec("executorch") is None:
        return "the package executorch is not installed; run: pip install 'executorch==1.5.*'"
    return None


TARGET = Target(
    name="executorch",
    summary="phone: one .pte for ExecuTorch, XNNPACK delegates, stock runtime",
    capabilities=frozenset({"in_order"}),
    kernels=frozenset({"edgedyn_kernels", "edgedyn_block_kernel"}),
    precisions=frozenset({"fp32", "int8"}),
    int8=Int8Scheme(
        symmetric=False,
        outputs=True,
        dynamic=deferred("edgedyn.targets.executorch.dynamic", "can_be_dynamic"),
    ),
    lower=deferred("edgedyn.targets.executorch.lower", "lower"),
    preview=deferred("edgedyn.targets.executorch.lower", "preview"),
    load=deferred("edgedyn.targets.executorch.run", "load"),
    missing=_missing,
    profile=deferred("edgedyn.targets.executorch.profile", "Profiled"),
    load_kernels=deferred("edgedyn.targets.executorch.kernels", "load"),
)

"""ExecuTorch with XNNPACK: the phone."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedyn.targets import Artifact, Int8Scheme, Target

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram

    from edgedyn.targets import Run


def _lower(programs: Mapping[str, ExportedProgram], out: Path, precision: str) -> Artifact:
    from edgedyn.targets.executorch.lower import lower

    return lower(programs, out, precision)


def _preview(programs: Mapping[str, ExportedProgram]) -> dict[str, Any]:
    from edgedyn.targets.executorch.lower import preview

    return preview(programs)


def _load(path: Path, program: str = "forward") -> Run:
    from edgedyn.targets.executorch.run import load

    return load(path, program)


def _missing() -> str | None:
    if find_spec("executorch") is None:
        return "the package executorch is not installed; run: pip install 'executorch==1.5.*'"
    return None


TARGET = Target(
    name="executorch",
    summary="phone: one .pte for ExecuTorch, XNNPACK delegates, stock runtime",
    capabilities=frozenset(),
    precisions=frozenset({"fp32", "int8"}),
    int8=Int8Scheme(symmetric=False, outputs=True),
    lower=_lower,
    preview=_preview,
    load=_load,
    missing=_missing,
)

"""Check our references against outputs of the authors' own code: ``python tests/golden_check.py FOLDER``.

Every ``.safetensors`` file of the folder is driven by its metadata alone (see tests/golden/README.md). One
line a file: the output that is worst for its tolerance, of float64 and float32; exit 1 if one fails or there
is no file.

Rules, one file ``golden_<paper>.py`` a paper: ``RULES`` {beginning of ``official``: function of a ``Golden``
that gives the file's outputs by name}; a suffix ``@canonical`` marks the same output of the canonical module.
``BOUNDS``, where a file's own definition is approximate: {beginning of ``official``: function of a ``Golden``
that gives the allowed absolute difference}.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

# Both sides compute the same formula in float64 and differ by the order of summation only: chains of at most
# a hundred layers, each rounded at 1.1e-16 a few dozen times, relative to a largest output that cancels at
# most a hundredfold.
EXACT = 1e-12
# The files' README: ten times the authors' own float32 error, not less than 1e-6 of the largest output.
FLOAT32_FACTOR, FLOAT32_FLOOR = 10, 1e-6


@dataclass(frozen=True)
class Golden:
    """One file, its floating-point tensors in one dtype.

    Attributes:
        official: the authors' class or function.
        system: the paper.
        constructor: the authors' constructor arguments.
        call: arguments of the call besides the inputs.
        parameters: the state_dict.
        inputs: by argument name.
        outputs: expected results, ``mid.<name>`` intermediates included.
        own_error: the authors' largest |float32 - float64| by output.
    """

    official: str
    system: str
    constructor: dict
    call: dict
    parameters: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    own_error: dict[str, float]


def read(path: Path, dtype: torch.dtype) -> Golden:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 a file, no dict
    expected = part(tensors, "output.") | {f"mid.{k}": t for k, t in part(tensors, "mid.").items()}
    if dtype == torch.float64:
        discrete = {name: t for name, t in expected.items() if not t.is_floating_point()}
        expected = part(tensors, "output64.") | discrete
    return Golden(
        official=metadata["official"],
        system=metadata["system"],
        constructor=json.loads(metadata["constructor"]),
        call=json.loads(metadata["call"]),
        parameters=cast(part(tensors, "param."), dtype),
        inputs=cast(part(tensors, "input."), dtype),
        outputs=expected,
        own_error=json.loads(metadata["max_abs_diff_f32_f64"]),
    )


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}


@functools.cache
def rules() -> tuple[dict[str, Callable], dict[str, Callable]]:
    """Return every paper's RULES and BOUNDS."""
    found, bounds = {}, {}
    for file in sorted(Path(__file__).parent.glob("golden_*.py")):
        if file.stem == Path(__file__).stem:
            continue
        module = importlib.import_module(file.stem)
        found |= module.RULES
        bounds |= getattr(module, "BOUNDS", {})
    return found, bounds


def select(table: dict[str, Callable], official: str) -> Callable | None:
    """Return the entry with the longest key that ``official`` begins with."""
    keys = [key for key in table if official.startswith(key)]
    return table[max(keys, key=len)] if keys else None


def check_file(path: Path) -> list[tuple[str, float, float]]:
    """Compute a file's outputs in both dtypes; return (dtype, largest error, its tolerance) by output.

    Raises:
        LookupError: when no rule knows the file, or a rule does not give all its outputs.
    """
    table, bounds = rules()
    results = []
    for dtype in (torch.float64, torch.float32):
        golden = read(path, dtype)
        rule, bound = select(table, golden.official), select(bounds, golden.official)
        if rule is None:
            raise LookupError(f"no rule for {golden.official!r}; known: {', '.join(sorted(table))}")
        with torch.no_grad():
            found = rule(golden)
        if lacks := {n for n in golden.outputs if not n.startswith("mid.")} - {
            n.split("@")[0] for n in found
        }:
            raise LookupError(f"the rule for {golden.official!r} gives no {', '.join(sorted(lacks))}")
        for name, y in found.items():
            expected = golden.outputs.get(name.split("@")[0])
            if expected is None:
                continue  # an intermediate that the file does not hold in this dtype
            if y.shape != expected.shape:
                raise LookupError(f"{name} has shape {tuple(y.shape)}, expected {tuple(expected.shape)}")
            error = (y.double() - expected.double()).abs().max().item()
            allowed = tolerance(golden, name.split("@")[0], expected, dtype)
            results.append((f"{name}, {dtype}", error, max(allowed, bound(golden) if bound else 0.0)))
    return results


def tolerance(golden: Golden, name: str, expected: Tensor, dtype: torch.dtype) -> float:
    if not expected.is_floating_point():
        return 0.0
    largest = expected.abs().max().item()
    if dtype == torch.float64:
        return EXACT * largest
    own = golden.own_error.get(name, max(golden.own_error.values(), default=0.0))
    return max(FLOAT32_FACTOR * own, FLOAT32_FLOOR * largest)


def main(folder: Path) -> int:
    files = sorted(folder.glob("*.safetensors"))
    failures = 0
    for path in files:
        try:
            results = check_file(path)
        except Exception as error:  # one broken file must not hide the others
            failures += 1
            print(f"FAILED  {path.name}: {type(error).__name__}: {error}")
            continue
        wrong = [r for r in results if not r[1] <= r[2]]
        name, error, allowed = max(wrong or results, key=lambda r: r[1] / r[2] if r[2] else float(r[1] > 0))
        failures += bool(wrong)
        word = "FAILED" if wrong else "ok    "
        print(
            f"{word}  {path.name}: {len(results)} outputs, worst {name}: error {error:.2e} <= {allowed:.2e}"
        )
    if not files:
        print(f"{folder} holds no .safetensors file; expected outputs of the authors' code.", file=sys.stderr)
    print(f"{len(files) - failures} of {len(files)} files agree", file=sys.stderr)
    return 0 if files and not failures else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/golden_check.py FOLDER")
    sys.exit(main(Path(sys.argv[1])))

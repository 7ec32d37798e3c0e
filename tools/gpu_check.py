"""Check our CUDA kernels on this GPU, and measure them beside a copy, eager PyTorch and torch.compile.

    python tools/gpu_check.py [--out FILE.json] [--json] [--examples] [PATTERN ...]

Needs this checkout, nvcc and a torch with CUDA, nothing else. Correctness: every example and random shapes
against the op's definition in float64, within derived bounds. Speed: tensors far larger than the second-level
cache, CUDA events, medians; ``share_of_copy`` is the bandwidth for the fewest bytes that the op can move,
divided by that of a copy.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # also where the package is not installed

import measurement
import torch
import torch.nn.functional as F
from kernel_check import TYPES, Case, make_case, random_calls
from torch import Tensor

from edgedyn import ops
from edgedyn.errors import EdgedynError, TargetMissingError
from edgedyn.files import replace_file
from edgedyn.targets.tensorrt import cuda_kernels
from edgedyn.targets.tensorrt.cuda_kernels import Affine, Array

OPS = {path.parent.name: ops.load_all()[path.parent.name] for path in cuda_kernels.sources()}
LIMITS = {"share_of_copy": 0.8, "times_eager": 10.0, "times_compiled": 1.0}  # all at least
COPY_BYTES, RANDOM_CALLS, WARM_UPS = 2**30, 60, 3


def find_gpu() -> str:
    """Return the architecture of this machine's GPU.

    Raises:
        TargetMissingError: without one.
    """
    if not torch.cuda.is_available():
        raise TargetMissingError(
            f"the CUDA kernels cannot be checked here: torch {torch.__version__} finds no NVIDIA GPU; "
            "expected a GPU, its driver and a torch with CUDA. Run this where they are: pip install torch "
            "(https://pytorch.org/get-started), then nvidia-smi must list the GPU."
        )
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def move(case: Case, device: torch.device) -> Case:
    moved = [None if t is None else t.to(device).contiguous() for t in case.inputs]
    return case._replace(inputs=tuple(moved), exact=case.exact.to(device), limit=case.limit.to(device))


def run_kernel(library: Path, op: ops.Op, case: Case, y: Tensor) -> None:
    """Launch the kernel of a case on the current stream; y is on the device of the case's tensors."""
    cuda_kernels.call(
        library,
        op.name,
        case.dtype,
        inputs=[None if t is None else Array(t.data_ptr(), t.shape) for t in case.inputs],
        attributes=case.attributes,
        output=y.data_ptr(),
        of_x=Affine(*case.of_x),
        of_y=Affine(*case.of_y),
        stream=torch.cuda.current_stream().cuda_stream if y.is_cuda else 0,
    )


def worst_error(library: Path, op: ops.Op, case: Case, device: torch.device) -> float:
    """Return the largest error divided by its limit; infinity for NaN."""
    case = move(case, device)
    y = torch.empty(case.exact.shape, dtype=getattr(torch, case.dtype), device=device)
    run_kernel(library, op, case, y)
    ratios = (y.double() - case.exact).abs() / case.limit
    return float(ratios.nan_to_num(float("inf")).amax()) if y.numel() else 0.0


def check(library: Path, op: ops.Op, dtype: str, count: int, device: torch.device) -> dict[str, Any]:
    """Compare every example and ``count`` random calls with the definition."""
    calls = [*op.examples(), *random_calls(op, count)]
    errors = [worst_error(library, op, make_case(op, args, dtype), device) for args in calls]
    worst = max(errors)
    return {
        "what": f"{op.name} : its definition",
        "dtype": dtype,
        "calls": len(calls),
        "worst_of_limit": worst,
        "passed": worst <= 1,
    }


def check_memory() -> dict[str, Any] | None:
    """Run the examples under compute-sanitizer, where it is installed."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return None
    command = [tool, "--error-exitcode=9", sys.executable, __file__, "--examples"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"what": "compute-sanitizer memcheck", "dtype": "all", "passed": done.returncode == 0}


class Workload(NamedTuple):
    """A call of a realistic size: the arguments of one image, and the number of images in float32."""

    name: str
    op: str
    images: int
    make: Callable[[], tuple[Any, ...]]


def random(*shape: int) -> Tensor:
    return torch.randn(shape)


def blobs(active: float, size: int) -> Tensor:
    """Return a mask that is active in blobs, like masks of photos."""
    coarse = torch.randn(1, 1, size // 8, size // 8, generator=torch.Generator().manual_seed(5))
    field = F.interpolate(coarse, size=(size, size), mode="bicubic")
    return (field >= field.quantile(1 - active)).float()


def masked(
    active: float, channels: int, outputs: int, side: int, groups: int, activation: str
) -> tuple[Any, ...]:
    weight = random(outputs, channels // groups, side, side)
    mask = blobs(active, 128)
    return random(1, channels, 128, 128), weight, random(outputs), mask, 1, side // 2, 1, groups, activation


def workloads() -> Iterator[Workload]:
    yield Workload(
        "sliced 3x3, 32 x 1024 x 1024, grid 16 x 16",
        "sliced_depthwise2d",
        4,
        lambda: (random(1, 32, 1024, 1024), random(1, 9 * 32, 16, 16), None, 3),
    )
    yield Workload(
        "sliced affine, 32 x 1024 x 1024, grid 16 x 16",
        "sliced_depthwise2d",
        4,
        lambda: (random(1, 32, 1024, 1024), random(1, 32, 16, 16), random(1, 32, 16, 16), 1),
    )
    yield Workload(
        "decoupled 3x3, 64 x 512 x 512",
        "decoupled_depthwise2d",
        8,
        lambda: (random(1, 64, 512, 512), random(1, 9 * 64, 1, 1), random(1, 9, 512, 512), 3),
    )
    yield Workload(
        "atoms 3x3, M = K = 6, 64 x 512 x 512",
        "atom_depthwise2d",
        1,
        lambda: (random(1, 64, 512, 512), random(1, 36, 512, 512), random(6, 9), 3),
    )
    for active in (0.15, 0.5, 1.0):
        for name, options in (
            ("expand 96 : 576", (96, 576, 1, 1, "relu6")),
            ("depthwise 576", (576, 576, 3, 576, "relu6")),
            ("project 576 : 96", (576, 96, 1, 1, "none")),
        ):
            title = f"masked {name}, 128 x 128, {active:.0%} active"
            yield Workload(title, "masked_conv2d", 16, lambda a=active, o=options: masked(a, *o))


def batch_up(op: ops.Op, case: Case, images: int) -> Case:
    """Repeat x and the generated tensors of a call along the batch; all images share the others."""
    names = [a.name for a in op.overload._schema.arguments]
    inputs = [
        t.repeat(images, *[1] * (t.dim() - 1)) if t is not None and name in ("x", *op.generated) else t
        for name, t in zip(names, case.inputs, strict=False)
    ]
    return case._replace(inputs=tuple(inputs))


def minimal_bytes(op: ops.Op, case: Case, y: Tensor) -> int:
    """Return the bytes that any kernel has to read and write; under a mask, only the active part of x."""
    x, *others = (t for t in case.inputs if t is not None)
    used = 1.0
    if op.name == "masked_conv2d":
        side, mask = case.inputs[1].shape[2], case.inputs[3].float()
        used = float(F.max_pool2d(mask, side, 1, side // 2).mean())
    return round(x.nbytes * used) + sum(t.nbytes for t in others) + y.nbytes


def stock(op: ops.Op, case: Case) -> Callable[[], Tensor]:
    """Return the op in a form without kernels of ours; of an INT8 case, from INT8 to INT8."""
    form = next(form.fn for form in op.forms if form.fn and not form.requires)

    def run(*inputs: Tensor | None) -> Tensor:
        if case.dtype != "int8":
            return form(*inputs, *case.attributes)
        (scale, zero_point), (y_scale, y_zero_point) = case.of_x, case.of_y
        y = form((inputs[0].float() - zero_point) * scale, *inputs[1:], *case.attributes)
        return torch.clamp((y * (1 / y_scale)).round() + y_zero_point, -128, 127).to(torch.int8)

    return run


def time_ms(run: Callable[[], object], seconds: float = 0.5) -> float:
    """Return the median time of the runs that fit into ``seconds``, at least 5, at most 100."""
    for _ in range(WARM_UPS):
        run()
    times: list[float] = []
    while len(times) < 5 or (len(times) < 100 and sum(times) < seconds * 1e3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes per millisecond, read and written, of torch's own copy."""
    a, b = (torch.zeros(COPY_BYTES // 4, device=device) for _ in range(2))
    return 2 * COPY_BYTES / time_ms(lambda: b.copy_(a), 1.0)


def measure(
    library: Path, load: Workload, dtype: str, bandwidth: float, device: torch.device
) -> dict[str, Any]:
    """Time a kernel beside the stock form, eager and compiled; check its result as well."""
    op = OPS[load.op]
    args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in load.make())
    single = make_case(op, args, dtype)
    images = load.images * 4 // single.inputs[0].itemsize
    case = batch_up(op, move(single, device), images)
    y = torch.empty((images, *case.exact.shape[1:]), dtype=getattr(torch, dtype), device=device)
    ms = time_ms(lambda: run_kernel(library, op, case, y))
    is_right = all(bool(((y[k] - case.exact[0]).abs() <= case.limit[0]).all()) for k in (0, images - 1))
    run = stock(op, case)
    torch._dynamo.reset()  # it compiles one function 8 times and then no more
    compiled = torch.compile(run, dynamic=False)
    times: dict[str, float | None] = {"times_eager": time_ms(lambda: run(*case.inputs)) / ms}
    try:
        times["times_compiled"] = time_ms(lambda: compiled(*case.inputs)) / ms
    except torch._dynamo.exc.TorchDynamoException as error:  # no C compiler, no Triton, or a bug of theirs
        print(f"torch.compile cannot compile {load.name}, {dtype}: {error}", file=sys.stderr)
        times["times_compiled"] = None
    return make_row(load.name, dtype, ms, minimal_bytes(op, case, y), bandwidth, times, is_right)


def make_row(
    name: str,
    dtype: str,
    ms: float,
    fewest: int,
    bandwidth: float,
    times: dict[str, float | None],
    is_right: bool,
) -> dict[str, Any]:
    """Return one line of the result; passed where the result is right and every limit is met."""
    reached = {"share_of_copy": fewest / ms / bandwidth, **times}
    return {
        "what": name,
        "dtype": dtype,
        "ms": round(ms, 4),
        "minimal_bytes": fewest,
        **{key: value and round(value, 3) for key, value in reached.items()},
        "limits": LIMITS,
        "is_right": is_right,
        "passed": is_right and all((reached[key] or 0) >= limit for key, limit in LIMITS.items()),
    }


def provenance() -> dict[str, Any]:
    """Return machine, versions and command; nvidia-smi reports the driver's version."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    found = measurement.provenance(("torch",))
    machine = {"host": found["machine"], "gpu": torch.cuda.get_device_name(), "driver": driver[0]}
    nvcc = subprocess.run(
        [cuda_kernels.find_nvcc(), "--version"], capture_output=True, text=True, check=False
    )
    toolkit = nvcc.stdout.split("release ")[-1].split(",")[0]
    versions = {**found["versions"], "cuda": torch.version.cuda, "nvcc": toolkit}
    return {"machine": machine, "versions": versions, "command": found["command"]}


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table on stderr; a row that does not pass is marked."""
    for row in rows:
        numbers = {k: v for k, v in row.items() if k not in ("what", "dtype", "limits", "passed", "is_right")}
        mark = " " if row["passed"] else "!"
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
        print(f"{mark} {row['what']:50} {row['dtype']:8} {shown}", file=sys.stderr)


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    library, device = cuda_kernels.build(find_gpu()), torch.device("cuda")
    count = 0 if options.examples else RANDOM_CALLS
    checks = [check(library, op, dtype, count, device) for op in OPS.values() for dtype in TYPES]
    if not options.examples and (memory := check_memory()):
        checks.append(memory)
    show(checks)
    if options.examples:
        return {"checks": checks, "rows": []}
    bandwidth = copy_bandwidth(device)
    rows = []
    for load in workloads():
        if any(fnmatch.fnmatch(load.name, f"*{p}*") for p in options.patterns or ["*"]):
            rows += [measure(library, load, dtype, bandwidth, device) for dtype in TYPES]
            show(rows[-len(TYPES) :])
            torch.cuda.empty_cache()
    return {"checks": checks, "copy_gb_per_s": round(bandwidth / 1e6, 1), "rows": rows}


def main() -> int:
    """Return the exit code: 1 for a wrong result; a missed speed limit is only reported."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("patterns", nargs="*", help="workloads, * matches any part")
    parser.add_argument("--out", type=Path, help="JSON file, for docs/measurements/")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    parser.add_argument("--examples", action="store_true", help="run the ops' examples only, without timing")
    options = parser.parse_args()
    try:
        result = run_all(options)
        text = json.dumps({**result, **provenance()}, indent=1) + "\n"
        if options.out:
            replace_file(options.out, text.encode())
    except EdgedynError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if options.json:
        sys.stdout.write(text)
    return (
        0
        if all(row["passed"] for row in result["checks"]) and all(r["is_right"] for r in result["rows"])
        else 1
    )


if __name__ == "__main__":
    sys.exit(main())

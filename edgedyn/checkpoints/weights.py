"""Load weights from safetensors, or from a pickle that the user trusts, and then tensors only."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from edgedyn.checkpoints.archive import read_pickle
from edgedyn.checkpoints.formats import refuse_others
from edgedyn.checkpoints.nesting import choose_state
from edgedyn.errors import ModelError, WeightsError, shown

_PICKLES = {".pth", ".pt", ".ckpt", ".ckp", ".bin", ".pkl"}


def load_weights(
    model: nn.Module, path: Path, *, sha256: str | None = None, trust: bool = False
) -> tuple[str, ...]:
    """Load a weights file into a model; every key must fit and every value be finite.

    Args:
        model: the network. The file may hold its state_dict inside dictionaries, with a prefix in front of
            its keys, and beside other things, as trainers write it (``nesting``).
        path: ``.safetensors``, or with ``trust`` a ``torch.save`` file of tensors.
        sha256: digest that the file must have; None accepts any.
        trust: allow ``torch.load(weights_only=True)``.

    Returns:
        Notes on the weights that were taken from the file, and on conversions; none for a plain state_dict.

    Raises:
        WeightsError: when the file is missing, altered, unsafe, damaged, not finite, or of another network.
    """
    if not os.path.isfile(path):
        fault = "are no regular file" if os.path.exists(path) else "do not exist"
        raise WeightsError(
            f"weights {path} {fault}; expected a safetensors file. Set model.weights in the recipe, or "
            "--set model.weights=PATH."
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 is not None and digest != sha256:
        raise WeightsError(
            f"weights {path} have sha256 {digest}; the recipe expects {sha256}. Fetch the file again, "
            "or change model.sha256 if you mean to deploy these."
        )
    chosen = choose_state(model.state_dict(), _read(path, trust=trust))
    if chosen is None:
        raise WeightsError(f"weights {path} are not a state_dict (name -> tensor). Save model.state_dict().")
    state, notes = chosen
    _refuse_views(state, path)
    _refuse_dtypes(model, state, path)
    broken = [
        key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if broken:
        raise WeightsError(
            f"weights {path} hold NaN or infinity in {len(broken)} tensors, the first is "
            f"{shown(broken[0])}; expected finite numbers. Take an earlier checkpoint."
        )
    advice = (
        "Is it the network that was trained (model.network), with the same widths, depths and options "
        "(model.arguments)?"
    )
    fit_state(model, state, f"weights {path} do not fit {type(model).__name__}", advice)
    return notes


_FLOATS = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
}  # float8 has scales, which a file lacks
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def _refuse_dtypes(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that torch would convert and change: quantized or complex values, numbers for masks."""
    own = model.state_dict()
    for key, tensor in state.items():
        expected = own[key].dtype if key in own else tensor.dtype
        alike = next((kinds for kinds in (_FLOATS, _INTEGERS) if expected in kinds), {expected})
        if tensor.dtype not in alike:
            kind = (
                "floating-point" if alike is _FLOATS else "integer" if alike is _INTEGERS else str(expected)
            )
            raise WeightsError(
                f"weights {path} hold {tensor.dtype} in {shown(key)}; expected {kind} values. Save the float "
                "weights of the network; edgedyn quantizes them itself."
            )


def _read(path: Path, *, trust: bool) -> Any:
    refuse_others(path)
    if path.suffix.lower() in _PICKLES or _looks_pickled(path):
        if not trust:
            raise WeightsError(
                f"weights {path} are a pickle, which can run code when it is loaded; expected "
                "safetensors. Convert it with safetensors.torch.save_file, or "
                "pass --trust if you know where it is from."
            )
        return read_pickle(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, LookupError, RuntimeError) as error:
        # the last three: a dtype that this version of safetensors does not give to torch
        raise WeightsError(
            f"weights {path} are not a whole safetensors file: {error}. Fetch them again."
        ) from error


def _refuse_views(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors without their own values: a few bytes of a file may claim any number of elements."""
    for key, tensor in state.items():
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not is_plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise WeightsError(
                f"weights {path} hold {shown(key)} as a sparse, quantized, empty or expanded tensor, "
                f"{tuple(tensor.shape)}; expected all of its values. Save model.state_dict() of the float "
                "network."
            )


def _looks_pickled(path: Path) -> bool:
    """Tell a pickle or a zip by its first bytes; one safetensors file in 256 also starts with byte 0x80."""
    with path.open("rb") as file:
        start = file.read(9)  # safetensors: 8 bytes of length, then JSON
    return (start[:1] == b"\x80" and start[8:] != b"{") or zipfile.is_zipfile(path)


def fit_state(model: nn.Module, state: Mapping[str, Tensor], complaint: str, advice: str) -> None:
    """Load a state_dict; every key and shape must fit.

    Raises:
        WeightsError: with ``complaint``, the first difference and ``advice``.
    """
    own = model.state_dict()
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    counters = [k for k in missing if k.endswith("num_batches_tracked")]  # no output depends on them
    missing = [k for k in missing if k not in counters]
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or extra or wrong:
        examples = [f"{shown(k)}, {tuple(state[k].shape)} against {tuple(own[k].shape)}" for k in wrong[:1]]
        examples += [f"{shown(k)} (missing)" for k in missing[:1]] + [
            f"{shown(k)} (unknown)" for k in extra[:1]
        ]
        raise WeightsError(
            f"{complaint}: {len(missing)} keys missing, {len(extra)} unknown, {len(wrong)} of another shape, "
            f"the first is {'; '.join(examples)}. {advice}"
        )
    model.load_state_dict({**state, **{key: own[key] for key in counters}})


def settle_norms(model: nn.Module, *batches: tuple[Tensor, ...]) -> int:
    """Set every BatchNorm that keeps statistics to those of its input; for a network without trained ones.

    Args:
        model: in evaluation mode, before and after. If it has a method ``every_path(*inputs)``, which runs
            every path that an input can take, that method is called instead of ``forward``.
        batches: inputs, each of a batch of real images, at least two where a feature map has one pixel.

    Returns:
        The number of BatchNorm modules that had an input; the others keep their initial values.

    Raises:
        ModelError: when statistics are not finite.
    """
    norms = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_var is not None
    }
    momenta = {name: norm.momentum for name, norm in norms.items()}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    try:
        with torch.no_grad():
            for inputs in batches:
                getattr(model, "every_path", model)(*inputs)
    finally:
        for name, norm in norms.items():
            norm.eval()
            norm.momentum = momenta[name]
    for name, norm in norms.items():
        assert norm.running_var is not None
        if not norm.running_var.isfinite().all():
            raise ModelError(
                f"BatchNorm {name!r} has statistics of real images that are not finite; expected finite "
                "ones. Give the recipe trained weights (model.weights)."
            )
    return sum(int(norm.num_batches_tracked or 0) > 0 for norm in norms.values())

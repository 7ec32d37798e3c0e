"""ExecuTorch on networks outside the five papers: a program loads, runs and computes the exported one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from odd_networks import READERS, Only, Readers, involution
from small_int8 import quantize_program
from torch import Tensor, nn

from edgedyn import quantize, targets
from edgedyn.errors import BundleError, ModelError
from edgedyn.recipe.keys import QuantizeSection
from edgedyn.targets.executorch import lower, passes
from edgedyn.targets.executorch.run import find_refusal
from edgedyn.targets.executorch.trial import locate

TARGET = targets.load("executorch")
SHAPE = (1, 3, 16, 24)


def make_input(seed: int = 1) -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))


def to_precision(net: nn.Module, precision: str) -> torch.export.ExportedProgram:
    captured = torch.export.export(net.eval(), (make_input(),))
    if precision == "fp32":
        return quantize.to_float(captured, (make_input(),), "fp32").program
    return quantize_program(
        captured,
        (make_input(),),
        scheme=TARGET.int8,
        section=QuantizeSection(rounding="nearest"),
        samples=[(make_input(seed),) for seed in (2, 3)],
    ).program


def rms(x: np.ndarray) -> float:
    return float(np.sqrt((x.astype(np.float64) ** 2).mean()))


@pytest.mark.parametrize(
    ("kind", "precision"), [(Readers, "int8"), (Readers, "fp32"), (Only, "int8")], ids=str
)
@pytest.mark.parametrize("group", READERS)
def test_map_that_other_operators_read(kind, group, precision, tmp_path: Path):
    torch.manual_seed(4)
    net = kind(*READERS[group]).eval()
    program = to_precision(net, precision)
    TARGET.lower({"forward": program}, tmp_path, precision)
    (y,) = TARGET.load(tmp_path / "model.pte")(make_input().numpy())
    with torch.no_grad():
        exported, expected = program.module()(make_input()).numpy(), net(make_input()).numpy()
    limit = rms(exported - expected) if precision == "int8" else 1e-5 * rms(expected)
    assert rms(y - exported) <= limit


def test_involution_loads_in_int8(tmp_path: Path):
    torch.manual_seed(4)
    net = involution().eval()
    program = to_precision(net, "int8")
    TARGET.lower({"forward": program}, tmp_path, "int8")
    (y,) = TARGET.load(tmp_path / "model.pte")(make_input().numpy())
    with torch.no_grad():
        exported, expected = program.module()(make_input()).numpy(), net(make_input()).numpy()
    assert rms(y - exported) <= rms(exported - expected)


@pytest.fixture
def without_edge_passes(monkeypatch):
    monkeypatch.setattr(lower, "apply_edge_passes", lambda module: passes.PassResult(module, False))


@pytest.mark.usefixtures("without_edge_passes")
def test_refused_program_is_not_shipped_and_names_its_layers(tmp_path: Path):
    with pytest.raises(ModelError) as caught:
        TARGET.lower({"forward": to_precision(involution(), "int8")}, tmp_path, "int8")
    text = str(caught.value)
    assert "Failed to create StaticConstantPad node" in text
    assert "constant_pad_nd of body.2" in text
    assert "quantize.keep_float: [body.0, " in text
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("without_edge_passes")
def test_program_that_loads_and_fails_is_not_shipped(tmp_path: Path):
    net = Readers(torch.nn.functional.softplus)
    with pytest.raises(ModelError, match="Attempted to resize a static tensor") as caught:
        TARGET.lower({"forward": to_precision(net, "int8")}, tmp_path, "int8")
    assert "quantize.keep_float: [maps.0" in str(caught.value)


@pytest.mark.usefixtures("without_edge_passes")
def test_layers_kept_as_the_refusal_says_give_a_program_that_runs(tmp_path: Path):
    captured = torch.export.export(involution().eval(), (make_input(),))
    section = QuantizeSection(keep_float=["body.0"])
    program = quantize_program(
        captured, (make_input(),), scheme=TARGET.int8, section=section, samples=[(make_input(),)]
    ).program
    TARGET.lower({"forward": program}, tmp_path, "int8")


def test_refusal_of_a_kernel_names_the_layers_of_its_operator():
    program = to_precision(Only(lambda y: torch.cumsum(y, 1), torch.erf), "int8")
    graph = lower._to_edge({"forward": program}, is_delegated=False).exported_program("forward").graph
    text = locate(
        "[method.cpp:1] KernelCall failed at instruction 0:1 in operator aten::erf.out: 0x12", graph
    )
    assert "erf of the network itself" in text
    assert "quantize.keep_float: [convolutions.0, convolutions.1]" in text


def test_refusal_of_a_run_quotes_the_runtime(tmp_path: Path):
    program = to_precision(Only(torch.erf), "fp32")
    TARGET.lower({"forward": program}, tmp_path, "fp32")
    wrong = make_input().numpy()[:, :2]
    assert find_refusal(tmp_path / "model.pte", "forward", [make_input().numpy()]) == ""
    with pytest.raises(BundleError, match=r"cannot run .*\[tensor_impl\.cpp:\d+\] Attempted to resize"):
        TARGET.load(tmp_path / "model.pte")(wrong)


def test_refusal_of_a_load_quotes_the_runtime(tmp_path: Path):
    (tmp_path / "model.pte").write_bytes(b"not a program")
    with pytest.raises(BundleError, match=r"\[buffer_data_loader\.h:\d+\] offset 0"):
        TARGET.load(tmp_path / "model.pte")


def test_failure_of_lowering_quotes_its_line(monkeypatch, tmp_path: Path):
    def fail(*arguments, **options):
        raise AssertionError("amax.default only supports dim == 2\nmore")

    monkeypatch.setattr(lower, "to_edge_transform_and_lower", fail)
    with pytest.raises(ModelError, match=r"network: amax.default only supports dim == 2\. Write"):
        TARGET.lower({"forward": to_precision(Only(torch.erf), "fp32")}, tmp_path, "fp32")

"""What inspect counts, on small networks of awkward shapes."""

from __future__ import annotations

import pytest
import strangers
import torch
from small_blocks import small_mobilenet
from strangers import C
from torch import Tensor, nn

from edgedyn import targets
from edgedyn.cli.app import execute
from edgedyn.conversion.inspection import inspect, inspect_model
from edgedyn.errors import RecipeError
from edgedyn.layers.dynconv import SparseInvertedResidual
from edgedyn.layers.malleconv import AffineMalleConv, MalleConv
from edgedyn.ops.sliced_depthwise2d import sliced_depthwise2d
from edgedyn.recipe.recipe import Recipe

SIZE = 16


def deep() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), AffineMalleConv(4, 4, 2, depth=3), nn.Conv2d(4, 3, 1))


def layer_itself() -> nn.Module:
    return AffineMalleConv(3, 4, 2)


def kernels() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), MalleConv(8, 3, num_blocks=2))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Sequential(AffineMalleConv(3, 4, 2))
        self.f = self.e

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.e(x))


class OwnCall(nn.Module):
    """A network of a user that calls the op without a layer of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.grid = nn.Conv2d(3, 27, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        return sliced_depthwise2d(x, self.grid(x), None, 3)


def look(name: str, precision: str = "fp32") -> dict:
    return inspect(
        Recipe(
            name="small",
            model={"network": f"{__name__}:{name}"},
            input={"shape": [1, 3, SIZE, SIZE]},
            tile={"overlap": 4},
            target="executorch",
            precision=precision,
            validation="none",
        )
    )


def macs(model: nn.Module, *shape: int) -> int:
    """Count the multiply-adds of all convolutions by hooks."""
    counted = []

    def count(conv: nn.Conv2d, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        counted.append(conv.weight[0].numel() * y.numel())

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(torch.zeros(shape))
    return sum(counted)


def test_cells_of_a_deep_grid_share_their_predictor():
    found = look("deep")
    layer = deep()[1]
    predictor = macs(nn.Sequential(layer.predictor, layer.coefficients), 1, 4, SIZE, SIZE)
    assert len(found["layers"]) == 3
    assert sum(entry["generator_macs"] for entry in found["layers"]) == predictor
    assert 0 < found["generator_share"] < 1
    assert found["macs"] == macs(deep(), 1, 3, SIZE, SIZE) + sum(e["apply_macs"] for e in found["layers"])


def test_model_that_is_the_layer_has_a_generator():
    (entry,) = look("layer_itself")["layers"]
    assert (entry["path"], entry["class"]) == ("", "AffineMalleConv")
    layer = layer_itself()
    assert entry["generator_macs"] == macs(
        nn.Sequential(layer.predictor, layer.coefficients), 1, 3, SIZE, SIZE
    )


def test_layer_at_two_places_is_listed_twice():
    entries = look("Twice")["layers"]
    assert [entry["class"] for entry in entries] == ["AffineMalleConv"] * 2
    assert entries[0]["generator_macs"] == entries[1]["generator_macs"] > 0


def test_call_of_the_op_itself_is_listed():
    (entry,) = look("OwnCall")["layers"]
    assert (entry["class"], entry["paper"]) == ("OwnCall", "calls the op itself")
    assert entry["generator_macs"] == 27 * 3 * 16 * (SIZE // 4) ** 2
    assert entry["generated"] == {"grid": [1, 27, 4, 4]}
    assert entry["apply_macs"] == SIZE**2 * (4 * 27 + 9 * 3)
    assert entry["kernel_bytes"] == 4 * 27 * 4 * 4
    assert entry["generator_parameters"] == 27 * (3 * 16 + 1)


def test_convolution_behind_the_kernels_generates_nothing():
    (entry,) = look("kernels")["layers"]
    layer = kernels()[1]
    expected = macs(nn.Sequential(layer.pool, layer.predictor, layer.expander), 1, 8, SIZE, SIZE)
    assert entry["generator_macs"] == expected


def test_precision_that_the_target_lacks_is_refused_as_by_build():
    with pytest.raises(RecipeError, match="no precision 'fp16'"):
        look("deep", "fp16")


def test_every_target_says_its_form_why_and_what_it_delegates():
    found = look("kernels")
    (entry,) = found["layers"]
    assert entry["forms"].keys() == found["targets"].keys() == {"executorch", "onnxruntime", "tensorrt"}
    assert {form["form"] for form in entry["forms"].values()} == {"banded_shift_mac", "resize_shift_mac"}
    assert all("fused needs edgedyn_kernels" in form["why"] for form in entry["forms"].values())
    for target, preview in found["targets"].items():
        assert preview["unsupported"] == {}
        assert preview["delegated"] == 1 or (target == "executorch" and preview["delegated"] > 0.9)
    # the predictor's norms and partial convolutions, on the small grid
    portable = set(found["targets"]["executorch"]["portable"])
    assert portable == {"aten.native_group_norm.default", "aten.split_with_sizes_copy.default"}


def test_operator_that_no_runtime_has_is_named():
    class Determinant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.linalg.matrix_exp(x[:, :, :3, :3]).sum()

    found = inspect_model(Determinant().eval(), (torch.zeros(1, 3, 8, 8),))
    (operator,) = found["targets"]["executorch"]["unsupported"]
    assert operator.startswith("aten::linalg_matrix_exp")
    assert "refused" in found["targets"]["tensorrt"]


def test_network_without_dynamic_layers_is_all_static():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()
    found = inspect_model(net, (torch.zeros(1, 3, 8, 12),))
    assert found["layers"] == []
    assert found["static_macs"] == found["macs"] == 24 * 8 * 12
    assert found["static_parameters"] == found["parameters"] == 31


def test_generator_apply_and_static_parts_add_up():
    found = look("deep")
    parts = [
        sum(e[f"{part}_{what}"] for e in found["layers"])
        for what in ("macs", "parameters")
        for part in ("generator", "apply")
    ]
    assert sum(parts[:2]) + found["static_macs"] == found["macs"]
    # BatchNorm behind the slicing is folded into the generator, and the gate is read outside of the op
    assert 0 < sum(parts[2:]) < found["parameters"]


def test_routed_network_has_a_row_of_its_own_and_costs_of_every_program():
    from edgedyn.models.slimmable_dncnn import gated_dncnn

    net = gated_dncnn([[4, 4], [6, 8]]).eval()
    found = inspect_model(net, (torch.zeros(1, 3, 8, 12),))
    (row,) = found["layers"]
    assert (row["primitive"], row["class"]) == ("routed program", "GatedNetwork")
    assert row["forms"]["tensorrt"]["form"] == "argmax of 2 variants: w0, w1"
    assert found["macs"] > 0


@pytest.mark.parametrize(
    ("kind", "form", "kernels"),
    [("condconv", "3 static layers, outputs mixed", 3), ("modulated", "float layer", 1)],
)
def test_layer_with_a_weight_from_data_is_named_dynamic(kind, form, kernels):
    net = strangers.dynamic(kind).eval()
    (row,) = inspect_model(net, (torch.zeros(1, 3, 8, 12),))["layers"]
    assert (row["path"], row["class"], row["primitive"]) == ("body.2", type(net.body[2]).__name__, "conv2d")
    assert row["paper"] == "kernels generated outside the five papers"
    assert {entry["form"] for entry in row["forms"].values()} == {form}
    assert row["generated"] == {"weight": [C, C, 3, 3]}
    assert row["apply_macs"] == kernels * 8 * 12 * C * C * 9
    assert row["generator_macs"] == C * (strangers.K if kind == "condconv" else C)  # the layer that routes


def test_command_names_the_paper_and_the_path(capsys, monkeypatch):
    monkeypatch.setattr(targets, "names", list)
    assert execute(["inspect", "strangers:condconv", "--shape", "1,3,8,12"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "kernels generated outside the five papers: body.2" in printed
    assert "no dynamic layer" not in printed


def test_blocks_of_a_network_are_listed_with_the_reason_why_others_are_none():
    found = inspect_model(small_mobilenet().eval(), (torch.zeros(1, 3, SIZE, SIZE),))
    assert [row["path"] for row in found["blocks"]] == ["features.2.conv", "features.3.conv"]
    assert found["blocks"][1] == {
        "program": "forward",
        "path": "features.3.conv",
        "layers": ["features.3.conv.0.0", "features.3.conv.1.0", "features.3.conv.2"],
        "activations": ["relu6", "relu6", "none"],
        "stride": 1,
        "masked": False,
        "residual": True,
    }
    (refused,) = found["refused_blocks"]
    assert refused["path"] == "features.1.conv.0.0"
    assert "expand_ratio of 1" in refused["reason"]


def test_blocks_behind_masks_are_listed_whatever_the_kernels_are():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), SparseInvertedResidual(4, 4)).eval()
    found = inspect_model(network, (torch.zeros(1, 3, SIZE, SIZE),))
    assert [(row["path"], row["masked"], row["residual"]) for row in found["blocks"]] == [("1", True, True)]


def test_blocks_are_printed_with_each_reason_once(capfd):
    assert execute(["inspect", "small_blocks:small_mobilenet", "--trust", "--shape", "1,3,16,16"]) == 0
    text = " ".join("".join(capfd.readouterr()).split())
    assert "2 inverted-residual blocks: one kernel each with kernels: fused on a phone" in text
    assert "features.2.conv, features.3.conv" in text
    assert "no block: features.1.conv.0.0: no 1 x 1 convolution stands in front of it" in text

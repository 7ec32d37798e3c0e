"""Programs in another floating-point type."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from edgedyn.graph.dtypes import to_float16, to_float64, to_float64_like
from edgedyn.graph.nodes import module_path


class Casting(nn.Module):
    """Casts to float32 by name, and creates a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1 / 3]))
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.to(torch.float32)) * self.gain
        return y + torch.full((4,), 0.1, dtype=torch.float32) * (y > 0).to(torch.float32)


def capture(x: Tensor):
    torch.manual_seed(2)
    net = Casting()
    return net, torch.export.export(net, (x,))


def test_float64_reaches_casts_and_created_tensors():
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
    net, program = capture(x.float())
    module = program.module(check_guards=False)
    to_float64(module)
    norm = nn.functional.layer_norm(x, (4,)) * net.gain.double()
    expected = norm + 0.1 * (norm > 0).double()
    assert module(x).dtype == torch.float64
    torch.testing.assert_close(module(x), expected, rtol=1e-14, atol=1e-15)


def test_float64_takes_the_tensors_of_the_source():
    x = torch.rand(3, 4)
    net, program = capture(x)
    source = copy.deepcopy(net).double()  # the program shares the tensors of the network
    source.gain.data = torch.tensor([1 / 3], dtype=torch.float64)  # float32 has another value
    module = to_float64_like(program, source)
    assert torch.equal(dict(module.named_parameters())["gain"], source.gain)
    assert dict(program.module().named_parameters())["gain"].dtype == torch.float32


def test_excluded_nodes_compute_in_float32_between_two_casts():
    x = torch.rand(3, 4)
    _, program = capture(x)
    module = program.module(check_guards=False)
    excluded = {node for node in module.graph.nodes if module_path(node) == "norm"}
    assert excluded
    to_float16(module, excluded)
    seen: dict[str, torch.dtype] = {}

    class Types(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.is_floating_point():
                seen[n.name] = value.dtype
            return value

    Types(module).run(x.half())
    assert {seen[node.name] for node in excluded} == {torch.float32}
    assert seen["full"] == seen["mul"] == torch.float16
    casts = [n for n in module.graph.nodes if n.target is torch.ops.aten._to_copy.default]
    assert [cast.kwargs["dtype"] for cast in casts] == [torch.float32, torch.float16]

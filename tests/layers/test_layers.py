"""Paper layers: the canonical counterpart equals the reference, and canonicalize changes nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from disturbed import disturb
from torch import nn

from edgedyn import layers, ops
from edgedyn.errors import ModelError
from edgedyn.layers import RoutedModel, canonicalize, find_dynamic
from edgedyn.layers.malleconv import AffineMalleConv, CanonicalAffineMalleConv, CanonicalMalleConv, MalleConv

LAYERS = layers.load_all()
ROUTED = "routed program"  # the primitive of papers without an op


def examples():
    torch.manual_seed(4)  # examples initialise their modules from the global generator
    for name, layer in LAYERS.items():
        for k, (module, inputs) in enumerate(layer.examples()):
            yield pytest.param(
                layer, disturb(module, seed=11, spread=0.2), inputs, id=f"{name}-{k}-{type(module).__name__}"
            )


EXAMPLES = list(examples())
every_example = pytest.mark.parametrize(("layer", "module", "inputs"), EXAMPLES)


def test_every_class_of_every_paper_has_an_example():
    assert LAYERS
    shown = {type(example.values[1]) for example in EXAMPLES}
    assert shown == {cls for layer in LAYERS.values() for cls in layer.canonical}
    assert {layer.primitive for layer in LAYERS.values()} <= {*ops.load_all(), ROUTED}


@every_example
def test_canonical_equals_reference_in_float64(layer, module, inputs):
    module, inputs = copy.deepcopy(module).double(), tuple(x.double() for x in inputs)
    canonical = layer.canonical[type(module)](module).eval()
    with torch.no_grad():
        expected, y = module(*inputs), canonical(*inputs)
    assert (expected - inputs[0]).abs().max() > 0.01 if expected.shape == inputs[0].shape else True
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())


@every_example
def test_canonical_calls_its_primitive_and_no_other_op_of_ours(layer, module, inputs):
    canonical = layer.canonical[type(module)](module).eval()
    if layer.primitive == ROUTED:
        assert isinstance(canonical, RoutedModel)
        return
    program = torch.export.export(canonical, inputs)
    called = {str(node.target) for node in program.graph.nodes if "edgedyn" in str(node.target)}
    assert called == {f"edgedyn.{layer.primitive}.default"}


@every_example
def test_example_discriminates(layer, module, inputs):
    assert not module.training
    assert inputs[0].shape[0] >= 2
    assert inputs[0].shape[2] != inputs[0].shape[3]


@every_example
def test_gradients_reach_every_parameter_of_the_reference(layer, module, inputs):
    module = copy.deepcopy(module)
    x = inputs[0].clone().requires_grad_()
    module(x, *inputs[1:]).square().sum().backward()
    without = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    if layer.primitive == ROUTED:  # an argmax has no gradient
        without = [n for n in without if "gate" not in n]
    assert not without
    assert x.grad.isfinite().all()


class Nested(nn.Module):
    """A dynamic layer three levels down, another one at two places."""

    def __init__(self):
        super().__init__()
        shared = disturb(AffineMalleConv(4, 4, 2), seed=11, spread=0.2)
        self.first = shared
        self.body = nn.Sequential(
            nn.Conv2d(4, 4, 1),
            nn.ModuleDict({"deep": disturb(MalleConv(4, 4, scale=2), seed=11, spread=0.2)})["deep"],
        )
        self.last = nn.Sequential(nn.Identity(), nn.Sequential(shared))

    def forward(self, x):
        return self.last(self.body(self.first(x)))


def make_nested():
    torch.manual_seed(2)
    return Nested().eval()


def test_nested_layers_are_replaced_and_the_numbers_stay():
    model = make_nested().double()  # BatchNorm is folded once, in the model's precision
    canonical = canonicalize(model)
    assert isinstance(canonical.first, CanonicalAffineMalleConv)
    assert isinstance(canonical.body[1], CanonicalMalleConv)
    assert not find_dynamic(canonical)
    assert not any(module.training for module in canonical.modules())
    x = torch.rand(2, 4, 8, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(canonical(x), model(x), rtol=1e-12, atol=1e-12)


def test_layer_at_two_places_stays_one_module():
    canonical = canonicalize(make_nested())
    assert canonical.first is canonical.last[1][0]


def test_layer_twice_under_one_parent_is_replaced_twice():
    layer = AffineMalleConv(4, 4, 2)
    canonical = canonicalize(nn.Sequential(layer, nn.Identity(), layer).eval())
    assert type(canonical[0]) is CanonicalAffineMalleConv
    assert canonical[2] is canonical[0]


def test_original_is_unchanged():
    model = make_nested()
    before = copy.deepcopy(model.state_dict())
    canonical = canonicalize(model)
    with torch.no_grad():
        for parameter in canonical.parameters():
            parameter.fill_(7)
    assert type(model.first) is AffineMalleConv
    assert type(model.body[1]) is MalleConv
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_model_that_is_a_layer_becomes_its_twin():
    model = MalleConv(4, 6).eval()
    assert isinstance(canonicalize(model), CanonicalMalleConv)
    assert type(model) is MalleConv


def test_model_without_dynamic_layers_is_copied():
    model = nn.Sequential(nn.Conv2d(3, 3, 1)).eval()
    canonical = canonicalize(model)
    assert canonical is not model
    assert torch.equal(canonical[0].weight, model[0].weight)


def test_subclass_of_a_layer_is_refused():
    """Its forward may differ from the paper's: only the exact class has a proved counterpart."""

    class Mine(MalleConv):
        def forward(self, x):
            return -super().forward(x)

    with pytest.raises(ModelError, match=r"0 is Mine, derived from MalleConv.*Use the class itself"):
        canonicalize(nn.Sequential(Mine(4, 4)).eval())


def test_find_dynamic_gives_dotted_paths_and_papers():
    found = [(path, type(module).__name__, layer.name) for path, module, layer in find_dynamic(make_nested())]
    assert found == [("first", "AffineMalleConv", "malleconv"), ("body.1", "MalleConv", "malleconv")]


def test_training_mode_is_refused_with_the_first_module():
    model = make_nested()
    model.body[1].train()
    with pytest.raises(
        ModelError, match=r"training mode \(body\.1 and \d+ more modules\).*model\.eval\(\)"
    ) as caught:
        canonicalize(model)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_refused_with_the_path(register):
    model = make_nested()
    getattr(model.body[1], register)(lambda *args: None)
    with pytest.raises(ModelError, match=r"body\.1 \(MalleConv\) carries forward hooks.*Remove them"):
        canonicalize(model)


@pytest.mark.parametrize(
    "arguments", [{"in_channel": 3}, {"in_channel": 8, "groups": 3}], ids=["few", "indivisible"]
)
def test_malleconv_refuses_widths_that_cannot_be_split(arguments):
    found = f"in_channel={arguments['in_channel']}, groups={arguments.get('groups', 1)}"
    with pytest.raises(ModelError, match=f"{found}; it needs at least 4 channels"):
        MalleConv(out_channel=4, **arguments)

"""Quantization-aware fine-tuning: INT8 comes nearer to its own float program, or stays as it is."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from small_networks import LAYERS, capture, make_net
from torch import Tensor, fx, nn

from edgedyn import ops, targets
from edgedyn.graph.nodes import weight_of
from edgedyn.layers import canonicalize
from edgedyn.quantize.calibrated import Calibrated, qparams_of, restore
from edgedyn.quantize.convert import insert_qdq
from edgedyn.quantize.fake_quantize import quantize_dequantize
from edgedyn.quantize.fold import fold
from edgedyn.quantize.observe.program import observe_program
from edgedyn.quantize.plan import Plan, QParams, make_plan
from edgedyn.quantize.rounding import finetune as training
from edgedyn.quantize.rounding.finetune import Example, choose_examples, finetune
from edgedyn.quantize.rounding.program import round_program
from edgedyn.recipe.keys import QuantizeSection

SCHEMES = {name: targets.load(name).int8 for name in ("executorch", "tensorrt")}
AFFINE = SCHEMES["executorch"]
Sample = tuple[Tensor, ...]


def make_samples(count: int = 8, seed: int = 1) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(1, 3, 12, 20, generator=generator) * 1.5 - 0.25,) for _ in range(count)]


def calibrate(module, plan, *, section, samples, **more) -> Calibrated:
    observed = observe_program(module, section=section, samples=samples)
    return round_program(module, plan, observed, section=section, samples=samples, **more)


def coarse(
    net: nn.Module,
    bits: int = 4,
    scheme=AFFINE,
    keep_float: tuple[str, ...] = (),
    dynamic: tuple[str, ...] = (),
) -> tuple[fx.GraphModule, Plan, QParams, list[Example], list[Example]]:
    """Return a program with weights rounded to few values, and its examples."""
    samples = make_samples()
    module = fold(capture(net, samples[0][0]))
    kernels = {op.overload for op in KERNELS}
    plan = make_plan(module, scheme=scheme, keep_float=keep_float, dynamic=dynamic, kernels=kernels)
    section = QuantizeSection(rounding="nearest", equalize=False)
    found = calibrate(module, plan, scheme=scheme, section=section, samples=samples)
    examples = choose_examples(module, samples)
    qparams = qparams_of(found.entries, scheme)
    wider = {name: scales * 2.0 ** (8 - bits) for name, scales in qparams.weights.items()}
    return module, plan, QParams(qparams.tensors, wider), *examples


KERNELS = tuple(ops.load_all().values())


def train(made, count: int, scheme=AFFINE, **options) -> dict:
    module, plan, qparams, training_set, held_out = made
    return finetune(
        module,
        plan,
        qparams=qparams,
        scheme=scheme,
        training=training_set,
        held_out=held_out,
        count=count,
        **options,
    )


def error(made, constants: dict, scheme=AFFINE) -> float:
    """Return the error of INT8 on images that were not trained on."""
    module, plan, qparams, *_ = made
    unseen, _ = choose_examples(module, make_samples(6, seed=2))
    program = training._TrainableProgram(module, plan, qparams, scheme)
    for node, site in program.layers.items():
        if constants:
            program.quantized[node] = torch.from_numpy(constants[site.weight]).float()
            program.biases[node] = torch.from_numpy(constants[site.bias]) / program.units[node]
    return float(program.errors(unseen).mean())


class InPlaceNet(nn.Module):
    """A residual block as it is written for training, with its activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        )
        self.tail = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(nn.functional.relu_(self.body(x)).mean((2, 3)))


def dynamic_net(layer: str) -> nn.Module:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), LAYERS[layer](), nn.Conv2d(8, 3, 3, padding=1))
    for name, tensor in net.state_dict().items():
        tensor.add_(0.3 if name.endswith("gate") else 0)  # of zero, nothing dynamic reaches the output
    return canonicalize(net.eval())


NETS = {
    "tiny": make_net,
    "in place": lambda: torch.manual_seed(3) and InPlaceNet().eval(),
    **{layer: lambda layer=layer: dynamic_net(layer) for layer in LAYERS},
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("net", NETS)
def test_training_lowers_the_error_of_coarse_weights_on_other_images(net, scheme, monkeypatch):
    monkeypatch.setattr(training, "_RATE", 0.05)  # few steps here
    made = coarse(NETS[net](), scheme=SCHEMES[scheme])
    constants = train(made, 60, SCHEMES[scheme])
    # 0.18 to 0.62 where it was written
    assert error(made, constants, SCHEMES[scheme]) < 0.75 * error(made, {}, SCHEMES[scheme])


def test_training_goes_through_ranges_of_each_image(monkeypatch):
    monkeypatch.setattr(training, "_RATE", 0.05)  # few steps here
    scheme = targets.load("executorch").int8
    made = coarse(make_net(), scheme=scheme, dynamic=("*",))
    assert len(made[1].dynamic) == len(made[1].layers) == 3
    assert error(made, train(made, 60, scheme), scheme) < 0.75 * error(made, {}, scheme)


def test_rounding_lets_the_gradient_through_where_it_does_not_clip():
    x = torch.tensor([-3.0, -2.6, -0.31, 0.0, 0.47, 2.3, 9.0], requires_grad=True)
    step = (0.02, -1)  # -2.54 to 2.56
    y = training._round_activation(x, step)
    y.sum().backward()
    assert torch.equal(y, quantize_dequantize(x.detach(), step))
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 1, 0]
    free = x.detach().requires_grad_()
    y = training._round_activation(free, None)  # by its own range nothing is clipped
    y.sum().backward()
    assert free.grad.tolist() == [1] * 7
    assert 0 < (y - free).abs().max() <= 12 / 255 / 2 + 1e-6
    quantized = torch.tensor([-130.0, -126.6, 0.4, 127.0, 127.2], requires_grad=True)
    rounded = training._round_weight_values(quantized)
    rounded.sum().backward()
    assert rounded.tolist() == [-127, -127, 0, 127, 127]
    assert quantized.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_trained_program_is_the_one_that_is_converted(layer, scheme):
    made = coarse(dynamic_net(layer), bits=8, scheme=SCHEMES[scheme])
    module, plan, qparams, _, (example, *_) = made
    program = training._TrainableProgram(module, plan, qparams, SCHEMES[scheme])
    with torch.no_grad():
        expected, deviation = program.run(*example.inputs)[0], program.error(example)
        converted = insert_qdq(module, plan, qparams, SCHEMES[scheme])(*example.inputs)[0]
    assert deviation > 0
    # the form of our op rounds in another order, and a value in a thousand falls to the next step
    assert (converted - expected).abs().mean() < 1e-3 * (expected - example.outputs[0]).abs().mean()


@pytest.mark.parametrize("op", KERNELS, ids=lambda op: op.name)
def test_last_form_of_every_op_runs_anywhere_and_has_a_gradient(op):
    form = op.forms[-1]
    assert form.requires == frozenset()
    x, *rest = next(iter(op.examples()))
    x = x.clone().requires_grad_()
    form.fn(x, *rest).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("layer", LAYERS)
def test_gradient_reaches_every_layer_through_ops_of_ours(layer):
    module, plan, qparams, training_set, _ = coarse(dynamic_net(layer))
    assert any(ops.is_ours(node) for node in module.graph.nodes)
    program = training._TrainableProgram(module, plan, qparams, AFFINE)
    program.error(training_set[0]).backward()
    for node, quantized in program.quantized.items():
        assert quantized.grad is not None, node.name
        assert quantized.grad.abs().sum() > 0, node.name
        assert program.biases[node].grad is not None


def test_caller_without_gradients_gets_the_same_training():
    made = coarse(make_net())
    with torch.no_grad():
        found = train(made, 4)
    assert found.keys() == train(made, 4).keys() != set()


def test_result_that_is_not_better_is_dropped(monkeypatch):
    made = coarse(make_net())
    assert train(made, 8)
    monkeypatch.setattr(training, "_RATE", 30.0)
    assert train(made, 8) == {}


def test_training_twice_gives_the_same_weights_and_leaves_the_module_alone():
    made = coarse(make_net())
    before = [weight_of(made[0], site.node).clone() for site in made[1].layers]
    first, second = train(made, 12), train(made, 12)
    assert first
    assert all((first[name] == second[name]).all() for name in first)
    assert all(parameter.grad is None for parameter in made[0].parameters())
    assert all(
        torch.equal(weight_of(made[0], s.node), w) for s, w in zip(made[1].layers, before, strict=True)
    )


def test_only_int8_layers_are_trained_and_weights_fit_int8():
    made = coarse(make_net(), keep_float=("body",))
    constants = train(made, 30)
    before = training._TrainableProgram(*made[:3], AFFINE).constants()
    assert (constants["head.weight"] != before["head.weight"]).any()
    assert (constants["head.bias"] != before["head.bias"]).any()
    assert constants.keys() == {"head.weight", "head.bias", "tail.weight", "tail.bias"}
    assert constants["head.weight"].dtype == "int8"
    assert constants["head.bias"].dtype == "float32"


def test_every_example_is_seen_equally_often_and_weighs_the_same(monkeypatch):
    made, seen, losses = coarse(make_net()), [], []
    see, go_back = training._TrainableProgram.error, Tensor.backward

    def error(self, example):
        seen.extend([id(example)] * torch.is_grad_enabled())
        return see(self, example)

    def backward(loss):
        losses.append(loss.item())
        go_back(loss)

    monkeypatch.setattr(training._TrainableProgram, "error", error)
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(training, "_RATE", 0.0)
    train(made, 18)
    assert Counter(seen[1:]) == {id(example): 3 for example in made[3]}  # the first asks for a gradient
    # the layers' biases are the same but for one float32 rounding, which shifts few values by one scale
    assert losses == [pytest.approx(1, abs=0.01)] * 18


def test_spread_weights_round_to_their_old_values():
    module, plan, qparams, *_ = coarse(make_net(), bits=8)
    program = training._TrainableProgram(module, plan, qparams, AFFINE)
    before = {node: quantized.detach().clone() for node, quantized in program.quantized.items()}
    program.spread(torch.Generator().manual_seed(0))
    for node, quantized in program.quantized.items():
        assert torch.equal(quantized.round(), before[node])
        assert quantized.abs().max() <= 127
        assert (quantized - before[node]).std() > 0.2


class Decides(nn.Module):
    """A router: its outputs are decisions, without a gradient."""

    def __init__(self, *, is_float: bool) -> None:
        super().__init__()
        self.conv, self.is_float = nn.Conv2d(3, 4, 3), is_float

    def forward(self, x: Tensor) -> Tensor:
        choice = self.conv(x).mean((2, 3)).argmax(1)
        return nn.functional.one_hot(choice, 4).float() if self.is_float else choice


@pytest.mark.parametrize("is_float", [True, False])
def test_program_that_only_decides_is_left_as_it_is(is_float):
    assert train(coarse(Decides(is_float=is_float)), 2) == {}


def test_program_without_int8_layers_is_left_as_it_is():
    assert train(coarse(make_net(), keep_float=("*",)), 2) == {}


@pytest.mark.parametrize(
    ("count", "training_set", "held_out"), [(8, [1, 2, 3, 5, 6, 7], [0, 4]), (2, [1], [0]), (1, [0], [0])]
)
def test_no_sample_is_trained_on_and_held_out_where_there_are_enough(count, training_set, held_out):
    net, samples = make_net(), make_samples(count)
    for examples, wanted in zip(
        choose_examples(fold(capture(net, samples[0][0])), samples), (training_set, held_out), strict=True
    ):
        assert [next(i for i, x in enumerate(samples) if x is e.inputs) for e in examples] == wanted
        with torch.no_grad():
            for example in examples:
                torch.testing.assert_close(example.outputs[0], net(*example.inputs), rtol=1e-6, atol=1e-6)


def test_samples_for_fine_tuning_come_before_those_of_calibration(monkeypatch):
    module, given = fold(capture(make_net(), make_samples()[0][0])), []

    def choose(module, samples):
        given.append(samples)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[round_program.__module__], "choose_examples", choose)
    samples, others = make_samples(2), make_samples(2, seed=9)
    for finetuning in (others, []):
        with pytest.raises(KeyboardInterrupt):
            calibrate(
                module,
                make_plan(module, scheme=AFFINE),
                scheme=AFFINE,
                section=QuantizeSection(finetune=1),
                samples=samples,
                finetuning=finetuning,
            )
    assert given[0] is others
    assert given[1] is samples


def found_by(**section) -> tuple[Calibrated, list[str]]:
    samples, seen = make_samples(), []
    module = fold(capture(make_net(), samples[0][0]))
    found = calibrate(
        module,
        make_plan(module, scheme=AFFINE),
        scheme=AFFINE,
        section=QuantizeSection(rounding="nearest", equalize=False, **section),
        samples=samples,
        progress=lambda phase, done, total: seen.append(f"{phase} {done}/{total}"),
    )
    return found, seen


def test_no_steps_train_nothing(monkeypatch):
    for name in ("choose_examples", "finetune"):
        monkeypatch.setattr(
            sys.modules[round_program.__module__], name, lambda *_, **__: pytest.fail("trained")
        )
    assert found_by()[0].constants == {}


def test_dropped_training_is_reported(monkeypatch):
    monkeypatch.setattr(training, "_RATE", 30.0)
    found, seen = found_by(finetune=8)
    assert (found.constants, seen[-1]) == (
        {},
        "fine-tuning was dropped: no better on samples held out 1/1",
    )


def test_steps_are_counted_and_calibration_returns_the_trained_constants():
    found, seen = found_by(finetune=50)
    assert [line for line in seen if "fine-tune" in line] == [f"fine-tune {k}/50" for k in range(1, 51)]
    module = fold(capture(make_net(), make_samples()[0][0]))
    restore(module, found)
    plan, qparams = make_plan(module, scheme=AFFINE), qparams_of(found.entries, AFFINE)
    program = training._TrainableProgram(module, plan, qparams, AFFINE)
    assert len(found.constants) == 2 * len(plan.layers)
    for site in plan.layers:
        quantized = program.quantized[site.node].detach().to(torch.int8).numpy()
        assert (quantized == found.constants[site.weight]).all()

"""Masks and gates: found in a program, counted when they change, and told apart from arithmetic."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from small_decisions import make_recipe
from small_networks import make_input, make_net, quantize
from torch import nn

from edgedyn import targets
from edgedyn.bundle.dispatch import Decision, Dispatcher
from edgedyn.bundle.manifest import Routing
from edgedyn.conversion.convert import Part
from edgedyn.images.sample import Sample
from edgedyn.images.tasks import TASKS
from edgedyn.quantize import Quantized
from edgedyn.report.rows import Row
from edgedyn.validation import checks, decisions
from edgedyn.validation.measurements import Case
from edgedyn.validation.runs import Outputs


@pytest.mark.parametrize(
    ("decide", "count"),
    [
        (lambda y: y, 0),
        (lambda y: y + y.argmax(1, keepdim=True), 1),
        (lambda y: torch.where(y > 0.5, y, 0.0), 1),
        (lambda y: y.max(1, keepdim=True).values, 1),
        (lambda y: torch.round(torch.sigmoid(y)) * y, 1),
        (lambda y: y * torch.logical_not(y > 0).float() + (y < 1).float(), 2),
        (lambda y: y.clamp(0, 1) * torch.arange(14).float(), 0),
    ],
)
def test_decisions_that_depend_on_data_are_counted(decide, count):
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return decide(self.net(x))

    masks, others = decisions.find_decisions(torch.export.export(Deciding().eval(), (make_input(),)))
    assert len(masks) + others == count


class Gated(nn.Module):
    """A residual branch where a mask of the input is set."""

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.net, self.mask, self.threshold = make_net(), nn.Conv2d(3, 1, 1), threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.decide(self.mask(x)) * self.net(x)

    def decide(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits >= self.threshold).to(logits.dtype)


class GatedByFloor(Gated):
    """The same, for a runtime without booleans."""

    def decide(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.floor(torch.clamp(logits, -1, 0)) + 1


@pytest.fixture(scope="module", params=[Gated, GatedByFloor])
def gated(request):
    torch.manual_seed(1)
    model, x = request.param().eval(), make_input((1, 3, 10, 14))
    with torch.no_grad():
        model.mask.bias -= model.mask(x).median()
    return model, torch.export.export(model, (x,)), Sample((x.numpy(),), x.numpy(), 0.0, "a.png")


def test_mask_is_found_with_its_module_and_threshold():
    program = torch.export.export(Gated(0.25).eval(), (make_input(),))
    (mask,), others = decisions.find_decisions(program)
    assert (mask.path, mask.threshold, others) == ("", 0.25, 0)
    assert mask.decide(np.array([0.2, 0.25, 0.3])).tolist() == [False, True, True]


def test_what_follows_from_a_mask_decides_nothing_more():
    class Sorted(Gated):
        def forward(self, x):
            active = (self.mask(x) >= 0).to(x.dtype).flatten(1)
            return x + torch.topk(active, 5).values.sum()

    masks, others = decisions.find_decisions(torch.export.export(Sorted().eval(), (make_input(),)))
    assert (len(masks), others) == (1, 0)


def test_masks_of_a_quantized_program_stand_in_the_same_order(gated):
    model, _, sample = gated
    program = quantize(model, torch.from_numpy(sample.noisy))
    masks, others = decisions.find_decisions(program)
    assert (len(masks), others) == (1, 0)


def test_run_noting_gives_output_and_logits(gated):
    model, program, sample = gated
    ((y, (logits,)),) = decisions.run_noting(program, [sample], torch.float32)
    x = torch.from_numpy(sample.noisy)
    with torch.no_grad():
        np.testing.assert_array_equal(y, model(x).numpy())
        np.testing.assert_array_equal(logits, model.mask(x).numpy())


def test_forced_masks_take_the_place_of_the_programs_own(gated):
    model, program, sample = gated
    x = torch.from_numpy(sample.noisy)
    none, every = (np.full((1, 1, 10, 14), value) for value in (False, True))
    with torch.no_grad():
        everywhere = (x + model.net(x)).numpy()
    forced = [[none], [every]]
    results = [y for y, _ in decisions.run_noting(program, [sample] * 2, torch.float32, forced)]
    assert np.array_equal(results[0], sample.noisy)
    assert np.array_equal(results[1], everywhere)


def test_exposed_program_gives_the_logits_as_a_further_output(gated):
    model, program, sample = gated
    x = torch.from_numpy(sample.noisy)
    y, logits = decisions.expose(program, (x,)).module()(x)
    with torch.no_grad():
        torch.testing.assert_close(y, model(x), rtol=0, atol=0)
        torch.testing.assert_close(logits, model.mask(x), rtol=0, atol=0)


def test_flips_are_counted_with_the_margin_that_the_float_program_had(gated):
    _, program, _ = gated
    (mask,), _ = decisions.find_decisions(program)
    float_ = [[np.array([[-3.0, -0.1, 0.1, 3.0]])]]
    found = [[np.array([[-3.1, 0.05, 0.2, 2.0]])]]
    wanted = [[float_[0][0] >= 0]]
    flips, margins = decisions._flips([mask], float_, found, wanted)
    assert flips.tolist() == [False, True, False, False]
    rms = np.sqrt((9 + 0.01 + 0.01 + 9) / 4)
    assert margins == pytest.approx(np.array([3, 0.1, 0.1, 3]) / rms)


def test_histogram_counts_all_and_changed_and_keeps_what_lies_beyond():
    margins, changed = np.array([0.05, 0.15, 0.15, 7.0]), np.array([True, False, True, False])
    table = decisions._histogram(margins, changed)
    assert table["all"][:2] == [1, 2]
    assert table["changed"][:2] == [1, 1]
    assert (sum(table["all"]), table["all"][-1], sum(table["changed"])) == (4, 1, 2)


def test_masks_are_held_to_the_limits_of_the_recipe_on_rate_and_margin(gated):
    model, program, sample = gated
    x = torch.from_numpy(sample.noisy)
    lower = targets.load("onnxruntime")
    given = [sample.noisy]
    outputs = Outputs([sample], given, given, given)

    def measured(shift: float) -> dict[str, Row]:
        shifted = copy.deepcopy(model)
        shifted.mask.bias.data += shift
        made = torch.export.export(shifted, (x,))
        part = Part((x,), {}, program, Quantized(made), made)
        case = Case(outputs, {}, "fp32", TASKS["denoise"], make_recipe().limits)
        found = decisions.measure_masks(part, lower, case)
        return {row.metric: row for row in found.rows}

    with torch.no_grad():
        logits = model.mask(x)
    rms = float(logits.square().mean().sqrt())
    rows = measured(-0.4 * rms)
    crossed = (logits >= 0) & (logits < 0.4 * rms)
    for where in ("quantized", "device"):
        rate, margin = rows[f"mask_flip_rate[{where}]"], rows[f"largest_flipped_margin[{where}]"]
        assert (rate.limit, margin.limit) == ({"at_most": 0.005}, {"at_most": 0.25})
        assert rate.value == pytest.approx(float(crossed.float().mean()))
        assert margin.value == pytest.approx(float(logits[crossed].max()) / rms, rel=1e-5)
        assert (rate.passed, margin.passed) == (False, False)
    rows = measured(0.0)
    assert rows["mask_flip_rate[quantized]"].value == rows["largest_flipped_margin[quantized]"].value == 0
    # one logit is 0 but for rounding, and the runtime adds in another order
    assert rows["largest_flipped_margin[device]"].passed
    assert checks.report_only([rows["largest_flipped_margin[device]"]])[0].limit == {}


def routes(rule: str, *found: tuple[float, ...]) -> dict[str, Row]:
    """Measure the routes of four images with margins 4, 2, 2, 1, where a program found other scores."""
    float_ = [Decision(0, np.array(scores)) for scores in ([4.0, 0], [2.0, 0], [2.0, 0], [1.0, 0])]
    other = [Decision(int(np.argmax(scores)), np.array(scores)) for scores in found]
    x = np.random.default_rng(1).random((1, 3, 8, 10), dtype=np.float32)
    runs = {"router": lambda x: [np.array([[1.0, 0.0]])], "a": lambda x: [x, np.zeros(1)], "b": lambda x: [x]}
    routing = Routing(rule, "router" if rule == "argmax" else "", ("a", "b"))
    outputs = Outputs(
        [Sample((x,), x + 0.1, 0.0, "a.png")] * 4,
        [x] * 4,
        [x] * 4,
        [x] * 4,
        decided={"decomposed": float_, "quantized": float_, "device": other},
        dispatchers={"quantized": Dispatcher(runs, routing)},
    )
    recipe = make_recipe()
    case = Case(outputs, {}, recipe.precision, TASKS[recipe.task], recipe.limits)
    return {row.metric: row for row in decisions.measure_routes(routing, case).rows}


def test_gates_are_held_to_the_limits_of_the_recipe_on_agreement_and_margin():
    rows = routes("argmax", (4.0, 0), (0, 2.0), (2.0, 0), (0, 1.0))
    agreement, margin = rows["gate_agreement[device]"], rows["largest_flipped_gate_margin[device]"]
    assert (agreement.value, agreement.limit, agreement.passed) == (0.5, {"at_least": 0.995}, False)
    # the margins 4, 2, 2, 1 have an rms of 2.5, and the image with a margin of 2 changed
    assert (margin.value, margin.limit, margin.passed) == (0.8, {"at_most": 0.25}, False)
    assert rows["gate_agreement[quantized]"].passed
    assert rows["largest_flipped_gate_margin[quantized]"].value == 0
    assert [row.limit for row in checks.report_only([agreement, margin])] == [{}, {}]


def test_images_that_no_longer_fit_the_capacity_variant_are_only_reported():
    rows = routes("fallback", (4.0, 0), (0, 2.0), (2.0, 0), (2.0, 0))
    assert (rows["gate_agreement[device]"].value, rows["gate_agreement[device]"].limit) == (0.75, {})
    assert "largest_flipped_gate_margin[device]" not in rows

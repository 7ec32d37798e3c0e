"""The mixed-precision search: the cost of INT8 is measured by layer, and layers stay float for a limit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from decibels import apart_db, rms_of_psnr
from small_int8 import quantize_program
from torch import Tensor, nn
from typer.testing import CliRunner

from edgedyn import pipeline, quantize, targets
from edgedyn.cli.app import app
from edgedyn.conversion.convert import load_target
from edgedyn.errors import CheckFailedError, RecipeError
from edgedyn.images import metrics
from edgedyn.quantize.accounting import KEPT_FOR_QUALITY
from edgedyn.quantize.calibration import Calibrator
from edgedyn.quantize.search.measurement_cache import MeasurementCache
from edgedyn.quantize.search.precision import EvaluationSet, _refusal
from edgedyn.quantize.table.entries import Point
from edgedyn.quantize.table.table import read_table
from edgedyn.recipe.keys import QuantizeSection
from edgedyn.recipe.recipe import load_recipe

# the same quantized values; a dequantized weight may round otherwise, once, in values around 1
ONE_ROUNDING = 2**-20
RECIPES = Path(__file__).parents[2] / "recipes"
SCHEMES = {name: targets.load(name).int8 for name in ("executorch", "tensorrt")}
PLAIN = QuantizeSection(equalize=False, rounding="nearest")


class Uneven(nn.Module):
    """Three layers; ``coarse`` reads channels of ranges of which 8 bits hold one only."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.coarse = nn.Conv2d(8, 8, 1)
        self.tail = nn.Conv2d(8, 3, 3, padding=1)
        with torch.no_grad():
            self.head.weight[0] *= 300
            self.coarse.weight[:, 0] /= 300

    def forward(self, x: Tensor) -> Tensor:
        return x + self.tail(torch.relu(self.coarse(torch.relu(self.head(x)))))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(1)
    return Uneven().eval()


@pytest.fixture(scope="module")
def inputs() -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.rand(1, 3, 12, 20, generator=generator),) for _ in range(4)]


@pytest.fixture(scope="module")
def evaluation(net, inputs) -> EvaluationSet:
    rng = np.random.default_rng(3)
    with torch.no_grad():
        outputs = [net(*x).numpy() for x in inputs]
    truths = [y + 0.003 * rng.standard_normal(y.shape).astype(np.float32) for y in outputs]
    return EvaluationSet(inputs, truths, ["sigma=15", "sigma=50", "sigma=15", "sigma=50"])


def make(net, inputs, target="tensorrt", section=PLAIN, **more) -> quantize.Quantized:
    program = torch.export.export(net, inputs[0])
    return quantize_program(
        program, inputs[0], scheme=SCHEMES[target], section=section, samples=inputs, **more
    )


@pytest.fixture(scope="module")
def measured(net, inputs, evaluation) -> quantize.Quantized:
    return make(net, inputs, evaluation=evaluation)


def rounded_by(net, inputs, target):
    calibrator = Calibrator(
        quantize.fold(torch.export.export(net, inputs[0])),
        quantize.CalibrationInputs(inputs),
        quantize.Int8Method(SCHEMES[target], PLAIN),
    )
    return calibrator.round(*calibrator.observe())


def test_colour_augmented_samples_widen_ranges_and_round_no_weight(net, inputs):
    """Weights are those that rounding on the others finds, within the ranges of all."""
    extreme, section = (1 - 3 * inputs[0][0],), QuantizeSection(equalize=False)
    found = make(net, [*inputs, extreme], section=section, color_augmented=1).calibrated
    program = Calibrator(
        quantize.fold(torch.export.export(net, inputs[0])),
        quantize.CalibrationInputs([*inputs, extreme]),
        quantize.Int8Method(SCHEMES["tensorrt"], section),
    )
    observed = program.observe()
    wanted = replace(program, inputs=quantize.CalibrationInputs(inputs)).round(*observed).calibrated
    other = program.round(*observed).calibrated
    assert [e.affine for e in found.entries] == [e.affine for e in wanted.entries]
    lows = {entry.name: entry.histogram.low for entry in found.entries}
    assert lows["head.input"] == float(extreme[0].min())
    for name, value in wanted.constants.items():
        np.testing.assert_array_equal(found.constants[name], value)
    assert any((found.constants[name] != value).any() for name, value in other.constants.items())


@pytest.mark.parametrize("target", SCHEMES)
def test_what_is_judged_is_what_the_quantized_program_computes(net, inputs, target):
    with torch.no_grad():
        found = rounded_by(net, inputs, target).run(inputs[0])
        wanted = make(net, inputs, target).program.module()(*inputs[0])
    # the same integers; a dequantized weight may round otherwise, once
    assert float((found - wanted).abs().max()) <= ONE_ROUNDING


def test_layers_that_are_named_are_float(net, inputs):
    rounded = rounded_by(net, inputs, "tensorrt")
    layers = {name: net.get_submodule(name) for name in ("head", "coarse", "tail")}
    with torch.no_grad():
        wanted, some = net(*inputs[0]), rounded.run(inputs[0])
        all_float = rounded.run(inputs[0], {n: (m.weight, m.bias) for n, m in layers.items()})
        one = rounded.run(inputs[0], {"coarse": (layers["coarse"].weight, layers["coarse"].bias)})
    assert torch.equal(all_float, wanted)
    errors = [float((y - wanted).abs().mean()) for y in (some, one)]
    assert 0 < errors[1] < errors[0] / 2


def test_layer_that_costs_most_comes_first_and_its_costs_are_measured(measured, net, evaluation):
    precision = measured.calibrated.precision
    assert precision.kept == ()
    assert {layer.layer for layer in precision.layers} == {"head", "coarse", "tail"}
    assert precision.layers[0].layer == "coarse"
    assert precision.layers[0].gain_db > 5 * abs(precision.layers[-1].gain_db)
    shares = {layer.layer: layer.share for layer in precision.layers}
    assert shares["coarse"] == pytest.approx(64 / (64 + 2 * 8 * 3 * 9))
    assert sum(shares.values()) == pytest.approx(1)
    psnr = [
        [
            metrics.psnr_db(program(*x).detach().numpy(), truth)
            for x, truth in zip(evaluation.inputs, evaluation.truths, strict=True)
        ]
        for program in (net, measured.program.module())
    ]
    drops = np.subtract(*psnr)
    worst = max(np.mean(drops[0::2]), np.mean(drops[1::2]))  # of the two noise levels
    apart = 2 * apart_db(ONE_ROUNDING, rms_of_psnr(np.max(psnr)))
    assert precision.drop_db == pytest.approx(worst, rel=0, abs=apart)
    assert precision.curve[0].drop_db == pytest.approx(worst, rel=0, abs=apart)


def test_sqnr_is_of_what_the_layer_writes(measured, net, inputs):
    with torch.no_grad():
        wanted = torch.stack([net.head(*x) for x in inputs])
    rounded = rounded_by(net, inputs, "tensorrt")
    seen = []
    for x in inputs:
        rounded.run(x, observe=lambda node, y: seen.append((node.name, y)))
    found = torch.stack([y for name, y in seen if name == "conv2d"])
    error = (found.double() - wanted).square()
    sqnr = 10 * torch.log10(wanted.double().square().sum() / error.sum())
    (head,) = [layer for layer in measured.calibrated.precision.layers if layer.layer == "head"]
    apart = apart_db(ONE_ROUNDING, float(error.mean().sqrt()))
    assert head.sqnr_db == pytest.approx(float(sqnr), rel=0, abs=apart)


def test_curve_ends_where_nothing_is_int8_and_nothing_is_lost(measured):
    curve = measured.calibrated.precision.curve
    assert [point.layers for point in curve] == [0, 1, 2, 3]
    assert [point.int8_share for point in curve] == sorted((p.int8_share for p in curve), reverse=True)
    assert curve[-1].int8_share == curve[-1].drop_db == 0


def test_least_float_layers_that_keep_the_limit_are_kept(measured, net, inputs, evaluation):
    curve = measured.calibrated.precision.curve
    limit = (curve[0].drop_db + curve[1].drop_db) / 2
    result = make(net, inputs, evaluation=replace(evaluation, limit_db=limit))
    precision = result.calibrated.precision
    assert precision.kept == ("coarse",)
    assert precision.drop_db <= limit
    assert {row["reason"] for row in result.float_nodes if row["node"] == "coarse"} == {KEPT_FOR_QUALITY}
    assert result.int8_mac_share == pytest.approx(curve[1].int8_share)
    again = make(net, inputs, calibrated=result.calibrated)
    assert again.program.graph_module.code == result.program.graph_module.code


def test_limit_that_is_kept_anyway_leaves_every_layer_in_int8(net, inputs, evaluation):
    result = make(net, inputs, evaluation=replace(evaluation, limit_db=100.0))
    assert result.calibrated.precision.kept == ()
    assert result.int8_mac_share == 1


def test_limit_that_leaves_too_little_int8_is_refused_with_curve_and_best(net, inputs, evaluation):
    words = (
        r"no choice of float layers keeps the drop within quantize.max_drop_db 1e-09 dB and 90% .*"
        r"0: 100.0%, \d+\.\d+ dB; 1: 87.1%, .*The best is 0 float layers, \d+\.\d+ dB at 100.0%"
    )
    with pytest.raises(CheckFailedError, match=words):
        make(net, inputs, evaluation=replace(evaluation, limit_db=1e-9, least_share=0.9))


def test_without_a_limit_little_int8_is_measured_and_not_refused(net, inputs, evaluation):
    section = PLAIN.model_copy(update={"keep_float": ("head",)})
    found = make(net, inputs, section=section, evaluation=replace(evaluation, least_share=0.9))
    assert found.int8_mac_share < 0.9
    assert {layer.layer for layer in found.calibrated.precision.layers} == {"coarse", "tail"}


def test_refusal_counts_what_was_tried_with_weights_rounded_for_it(evaluation):
    curve = [Point(0, 1.0, 0.3), Point(1, 0.8, 0.05), Point(2, 0.2, 0.01)]
    tried = [Point(1, 0.8, 0.08), Point(2, 0.6, 0.07)]
    words = _refusal(curve, tried, replace(evaluation, limit_db=0.06, least_share=0.5))
    assert "With weights rounded for that choice: 1: 80.0%, 0.0800 dB; 2: 60.0%, 0.0700 dB. " in words
    assert "The best is 2 float layers, 0.0700 dB at 60.0%" in words
    assert "The best is 1 float layers, 0.0500 dB" in _refusal(
        curve, [], replace(evaluation, limit_db=0.06, least_share=0.5)
    )


def test_ablation_tries_every_switch_the_other_way(net, inputs, evaluation):
    section = QuantizeSection(equalize=True, rounding="reconstruct")
    found = make(net, inputs, section=section, evaluation=replace(evaluation, ablates=True)).calibrated
    tried = found.ablation
    assert next(iter(tried)) == "as the recipe says"
    assert tried["as the recipe says"] == found.precision.drop_db
    assert {"equalize: false", "rounding: nearest", "bias_correction: full"} <= set(tried)
    assert "equalize: true" not in tried
    other = make(net, inputs, section=section.model_copy(update={"equalize": False}), evaluation=evaluation)
    assert tried["equalize: false"] == other.calibrated.precision.drop_db
    assert tried["equalize: false"] > 2 * tried["as the recipe says"]
    assert "dynamic: []" not in tried  # the recipe has none
    assert not any(name.startswith("generated") for name in tried)  # nor the network kernels
    alone = replace(evaluation, by_layer=False, ablates=True)
    quick = make(net, inputs, section=section, evaluation=alone).calibrated
    assert quick.precision is None
    assert quick.ablation == tried


def test_interrupted_measurement_goes_on_where_it_stopped(net, inputs, evaluation, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []

    def remember(stop: int) -> EvaluationSet:
        cache = MeasurementCache("net", [Path(__file__)])

        def limited(name, measure):
            def count():
                if len(measured) == stop:
                    raise KeyboardInterrupt
                measured.append(name)
                return measure()

            return cache(name, count)

        return replace(evaluation, remember=limited)

    with pytest.raises(KeyboardInterrupt):
        make(net, inputs, evaluation=remember(3))
    assert len(measured) == 3
    whole = make(net, inputs, evaluation=remember(99)).calibrated.precision
    assert len(measured) == len(set(measured))  # nothing was measured twice
    count = len(measured)
    assert make(net, inputs, evaluation=remember(99)).calibrated.precision == whole
    assert len(measured) == count


def test_other_facts_or_other_code_are_measured_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "code.py"
    source.write_text("a")
    assert MeasurementCache("x", [source])("drop", lambda: {"a": 1.0}) == {"a": 1.0}
    assert MeasurementCache("x", [source])("drop", lambda: pytest.fail("measured again")) == {"a": 1.0}
    assert MeasurementCache("y", [source])("drop", lambda: {"a": 2.0}) == {"a": 2.0}
    source.write_text("b")
    assert MeasurementCache("x", [source])("drop", lambda: {"a": 3.0}) == {"a": 3.0}
    MeasurementCache("x", [source]).path.write_text("{")
    assert MeasurementCache("x", [source])("drop", lambda: {"a": 4.0}) == {"a": 4.0}


def test_limit_of_a_task_without_truth_is_refused():
    values = ["quantize.max_drop_db=0.1", "input.shape=[1, 3, 32, 32]"]
    recipe = load_recipe(RECIPES / "dynconv-resnet32.phone.int8.yaml", values)
    calibration, samples = pipeline.load_sets(recipe)
    target = load_target(recipe)
    network = pipeline.rewrite_network(recipe, target)
    with pytest.raises(
        RecipeError, match=r"max_drop_db, --sensitivity, .* is PSNR .* the task 'classify' has none"
    ):
        pipeline.convert(network, target, calibration, samples[0])


@pytest.mark.parametrize("verb", ["calibrate", "build"])
def test_command_ends_with_1_and_writes_nothing_where_no_precision_keeps_the_limit(
    tmp_path, monkeypatch, verb
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    values = ["model.network=small_networks:coarse_identity", "model.weights=null", "model.arguments={}"]
    values += [
        "input.shape=[1, 3, 32, 48]",
        "tile.overlap=0",
        "quantize.keep_float=[]",
        "quantize.dynamic=[]",
    ]
    values += ["quantize.equalize=false", "quantize.equalize_outputs=false", "quantize.rounding=nearest"]
    values += ["quantize.max_drop_db=0.01", "limits.int8_share=0.9"]
    options = [word for value in values for word in ("--set", value)]
    recipe, out = str(RECIPES / "mallenet-s.phone.int8.yaml"), tmp_path / "out.json"
    done = CliRunner().invoke(app, [verb, recipe, *options, "-o", str(out)])
    assert isinstance(done.exception, CheckFailedError)
    assert done.exception.exit_code == 1
    assert "no choice of float layers keeps the drop within quantize.max_drop_db 0.01 dB" in str(
        done.exception
    )
    assert "The best is 0 float layers" in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_command_measures_layers_and_a_build_by_its_table_shows_them(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = ["model.network=small_networks:make_net", "model.weights=null", "model.arguments={}"]
    small += ["input.shape=[1, 3, 32, 48]", "tile.overlap=0", "quantize.keep_float=[]", "quantize.dynamic=[]"]
    options = [word for value in small for word in ("--set", value)]
    recipe, table = str(RECIPES / "mallenet-s.phone.int8.yaml"), tmp_path / "t.json"
    done = CliRunner().invoke(
        app, ["calibrate", recipe, *options, "-o", str(table), "--sensitivity", "--ablation", "--json"]
    )
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert {layer["layer"] for layer in printed["precision"]["forward"]["layers"]} == {"head", "body", "tail"}
    assert "rounding: nearest" in printed["ablation"]["forward"]
    kept = read_table(table)
    assert kept.precision["forward"].to_json() == printed["precision"]["forward"]
    assert dict(kept.ablation["forward"]) == printed["ablation"]["forward"]
    parsed = load_recipe(Path(recipe), [*small, f"quantize.table={table}"])
    built = pipeline.build(parsed, tmp_path / "bundle", compare=False)
    page = (built.bundle.path / "report.html").read_text()
    assert "<polyline points=" in page
    assert "rounding: nearest" in page
    assert "<code>body</code>" in page

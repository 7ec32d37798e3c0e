"""Rows are right by hand computation, pass at their limit, and fail past it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from edgedyn.bundle.dispatch import Dispatcher
from edgedyn.errors import CalibrationError, CheckFailedError
from edgedyn.images.sample import Sample
from edgedyn.images.tasks import TASKS
from edgedyn.recipe.keys import LimitSection
from edgedyn.recipe.recipe import load_recipe
from edgedyn.report.rows import Row, ValidationReport
from edgedyn.validation import checks
from edgedyn.validation.measurements import Case
from edgedyn.validation.runs import Outputs, run_all

RECIPES = Path(__file__).parents[2] / "recipes"
SHAPE = (24, 16, 3)
LIMITS = LimitSection()
# A float32 value below 1 is rounded by 2**-25 at most: 20 / ln 10 * 2**-25 / 0.01 = 2.6e-5 dB for the least
# error of these pictures, and a drop has two.
ROUNDED_DB = 1e-4


def make_outputs(*, decomposed: float = 0.05, quantized: float = 0.05, device: float = 0.05) -> Outputs:
    """Give 4 samples, two of each noise level; programs err by a constant, in turn up and down.

    The truth is 0.5 everywhere and the input errs by 0.1, so that every PSNR is -20 log10 of an error.
    """
    sigmas = (25.0, 15.0, 25.0, 15.0)
    signs = [np.float32((-1) ** (np.indices(SHAPE).sum(0))) for _ in sigmas]
    samples = [
        Sample((chw(0.5 + np.float32(0.1) * sign),), chw(np.full(SHAPE, 0.5, np.float32)), sigma, "a.png")
        for sign, sigma in zip(signs, sigmas, strict=True)
    ]
    errors = (decomposed, quantized, device)
    return Outputs(samples, *[[chw(0.5 + np.float32(error) * sign) for sign in signs] for error in errors])


def chw(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None])


def rows_between(
    outputs: Outputs,
    precision: str,
    *between: str,
    limits: LimitSection = LIMITS,
    task: str = "denoise",
    rounding: float = 0.0,
) -> list[Row]:
    """Return the rows of some comparisons; the share of INT8 has tests of its own."""
    case = Case(outputs, {}, precision, TASKS[task], limits, rounding)
    return [row for row in checks.rows(case) if row.between in between]


def arithmetic_rows(outputs: Outputs, precision: str, **options) -> list[Row]:
    return rows_between(outputs, precision, "quantized:decomposed", "device:quantized", **options)


def truth_rows(outputs: Outputs) -> list[Row]:
    return rows_between(outputs, "fp32", "float:truth", "device:truth")


def by_name(rows: list[Row]) -> dict[str, Row]:
    assert len({(row.between, row.metric) for row in rows}) == len(rows)
    return {f"{row.between} {row.metric}": row for row in rows}


def failed(rows: list[Row]) -> list[str]:
    return sorted(name for name, row in by_name(rows).items() if not row.passed)


@pytest.mark.parametrize(
    ("value", "limit", "samples", "passed"),
    [
        (1.0, {"at_most": 1.0}, 1, True),
        (1.0, {"at_least": 1.0}, 1, True),
        (math.nextafter(1.0, 2.0), {"at_most": 1.0}, 1, False),
        (math.nextafter(1.0, 0.0), {"at_least": 1.0}, 1, False),
        (math.inf, {"at_least": 1.0}, 1, True),
        (math.inf, {"at_most": 1.0}, 1, False),
        (math.nan, {}, 1, False),
        (0.0, {"at_most": 1.0}, 0, False),
    ],
)
def test_row_passes_within_its_limit_if_something_was_measured(value, limit, samples, passed):
    row = Row("a:b", "max_abs", value, limit, samples)
    assert row.passed is passed
    assert row.to_json()["passed"] is passed
    assert ValidationReport((row,)).ok is passed


@pytest.mark.parametrize(("asked", "limit"), [("null", 0.25), (0.02, 0.02), (0.5, 0.25)])
def test_limit_of_the_precision_search_is_demanded_of_the_build(asked, limit):
    recipe = load_recipe(RECIPES / "acda-dncnn.phone.int8.yaml", [f"quantize.max_drop_db={asked}"])
    outputs = make_outputs(quantized=0.0503, device=0.0503)  # 0.052 dB
    limits = checks.tighten_drop(recipe.limits, recipe.quantize.max_drop_db)
    rows = checks.rows(Case(outputs, {"forward": (1.0, 1)}, "int8", TASKS[recipe.task], limits))
    drops = [row for row in rows if row.metric.startswith("psnr_drop_db")]
    assert {row.between for row in drops} == {"quantized:decomposed", "device:truth"}
    assert all(row.limit == {"at_most": limit} for row in drops)
    assert all(row.passed is (limit > 0.052) for row in drops)


def test_report_is_ok_only_with_rows_that_all_pass():
    good, bad = Row("a:b", "x", 0.0, {}, 1), Row("a:b", "y", 2.0, {"at_most": 1.0}, 1)
    assert not ValidationReport(()).ok
    assert ValidationReport((good, good)).ok
    assert not ValidationReport((good, bad)).ok


def test_truth_rows_are_means_by_noise_level_with_the_input_as_limit():
    rows = by_name(truth_rows(make_outputs(decomposed=0.01, device=0.02)))
    levels = [name for name in rows if name.startswith("float:truth psnr_db")]
    assert levels == ["float:truth psnr_db[sigma=15]", "float:truth psnr_db[sigma=25]"]
    for sigma in (15, 25):
        float_, device = (rows[f"{side}:truth psnr_db[sigma={sigma}]"] for side in ("float", "device"))
        assert (float_.value, device.value) == pytest.approx((40.0, -20 * math.log10(0.02)), abs=ROUNDED_DB)
        assert float_.limit["at_least"] == device.limit["at_least"] == pytest.approx(20.0, abs=ROUNDED_DB)
        drop = rows[f"device:truth psnr_drop_db[sigma={sigma}]"]
        assert (drop.value, drop.limit) == (
            pytest.approx(20 * math.log10(2), abs=ROUNDED_DB),
            {"at_most": 0.25},
        )
        assert (drop.samples, float_.samples, device.samples) == (2, 2, 2)
        assert 0 < rows[f"device:truth ssim[sigma={sigma}]"].value < 1
    worst = rows["device:truth worst_image_psnr_drop_db"]
    assert (worst.value, worst.samples) == (pytest.approx(20 * math.log10(2), abs=ROUNDED_DB), 4)
    assert rows["device:truth worst_tile_psnr_db"].value == pytest.approx(
        -20 * math.log10(0.02), abs=ROUNDED_DB
    )


def test_worst_image_and_worst_tile_tell_what_the_means_hide():
    outputs = make_outputs(decomposed=0.01, device=0.01)
    outputs.device[2][:] = outputs.decomposed[2] + np.float32(0.03) * np.sign(outputs.decomposed[2] - 0.5)
    rows = by_name(truth_rows(outputs))
    assert rows["device:truth worst_image_psnr_drop_db"].value == pytest.approx(
        20 * math.log10(4), abs=ROUNDED_DB
    )
    assert rows["device:truth worst_tile_psnr_db"].value == pytest.approx(
        -20 * math.log10(0.04), abs=ROUNDED_DB
    )
    assert rows["device:truth psnr_drop_db[sigma=15]"].value == pytest.approx(0.0, abs=ROUNDED_DB)
    assert rows["device:truth psnr_drop_db[sigma=25]"].value == pytest.approx(
        10 * math.log10(4), abs=ROUNDED_DB
    )


def test_program_worse_than_its_input_fails():
    assert failed(truth_rows(make_outputs(decomposed=0.11, device=0.11))) == [
        "device:truth psnr_db[sigma=15]",
        "device:truth psnr_db[sigma=25]",
        "float:truth psnr_db[sigma=15]",
        "float:truth psnr_db[sigma=25]",
    ]


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_drop_past_the_limit_fails_on_either_side(precision):
    fine, too_far = 0.05 * 10 ** (0.24 / 20), 0.05 * 10 ** (0.26 / 20)
    outputs = make_outputs(quantized=fine, device=fine)
    assert failed(arithmetic_rows(outputs, precision)) == []
    assert failed(truth_rows(outputs)) == []
    quantized = arithmetic_rows(make_outputs(quantized=too_far, device=fine), precision)
    drops = [f"psnr_drop_db[sigma={sigma}]" for sigma in (15, 25)]
    assert set(failed(quantized)) >= {f"quantized:decomposed {drop}" for drop in drops}
    device = truth_rows(make_outputs(quantized=fine, device=too_far))
    assert failed(device) == [f"device:truth {drop}" for drop in drops]


@pytest.mark.parametrize(("off", "passed"), [(1.4, True), (1.43, False)])
def test_int8_device_may_differ_by_root_two_of_the_quantization_noise(off, passed):
    outputs = make_outputs(quantized=0.051, device=0.051 + 0.001 * off)
    rows = by_name(arithmetic_rows(outputs, "int8"))
    row = rows["device:quantized rms_ratio"]
    assert row.value == pytest.approx(off, rel=1e-3)
    assert row.passed is passed
    assert rows["device:quantized mean_abs_levels"].value == pytest.approx(0.255 * off, rel=1e-3)
    assert rows["device:quantized max_abs"].value == pytest.approx(0.001 * off, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("levels", "passed"), [(0.24, True), (0.26, False)])
def test_float_device_may_differ_by_a_quarter_level(precision, levels, passed):
    rows = by_name(arithmetic_rows(make_outputs(device=0.05 + levels / 255), precision))
    row = rows["device:quantized mean_abs_levels"]
    assert row.value == pytest.approx(levels, rel=1e-3)
    assert row.passed is passed


@pytest.mark.parametrize(("levels", "passed"), [(0.06, True), (0.065, False)])
def test_folding_of_a_float_program_may_move_a_sixteenth_of_a_level(levels, passed):
    outputs = make_outputs(quantized=0.05 + levels / 255, device=0.05 + levels / 255)
    row = by_name(arithmetic_rows(outputs, "fp32"))["quantized:decomposed max_abs"]
    assert (row.passed, row.samples) == (passed, 4)


@pytest.mark.parametrize(
    ("rounding", "dtype", "limit"),
    [
        (1e-6, np.float32, 1e-4),
        (1e-3, np.float32, 2e-3),
        (0.5, np.float32, 0.02),
        (1e-3, np.float64, 2e-3 / 2**29),
    ],
)
def test_limits_are_never_below_twice_the_rounding_of_the_network(rounding, dtype, limit):
    lowest = 1e-4 if dtype == np.float32 else 1e-12
    assert checks.at_least_rounding(lowest, rounding, dtype) == pytest.approx(limit, rel=1e-12)


@pytest.mark.parametrize(("rounding", "passed"), [(0.0, False), (1e-3, True)])
def test_float32_programs_may_differ_by_what_float32_costs_the_network(rounding, passed):
    off = 0.05 + 1e-3
    outputs = make_outputs(quantized=off, device=off + 1e-3)
    rows = by_name(
        rows_between(
            outputs, "fp32", "quantized:decomposed", "device:quantized", task="classify", rounding=rounding
        )
    )
    assert rows["quantized:decomposed max_abs"].passed is passed
    assert rows["device:quantized mean_relative"].passed is passed


def test_residual_sqnr_compares_what_the_network_adds_to_its_input():
    rows = by_name(arithmetic_rows(make_outputs(quantized=0.055), "int8"))
    # the residual is 0.05 in size, the difference 0.005
    assert rows["quantized:decomposed residual_sqnr_db"].value == pytest.approx(20.0, abs=1e-3)


def test_run_all_gives_float32_as_the_program_does():
    seen = []

    def run(x: np.ndarray) -> list[np.ndarray]:
        seen.append((x.shape, x.dtype))
        return [x * 2]

    samples = make_outputs().samples
    results = run_all(Dispatcher({"forward": run}), samples, "device", np.float16)
    assert seen == [((1, 3, 24, 16), np.float16)] * 4
    assert all(y.dtype == np.float32 and decision is None for (y,), decision in results)
    assert np.abs(results[0][0][0] - 2 * samples[0].noisy).max() < 1e-3


def test_output_that_is_not_finite_names_program_image_and_noise():
    samples = make_outputs().samples
    broken = Dispatcher({"forward": lambda x: [x * np.float32("inf")]})
    with pytest.raises(
        CheckFailedError, match=r"the device program: found 1152 of 1152 .* a\.png .* sigma 25"
    ):
        run_all(broken, samples, "device")


def test_runtime_that_computes_float_is_not_taken_for_int8():
    outputs = make_outputs(quantized=0.051, device=0.05)
    assert failed(arithmetic_rows(outputs, "int8")) == ["device:quantized noise_ratio"]


def test_truth_as_input_sets_no_limit():
    outputs = make_outputs()
    samples = [dataclasses.replace(s, inputs=(s.truth,), sigma=0.0) for s in outputs.samples]
    rows = truth_rows(dataclasses.replace(outputs, samples=samples))
    assert by_name(rows)["device:truth psnr_db[sigma=0]"].limit == {}


@pytest.mark.parametrize(("share", "passed"), [(0.8, True), (0.79, False)])
def test_int8_share_has_a_limit(share, passed):
    def share_rows(precision: str, *programs: str) -> list[Row]:
        shares = dict.fromkeys(programs, (share, 7))
        rows = checks.rows(Case(make_outputs(), shares, precision, TASKS["denoise"], LIMITS))
        return [row for row in rows if row.metric.startswith("int8_mac_share")]

    (row,) = share_rows("int8", "forward")
    assert (row.metric, row.passed, row.samples) == ("int8_mac_share", passed, 7)
    assert share_rows("fp32", "forward") == []
    router, variant = share_rows("int8", "router", "w50")
    assert (router.metric, router.passed) == ("int8_mac_share[router]", True)
    assert (variant.metric, variant.passed) == ("int8_mac_share[w50]", passed)


def names(precision: str, task: str) -> list[str]:
    outputs = make_outputs()
    if task == "classify":  # logits (1, K)
        logits = [np.arange(5, dtype=np.float32)[None]] * 4
        outputs = dataclasses.replace(outputs, decomposed=logits, quantized=logits, device=logits)
    rows = checks.rows(Case(outputs, {"forward": (1.0, 3)}, precision, TASKS[task], LIMITS))
    return [f"{row.between} {row.metric}" for row in rows]


def test_checks_of_a_picture_in_int8_stand_in_the_order_of_the_programs():
    assert names("int8", "denoise") == [
        "quantized:decomposed int8_mac_share",
        "quantized:decomposed residual_sqnr_db",
        "quantized:decomposed psnr_drop_db[sigma=15]",
        "quantized:decomposed psnr_drop_db[sigma=25]",
        "device:quantized mean_abs_levels",
        "device:quantized max_abs",
        "device:quantized rms_ratio",
        "device:quantized noise_ratio",
        "float:truth psnr_db[sigma=15]",
        "float:truth ssim[sigma=15]",
        "float:truth psnr_db[sigma=25]",
        "float:truth ssim[sigma=25]",
        "device:truth psnr_db[sigma=15]",
        "device:truth ssim[sigma=15]",
        "device:truth psnr_db[sigma=25]",
        "device:truth ssim[sigma=25]",
        "device:truth psnr_drop_db[sigma=15]",
        "device:truth psnr_drop_db[sigma=25]",
        "device:truth worst_image_psnr_drop_db",
        "device:truth worst_tile_psnr_db",
    ]


@pytest.mark.parametrize(
    ("precision", "more"),
    [
        ("fp32", ["quantized:decomposed max_abs", "mean_relative", "max_abs"]),
        ("fp16", ["quantized:decomposed sqnr_db", "mean_relative", "max_abs", "rms_ratio"]),
    ],
)
def test_checks_of_predictions_by_precision(precision, more):
    first, *device = more
    assert names(precision, "classify") == [
        first,
        *(f"device:quantized {name}" for name in device),
        "quantized:decomposed prediction_agreement",
        "device:float prediction_agreement",
        "device:float sqnr_db",
    ]


def test_every_check_applies_to_some_precision_and_task():
    labelled = dataclasses.replace(TASKS["classify"], is_labelled=True)
    noisy = dataclasses.replace(TASKS["denoise"], has_truth=False)
    tasks = [*TASKS.values(), labelled, noisy]
    pairs = [(precision, task) for precision in ("fp32", "fp16", "int8") for task in tasks]
    for check in checks.CHECKS:
        assert any(check.applies(*pair) for pair in pairs), check


def test_agreement_counts_predictions_that_stay():
    logits = [np.eye(3, dtype=np.float32)[[k]] for k in (0, 1, 2, 0)]
    moved = [*logits[:3], np.eye(3, dtype=np.float32)[[1]]]
    outputs = dataclasses.replace(make_outputs(), decomposed=logits, quantized=logits, device=moved)
    rows = checks.rows(Case(outputs, {}, "fp32", TASKS["classify"], LIMITS))
    found = {row.between: row for row in rows if row.metric == "prediction_agreement"}
    assert (found["quantized:decomposed"].value, found["quantized:decomposed"].passed) == (1.0, True)
    assert (found["device:float"].value, found["device:float"].passed) == (0.75, False)
    assert {row.samples for row in found.values()} == {4}


def photo_without_truth(**errors: float) -> Outputs:
    outputs = make_outputs(**errors)
    samples = [
        dataclasses.replace(s, has_truth=False, source=f"{k}.png") for k, s in enumerate(outputs.samples)
    ]
    return dataclasses.replace(outputs, samples=samples)


def rows_without_truth(outputs: Outputs, precision: str = "int8", task: str = "denoise") -> list[Row]:
    measured = TASKS[task].measured_on(outputs.samples)
    return checks.rows(Case(outputs, {"forward": (1.0, 3)}, precision, measured, LIMITS))


def test_without_a_truth_the_device_is_compared_with_the_float_network():
    outputs = photo_without_truth(decomposed=0.05, quantized=0.06, device=0.06)
    rows = by_name(rows_without_truth(outputs))
    assert not any("psnr" in name or "ssim" in name for name in rows)
    missing = rows["float:truth images_without_truth"]
    assert (missing.value, missing.limit, missing.samples) == (4, {}, 4)
    # energies: of the output 0.25 + 0.05^2, of output minus input 0.05^2, of the error 0.01^2
    error = pytest.approx(10 * math.log10((0.25 + 0.0025) / 1e-4), abs=1e-3)
    residual = pytest.approx(20 * math.log10(5), abs=1e-3)
    for sigma in (15, 25):
        assert rows[f"device:float sqnr_db[sigma={sigma}]"].value == error
        row = rows[f"device:float residual_sqnr_db[sigma={sigma}]"]
        assert (row.value, row.limit, row.passed) == (residual, {"at_least": 15.0}, False)
    assert not rows["quantized:decomposed residual_sqnr_db"].passed
    assert rows["device:float max_abs"].value == pytest.approx(0.01, rel=1e-4)


def test_the_worst_tile_is_named_by_its_file_and_place():
    outputs = photo_without_truth()
    far = np.pad(outputs.decomposed[2], ((0, 0), (0, 0), (0, 100), (0, 180)))
    near = far.copy()
    near[0, :, 70, 130] += 0.5
    for program, y in (("decomposed", far), ("quantized", near), ("device", near)):
        getattr(outputs, program)[2] = y
    outputs.samples[2] = dataclasses.replace(outputs.samples[2], inputs=(far + np.float32(0.1),))
    (worst,) = (r for r in rows_without_truth(outputs) if "worst_tile" in r.metric)
    assert worst.metric == "worst_tile_rms_levels[2.png x=128 y=64]"
    assert worst.value == pytest.approx(255 * 0.5 / math.sqrt(60 * 64))
    assert (worst.limit, worst.samples) == ({}, 4)


def test_an_enlarging_network_without_a_truth_is_limited_by_its_sqnr():
    rows = by_name(rows_without_truth(photo_without_truth(quantized=0.3, device=0.3), task="upscale"))
    assert rows["quantized:decomposed sqnr_db"].limit == {"at_least": 15.0}
    assert rows["device:float sqnr_db[sigma=15]"].limit == {"at_least": 15.0}
    assert not any("residual" in name for name in rows)
    with_truth = checks.rows(Case(make_outputs(), {"forward": (1.0, 3)}, "int8", TASKS["upscale"], LIMITS))
    assert by_name(with_truth)["quantized:decomposed sqnr_db"].limit == {}


def labelled(labels: list[int], classes: int = 8, device: dict[int, list[int]] | None = None) -> Outputs:
    """Give four photos whose logits fall from class 0 on; the device's order of some of them is given."""

    def logits(order: list[int]) -> np.ndarray:
        y = np.zeros((1, classes), np.float32)
        y[0, order] = -np.arange(classes)
        return y

    float_ = [logits(list(range(classes))) for _ in labels]
    on_device = [logits((device or {}).get(k, list(range(classes)))) for k in range(len(labels))]
    outputs = make_outputs()
    samples = [dataclasses.replace(s, label=k) for s, k in zip(outputs.samples, labels, strict=True)]
    return Outputs(samples, float_, float_, on_device)


def test_accuracy_counts_labels_among_the_largest_logits():
    outputs = labelled([0, 0, 4, 5], device={1: [1, 2, 3, 4, 5, 0, 6, 7]})
    rows = by_name(rows_without_truth(outputs, "fp16", "classify"))
    values = {name: row.value for name, row in rows.items() if ":labels" in name}
    assert values == {
        "float:labels top1_accuracy": 0.5,
        "float:labels top5_accuracy": 0.75,
        "device:labels top1_accuracy": 0.25,
        "device:labels top5_accuracy": 0.5,
        "device:labels top1_drop": 0.25,
        "device:labels top5_drop": 0.25,
    }
    drop = rows["device:labels top1_drop"]
    assert (drop.limit, drop.passed, drop.samples) == ({"at_most": 0.02}, False, 4)
    assert not rows["device:labels top5_drop"].passed


def test_better_than_float_is_no_drop():
    outputs = labelled([1, 0, 0, 0], device={0: [1, 0, 2, 3, 4, 5, 6, 7]})
    drop = by_name(rows_without_truth(outputs, "int8", "classify"))["device:labels top1_drop"]
    assert (drop.value, drop.passed) == (-0.25, True)


def test_five_classes_have_no_top_five():
    rows = by_name(rows_without_truth(labelled([0, 1, 2, 3], classes=5), "int8", "classify"))
    assert [name for name in rows if "top5" in name] == []
    assert rows["float:labels top1_accuracy"].value == 0.25


def test_of_equal_logits_the_first_is_the_class():
    outputs = labelled([0, 1, 2, 5])
    equal = [np.zeros((1, 8), np.float32)] * 4
    outputs = dataclasses.replace(outputs, decomposed=equal, quantized=equal, device=equal)
    rows = by_name(rows_without_truth(outputs, "fp32", "classify"))
    assert rows["float:labels top1_accuracy"].value == 0.25
    assert rows["float:labels top5_accuracy"].value == 0.75


def test_a_label_beyond_the_logits_is_refused_by_its_file():
    with pytest.raises(
        CalibrationError, match=r"a\.png has the label 8, and the network has 8 logits, 0 to 7"
    ):
        rows_without_truth(labelled([0, 1, 2, 8]), "fp32", "classify")


def test_photos_without_labels_and_keypoints_have_no_accuracy():
    partial = labelled([0, 1, 2, 3])
    some = [dataclasses.replace(partial.samples[0], label=None), *partial.samples[1:]]
    assert not TASKS["classify"].measured_on(some).is_labelled
    assert not TASKS["keypoints"].measured_on(partial.samples).is_labelled
    assert TASKS["classify"].measured_on(partial.samples).is_labelled

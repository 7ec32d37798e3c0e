"""Coverage of decisions: counted by hand-made rules, refused with what comes nearest, kept in the table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from small_decisions import (
    BrightParts,
    EveryRow,
    FirstRows,
    given,
    make_recipe,
    make_routed,
    make_samples,
    masked_denoiser,
    routed_denoiser,
)
from torch import nn
from typer.testing import CliRunner

from edgedyn import pipeline, quantize
from edgedyn.cli import app as cli
from edgedyn.conversion import calibration, coverage
from edgedyn.conversion.convert import Converted, load_target
from edgedyn.errors import CalibrationError, RecipeError
from edgedyn.layers import RoutedModel
from edgedyn.quantize.table.entries import Outcome
from edgedyn.quantize.table.table import read_table
from edgedyn.recipe.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def cover(model: nn.Module, *images, is_trained: bool = True, sigma: float = 0.0, **section):
    samples = make_samples(*images, sigma=sigma)
    exported, observed = given(model, samples)
    recipe = make_recipe(is_trained=is_trained, **section)
    return coverage.cover(
        model,
        exported,
        observed,
        drawn=samples,
        section=recipe.quantize.coverage,
        is_trained=recipe.is_trained,
    )


def taken(covered: coverage.Coverage) -> dict[str, int]:
    return {f"{o.decision} {o.name}": o.taken for o in covered.outcomes}


def half_bright(rows: int, level: float = 0.75) -> np.ndarray:
    """Return an image of (1, 3, 8, 10) whose first rows are bright."""
    image = np.full((1, 3, 8, 10), 0.25, np.float32)
    image[:, :, :rows] = level
    return image


def plain() -> nn.Module:
    return nn.Conv2d(3, 3, 3, padding=1)


def test_each_variant_counts_the_samples_that_pick_it():
    found = cover(make_routed(plain), 0.1, 0.9, 0.2, 0.45, 0.3, samples=1, own=1)
    assert taken(found) == {"variant w0": 3, "variant w1": 1, "variant w2": 1}
    assert {(o.samples, o.needed) for o in found.outcomes} == {(5, 1)}
    assert found.chosen == {"router": (0, 1, 2, 3, 4), "w0": (0, 2, 4), "w1": (3,), "w2": (1,)}


@pytest.mark.parametrize(("enough", "own"), [(3, ["w0"]), (2, ["w0", "w1"]), (4, [])])
def test_variant_is_calibrated_on_its_own_samples_where_there_are_enough_and_else_on_all(enough, own):
    found = cover(make_routed(plain), 0.1, 0.2, 0.3, 0.4, 0.5, 0.9, samples=1, own=enough)
    alone = {"w0": (0, 1, 2), "w1": (3, 4), "w2": (5,)}
    every = tuple(range(6))
    assert found.chosen == {"router": every} | {k: alone[k] if k in own else every for k in alone}


def test_logits_of_the_router_are_an_entry_without_a_step():
    found = cover(make_routed(plain), 0.0, 1.0, is_trained=False)
    ((entry,),) = found.logits.values()
    assert list(found.logits) == ["router"]
    assert (entry.name, entry.kind, entry.affine, entry.symmetric) == ("logits", "decision", None, None)
    # 2 m c - c^2 of m = 0 and 1
    assert entry.histogram.total == 6
    assert (entry.histogram.low, entry.histogram.high) == (-(0.875**2), 2 * 0.875 - 0.875**2)


def test_variant_that_no_sample_picks_is_refused_with_the_nearest():
    # 2 m (c2 - c1) - (c2^2 - c1^2) with the centers 0.5 and 0.875, and 0.125 for the darkest
    message = (
        r"2 of 3 decision outcomes occur in at least 1 .*Missing: variant w2 has 0 of 3 samples, nearest are "
        r"b\.png at sigma 25 \(its logit is 0\.0656 below the best\), c\.png at sigma 25 .*, a\.png .*"
        r"Add images like the nearest.*or lower the limit \(0 disables the check\)"
    )
    with pytest.raises(CalibrationError, match=message) as caught:
        cover(make_routed(plain), 0.1, 0.6, 0.4, sigma=25.0, samples=1)
    assert caught.value.exit_code == 5
    assert "bands" not in str(caught.value)


def test_set_without_further_samples_says_so():
    with pytest.raises(
        CalibrationError, match=r"variant w0 has 2 of 2 samples, and the set has no more; var"
    ):
        cover(make_routed(plain), 0.1, 0.1, samples=3)


def test_refusal_names_three_outcomes_and_counts_the_rest():
    message = r"^0 of 12 decision .*variant w0 has .*variant w1 has .*variant w2 has .*; and 9 more\. Add"
    with pytest.raises(CalibrationError, match=message):
        cover(make_routed(BrightParts), 0.1, samples=2, bands=[0.0, 0.5, 1.0])


@pytest.mark.parametrize("options", [{"is_trained": False}, {"samples": 0}])
def test_nothing_is_demanded_of_untrained_networks_or_where_the_recipe_says_so(options):
    found = cover(make_routed(plain), 0.1, 0.2, **options)
    assert taken(found) == {"variant w0": 2, "variant w1": 0, "variant w2": 0}
    assert {o.needed for o in found.outcomes} == {0}


def test_mask_counts_the_samples_on_which_it_is_active_with_its_densities():
    images = map(half_bright, (0, 2, 4, 8))
    found = cover(BrightParts(), *images, samples=1, bands=[0.0, 0.25, 0.5, 1.0])
    mask, *bands = found.outcomes
    assert mask == Outcome("mask", "(the network)", 3, 4, 1, 0.0, 1.0)
    # an edge belongs to the band below it, and what is never active to none
    assert [(b.name, b.taken, b.samples) for b in bands] == [
        ("0-25%", 1, 4),
        ("25-50%", 1, 4),
        ("50-100%", 1, 4),
    ]


def test_density_is_over_the_positions_of_all_masks():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine, self.coarse, self.pool = BrightParts(), BrightParts(0.7), nn.AvgPool2d(2)

        def forward(self, x):
            return self.fine(x) + nn.functional.interpolate(self.coarse(self.pool(x)), scale_factor=2.0)

    # fine: 40 of 80 positions, coarse: 10 of 20
    found = cover(Two(), half_bright(4), samples=1, bands=[0.0, 0.49, 0.51, 1.0], is_trained=False)
    assert [o.name for o in found.outcomes[:2]] == ["fine", "coarse"]
    assert [o.most for o in found.outcomes[:2]] == [0.5, 0.5]
    assert [o.taken for o in found.outcomes[2:]] == [0, 1, 0]
    # fine: 40 of 80, coarse: none
    found = cover(Two(), half_bright(4, 0.6), samples=1, bands=[0.0, 0.39, 0.41, 1.0], is_trained=False)
    assert [o.taken for o in found.outcomes[2:]] == [0, 1, 0]


def test_logits_of_masks_are_entries_by_layer():
    found = cover(nn.Sequential(BrightParts(), BrightParts()), 0.25, 0.75, is_trained=False)
    first, second = found.logits["forward"]
    assert (first.name, second.name, first.kind) == ("0.logits", "1.logits", "decision")
    assert first.histogram.total == 2 * 80
    # the head takes the mean of the colours: a sum of three thirds
    np.testing.assert_allclose([first.histogram.low, first.histogram.high], [0.25, 0.75], rtol=1e-6)


def test_mask_that_is_never_active_is_refused_with_the_distance_to_its_threshold():
    message = (
        r"mask \(the network\) has 0 of 2 samples, nearest are b\.png \(its nearest logit is 0\.125 from the "
        r"threshold\), a\.png \(its nearest logit is 0\.25"
    )
    with pytest.raises(CalibrationError, match=message):
        cover(BrightParts(), 0.25, 0.375, samples=1)


def test_nothing_is_demanded_of_a_mask_that_is_said_to_be_unused_and_still_of_the_others():
    pair = nn.Sequential(BrightParts(), BrightParts(50.0))  # the first adds what its seed gives
    with pytest.raises(
        CalibrationError, match=r"mask 1 has 0 of 1 .*left empty \(quantize\.coverage\.unused\)"
    ):
        cover(pair, 0.75, samples=1)
    found = cover(pair, 0.75, samples=1, unused=["1"])
    assert [(o.name, o.taken, o.needed) for o in found.outcomes[:2]] == [("0", 1, 1), ("1", 0, 0)]
    (row, *_) = [row for row in coverage.rows(found.outcomes) if row.metric == "coverage[mask]"]
    assert (row.value, row.limit) == (1, {"at_least": 1.0})  # of the mask that something is asked of
    with pytest.raises(CalibrationError, match="mask 0 has 0 of 1"):
        cover(pair, 0.25, samples=1, unused=["1"])


def test_pattern_of_unused_masks_that_matches_none_is_refused_with_their_names():
    with pytest.raises(RecipeError, match=r"'2\.\*' matches no mask; the network's are 0, 1\. Fix"):
        cover(nn.Sequential(BrightParts(), BrightParts()), 0.75, samples=1, unused=["2.*"])


def test_band_that_is_not_reached_is_refused_with_the_densities_and_the_way_out():
    message = (
        r"^2 of 3 decision .*density 0-25% has 0 of 2 samples, nearest are b\.png \(37\.5% active\), a\.png "
        r"\(50\.0% active\)\. Add images.*state the densities that the network has \(quantize\.cov.*\.bands\)"
    )
    with pytest.raises(CalibrationError, match=message):
        cover(BrightParts(), half_bright(4), half_bright(3), samples=1, bands=[0.0, 0.25, 0.5])


def test_masks_of_a_variant_are_seen_on_the_samples_that_it_is_calibrated_on():
    found = cover(
        make_routed(BrightParts),
        half_bright(0),
        half_bright(5),
        half_bright(8, 0.9),
        own=1,
        is_trained=False,
    )
    assert taken(found) == {
        "variant w0": 1, "variant w1": 1, "variant w2": 1,
        "mask w0: (the network)": 0, "density w0: 0-100%": 0,
        "mask w1: (the network)": 1, "density w1: 0-100%": 1,
        "mask w2: (the network)": 1, "density w2: 0-100%": 1,
    }  # fmt: skip
    assert {o.samples for o in found.outcomes[3:]} == {1}
    assert list(found.logits) == ["router", "w0", "w1", "w2"]


def test_router_with_a_mask_of_its_own_has_the_logits_of_both():
    model = RoutedModel(nn.Sequential(BrightParts(), make_routed().router), {k: plain() for k in "abc"})
    found = cover(model, half_bright(0), half_bright(4), is_trained=False)
    assert [entry.name for entry in found.logits["router"]] == ["logits", "0.logits"]
    assert taken(found)["mask router: 0"] == 1


def test_layer_that_compares_twice_has_a_name_for_each_time():
    class Two(BrightParts):
        def forward(self, x):
            y = self.head(x)
            return x + (y >= 0.5).to(x.dtype) + (y < 0.5).to(x.dtype)

    found = cover(Two(), half_bright(8), is_trained=False)
    assert [(o.name, o.taken) for o in found.outcomes[:2]] == [("(the network)", 1), ("(the network)#2", 0)]


def rows_above_zero(count: int) -> np.ndarray:
    image = np.full((1, 3, 8, 10), -1, np.float32)
    image[:, :, :count] = 1
    return image


def test_capacity_variant_is_calibrated_on_fitting_samples_and_demands_nothing():
    model = RoutedModel(None, {"capacity": FirstRows(), "dense": EveryRow()})
    images = [rows_above_zero(n) for n in (1, 5, 2, 3)]
    found = cover(model, *images, samples=2, own=2)
    assert taken(found) == {
        "variant capacity": 2,
        "variant dense": 2,
        "mask (the network)": 4,
        "density 0-100%": 4,
    }
    assert [o.needed for o in found.outcomes] == [0, 0, 2, 2]
    assert found.chosen == {"capacity": (0, 2), "dense": (0, 1, 2, 3)}
    assert list(found.logits) == ["dense"]
    assert cover(model, *images[1:], samples=2, own=2).chosen["capacity"] == (0, 1, 2)


@pytest.mark.parametrize("make", [lambda: make_routed(plain), BrightParts])
def test_sample_whose_logits_are_not_finite_is_named(make):
    broken = half_bright(1)
    broken[0, 1, 2, 3] = np.nan
    with pytest.raises(CalibrationError, match=r"b\.png, '.*logits': \d+ of \d+ values are NaN or infinite"):
        cover(make(), 0.5, broken)


def test_rows_show_variants_and_bands_and_the_mask_that_is_met_least():
    outcomes = [
        Outcome("variant", "w0", 5, 7, 4),
        Outcome("mask", "a", 3, 7, 4, 0.0, 0.5),
        Outcome("mask", "b", 2, 7, 4, 0.0, 0.5),
        Outcome("density", "0-50%", 7, 7),
    ]
    found = coverage.rows(outcomes)
    assert [(r.metric, r.value, r.limit, r.samples, r.passed) for r in found] == [
        ("coverage[variant=w0]", 5, {"at_least": 4}, 7, True),
        ("coverage[density=0-50%]", 7, {}, 7, True),
        ("coverage[mask]", 2, {"at_least": 4}, 7, False),
    ]
    assert coverage.rows([]) == []


# ---- with real photos, from a recipe to the table


def photos(tmp_path: Path, network: str, *overrides: str) -> list[str]:
    """Return overrides of a recipe that make it one of a trained small network on small tiles."""
    model = {"routed_denoiser": routed_denoiser, "masked_denoiser": masked_denoiser}[network]()
    save_file(model.state_dict(), tmp_path / "of.safetensors")
    small = ["input.shape=[1, 3, 24, 32]", "tile.overlap=0", "quantize.rounding=nearest"]
    model_is = [f"model.network=small_decisions:{network}", "model.arguments={}"]
    return [*small, *model_is, f"model.weights={tmp_path / 'of.safetensors'}", *overrides]


def convert(recipe: Recipe) -> Converted:
    images, samples = pipeline.load_sets(recipe)
    target = load_target(recipe)
    return pipeline.convert(pipeline.rewrite_network(recipe, target), target, images, samples[0])


def load(overrides: list[str], target: str = "phone") -> Recipe:
    return load_recipe(RECIPES / f"slimmable-dncnn.{target}.int8.yaml", overrides)


def test_statistics_of_a_variant_are_of_the_photos_that_pick_it(tmp_path):
    # two are enough; of seven crops of photos no variant gets all
    made = convert(load(photos(tmp_path, "routed_denoiser", "quantize.coverage.own=2", "model.weights=null")))
    outcomes = {o.name: o.taken for o in made.table.coverage}
    assert sum(outcomes.values()) == 7
    assert max(outcomes.values()) < 7
    for name, count in outcomes.items():
        entries = {e.name: e for e in made.table.programs[name]}
        assert entries["0.input"].histogram.total == (count if count >= 2 else 7) * 3 * 24 * 32
    (decision,) = [e for e in made.table.programs["router"] if e.kind == "decision"]
    assert decision.histogram.total == 7 * 3


def test_color_augmented_samples_reach_every_variant_and_decide_nothing(tmp_path, monkeypatch):
    color_augmented, real = [], quantize.calibrate

    def spy(program, inputs, *more, **named):
        color_augmented.append(inputs.color_augmented)
        return real(program, inputs, *more, **named)

    monkeypatch.setattr(quantize, "calibrate", spy)
    given = photos(tmp_path, "routed_denoiser", "quantize.coverage.own=2", "model.weights=null")
    plain, made = (convert(load([*given, f"quantize.color_augmented={count}"])) for count in (0, 3))
    assert made.table.coverage == plain.table.coverage
    assert color_augmented == [0] * 4 + [3] * 4  # router and three variants, both times
    for name in (o.name for o in made.table.coverage):
        totals = [
            next(e for e in x.table.programs[name] if e.name == "0.input").histogram.total
            for x in (plain, made)
        ]
        assert totals[1] == totals[0] + 3 * 3 * 24 * 32


def test_recipe_of_trained_weights_is_refused_before_anything_is_calibrated(tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "calibrate", lambda *_, **__: pytest.fail("calibrated"))
    table = f"quantize.table={tmp_path / 'table.json'}"
    with pytest.raises(
        CalibrationError, match=r"variant w\d has \d of 7 samples, nearest are \w+\.(png|jpg) at sig"
    ):
        convert(load(photos(tmp_path, "routed_denoiser", "quantize.coverage.samples=6", table)))
    assert not (tmp_path / "table.json").exists()


def test_second_conversion_decides_nothing_and_knows_the_coverage(tmp_path, monkeypatch):
    overrides = photos(
        tmp_path,
        "masked_denoiser",
        f"quantize.table={tmp_path / 'table.json'}",
        "quantize.coverage.samples=1",
    )
    first = convert(load(overrides)).table
    assert [o.decision for o in first.coverage] == ["mask", "density"]
    assert {o.needed for o in first.coverage} == {1}
    monkeypatch.setattr(calibration, "cover", lambda *_, **__: pytest.fail("decided"))
    assert convert(load(overrides)).table.coverage == first.coverage
    assert convert(load(overrides, "jetson")).table.coverage == first.coverage
    with pytest.raises(
        CalibrationError, match=r"of another method: coverage was .*'samples': 1.*, now .*'samples': 2"
    ):
        convert(load([*overrides, "quantize.coverage.samples=2"]))


def test_edited_coverage_is_refused_by_its_name(tmp_path):
    path = tmp_path / "table.json"
    made = convert(
        load(photos(tmp_path, "masked_denoiser", f"quantize.table={path}", "quantize.coverage.samples=1"))
    )
    assert read_table(path).coverage == made.table.coverage
    old = f'"taken": {made.table.coverage[0].taken}'
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, '"taken": 99', 1))
    with pytest.raises(
        CalibrationError,
        match=r"the coverage of mask '\(the network\)' was edited: .*\(quantize\.coverage\)\. Calib",
    ):
        read_table(path)


def test_command_prints_the_coverage(tmp_path):
    overrides = photos(tmp_path, "masked_denoiser", "quantize.coverage.samples=1")
    sets = [word for override in overrides for word in ("--set", override)]
    recipe = str(RECIPES / "slimmable-dncnn.phone.int8.yaml")
    command = ["calibrate", recipe, "--force", "-o", str(tmp_path / "t.json"), *sets]
    printed = json.loads(CliRunner().invoke(cli.app, [*command, "--json"]).stdout)
    mask, density = read_table(tmp_path / "t.json").coverage
    assert printed["coverage"] == [asdict(mask), asdict(density)]
    assert printed["tensors"]["decision"] == 1
    text = CliRunner().invoke(cli.app, command).stdout
    span = f"{mask.least:.0%} to {mask.most:.0%} of it"
    assert f"mask (the network): {mask.taken} of 7 samples, {span}\n" in text
    assert f"density 0-100%: {density.taken} of 7 samples\n" in text

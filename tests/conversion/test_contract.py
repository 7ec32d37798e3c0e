"""The inputs and outputs of a network against its recipe, and the values that a picture has in it."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import save_image, waves
from torch import Tensor, nn

from edgedyn import pipeline
from edgedyn.cli import app as command_line
from edgedyn.conversion.contract import load_network
from edgedyn.conversion.evaluation_sets import make_evaluation_sets
from edgedyn.conversion.image_sets import draw_more, to_tensors
from edgedyn.device.session import check, open_session
from edgedyn.errors import EdgedynError, ModelError, RecipeError, UsageError
from edgedyn.images.image_set import CalibrationSet
from edgedyn.recipe.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["model.weights=null", "model.arguments={}", "input.shape=[1, 3, 32, 48]", "tile.overlap=8"]
SMALL += ["quantize.keep_float=[]", "quantize.dynamic=[]", "quantize.rounding=nearest", "quantize.samples=3"]
UPSCALE = ["task=upscale", *(f"{s}={RECIPES.parent}/calib/skimage-clean{v}.yaml" for s, v in
           (("calibration", ""), ("validation", "-validation")))]  # fmt: skip
MEAN, STD = [103.939, 116.779, 123.68], [57.375, 57.12, 58.395]
CAFFE = ["input.range=[0, 255]", f"input.mean={MEAN}", f"input.std={STD}", "input.order=BGR"]
Pair = namedtuple("Pair", "fine coarse")


@dataclass
class Found:
    """Outputs of a network as a dataclass."""

    fine: Tensor
    side: list[Tensor]
    score: float | None = None


def blur() -> nn.Module:
    """Return a denoiser: the mean of nine pixels, as three convolutions."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1)
    )
    with torch.no_grad():
        for layer, weight in ((net[0], torch.eye(8, 3)), (net[2], torch.eye(8)), (net[4], torch.eye(3, 8))):
            sides = layer.weight.shape[2]
            layer.weight.copy_(weight[:, :, None, None].expand_as(layer.weight) / sides**2)
            layer.bias.zero_()
        net[0].bias += 1  # so that no value of a picture is below the ReLU
        net[4].bias -= 1
    return net.eval()


class Caffe(nn.Module):
    """A denoiser for B, G, R from 0 to 255 less the mean, divided by the standard deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blur()
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(((x * self.std + self.mean) / 255).flip(1))
        return (y.flip(1) * 255 - self.mean) / self.std


class Outputs(nn.Module):
    """A denoiser that returns more than its picture."""

    def __init__(self, make) -> None:
        super().__init__()
        self.body, self.make = blur(), make

    def forward(self, x: Tensor):
        y = self.body(x)
        return self.make(y, nn.functional.avg_pool2d(y, 2))


def outputs_dict() -> nn.Module:
    return Outputs(lambda y, small: {"out": y, "aux": small, "state": None})


def outputs_pair() -> nn.Module:
    return Outputs(lambda y, small: (small, y))


def outputs_named() -> nn.Module:
    return Outputs(lambda y, small: Pair(y, small))


def outputs_nested() -> nn.Module:
    return Outputs(lambda y, small: Found(y, [small, y * 2]))


def outputs_one() -> nn.Module:
    return Outputs(lambda y, small: {"out": y, "aux": None})


def outputs_counted() -> nn.Module:
    return Outputs(lambda y, small: (y, small.argmax(1)))


def outputs_nothing() -> nn.Module:
    return Outputs(lambda y, small: None)


def outputs_infinite() -> nn.Module:
    return Outputs(lambda y, small: y / 0)


class WithNoiseLevel(nn.Module):
    """A blend of picture and blur: the more noise, the more blur."""

    def __init__(self) -> None:
        super().__init__()
        self.body = blur()

    def forward(self, x: Tensor, sigma: Tensor, offset: Tensor) -> Tensor:
        share = (sigma * 5).clamp(max=1)
        return x + share * (self.body(x) - x) + offset


class KeywordOnly(nn.Module):
    def forward(self, x: Tensor, *, sigma: Tensor) -> Tensor:
        return x + sigma


class Enlarge(nn.Module):
    """Pixels repeated, by a convolution and a pixel shuffle."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.conv, self.shuffle = nn.Conv2d(3, 3 * scale**2, 1), nn.PixelShuffle(scale)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3).repeat_interleave(scale**2, 0)[:, :, None, None])
            self.conv.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.conv(x))


def enlarge_3() -> nn.Module:
    return Enlarge(3)


def enlarge_4() -> nn.Module:
    return Enlarge(4)


def recipe(network: str, *overrides: str, target: str = "phone") -> Recipe:
    path = RECIPES / f"mallenet-s.{target}.int8.yaml"
    return load_recipe(path, [*SMALL, f"model.network={__name__}:{network}", *overrides])


def build(tmp_path: Path, network: str, *overrides: str, target: str = "phone"):
    given = recipe(network, *overrides, target=target)
    return pipeline.build(given, tmp_path / f"{network}.{target}", compare=False)


def values(report) -> dict[str, float]:
    return {f"{row.between} {row.metric}": row.value for row in report.rows}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return build(tmp_path_factory.mktemp("plain"), "blur")


@pytest.fixture(scope="module")
def caffe(tmp_path_factory):
    return build(tmp_path_factory.mktemp("caffe"), "Caffe", *CAFFE)


def test_network_of_other_values_has_the_report_of_the_plain_one(plain, caffe):
    expected, actual = values(plain.report), values(caffe.report)
    decibels = [name for name in expected if "psnr" in name or "sqnr" in name]
    assert len(decibels) > 10
    for name in decibels:
        # float32 rounding at 255 moves single INT8 values to the next step
        assert actual[name] == pytest.approx(expected[name], abs=0.01), name
    assert caffe.report.ok
    assert check(caffe.bundle.path).ok


def test_manifest_states_the_values_that_the_program_takes(caffe):
    for spec in caffe.bundle.inputs + caffe.bundle.outputs:
        assert (spec.range, spec.mean, spec.std, spec.order) == ((0, 255), tuple(MEAN), tuple(STD), "BGR")
        assert spec.meaning == "sRGB image, BGR order, 0 black, 255 white, then minus mean, divided by std"
    x = np.load(caffe.bundle.path / "vectors/first.input.npy")
    assert x.min() < -1
    assert x.max() > 1


def test_session_takes_and_returns_pixels_whatever_the_program_takes(plain, caffe):
    pixels = waves(size=(50, 70)).astype(np.float32) / 255
    expected, actual = (open_session(built.bundle.path).process(pixels) for built in (plain, caffe))
    assert 255 * np.abs(actual - expected).max() < 1.5  # one INT8 step
    assert 255 * np.abs(actual - expected).mean() < 0.01
    assert np.abs(expected - pixels).mean() < 0.05


def test_precision_search_and_fine_tuning_see_the_same_pictures():
    measured = []
    for network, keys in (("blur", []), ("Caffe", CAFFE)):
        given = recipe(network, *keys, "quantize.max_drop_db=0.1")
        images, _ = pipeline.load_sets(given)
        net = given.load_model()
        evaluation = make_evaluation_sets(given, images, net, {"method": {}})["forward"]
        with torch.no_grad():
            measured.append(evaluation.psnr_db([net(*x) for x in evaluation.inputs]))
            y = net(*to_tensors(draw_more(given, images)[0])).numpy()
        measured.append(given.output_spec("y", y.shape).decode(y).mean())
    assert measured[2] == pytest.approx(measured[0], abs=1e-3)
    assert measured[3] == pytest.approx(measured[1], abs=1e-5)


def test_output_differs_from_the_input_where_the_recipe_says(tmp_path):
    built = build(tmp_path, "blur", "output.range=[-1, 1]", "precision=fp32")
    # the network returns 0..1, which stands for 0.5..1
    assert built.bundle.outputs[0].range == (-1, 1)
    assert built.bundle.inputs[0].range == (0, 1)
    pixels = waves(size=(32, 48)).astype(np.float32) / 255
    y = open_session(built.bundle.path).process(pixels)
    assert np.abs(y - (pixels + 1) / 2).mean() < 0.05


@pytest.mark.parametrize(
    ("network", "keys", "words"),
    [
        (
            "outputs_dict",
            "[]",
            r"returns out \(1, 3, 32, 48\), aux \(1, 3, 16, 24\), state None; .* outputs:",
        ),
        (
            "outputs_pair",
            "[]",
            r"returns 0 \(1, 3, 16, 24\), 1 \(1, 3, 32, 48\); .*for instance outputs: \[1\]\.",
        ),
        ("outputs_pair", "[0]", r"the output 0 is \(1, 3, 16, 24\) .* It also returns 1 \(1, 3, 32, 48\)"),
        ("outputs_dict", "[ot]", r"'ot' is no output; did you mean 'out'\?"),
        ("outputs_dict", "[state]", "'state' is None"),
        ("outputs_nested", "[side]", "'side' is no output; .*side.0"),
        ("outputs_nested", "[fine, score]", "'score' is None"),
        ("outputs_counted", "[0, 1]", r"1 is \(1, 16, 24\) int64; expected float32 tensors"),
        ("outputs_nothing", "[]", "returns output None; expected a tensor"),
        ("outputs_infinite", "[]", "4608 values that are NaN or infinite"),
    ],
)
def test_outputs_that_do_not_fit_are_refused_with_names_and_shapes(network, keys, words):
    with pytest.raises((ModelError, RecipeError), match=words):
        load_network(recipe(network, f"outputs={keys}"))


@pytest.mark.parametrize(
    ("network", "keys", "names"),
    [
        ("outputs_one", "[]", ["out"]),
        ("outputs_dict", "[out]", ["out"]),
        ("outputs_pair", "[1]", ["output"]),
        ("outputs_pair", "[1, 0]", ["output1", "output0"]),
        ("outputs_named", "[0, coarse]", ["fine", "coarse"]),
        ("outputs_nested", "[fine, side.1]", ["fine", "side.1"]),
        ("blur", "[]", ["output"]),
    ],
)
def test_chosen_outputs_are_those_of_the_network_in_order(network, keys, names):
    loaded = load_network(recipe(network, f"outputs={keys}"))
    assert [spec.name for spec in loaded.outputs] == names
    assert (loaded.outputs[0].role, loaded.outputs[0].shape) == ("picture", (1, 3, 32, 48))
    y = loaded.model(torch.rand(1, 3, 32, 48))
    shapes = [tuple(t.shape) for t in y] if isinstance(y, tuple) else [tuple(y.shape)]
    assert shapes == [spec.shape for spec in loaded.outputs]


@pytest.mark.parametrize("target", ["phone", "jetson"])
def test_every_chosen_output_is_in_the_program_its_vectors_and_the_report(tmp_path, target):
    built = build(tmp_path, "outputs_dict", "outputs=[out, aux]", target=target)
    names = {row.metric.partition("[")[2] for row in built.report.rows}
    assert "aux]" in names
    assert all(row.passed for row in built.report.rows if "check_build" not in row.metric)
    assert [len(vector.outputs) for vector in built.bundle.vectors] == [2, 2]
    rows = check(built.bundle.path).rows
    assert len(rows) == 1 + 2 * 2 * 2
    assert all(row.passed for row in rows[1:])
    session = open_session(built.bundle.path)
    y, aux = session.run(np.random.default_rng(0).random((1, 3, 32, 48), dtype=np.float32))
    assert np.abs(aux - y.reshape(1, 3, 16, 2, 24, 2).mean(axis=(3, 5))).max() < 0.01
    assert session.process(np.zeros((20, 20, 3), np.float32)).shape == (20, 20, 3)


def test_error_in_a_further_output_fails_its_rows(tmp_path, monkeypatch):
    from edgedyn.validation import runs

    usual = runs.run_all

    def wrong(run, samples, program, *arguments, **options):
        results = usual(run, samples, program, *arguments, **options)
        moved = [([ys[0], ys[1] + 0.1], decision) for ys, decision in results]
        return moved if program == "device" else results

    monkeypatch.setattr(runs, "run_all", wrong)
    built = build(tmp_path, "outputs_dict", "outputs=[out, aux]")
    assert [row.metric for row in built.report.rows if not row.passed] == ["rms_ratio[aux]"]


NOISE_LEVEL = "inputs=[{name: sigma, shape: [1, 1, 1, 1], noise_level: 1.0}, "
NOISE_LEVEL += "{name: offset, shape: [1, 1, 1, 1], value: 0.01}]"


@pytest.mark.parametrize(
    ("network", "inputs", "words"),
    [
        (
            "WithNoiseLevel",
            "[]",
            r"takes 3 inputs \(x, sigma, offset\), the recipe gives 1 \(image\); give the others in inputs:",
        ),
        (
            "blur",
            NOISE_LEVEL[7:],
            r"takes 1 input \(input\), the recipe gives 3 \(image, sigma, offset\); remove",
        ),
        ("KeywordOnly", "[]", "takes the input 'sigma' by keyword only"),
    ],
)
def test_another_number_of_inputs_is_refused_with_both_names(network, inputs, words):
    with pytest.raises(ModelError, match=words):
        load_network(recipe(network, f"inputs={inputs}"))


@pytest.mark.parametrize("target", ["phone", "jetson"])
def test_noise_level_of_each_sample_and_a_constant_reach_the_program(tmp_path, target):
    built = build(tmp_path, "WithNoiseLevel", NOISE_LEVEL, target=target)
    assert [(spec.name, spec.role, spec.value) for spec in built.bundle.inputs] == [
        ("image", "picture", 0.0),
        ("sigma", "noise_level", 1.0),
        ("offset", "constant", 0.01),
    ]
    levels = [
        np.load(built.bundle.path / f"vectors/{name}.input1.npy").item() for name in ("first", "noisiest")
    ]
    assert levels == pytest.approx([15 / 255, 50 / 255])
    assert all(row.passed for row in check(built.bundle.path).rows[1:])
    session, pixels = open_session(built.bundle.path), waves(size=(32, 48)).astype(np.float32) / 255
    assert np.abs(session.process(pixels, noise_level=0) - pixels - 0.01).max() < 1e-6
    blurred = session.process(pixels, noise_level=51)
    assert 0.005 < np.abs(blurred - pixels - 0.01).mean() < 0.1
    for wrong, words in (
        (None, "takes the noise level"),
        (-1, "expected a number"),
        (256, "expected a number"),
    ):
        with pytest.raises(UsageError, match=words):
            session.process(pixels, noise_level=wrong)


def test_command_line_states_the_noise_level(tmp_path, capsys):
    built = build(tmp_path, "WithNoiseLevel", NOISE_LEVEL)
    photo = save_image(tmp_path / "photo.png", size=(32, 48))
    arguments = ["run", str(built.bundle.path), str(photo), "-o", str(tmp_path / "out")]
    assert command_line.execute(arguments) == 2
    assert "--noise-level 25" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert command_line.execute([*arguments, "--noise-level", "0"]) == 0
    sharp, truth = (np.asarray(Image.open(p), int) for p in (tmp_path / "out/photo.png", photo))
    assert np.abs(sharp - truth - 2.55).max() <= 1  # the constant is 0.01


def test_noise_level_is_refused_by_a_program_that_takes_none(plain):
    with pytest.raises(UsageError, match="its program takes no noise level"):
        open_session(plain.bundle.path).process(np.zeros((9, 9, 3), np.float32), noise_level=25)


@pytest.mark.parametrize("scale", [3, 4])
def test_upscaling_takes_its_scale_from_the_network(tmp_path, scale):
    built = build(tmp_path, f"enlarge_{scale}", *UPSCALE)
    psnr = values(built.report)
    assert psnr["device:truth psnr_db[sigma=0]"] > 20
    # the truth was shrunk by the scale: repeated pixels are the input, enlarged
    assert load_recipe(built.bundle.path / "recipe.yaml").scale == scale
    y = open_session(built.bundle.path).process(waves(size=(20, 30)).astype(np.float32) / 255)
    assert y.shape == (20 * scale, 30 * scale, 3)


def test_scale_of_the_recipe_must_be_the_network_s(monkeypatch):
    with pytest.raises(
        ModelError, match=r"is \(1, 3, 128, 192\) .* expected \(1, 3, s \* 32, s \* 48\), s = 2 "
    ):
        load_network(recipe("enlarge_4", *UPSCALE, "scale=2"))
    with pytest.raises(ModelError, match=r"expected \(1, 3, 32, 48\) for the task denoise"):
        load_network(recipe("enlarge_4"))
    with pytest.raises(ModelError, match="s = 2, 3, 4 or more"):
        load_network(recipe("blur", *UPSCALE))


def test_network_that_does_not_fit_is_refused_before_an_image_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "draw", lambda *_: pytest.fail("read images"))
    given = recipe("outputs_pair")
    for call in (pipeline.build, pipeline.lower, pipeline.calibrate):
        with pytest.raises(EdgedynError, match="expected one tensor"):
            call(given, tmp_path / "out.json")


def test_normalized_samples_of_a_loader_are_refused_and_pictures_with_noise_are_not():
    photos = [waves(k, (64, 64)).astype(np.float32).transpose(2, 0, 1) / 255 for k in range(3)]
    mean, std = (
        np.array(v, np.float32).reshape(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    for normalized in (
        [(p - mean) / std for p in photos],
        [2 * p - 1 for p in photos],
        [3 * p for p in photos],
    ):
        with pytest.raises(EdgedynError, match=r"has areas of .* before any normalization.*input\.mean"):
            CalibrationSet.of(normalized, samples=3)
    rng = np.random.default_rng(0)
    for sigma in (5, 50, 150):
        noisy = [p + np.float32(sigma / 255) * rng.standard_normal(p.shape, np.float32) for p in photos]
        black = [0 * p + n - p for p, n in zip(photos, noisy, strict=True)]
        assert len(CalibrationSet.of([*noisy, *black], samples=6).images) == 6


def test_training_values_of_the_recipe_are_checked(tmp_path):
    for keys, words in (
        (["input.range=[1, 0]"], "expected .low, high. with low < high"),
        (["input.mean=[1, 2]"], "mean has 2 numbers; expected 1, or one per channel, 3"),
        (["input.std=0"], "input.std"),
        (["input.shape=[1, 1, 32, 48]", "input.order=BGR"], "order is BGR for 1 channels"),
        (["input.low=0"], r"'low' is no key.*expected range: \[low, high\]"),
        (["output.mean=[1, 2]"], "mean has 2 numbers"),
        (["inputs=[{name: a, shape: [1]}]"], "'a' has neither of value and noise_level"),
        (["inputs=[{name: a, shape: [1], value: 1.0, noise_level: 1.0}]"], "has both"),
        (["inputs=[{name: image, shape: [1], value: 1.0}]"], "expected another one for each"),
        (["inputs=[{nme: a, shape: [1], value: 1.0}]"], r"unknown key 'inputs\.0\.nme'; did you mean 'name'"),
        (["outputs=[a, a]"], "expected each once"),
        (["scale=4"], "scale is for the task 'upscale'"),
        (["task=classify", "output.range=[0, 255]"], "output is for tasks whose output is a picture"),
    ):
        with pytest.raises(RecipeError, match=words):
            recipe("blur", *keys)

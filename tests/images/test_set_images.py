"""Images of sets: arrays, 16 bits, raw Bayer frames, iterables; and which of them are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from small_images import png16
from small_sets import NOISE, RAW, SHAPE, draw, entry, refused, save_image, waves, write_pairs, write_set
from torch.utils.data import DataLoader, TensorDataset

from edgedyn import CalibrationSet
from edgedyn.errors import CalibrationError
from edgedyn.images.crops import correlate
from edgedyn.images.disjoint import refuse_overlap
from edgedyn.images.image_set import open_set
from edgedyn.images.noise import NoiseSection
from edgedyn.images.photo import read_image
from edgedyn.images.pixels import read_pixels

FLOATS = waves().astype(np.float32) / 255
SIZE = (1, 3, *FLOATS.shape[:2])


def write_array(folder: Path, array: np.ndarray, name: str = "a.npy") -> Path:
    np.save(folder / name, array)
    return folder


def only_truth(folder: Path) -> np.ndarray:
    """The whole image of a folder that holds one, (H, W, C)."""
    return next(open_set(folder).draw([SIZE])).truth[0].transpose(1, 2, 0)


@pytest.mark.parametrize(
    ("array", "atol"),
    [
        (FLOATS, 0),
        (FLOATS.astype(np.float64), 0),
        (FLOATS.transpose(2, 0, 1), 0),
        (FLOATS.transpose(2, 0, 1)[None], 0),
        (waves(), 0),
        (waves().astype(np.uint16) * 257, 2**-23),  # 257 * 255 is 65535: two divisions, one rounding each
        (FLOATS.astype(np.float16), 2**-11),
    ],
    ids=["float32", "float64", "channels-first", "batch-of-one", "uint8", "uint16", "float16"],
)
def test_array_is_read_on_its_scale(tmp_path, array, atol):
    np.testing.assert_allclose(only_truth(write_array(tmp_path, array)), FLOATS, rtol=0, atol=atol)


def test_npz_of_one_array_is_read(tmp_path):
    np.savez(tmp_path / "a.npz", FLOATS[:, :, 1])
    np.testing.assert_array_equal(only_truth(tmp_path), FLOATS[:, :, [1, 1, 1]])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_image_keeps_its_16_bits(tmp_path, suffix):
    import tifffile

    deep = waves().astype(np.uint16) * 256 + np.arange(70, dtype=np.uint16)[None, :, None]
    if suffix == ".png":
        (tmp_path / "a.png").write_bytes(png16(deep))
    else:
        tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb")
    np.testing.assert_allclose(only_truth(tmp_path), deep / 65535, rtol=0, atol=2**-24)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.where(FLOATS > 0.6, np.nan, FLOATS), "a.npy holds .* values that are NaN or infinite"),
        (np.where(FLOATS > 0.6, np.inf, FLOATS), "a.npy holds .* values that are NaN or infinite"),
        (FLOATS * 255, r"a.npy holds values from .* expected 0 black to 1 white. Divide by the white level"),
        (FLOATS - 8, "a.npy holds values from -7"),
        (waves().astype(np.int64), "a.npy holds int64; expected uint8, uint16, or floats"),
        (FLOATS[:, :, :2], r"a.npy has shape \(90, 70, 2\); expected \(H, W\)"),
        (FLOATS[0, 0], r"a.npy has shape \(3,\)"),
        (np.zeros((0, 4), np.float32), r"a.npy has shape \(0, 4, 1\)"),
        (np.array([{}], dtype=object), r"a.npy cannot be read \(Object arrays cannot be loaded"),
    ],
)
def test_array_that_is_no_image_is_refused_by_name(tmp_path, array, words):
    with pytest.raises(CalibrationError, match=words):
        only_truth(write_array(tmp_path, array))


def test_npz_of_several_arrays_is_refused_with_their_names(tmp_path):
    np.savez(tmp_path / "a.npz", noisy=FLOATS, clean=FLOATS)
    assert "a.npz holds 2 arrays (noisy, clean); expected one" in refused(open_set, tmp_path)


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_damaged_array_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 no archive" if name == "a.npz" else b"\x93NUMPY")
    assert f"{name} cannot be read" in refused(open_set, tmp_path)


def mosaic(rgb: np.ndarray, pattern: str) -> np.ndarray:
    """Return the frame of a sensor with this pattern for (H, W, 3): the colour of each photosite."""
    sites = np.empty(rgb.shape[:2], rgb.dtype)
    for place, colour in enumerate(pattern):
        row, column = divmod(place, 2)
        sites[row::2, column::2] = rgb[row::2, column::2, "RGB".index(colour)]
    return sites


def write_raw(folder: Path, values: np.ndarray, **raw) -> Path:
    (folder / "frame.raw").write_bytes(values.tobytes())
    return write_set(folder, names=(), raw={**RAW, **raw}, files=[entry(folder / "frame.raw")], samples=1)


@pytest.mark.parametrize("pattern", ["RGGB", "BGGR", "GRBG", "GBRG"])
def test_raw_frame_of_a_photo_is_that_photo_at_half_the_size(tmp_path, pattern):
    """Greens of a cell are averaged; red and blue are those of their photosite."""
    photo = skimage.data.astronaut()[100:140, 200:248].astype(np.uint16) * 3 + 64
    path = write_raw(tmp_path, mosaic(photo, pattern).astype("<u2"), pattern=pattern)
    light = (photo.astype(np.float64) - 64) / (960 - 64)
    cells = light.reshape(20, 2, 24, 2, 3).transpose(0, 2, 1, 3, 4).reshape(20, 24, 4, 3)
    expected = [
        np.mean([cells[:, :, k, c] for k, site in enumerate(pattern) if site == "RGB"[c]], axis=0)
        for c in range(3)
    ]
    found = draw(path, (1, 3, 20, 24))[0].truth[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-23)  # float32: a division and a sum


def test_raw_frame_is_not_clipped_below_black(tmp_path):
    values = (mosaic(waves(1, (40, 48)), "RGGB") + 20).astype("<u2")
    truth = draw(write_raw(tmp_path, values, black=130), (1, 3, 20, 24))[0].truth
    assert truth.min() < 0


def test_8_bit_raw_frame_has_a_byte_a_photosite(tmp_path):
    values = mosaic(waves(1, (40, 48)), "RGGB")
    truth = draw(write_raw(tmp_path, values, bits=8, black=0, white=255), (1, 3, 20, 24))[0].truth
    np.testing.assert_allclose(truth[0, 0], values[::2, ::2] / 255, rtol=0, atol=2**-24)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"width": 46}, "has 3840 bytes; expected 3680 for 46 x 40 photosites of 10 bits"),
        ({"bits": 8, "black": 0, "white": 200}, "has 3840 bytes; expected 1920 for 48 x 40"),
        ({"bits": 9, "white": 500}, "holds the value 1023; expected less than 512 at 9 bits"),
        ({"width": 47}, "raw.width is 47: Input should be a multiple of 2"),
        ({"white": 30}, "black 64 and white 30; expected 0 <= black < white < 1024"),
        ({"white": 1024}, "black 64 and white 1024; expected"),
        ({"pattern": "RGBG"}, "raw.pattern is 'RGBG'"),
    ],
)
def test_raw_frame_that_does_not_fit_its_description_is_refused(tmp_path, raw, words):
    values = np.linspace(64, 1023, 48 * 40).astype("<u2")
    assert words in refused(open_set, write_raw(tmp_path, values, **raw))


def test_raw_frame_without_description_is_refused(tmp_path):
    (tmp_path / "frame.raw").write_bytes(bytes(64))
    assert "frame.raw is a raw frame of unknown size and levels" in refused(open_set, tmp_path)


def images(count: int) -> list[np.ndarray]:
    return [waves(seed) for seed in range(count)]


def tensors(count: int) -> torch.Tensor:
    return torch.from_numpy(np.stack(images(count))).permute(0, 3, 1, 2).float() / 255


def test_iterable_of_images_is_a_set():
    made = CalibrationSet.of(images(4), samples=3)
    samples = list(made.draw([SIZE]))
    assert [s.source for s in samples] == ["images[0]", "images[1]", "images[2]"]
    np.testing.assert_array_equal(samples[1].noisy[0].transpose(1, 2, 0), waves(1) / np.float32(255))


def test_loader_with_a_transform_gives_the_set_of_its_images():
    loader = DataLoader(TensorDataset(tensors(6), torch.arange(6)), batch_size=4)
    made = CalibrationSet.of(loader, samples=5, transform=lambda batch: batch[0])
    plain = CalibrationSet.of(images(6), samples=5)
    assert made.digest() == plain.digest()
    assert len(list(made.draw([SHAPE]))) == 5


def test_endless_iterable_is_asked_for_no_more_than_the_samples():
    asked = []

    def endless():
        while True:
            asked.append(len(asked))
            yield waves(len(asked))

    assert len(CalibrationSet.of(endless(), samples=3).images) == len(asked) == 3


def test_digest_of_an_iterable_follows_its_contents_and_order():
    first, second, third = images(3)
    sets = [[first, second], [second, first], [first, third], [first.transpose(1, 0, 2), second]]
    assert len({CalibrationSet.of(iterable, samples=2).digest() for iterable in sets}) == 4
    assert CalibrationSet.of(sets[0], samples=2, noise=NoiseSection(**NOISE)).digest() not in {
        CalibrationSet.of(iterable, samples=2).digest() for iterable in sets
    }


def test_noise_is_added_to_an_iterable_where_it_is_asked_for():
    made = CalibrationSet.of(images(2), samples=2, noise=NoiseSection(sigma=[10.0], clip=False))
    sample = next(iter(made.draw([SIZE])))
    assert 9 < 255 * (sample.noisy - sample.truth).std() < 11


def test_pillow_image_with_a_palette_is_taken_by_its_colours():
    photo = Image.fromarray(waves()).quantize(16)
    made = CalibrationSet.of([photo], samples=1)
    np.testing.assert_array_equal(made.images[0].read() * np.float32(255), np.asarray(photo.convert("RGB")))


@pytest.mark.parametrize(
    ("iterable", "words"),
    [
        ([(waves(), 3)], "item 0 of the set 'images' is a tuple of 2; .*transform=lambda batch: batch"),
        ([{"image": waves()}], "item 0 of the set 'images' is a dict of 1"),
        ([tensors(1).requires_grad_()], "cannot become an array .*detach"),
        (["photo.png"], "item 0 .* is a str"),
        ([waves(), np.full((90, 70), np.nan)], "item 1 .* holds 6300 values that are NaN or infinite"),
        (images(2), "the set 'images' has 2 images; expected 3, one per sample"),
    ],
)
def test_iterable_of_something_else_is_refused(iterable, words):
    with pytest.raises(CalibrationError, match=words):
        CalibrationSet.of(iterable, samples=3)


def test_iterable_that_holds_a_validation_image_is_refused(tmp_path):
    validation = open_set(write_set(tmp_path, name="held out"))
    refuse_overlap(CalibrationSet.of([waves(5), waves(6)], samples=2), validation)
    with pytest.raises(CalibrationError, match=r"'held out' share 1 files .*b\.png \(images\[1\]\)"):
        refuse_overlap(CalibrationSet.of([waves(5), waves(1)], samples=2), validation)


def test_clean_file_of_a_pair_that_the_validation_holds_is_refused(tmp_path):
    (tmp_path / "held").mkdir()
    save_image(tmp_path / "held/renamed.png", seed=1)
    with pytest.raises(CalibrationError, match=r"share 1 files .*renamed\.png \(1\.clean\.png\)"):
        refuse_overlap(open_set(write_pairs(tmp_path)), open_set(tmp_path / "held"))


def noise_image(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("size", [(32, 32), (300, 200)], ids=["small", "large"])
def test_random_image_among_photos_is_refused_by_name(tmp_path, suffix, size):
    save_image(tmp_path / "a.png")
    Image.fromarray(noise_image(*size, 3)).save(tmp_path / f"r{suffix}")
    text = refused(open_set, tmp_path)
    assert f"r{suffix} is random: neighbouring pixels have a correlation of" in text
    assert "Use photos." in text


@pytest.mark.parametrize("make", [torch.rand, torch.randn])
def test_random_tensors_are_refused(make):
    random = CalibrationSet.of(make(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)), samples=8)
    with pytest.raises(CalibrationError, match="every image of the set 'images' is random"):
        list(random.draw([SHAPE]))


def test_flat_patch_with_noise_among_noisy_photos_is_no_refusal():
    rng = np.random.default_rng(0)
    flat = (0.5 + 0.2 * rng.standard_normal((64, 64, 3))).astype(np.float32)
    photos = [flat, FLOATS + 0.2 * rng.standard_normal(FLOATS.shape).astype(np.float32)]
    assert len(list(CalibrationSet.of(photos, samples=2).draw([SHAPE]))) == 2


def test_random_clean_file_of_a_pair_is_refused_by_name(tmp_path):
    Image.fromarray(noise_image(90, 70, 3)).save(tmp_path / "r.png")
    files = [{**entry(save_image(tmp_path / "a.png")), "clean": entry(tmp_path / "r.png")}]
    text = refused(open_set, write_set(tmp_path, names=(), noise={"kind": "real"}, files=files))
    assert "r.png is random" in text


PHOTOS = sorted(
    path for path in Path(skimage.data.__file__).parent.iterdir() if path.suffix in (".png", ".jpg")
)


def test_no_photo_of_scikit_image_passes_for_random():
    """Textures too: the least of them, grass, has 0.72."""
    assert {"brick.png", "grass.png", "gravel.png"} <= {path.name for path in PHOTOS}
    for path in PHOTOS:
        assert correlate(read_image(path).pixels) > 0.5, path.name


@pytest.mark.parametrize("name", ["grass.png", "gravel.png", "brick.png"])
def test_texture_with_heavy_noise_does_not_pass_for_random(name):
    pixels = read_image(PHOTOS[0].parent / name).pixels
    noise = np.random.default_rng(0).standard_normal(pixels.shape) * 50 / 255
    assert correlate(pixels + noise) > 0.2


@pytest.mark.parametrize("size", [(16, 16), (32, 20), (64, 64), (500, 320), (1, 400), (400, 1)])
def test_random_values_of_any_size_are_uncorrelated(size):
    found = [correlate(noise_image(*size, 1, seed=seed) / 255) for seed in range(10)]
    assert max(found) < 0.2


def test_read_pixels_of_an_image_is_the_image(tmp_path):
    path = save_image(tmp_path / "a.png")
    np.testing.assert_array_equal(read_pixels(path), read_image(path).pixels)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (None, "is a NoneType; expected an image.* transform=PIL.Image.open"),
        ("a.png", "is a str; expected an image"),
        (Path("a.png"), "is a PosixPath; expected an image"),
        ([waves()], "is a list of 1; .* transform=lambda batch"),
        (waves().astype(np.int64), "holds int64; .* astype"),
    ],
)
def test_an_item_that_is_no_image_is_refused_with_the_next_step(item, words):
    with pytest.raises(CalibrationError, match=words):
        CalibrationSet.of([item], samples=1)


def test_a_set_that_is_almost_black_is_refused(tmp_path):
    dark = {
        "12 bits": waves().astype(np.uint16) * 16,
        "divided twice": waves().astype(np.float32) / 255**2,
        "8 bits": waves().astype(np.uint16),
    }
    for array in dark.values():
        with pytest.raises(
            CalibrationError, match=r"brightest pixel of the set 'images' is 0\.0.* white level"
        ):
            list(CalibrationSet.of([array], samples=1).draw([SHAPE]))
    # one picture that is not dark: the others may be
    assert len(list(CalibrationSet.of([*dark.values(), waves()], samples=4).draw([SHAPE]))) == 4

"""The values that a picture has in a tensor: one formula in Python and in the C++ of the documentation."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest
from doc_blocks import ROOT, read_blocks

from edgedyn.bundle.tensors import CONSTANT, GUIDE, NOISE_LEVEL, OTHER, TensorSpec, encode_inputs

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CAFFE = {"range": (0.0, 255.0), "mean": (103.939, 116.779, 123.68), "order": "BGR"}
CONTRACTS = [{}, IMAGENET, CAFFE, {"range": (-1.0, 1.0)}, {"range": (0.0, 255.0)}, {"order": "BGR"}]


def spec(channels=3, **contract) -> TensorSpec:
    return TensorSpec("x", "float32", (1, channels, 2, 3), "", **contract)


def pixels(channels=3) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.2, 1.2, (1, channels, 2, 3)).astype(np.float32)


def test_values_are_those_that_networks_are_trained_with():
    v = pixels()
    assert spec().encode(v) is v
    imagenet = (v - np.reshape(IMAGENET["mean"], (3, 1, 1))) / np.reshape(IMAGENET["std"], (3, 1, 1))
    np.testing.assert_allclose(spec(**IMAGENET).encode(v), imagenet, rtol=1e-5, atol=1e-6)
    caffe = 255 * v[:, ::-1] - np.reshape(CAFFE["mean"], (3, 1, 1))
    np.testing.assert_allclose(spec(**CAFFE).encode(v), caffe, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(spec(range=(-1.0, 1.0)).encode(v), 2 * v - 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("contract", CONTRACTS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_decode_is_the_inverse_of_encode(contract, dtype):
    v = pixels().astype(dtype)
    x = spec(**contract).encode(v)
    assert x.dtype == dtype
    assert x.flags.c_contiguous
    np.testing.assert_allclose(spec(**contract).decode(x), v, rtol=0, atol=2e-6)


def test_output_that_is_no_picture_is_returned_as_it_is():
    y = np.ones((1, 10), np.float32)
    assert TensorSpec("y", "float32", (1, 10), "logits", OTHER).decode(y) is y


@pytest.mark.parametrize("given", [spec(**c) for c in CONTRACTS] + [
    spec(4, mean=(1.0, 2.0, 3.0, 4.0)),
    spec(1, role=GUIDE),
    spec(1, role=CONSTANT, value=0.5),
    spec(1, role=NOISE_LEVEL, value=255.0),
    TensorSpec("y", "float16", (1, 10), "logits", OTHER),
])  # fmt: skip
def test_tensor_survives_json_with_the_keys_of_its_role_alone(given):
    written = given.to_json()
    assert TensorSpec.from_json({**written, "later": 1}) == given
    assert ("value" in written) == (given.role in (CONSTANT, NOISE_LEVEL))
    assert ("mean" in written) == (given.role not in (CONSTANT, NOISE_LEVEL, OTHER))


def test_inputs_are_pictures_then_constants_and_noise_levels():
    specs = (
        spec(**CAFFE),
        spec(1, role=GUIDE),
        spec(1, role=CONSTANT, value=0.5),
        spec(1, role=NOISE_LEVEL, value=2.0),
    )
    x, guide, constant, level = encode_inputs(specs, (pixels(), pixels(1)), 51.0)
    np.testing.assert_array_equal(x, specs[0].encode(pixels()))
    np.testing.assert_array_equal(guide, pixels(1))
    assert (constant == 0.5).all()
    assert level == pytest.approx(np.full((1, 1, 2, 3), 0.4))
    assert {a.dtype for a in (x, guide, constant, level)} == {np.dtype("float32")}


MAIN = """
#include <cstdio>
#include "pixels.h"
int main() {
  Picture p{%s};
  std::vector<float> v(p.channels * 6), x(v.size()), back(v.size());
  if (std::fread(v.data(), 4, v.size(), stdin) != v.size()) return 1;
  p.encode(v.data(), x.data(), 6);
  p.decode(x.data(), back.data(), 6);
  std::fwrite(x.data(), 4, x.size(), stdout);
  std::fwrite(back.data(), 4, back.size(), stdout);
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler: apt-get install g++")
@pytest.mark.parametrize("contract", [IMAGENET, CAFFE, {"range": (0.0, 255.0)}], ids=str)
def test_documented_cpp_converts_as_python_does(tmp_path, contract):
    blocks = read_blocks(ROOT / "docs/phone.md")
    (tmp_path / "pixels.h").write_text(next(b.code for b in blocks if b.title == "pixels.h"))
    given = spec(**contract)
    lists = (f"{{{', '.join(f'{v!r}f' for v in values)}}}" for values in (given.mean, given.std))
    fields = [f"{v!r}f" for v in given.range] + [*lists, str(given.order == "BGR").lower(), "3"]
    (tmp_path / "main.cpp").write_text(MAIN % ", ".join(fields))
    subprocess.run(
        ["c++", "-std=c++17", "-Wall", "-Werror", "main.cpp", "-o", "main"], cwd=tmp_path, check=True
    )
    done = subprocess.run([tmp_path / "main"], input=pixels().tobytes(), capture_output=True, check=True)
    x, back = np.frombuffer(done.stdout, np.float32).reshape(2, 1, 3, 2, 3)
    np.testing.assert_allclose(x, given.encode(pixels()), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(back, pixels(), rtol=0, atol=2e-6)

"""Programs that somebody crafted, in bundles with right digests: refused with a reason, without a crash."""

from __future__ import annotations

import os
from contextlib import suppress

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_bundles import SHAPE, make_manifest, onnx_model, tensor, write_small

from edgedyn import targets
from edgedyn.bundle.arrays import read_array
from edgedyn.bundle.bundle import open_bundle, write_bundle
from edgedyn.bundle.tensors import TensorSpec
from edgedyn.children import memory_limit
from edgedyn.cli.app import execute
from edgedyn.device import programs
from edgedyn.device.session import check, open_session, open_verified
from edgedyn.errors import BundleError, EdgedynError, ModelError
from edgedyn.files import staging_folder

SPEC = TensorSpec("x", "float32", SHAPE, "")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pte():
    from executorch.exir import to_edge_transform_and_lower

    class Double(torch.nn.Module):
        def forward(self, x):
            return x + x

    program = torch.export.export(Double().eval(), (torch.rand(SHAPE),))
    return to_edge_transform_and_lower(program).to_executorch().buffer


def mutated(data, seed):
    rng, changed = np.random.default_rng(seed), bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
    return bytes(changed)


def constant(name, value):
    return numpy_helper.from_array(np.asarray(value), name)


def loop_without_end():
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, SHAPE) for n in ("v", "w")]
    flags = [helper.make_tensor_value_info(n, TensorProto.BOOL, []) for n in ("go", "on")]
    count = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    nodes = [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["v", "v"], ["w"])]
    body = helper.make_graph(nodes, "body", [count, flags[0], value[0]], [flags[1], value[1]])
    node = helper.make_node("Loop", ["most", "yes", "x"], ["y"], body=body)
    return onnx_model(node, initializers=[constant("most", np.int64(2**62)), constant("yes", True)])


def test_a_bundle_is_tried_once_and_then_runs(tmp_path, monkeypatch):
    bundle = write_small(tmp_path / "out", onnx_model())
    assert check(tmp_path / "out").ok
    (record,) = (tmp_path / "cache/edgedyn/tried").iterdir()
    assert record.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(programs, "run_tool", lambda *a, **k: pytest.fail("it was tried before"))
    assert open_session(bundle.path).run(np.ones(SHAPE, np.float32))[0].max() == 2
    os.remove(record)
    with pytest.raises(pytest.fail.Exception, match="tried before"):
        open_session(bundle.path)


def test_a_bundle_is_tried_every_time_where_there_is_no_cache(tmp_path):
    (tmp_path / "cache").touch()
    write_small(tmp_path / "out", onnx_model())
    assert check(tmp_path / "out").ok
    assert check(tmp_path / "out").ok


@pytest.mark.parametrize(
    ("file", "program"),
    [
        ("model.onnx", b""),
        ("model.onnx", b"\x7fELF" + bytes(200)),
        ("model.onnx", onnx_model()[:-1]),
        ("model.onnx", onnx_model() + b"\x00"),
        ("model.onnx", b"\x08\x0a" * 20_000),
        ("model.onnx", b"\x08" + b"\xff" * 40),
        ("model.pte", b"\x1c\x00\x00\x00XX12" + bytes(200)),
        ("model.pte", b"PK\x03\x04" + bytes(200)),
        ("model.pte", b""),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused_before_a_runtime_sees_it(tmp_path, file, program):
    write_small(tmp_path / "out", program, file)
    with pytest.raises(BundleError, match=rf"{file}: found no (ONNX model|ExecuTorch program)"):
        open_verified(tmp_path / "out")


def test_a_real_program_is_identified(tmp_path, pte):
    write_small(tmp_path / "pte", pte, "model.pte")
    assert open_verified(tmp_path / "pte").target == "executorch"


@pytest.mark.parametrize("seed", [15, 21, 167])
def test_a_crafted_pte_ends_the_child_alone(tmp_path, pte, seed, capsys):
    write_small(tmp_path / "out", mutated(pte, seed), "model.pte")
    assert execute(["check", str(tmp_path / "out")]) == 1
    assert "error BundleError" in capsys.readouterr().err


def test_the_signal_and_the_last_words_of_the_child_are_quoted(tmp_path, monkeypatch):
    bundle = write_small(tmp_path / "out", onnx_model())
    dying = ["sh", "-c", "echo first >&2; printf 'last \\033[31m \\377 words\\n' >&2; kill -ABRT $$"]
    monkeypatch.setattr(programs, "python_command", lambda *a: dying)
    with pytest.raises(BundleError) as caught:
        programs.try_in_child(bundle, "a runtime")
    assert "in a runtime was ended by SIGABRT; its last words: last \\x1b[31m \\xff words." in str(
        caught.value
    )
    assert "first" not in str(caught.value)


def allocate(elements):
    """Return a model that fills a tensor of float32 zeros and adds its largest value to x."""
    nodes = [
        helper.make_node("ConstantOfShape", ["large"], ["z"]),
        helper.make_node("ReduceMax", ["z"], ["m"]),
        helper.make_node("Add", ["x", "m"], ["y"]),
    ]
    return onnx_model(*nodes, initializers=[constant("large", np.array([elements], np.int64))])


def test_a_program_that_asks_for_most_of_the_memory_is_refused(tmp_path):
    write_small(tmp_path / "out", allocate(memory_limit() // 4 + 1))
    with pytest.raises(BundleError, match=r"(?i)alloc.* It may use \d+\.\d GB, 75% of this machine's memory"):
        open_session(tmp_path / "out")
    write_small(tmp_path / "modest", allocate(1 << 20))
    open_session(tmp_path / "modest")


@pytest.mark.parametrize("shape", [(1, 3, 8, 13), (1, 3, 16 * 10**8, 24 * 10**7), (3, 8, 12)])
def test_an_output_of_another_shape_than_the_manifest_gives_is_refused(tmp_path, shape):
    manifest = make_manifest("small", [tensor("x")], [tensor("y", shape)], 2) | {"vectors": []}
    with staging_folder(tmp_path / "out") as staging:
        (staging / "model.onnx").write_bytes(onnx_model())
        write_bundle(tmp_path / "out", staging, manifest)
    with pytest.raises(BundleError, match=r"returns \[\(1, 3, 8, 12\)\], expected \[\(.* by its manifest"):
        open_session(tmp_path / "out")


@pytest.mark.parametrize("shape", [(), (1, 3, 8, 13), (1, 2**31 - 1, 2**31 - 1), (1,) * 100])
def test_an_input_of_another_shape_than_the_program_takes_is_refused(tmp_path, shape):
    manifest = make_manifest("small", [tensor("x", shape)], [tensor("y")], 2) | {"vectors": []}
    with staging_folder(tmp_path / "out") as staging:
        (staging / "model.onnx").write_bytes(onnx_model())
        write_bundle(tmp_path / "out", staging, manifest)
    with pytest.raises(BundleError, match=rf"bundle {tmp_path}/out: "):
        open_session(tmp_path / "out")


def test_a_refusal_of_the_child_is_the_refusal_and_is_not_remembered(tmp_path, monkeypatch):
    write_small(tmp_path / "out", onnx_model(helper.make_node("Nothing", ["x"], ["y"])))
    monkeypatch.setattr(programs, "load", lambda *a: pytest.fail("loaded here"))
    for _ in range(2):
        with pytest.raises(ModelError, match="Nothing"):
            open_session(tmp_path / "out")


@pytest.mark.parametrize("words", ["", "x", "[1, 2]", "[]", '["Path", "x"]', '["EdgedynError"]'])
def test_last_lines_that_are_no_refusal(words):
    assert programs._read_refusal(f"first\n{words}") is None


def test_a_program_without_end_is_ended(tmp_path, monkeypatch):
    write_small(tmp_path / "out", loop_without_end())
    monkeypatch.setattr(programs, "TRIAL_SECONDS", 3.0)
    with pytest.raises(BundleError, match="did not end within 3 s"):
        open_session(tmp_path / "out")


@pytest.mark.parametrize("seed", [16, 34, 36, 67, 106, 112, *range(12)])
def test_no_exception_of_a_runtime_leaves_a_mutated_model(tmp_path, seed, capfd):
    """The first six raise UnicodeDecodeError inside of ONNX Runtime 1.31."""
    bundle = write_small(tmp_path / "out", mutated(onnx_model(), seed))
    x = np.ones(SHAPE, np.float32)
    with suppress(EdgedynError):
        programs.identify(bundle)
        assert programs.load(bundle, targets.load("onnxruntime"))(x)[0].dtype.kind in "fiub"
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([helper.make_node("Gather", ["x", "far"], ["y"])], "out of data bounds"),
        ([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.STRING)], "expected arrays of numbers"),
    ],
)
def test_a_run_that_fails_is_refused_with_the_words_of_the_runtime(tmp_path, nodes, words, capsys):
    element = TensorProto.STRING if nodes[0].op_type == "Cast" else None
    used = [constant("far", np.int64(99))] if element is None else []
    write_small(tmp_path / "out", onnx_model(*nodes, element=element, initializers=used))
    assert execute(["check", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "error BundleError" in message
    assert words in message


def test_a_program_that_computes_something_else_is_not_ok(tmp_path):
    write_small(tmp_path / "out", onnx_model(helper.make_node("Mul", ["x", "x"], ["y"])))
    assert not check(tmp_path / "out").ok


def npy(text, values=b"\0" * 4 * 288, version=b"\x01\x00"):
    header = text.encode("latin1") + b"\n"
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + values


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 3, 8, 12), }"


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff", npy(GOOD)[:-1], npy(GOOD) + b"\0"),
        *(npy("("), npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 3, 8, 12), 'x': '''")),
        *(npy("(" * 5000), npy("__import__('os').system('touch ran')"), npy("é" * 10)),
        *(npy(GOOD.replace("<f4", "|O")), npy(GOOD.replace("<f4", "<f8")), npy(GOOD.replace("<f4", ">f4"))),
        *(
            npy(GOOD.replace("12", "9" * 40)),
            npy(GOOD.replace("12", "-12")),
            npy(GOOD.replace("8, 12", "96")),
        ),
        *(npy(GOOD.replace("12", "12L")), npy(GOOD.replace("False", "0")), npy(GOOD, version=b"\x03\x00")),
        npy(GOOD, version=b"\x09\x00"),
    ],
)
def test_a_crafted_header_of_an_array_is_refused(tmp_path, data):
    write_small(tmp_path / "out", onnx_model(), vector=data)
    with pytest.raises(BundleError, match=r"0\.input\.npy: found .*expected \.npy without pickle, float32"):
        read_array(tmp_path / "out", "vectors/0.input.npy", SPEC)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [SHAPE, (7,), (1, 5)])
def test_arrays_as_numpy_writes_them_are_read(tmp_path, order, dtype, shape):
    array = np.asarray(np.random.default_rng(1).random(shape), dtype, order=order)
    np.save(tmp_path / "a.npy", array)
    read = read_array(tmp_path, "a.npy", TensorSpec("x", dtype, shape, ""))
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def test_a_missing_array_is_refused(tmp_path):
    with pytest.raises(BundleError, match="No such file"):
        read_array(tmp_path, "a.npy", SPEC)


def test_check_refuses_a_crafted_vector(tmp_path, capsys):
    write_small(tmp_path / "out", onnx_model(), vector=npy("("))
    assert execute(["check", str(tmp_path / "out")]) == 1
    assert "no header of an array" in capsys.readouterr().err
    assert open_bundle(tmp_path / "out")

"""Bundles: written whole or not at all, opened only if every byte is as it was written."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgedyn.bundle import bundle as bundles
from edgedyn.bundle.bundle import add_files, open_bundle, refuse_existing, write_bundle
from edgedyn.bundle.manifest import FORMAT, canonical, seal
from edgedyn.bundle.tensors import TensorSpec
from edgedyn.errors import BundleError, UsageError
from edgedyn.files import staging_folder

SPEC = TensorSpec("x", "float32", (1, 3, 8, 16), "RGB", mean=(0.5,), std=(0.2, 0.3, 0.4))
IMAGE = SPEC.to_json()


def manifest(**changes):
    return {
        "format": FORMAT,
        "ok": True,
        "name": "small.onnxruntime.fp32",
        "edgedyn": "0.1.0",
        "target": "onnxruntime",
        "precision": "fp32",
        "programs": {"forward": "model.onnx"},
        "routing": {},
        "inputs": [IMAGE],
        "outputs": [{**IMAGE, "name": "y"}],
        "forms": {"sliced_depthwise2d": "resize_mac"},
        "tile": {"overlap": 4},
        "versions": {"torch": "2.13"},
        "digests": {"recipe": "00"},
        "facts": {"psnr_db": 31.5, "tiny": 1e-09, "nested": [None, True, -3]},
        "vectors": [
            {
                "inputs": ["vectors/0.input.npy"],
                "outputs": ["vectors/0.output.npy"],
                "max_abs": [1e-5],
                "rms": [1e-6],
            }
        ],
        **changes,
    }


def route(values, rule, router, *variants):
    """Give a manifest the programs of a routed network."""
    values["programs"] = dict.fromkeys(filter(None, [router, *variants]), "model.onnx")
    values["routing"] = {"rule": rule, "router": router, "variants": list(variants)}


def write(out, force=False, **changes):
    with staging_folder(out) as staging:
        (staging / "vectors").mkdir()
        (staging / "model.onnx").write_bytes(b"program")
        (staging / "recipe.yaml").write_bytes(b"")
        (staging / "vectors" / "0.input.npy").write_bytes(b"in")
        (staging / "vectors" / "0.output.npy").write_bytes(b"out")
        return write_bundle(out, staging, manifest(**changes), force=force)


def reseal(path, change):
    """Write the manifest as ``change`` leaves it, with its right digest: only the rules can refuse it."""
    values = json.loads((path / "manifest.json").read_bytes())
    change(values)
    values.pop("manifest_sha256")
    values["manifest_sha256"] = hashlib.sha256(canonical(values)).hexdigest()
    (path / "manifest.json").write_bytes(canonical(values))


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "out").path


def test_a_written_bundle_opens_with_everything_in_it(tmp_path):
    written = write(tmp_path / "deep" / "out")
    opened = open_bundle(tmp_path / "deep" / "out")
    assert opened == written
    assert (opened.target, opened.precision) == ("onnxruntime", "fp32")
    assert (opened.programs, opened.routing) == ({"forward": "model.onnx"}, None)
    assert opened.inputs == [SPEC]
    assert [spec.name for spec in opened.outputs] == ["y"]
    assert opened.vectors == [
        bundles.Vector(("vectors/0.input.npy",), ("vectors/0.output.npy",), (1e-5,), (1e-6,))
    ]
    assert opened.overlap == 4
    assert sorted(os.listdir(tmp_path / "deep")) == ["out"]


def test_the_manifest_is_sorted_indented_and_ends_in_a_newline(path):
    data = (path / "manifest.json").read_bytes()
    values = json.loads(data)
    assert data == (json.dumps(values, sort_keys=True, indent=1) + "\n").encode()
    assert values["files"]["model.onnx"] == {"size": 7, "sha256": hashlib.sha256(b"program").hexdigest()}
    assert list(values["files"]) == [
        "model.onnx",
        "recipe.yaml",
        "vectors/0.input.npy",
        "vectors/0.output.npy",
    ]


def test_a_flip_of_any_byte_of_the_manifest_is_noticed(path):
    file = path / "manifest.json"
    data = file.read_bytes()
    for place in range(len(data)):
        for bit in (0, 5):  # bit 5 turns case: the flip that text comparisons miss
            file.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            with pytest.raises(BundleError):
                open_bundle(path)


@pytest.mark.parametrize("name", ["model.onnx", "vectors/0.input.npy"])
def test_a_flip_in_a_file_is_noticed(path, name):
    data = (path / name).read_bytes()
    (path / name).write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(BundleError, match=re.escape(name) + ".*sha256.*expected.*sha256"):
        open_bundle(path)


def test_truncated_manifest_is_noticed(path):
    file = path / "manifest.json"
    data = file.read_bytes()
    for size in (0, 1, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(BundleError, match=r"manifest\.json"):
            open_bundle(path)


def replace_by_link(path):
    (path / "model.onnx").rename(path.parent / "elsewhere")
    (path / "model.onnx").symlink_to(path.parent / "elsewhere")


def replace_vectors_by_link(path):
    (path / "vectors").rename(path.parent / "elsewhere")
    (path / "vectors").symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "manifest.json").unlink(), "no such plain file"),
        (lambda path: (path / "recipe.yaml").unlink(), "no recipe.yaml"),
        (lambda path: (path / "extra.bin").touch(), "extra.bin"),
        (lambda path: (path / "vectors" / "1.npy").touch(), r"vectors/1\.npy"),
        (lambda path: (path / "folder").mkdir(), "'folder'"),
        (lambda path: (path / "vectors" / "folder").mkdir(), "'vectors/folder'"),
        (lambda path: (path / ".hidden").touch(), "'.hidden'"),
        (lambda path: os.mkfifo(path / "pipe"), "'pipe'"),
        (replace_by_link, "'model.onnx'"),
        (replace_vectors_by_link, "'vectors'"),
        (lambda path: shutil.rmtree(path), "no directory"),
    ],
)
def test_a_changed_directory_is_refused(path, damage, message):
    damage(path)
    with pytest.raises(BundleError, match=message):
        open_bundle(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"overlap": 4', b'"overlap": 99999999999999999999', "beyond 2"),
        (b'"overlap": 4', b'"overlap": ' + b"9" * 5000, "beyond 2"),
        (b"31.5", b"1e999", "not finite"),
        (b"31.5", b"NaN", "not plain JSON"),
        (b'"name": "small', b'"edgedyn": "again",\n "name": "small', "a key twice"),
        (b'"overlap": 4', b'"overlap": ' + b"[" * 100_000 + b"]" * 100_000, "strict JSON"),
        (b'"overlap": 4', b'"overlap":  4', "another serialization"),
    ],
)
def test_json_that_readers_may_understand_differently_is_refused(path, old, new, message):
    file = path / "manifest.json"
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))
    with pytest.raises(BundleError, match=message):
        open_bundle(path)


def test_json_of_another_kind_is_refused(path):
    for text in ("[]", "{}", '{"files": 3}', "7"):
        (path / "manifest.json").write_text(text + "\n")
        with pytest.raises(BundleError, match="manifest of a bundle"):
            open_bundle(path)


def test_a_huge_manifest_is_refused_before_it_is_read(path):
    with (path / "manifest.json").open("r+b") as file:
        file.truncate(2**34)
    with pytest.raises(BundleError, match="17179869184 bytes"):
        open_bundle(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2, edgedyn="0.0"), r"found 2 \(written by edgedyn 0.0\), expected 4"),
        (lambda m: m.update(format=True), "format: found True"),
        (lambda m: m.pop("target"), "key 'target'.*found 'nothing'"),
        (lambda m: m.update(inputs={}), "key 'inputs'"),
        (lambda m: m.update(outputs=[]), "outputs: found .*expected at least one"),
        (lambda m: m["tile"].update(overlap=True), "overlap"),
        (lambda m: m["tile"].update(overlap=-1), "overlap.*-1"),
        (lambda m: m.update(tile={}), "overlap"),
        (lambda m: m.update(programs={"forward": "../model.onnx"}), "programs"),
        (lambda m: m.update(programs={}), "programs"),
        (lambda m: m.update(programs={"main": "model.onnx"}), "routing"),
        (lambda m: m.update(routing={"rule": "argmax"}), "routing"),
        (lambda m: route(m, "fallback", "", "a"), "routing"),
        (lambda m: route(m, "fallback", "router", "a", "b"), "routing"),
        (lambda m: route(m, "argmax", "", "a", "b"), "routing"),
        (lambda m: route(m, "argmax", "router", "a", "a"), "routing"),
        (lambda m: route(m, "dice", "router", "a", "b"), "routing"),
        (lambda m: (route(m, "argmax", "router", "a", "b"), m["programs"].pop("b")), "routing"),
        (lambda m: m["vectors"][0].update(inputs=["vectors/0.input.npy"] * 2), "a vector"),
        (lambda m: m["inputs"][0].update(dtype="object"), "dtype"),
        (lambda m: m["inputs"][0].update(shape=[1, 0]), "shape"),
        (lambda m: m["inputs"][0].update(shape=[2**31]), "shape"),
        (lambda m: m["inputs"][0].update(shape=[1.0]), "shape"),
        (lambda m: m["inputs"][0].pop("role"), "'role'"),
        (lambda m: m["inputs"][0].update(role="photo"), "role"),
        *(
            (lambda m, wrong=wrong: m["inputs"][0].update(wrong), "the keys of its role")
            for wrong in (
                {"range": [1, 0]},
                {"range": [0, 1, 2]},
                {"range": 255},
                {"mean": [0.5, 0.5]},
                {"mean": [True]},
                {"mean": []},
                {"std": [0]},
                {"shape": [1, 8, 16], "mean": [], "std": []},
                {"std": ["0.2"]},
                {"order": "GBR"},
                {"order": 3},
                {"shape": [1, 4, 8, 16], "std": [0.2], "order": "BGR"},
                {"role": "constant"},
                {"role": "noise_level", "value": "25"},
            )
        ),
        (lambda m: m["inputs"][0].pop("std"), "the keys of its role"),
        (lambda m: m["inputs"][0].update(shape=[1, [3], 8, 16]), "sizes from 1"),
        (lambda m: m["vectors"][0].update(max_abs=True), "'max_abs'.*found True"),
        (lambda m: m["vectors"][0].update(max_abs=[True]), "max_abs and rms from 0"),
        (lambda m: m["vectors"][0].update(rms=[1e-6] * 2), "max_abs and rms from 0"),
        (lambda m: m["vectors"][0].update(outputs=[]), "one per input and output"),
        (lambda m: m.update(inputs=["x"]), "a tensor"),
        (lambda m: m["vectors"][0].update(inputs=["vectors/9.npy"]), "listed files"),
        (lambda m: m["vectors"][0].update(max_abs=[-1]), "max_abs and rms from 0"),
        (lambda m: m["vectors"][0].pop("max_abs"), "'max_abs'"),
        (lambda m: m["vectors"][0].pop("rms"), "'rms'"),
        (lambda m: m["vectors"][0].update(rms=[-1]), "rms from 0"),
        (lambda m: m.pop("ok"), "key 'ok'.*found 'nothing'"),
        (lambda m: m.update(ok=1), "key 'ok'.*found 1"),
        (lambda m: m["files"].update({"../model.onnx": {}}), r"\.\./model"),
        (lambda m: m["files"].update({"/etc/passwd": {}}), "/etc/passwd"),
        (lambda m: m["files"].update({"a\\b": {}}), "a listed name"),
        (lambda m: m["files"].update({"other/a": {}}), "other/a"),
        (lambda m: m["files"].update({"vectors/../a": {}}), "a listed name"),
        (lambda m: m["files"].update({"MODEL.onnx": m["files"]["model.onnx"]}), "distinct ones in any case"),
        (lambda m: m["files"].update({"Manifest.json": {}}), "distinct ones in any case"),
        (lambda m: m["files"]["model.onnx"].update(size=8), "file model.onnx"),
        (lambda m: m["files"].update({"model.onnx": None}), "file model.onnx"),
    ],
)
def test_a_manifest_that_breaks_a_rule_is_refused_though_its_digest_is_right(path, change, message):
    reseal(path, change)
    with pytest.raises(BundleError, match=message):
        open_bundle(path)


def test_a_wrong_digest_of_the_manifest_is_refused(path):
    values = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_bytes(canonical({**values, "name": "another"}))
    with pytest.raises(BundleError, match="manifest_sha256"):
        open_bundle(path)


def test_an_existing_output_is_refused_and_untouched(path):
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        write(path, name="second")
    assert (path / "manifest.json").read_bytes() == before


def test_force_replaces_a_bundle_and_leaves_nothing_else(path):
    assert write(path, force=True, name="second").manifest["name"] == "second"
    assert open_bundle(path).manifest["name"] == "second"
    assert os.listdir(path.parent) == ["out"]


def test_force_replaces_an_empty_directory(tmp_path):
    (tmp_path / "out").mkdir()
    assert open_bundle(write(tmp_path / "out", force=True).path)


def test_force_replaces_nothing_that_is_not_a_whole_bundle(path, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(path)
    (path / "notes.txt").touch()
    for name, message in (("photos", "no bundle"), ("file", "no directory"), ("link", "no directory")):
        with pytest.raises(UsageError, match=message):
            refuse_existing(tmp_path / name, force=True)
    with pytest.raises(UsageError, match=r"notes\.txt"):
        refuse_existing(path, force=True)


@pytest.mark.parametrize("step", ["seal", "replace_file", "open_bundle", "_publish"])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_failure_half_way_leaves_what_was_there(tmp_path, monkeypatch, step, replacing):
    if replacing:
        write(tmp_path / "out")

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(bundles, step, fail)
    with pytest.raises(UsageError, match="disk is full"):
        write(tmp_path / "out", force=replacing, name="second")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == (["out"] if replacing else [])
    assert not replacing or open_bundle(tmp_path / "out").manifest["name"] == "small.onnxruntime.fp32"


def test_a_failed_last_rename_puts_the_old_bundle_back(path, monkeypatch):
    rename = Path.rename

    def fail(self, target):
        if ".part-" in self.name:
            raise OSError("another process is faster")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UsageError, match="faster"):
        write(path, force=True)
    monkeypatch.undo()
    assert open_bundle(path).manifest["name"] == "small.onnxruntime.fp32"
    assert os.listdir(path.parent) == ["out"]


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, 2**60])
def test_a_manifest_that_is_not_plain_json_is_not_written(tmp_path, value):
    with pytest.raises(BundleError, match=r"not plain JSON|beyond 2\*\*53"):
        write(tmp_path / "out", facts={"value": value})
    assert os.listdir(tmp_path) == []


def test_a_staged_manifest_or_link_is_refused(tmp_path):
    with staging_folder(tmp_path / "out") as staging:
        (staging / "manifest.json").touch()
        with pytest.raises(BundleError, match=r"no manifest\.json"):
            write_bundle(tmp_path / "out", staging, manifest(vectors=[]))
        (staging / "link").symlink_to("/etc/passwd")
        with pytest.raises(BundleError, match="'link'"):
            write_bundle(tmp_path / "out", staging, manifest(vectors=[]))
    assert os.listdir(tmp_path) == []


def engine(folder, data=b"engine"):
    folder.mkdir(exist_ok=True)
    (folder / "model.engine").write_bytes(data)
    return folder / "model.engine"


def test_an_added_file_is_moved_in_listed_and_verified(path, tmp_path):
    file = engine(tmp_path / "made")
    bundle = add_files(open_bundle(path), [file])
    assert not file.exists()
    assert bundle == open_bundle(path)
    assert bundle.manifest["files"]["model.engine"]["size"] == 6
    (path / "model.engine").write_bytes(b"ENGINE")
    with pytest.raises(BundleError, match=r"file model\.engine"):
        open_bundle(path)


@pytest.mark.parametrize("state", ["listed", "changed", "unlisted", "missing"])
def test_a_file_is_added_again_whatever_became_of_it(path, tmp_path, state):
    if state != "unlisted":
        add_files(open_bundle(path), [engine(tmp_path / "made")])
    if state in ("changed", "unlisted"):
        (path / "model.engine").write_bytes(b"half")
    if state == "missing":
        (path / "model.engine").unlink()
    bundle = add_files(open_bundle(path, rebuilt=["model.engine"]), [engine(tmp_path / "made", b"newer")])
    assert bundle == open_bundle(path)
    assert (path / "model.engine").read_bytes() == b"newer"


def test_adding_refuses_odd_names_and_changes_elsewhere(path, tmp_path):
    bundle = open_bundle(path)
    before = (path / "manifest.json").read_bytes()
    odd = engine(tmp_path / "made").rename(tmp_path / "made" / ".hidden")
    listed = engine(tmp_path / "made").rename(tmp_path / "made" / "manifest.json")
    for file in (odd, listed):
        with pytest.raises(BundleError, match="listed name"):
            add_files(bundle, [file])
    (path / "model.onnx").write_bytes(b"changed")
    with pytest.raises(BundleError, match=r"file model\.onnx"):
        add_files(bundle, [engine(tmp_path / "made")])
    with pytest.raises(BundleError, match=r"file model\.onnx"):
        open_bundle(path, rebuilt=["model.engine"])
    assert (path / "manifest.json").read_bytes() == before
    assert not (path / "model.engine").exists()


def test_the_staging_folder_is_hidden_beside_the_output_and_goes(tmp_path):
    with staging_folder(tmp_path / "a" / "out") as staging:
        assert staging.parent == tmp_path / "a"
        assert staging.name.startswith(".out.part-")
    assert os.listdir(tmp_path / "a") == []
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write"), staging_folder(tmp_path / "file" / "out"):
        pass


BLOCKED = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
import {module}
"""
HOST_SIDE = ("torch", "tensorrt", "tensorrt_rtx", "executorch", "onnx", "onnxruntime", "torchao", "nncf")


@pytest.mark.parametrize(
    ("module", "blocked"),
    [
        ("edgedyn.bundle.bundle", (*HOST_SIDE, "numpy", "PIL", "tifffile")),
        ("edgedyn.device.session", (*HOST_SIDE, "PIL", "tifffile")),
        ("edgedyn.images.photo", HOST_SIDE),
    ],
)
def test_the_device_side_imports_without_the_host_side(module, blocked):
    code = BLOCKED.format(blocked=set(blocked), module=module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    denied = subprocess.run(
        [sys.executable, "-c", code + "import onnx"], capture_output=True, text=True, check=False
    )
    assert "blocked: onnx" in denied.stderr


@pytest.mark.parametrize(
    "name",
    [
        *(
            "numpy.py",
            "model.pyc",
            "a.so",
            "a.dll",
            "a.dylib",
            "a.pyd",
            "run.sh",
            "run.exe",
            "a.pth",
            "a.pkl",
        ),
        *("setup.cfg", "Makefile", "noending", "vectors/x.py", "vectors/x.onnx", "a.PY", "a.onnx.js", "a.pt"),
    ],
)
def test_a_file_that_is_no_kind_of_data_is_refused_though_it_is_listed(path, name):
    (path / name).write_bytes(b"code")
    entry = {"size": 4, "sha256": hashlib.sha256(b"code").hexdigest()}
    reseal(path, lambda m: m["files"].update({name: entry}))
    with pytest.raises(BundleError, match=r"a listed name.*ending of pte, onnx"):
        open_bundle(path)
    reseal(path, lambda m: m["files"].pop(name))
    with pytest.raises(BundleError, match=f"entry '{name}'.*Remove it"):
        open_bundle(path)


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from edgedyn.bundle import bundle as bundles

left = int(sys.argv[3])

def dying(method):
    def call(*arguments, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return method(*arguments, **options)
    return call

for name in ("replace", "rename", "write_bytes", "mkdir", "unlink"):
    setattr(Path, name, dying(getattr(Path, name)))
os.fsync, shutil.rmtree = dying(os.fsync), dying(shutil.rmtree)
path, made = Path(sys.argv[1]), Path(sys.argv[2])
bundles.add_files(bundles.open_bundle(path, rebuilt=sys.argv[4:]), sorted(made.iterdir()))
print(left)
"""
ADDED = {"bench.json": b"{}", "model.engine": b"engine", "recipe.yaml": b"new: 1"}


def kill_adding(path, made, steps):
    made.mkdir()
    for name, data in ADDED.items():
        (made / name).write_bytes(data)
    command = [sys.executable, "-c", KILLED, *map(str, (path, made, steps)), *ADDED]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_bundle_to_which_files_are_added_is_old_or_new_wherever_the_process_is_killed(tmp_path):
    found, steps = [], 0
    while True:
        path = write(tmp_path / str(steps) / "out").path
        done = kill_adding(path, tmp_path / str(steps) / "made", steps)
        opened = open_bundle(path)
        names = set(opened.manifest["files"]) & set(ADDED)
        found.append(names)
        if names == set(ADDED):
            assert {name: (path / name).read_bytes() for name in ADDED} == ADDED
        else:
            assert names == {"recipe.yaml"}
            assert (path / "recipe.yaml").read_bytes() == b""
        # the same addition again, and nothing of ours beside the bundle but what the sweep knows by its name
        again = kill_adding(path, tmp_path / str(steps) / "again", 1000)
        assert again.returncode == 0, again.stderr
        assert set(ADDED) <= set(open_bundle(path).manifest["files"])
        beside = {name for name in os.listdir(path.parent) if name.startswith(".")}
        assert all(name.startswith(".out.part-") for name in beside), beside
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        steps += 1
    assert steps > 12
    assert found == sorted(found, key=len)  # once it is the new bundle, it stays the new one
    assert {len(names) for names in found} == {1, 3}


def test_an_addition_that_fits_another_bundle_is_dropped(path, tmp_path):
    other = write(tmp_path / "elsewhere" / "out", name="another").path
    addition = path.with_name(".out.adding")
    shutil.copytree(other, addition)
    (addition / "model.onnx").write_bytes(b"changed")
    before = (path / "manifest.json").read_bytes()
    assert open_bundle(path).manifest["name"] == "small.onnxruntime.fp32"
    assert (path / "manifest.json").read_bytes() == before
    assert not addition.exists()


@pytest.mark.parametrize("name", ["/dev/zero", "a\0b", "../.."])
def test_an_addition_reads_only_regular_files(path, name):
    addition = path.with_name(".out.adding")
    addition.mkdir()
    values = json.loads((path / "manifest.json").read_bytes()) | {"files": {name: {}}, "vectors": []}
    (addition / "manifest.json").write_bytes(canonical(seal(values)))
    assert "model.onnx" in open_bundle(path).manifest["files"]
    assert not addition.exists()


def test_an_addition_that_cannot_be_finished_is_refused_with_its_place(path, monkeypatch):
    shutil.copytree(path, path.with_name(".out.adding"), ignore=shutil.ignore_patterns("vectors"))

    def fail(self, target):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UsageError, match=r"cannot be finished: read-only.*\.out\.adding"):
        open_bundle(path)

"""Checkpoints as trainers write them: the right weights are found in them, and the choice is said."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import pathlib
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from edgedyn.checkpoints import nesting
from edgedyn.checkpoints.weights import load_weights
from edgedyn.errors import WeightsError


def make_net(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 3, 1)))
    net[1].running_mean.uniform_()
    return net


PLAIN, EMA = make_net(9).state_dict(), make_net(10).state_dict()
OTHER = nn.Linear(5, 5).state_dict()


def prefixed(prefix: str, state=None) -> dict:
    return {prefix + key: tensor for key, tensor in (PLAIN if state is None else state).items()}


def load(tmp_path, contents, net=None, name="w.pth"):
    torch.save(contents, tmp_path / name)
    net = make_net() if net is None else net
    return net, load_weights(net, tmp_path / name, trust=True)


def same(net: nn.Module, state) -> bool:
    return all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())


def optimizer() -> dict:
    net = make_net()
    adam = torch.optim.Adam(net.parameters())
    net(torch.rand(2, 3, 8, 8)).sum().backward()
    adam.step()
    return adam.state_dict()


NESTED = {
    "plain": (PLAIN, ()),
    "lightning": (
        {"epoch": 3, "state_dict": prefixed("model."), "optimizer_states": [optimizer()], "loops": {"a": {}}},
        ("taken from 'state_dict'", "prefix 'model.' removed"),
    ),
    "basicsr": ({"params": PLAIN}, ("taken from 'params'",)),
    "ddp": ({"model": prefixed("module."), "optimizer": optimizer()}, ("taken from 'model'", "'module.'")),
    "compiled_ddp": (
        {"model_state_dict": prefixed("module._orig_mod.")},
        ("taken from 'model_state_dict'", "prefix 'module._orig_mod.' removed"),
    ),
    "mmcv": (
        {"meta": {"epoch": 1, "CLASSES": ("a", "b")}, "state_dict": prefixed("backbone.")},
        ("'backbone.' removed",),
    ),
    "net": ({"net": PLAIN, "acc": 91.2}, ("taken from 'net'",)),
    "deep": ({"network": {"generator": prefixed("net.")}}, ("taken from 'network.generator'", "'net.'")),
    "gan": ({"discriminator": OTHER, "generator": PLAIN}, ("taken from 'generator'",)),
    "unheard_of": ({"denoiser_weights": prefixed("a.b.c.")}, ("'denoiser_weights'", "'a.b.c.' removed")),
    "loss_beside": (
        {"state_dict": prefixed("net.") | prefixed("loss.vgg.", OTHER)},
        ("prefix 'net.' removed", "2 tensors beside it ignored"),
    ),
    "swa": (
        AveragedModel(nn.Sequential(*make_net(9))).state_dict(),
        ("'module.' removed", "1 tensors beside"),
    ),
    "numbers": (
        {"state_dict": PLAIN, "best": np.float64(31.2), "step": np.int64(5), "epoch": 3, "name": "x"},
        ("taken from 'state_dict'",),
    ),
    "timm": (
        {"arch": "net", "state_dict": PLAIN, "args": argparse.Namespace(lr=0.1, out=pathlib.Path("/x"))},
        ("taken from 'state_dict'",),
    ),
    "history": (
        {
            "model": PLAIN,
            "losses": np.ones(3),
            "at": datetime.datetime(2026, 1, 1),
            "log": collections.Counter("ab"),
        },
        ("taken from 'model'",),
    ),
    "fsdp_parts": (
        {"model": {key.replace("2.0.", "2._fsdp_wrapped_module.0."): t for key, t in PLAIN.items()}},
        ("taken from 'model'", "_fsdp_wrapped_module removed from keys"),
    ),
    "compiled_part": (
        {key.replace("2.0.", "2._orig_mod.module.0."): tensor for key, tensor in prefixed("net.").items()},
        ("'net.' removed", "_orig_mod and module removed from keys"),
    ),
    "ordered": ({"params": collections.OrderedDict(PLAIN)}, ("taken from 'params'",)),
}


@pytest.mark.parametrize("name", NESTED)
def test_weights_are_found_where_trainers_put_them_and_the_place_is_said(tmp_path, name):
    contents, said = NESTED[name]
    net, notes = load(tmp_path, contents)
    assert same(net, PLAIN)
    for part in said:
        assert part in "; ".join(notes)
    assert bool(said) == bool(notes)


AVERAGED = {
    "basicsr": {"params": PLAIN, "params_ema": EMA},
    "basicsr_turned": {"params_ema": EMA, "params": PLAIN},
    "timm": {"state_dict": PLAIN, "state_dict_ema": EMA},
    "model_ema": {"model": prefixed("module."), "model_ema": prefixed("module.", EMA)},
    "ema": {"model": PLAIN, "ema": EMA, "optimizer": optimizer()},
    "camel": {"model": PLAIN, "modelEMA": EMA},
    "average": {"moving_average": EMA, "model": PLAIN},
    "avg": {"model": PLAIN, "model_avg": EMA},
    "nested": {"ema": {"decay": 0.99, "model": prefixed("module.", EMA)}, "model": prefixed("module.")},
    "by_prefix": {"state_dict": prefixed("net.") | prefixed("ema_net.", EMA)},
    "ema_pytorch": prefixed("online_model.") | prefixed("ema_model.", EMA) | {"step": torch.tensor(3)},
}


@pytest.mark.parametrize("name", AVERAGED)
def test_averaged_weights_are_taken_and_said_where_both_stand(tmp_path, name):
    net, notes = load(tmp_path, AVERAGED[name])
    assert same(net, EMA)
    assert "averaged weights (EMA), which stand beside plain ones" in notes


def test_averaged_weights_of_another_network_are_not_taken(tmp_path):
    net, notes = load(tmp_path, {"params": PLAIN, "params_ema": OTHER})
    assert same(net, PLAIN)
    assert notes == ("taken from 'params'",)


def test_of_two_sets_the_one_without_other_tensors_is_taken(tmp_path):
    net, notes = load(tmp_path, {"a": prefixed("net.", EMA) | prefixed("loss.", OTHER), "b": PLAIN})
    assert same(net, PLAIN)
    assert notes == ("taken from 'b'",)


def test_another_set_that_fits_as_well_is_said(tmp_path):
    net, notes = load(tmp_path, {"netG_A": PLAIN, "netG_B": EMA})
    assert same(net, PLAIN)
    assert "'netG_B' fits as well" in ", ".join(notes)
    net, notes = load(tmp_path, {**prefixed("student."), **prefixed("teacher.", EMA)})
    assert same(net, PLAIN)
    assert "'teacher' fits as well" in ", ".join(notes)
    same_twice = {"model": PLAIN, "state_dict": PLAIN}
    assert "fits as well" not in ", ".join(load(tmp_path, same_twice)[1])


def test_a_crafted_file_of_many_prefixes_makes_few_candidates():
    value = torch.zeros(4)
    tensors = {f"p{k}.{'2.0.bias.' * 20}2.0.bias": value for k in range(300)}
    candidates = list(nesting._prefixes((), tensors, {"2.0.bias": value}))
    assert len(candidates) == 1 + nesting._PREFIXES
    shared = {"deep": {"state": PLAIN}}
    again = {"a": shared, "b": shared, "c": {"d": shared}}
    assert len(list(nesting._tensors(again, (), set()))) == 1


def test_a_set_of_other_shapes_is_passed_over(tmp_path):
    wide = PLAIN | {"0.weight": torch.zeros(8, 3, 3, 3)}
    net, notes = load(tmp_path, {"wide": wide, "b": PLAIN})
    assert same(net, PLAIN)
    assert notes == ("taken from 'b'",)


def test_wrappers_whose_removal_would_join_two_keys_stay(tmp_path):
    twice = PLAIN | prefixed("module.", EMA)
    net, notes = load(tmp_path, twice)
    assert same(net, EMA)
    assert notes == ("prefix 'module.' removed", "9 tensors beside it ignored")


def test_a_wrapper_of_the_network_itself_stays_in_its_keys(tmp_path):
    inner = nn.ModuleDict({"a": nn.ModuleDict({"module": make_net()})})
    net, notes = load(tmp_path, prefixed("net.a.module."), inner)
    assert same(net, prefixed("a.module."))
    assert notes == ("prefix 'net.' removed",)


def test_a_prefix_of_the_network_itself_is_not_removed(tmp_path):
    inner = nn.ModuleDict({"model": make_net()})
    net, notes = load(tmp_path, prefixed("model."), inner)
    assert same(net, prefixed("model."))
    assert notes == ()


def test_safetensors_are_unwrapped_likewise(tmp_path):
    save_file(prefixed("module."), tmp_path / "w.safetensors")
    net = make_net()
    assert load_weights(net, tmp_path / "w.safetensors") == ("prefix 'module.' removed",)
    assert same(net, PLAIN)


def test_counters_of_norms_may_be_missing(tmp_path):
    state = {key: tensor for key, tensor in PLAIN.items() if "num_batches" not in key}
    net, notes = load(tmp_path, {"state_dict": state})
    assert all(torch.equal(net.state_dict()[key], tensor) for key, tensor in state.items())
    assert notes == ("taken from 'state_dict'",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_converted_and_said(tmp_path, dtype):
    state = {key: t.to(dtype) if t.is_floating_point() else t for key, t in PLAIN.items()}
    net, notes = load(tmp_path, state)
    assert net[0].weight.dtype == torch.float32
    assert torch.equal(net[0].weight, PLAIN["0.weight"].to(dtype).float())
    assert notes == (f"{str(dtype).removeprefix('torch.')} converted to float32",)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("old", [False, True])
def test_both_spellings_of_normed_weights_fit_both_modules(tmp_path, kind, old):
    makers = [getattr(nn.utils, kind), getattr(parametrizations, kind)]
    torch.manual_seed(0)
    saved, own = makers[::-1] if old else makers
    source = saved(nn.Conv2d(3, 4, 3)).eval()
    net, notes = load(tmp_path, source.state_dict(), own(nn.Conv2d(3, 4, 3)).eval())
    assert notes == ("weight_norm or spectral_norm spelled as in the network",)
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(net(x), source(x), rtol=1e-6, atol=1e-6)


def refused(path) -> str:
    net = make_net()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(net, path, trust=True)
    assert same(net, before)
    text = str(caught.value)
    assert len(text) < 700
    assert "weights_only" not in text
    assert "pytorch.org" not in text
    return text


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: {"ema": net, "epoch": 3}])
def test_a_pickled_module_is_refused_in_our_words(tmp_path, wrap):
    torch.save(wrap(make_net()), tmp_path / "w.pt")
    text = refused(tmp_path / "w.pt")
    assert "are a pickled module (torch.nn.modules" in text
    assert "torch.save(model.state_dict()" in text


class History:
    """A class of a trainer."""


def test_an_object_of_any_other_class_is_refused_by_its_name(tmp_path):
    torch.save({"state_dict": PLAIN, "history": History()}, tmp_path / "w.ckpt")
    assert f"containers and numbers, {__name__}.History" in refused(tmp_path / "w.ckpt")


OTHERS = {
    "w.npz": (lambda path: np.savez(path, a=np.ones(3)), r"a NumPy archive; .*save_file\("),
    "n.pth": (lambda path: np.savez(path.open("wb"), a=np.ones(3)), "a NumPy archive"),
    "w.npy": (lambda path: np.save(path, np.ones(3)), "a NumPy array"),
    "w.h5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file of Keras"),
    "w.onnx": (lambda path: path.write_bytes(b"\x08\x0a\x12\x07pytorch"), "an ONNX model"),
    "w.pb": (lambda path: path.write_bytes(b"\x0a\x07abc"), "a TensorFlow graph"),
    "m.ckpt.index": (lambda path: path.write_bytes(b"\0\0\1abc"), "the index of a TensorFlow checkpoint"),
    "w.pth": (lambda path: path.write_text("\n<!DOCTYPE html>"), "a web page; .* Fetch the file itself"),
    "w.safetensors": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n"),
        "a Git LFS pointer, .* git lfs pull",
    ),
    "model.safetensors.index.json": (
        lambda path: path.write_text('{"weight_map": {}}'),
        "the index of several files; .* Join them",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_kind_is_refused_by_its_kind(tmp_path, name):
    write, words = OTHERS[name]
    write(tmp_path / name)
    assert re.search(words, refused(tmp_path / name))


def test_a_header_that_starts_like_a_web_page_is_read(tmp_path):
    tensor = torch.arange(3.0)
    header = b'{"weight":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    size = len(header) + (ord("<") - len(header)) % 256
    data = size.to_bytes(8, "little") + header.ljust(size) + tensor.numpy().tobytes()
    (tmp_path / "w.safetensors").write_bytes(data)
    net = nn.LayerNorm(3, bias=False)
    load_weights(net, tmp_path / "w.safetensors")
    assert data.startswith(b"<")
    assert torch.equal(net.weight, tensor)


def test_torchscript_is_refused_by_its_name(tmp_path):
    torch.jit.script(make_net()).save(tmp_path / "w.pt")
    assert "are a TorchScript program" in refused(tmp_path / "w.pt")


def test_a_tar_file_is_refused_by_its_name(tmp_path):
    with tarfile.open(tmp_path / "w.pth", "w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert "tar format of PyTorch before 0.1.10" in refused(tmp_path / "w.pth")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"a": torch.zeros(8_000_000)}, tmp_path / "big.pth")
    with zipfile.ZipFile(tmp_path / "big.pth") as big, zipfile.ZipFile(tmp_path / "w.pth", "w") as small:
        for name in big.namelist():
            small.writestr(name, big.read(name), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "w.pth").stat().st_size < 10**6
    assert "and unpack to 32" in refused(tmp_path / "w.pth")


def test_a_tensor_that_claims_more_values_than_it_has_is_refused(tmp_path):
    state = PLAIN | {"0.weight": torch.zeros(1).expand(4, 3, 3, 3)}
    torch.save(state, tmp_path / "w.pth")
    assert "'0.weight' as a sparse, quantized, empty or expanded tensor" in refused(tmp_path / "w.pth")


@pytest.mark.parametrize("keep", [0, 10, 500, -1])
def test_a_damaged_file_is_refused(tmp_path, keep):
    torch.save(PLAIN, tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:keep])
    assert "cannot be loaded as tensors only" in refused(tmp_path / "w.pth")


def test_an_archive_that_claims_several_disks_is_refused(tmp_path):
    torch.save(PLAIN, tmp_path / "w.pth")
    data = bytearray((tmp_path / "w.pth").read_bytes())
    data[data.rindex(b"PK\x06\x07") + 4] = 1  # the disk of the zip64 record
    (tmp_path / "w.pth").write_bytes(data)
    assert "the archive is damaged" in refused(tmp_path / "w.pth")


def test_the_best_candidate_is_shown_with_one_key_of_each_kind(tmp_path):
    state = prefixed("module.") | {
        "module.tail.weight": torch.zeros(1),
        "module.0.weight": torch.zeros(8, 3, 3, 3),
    }
    del state["module.0.bias"]
    torch.save({"optimizer": optimizer(), "model": state}, tmp_path / "w.pth")
    text = refused(tmp_path / "w.pth")
    assert "1 keys missing, 1 unknown, 1 of another shape" in text
    assert (
        "'0.weight', (8, 3, 3, 3) against (4, 3, 3, 3); '0.bias' (missing); 'tail.weight' (unknown)" in text
    )
    assert "model.network" in text

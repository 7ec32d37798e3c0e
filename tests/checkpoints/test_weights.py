"""Weights files: a fitting one is loaded exactly, any other is refused before it can do harm."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgedyn.checkpoints.weights import load_weights, settle_norms
from edgedyn.errors import ModelError, WeightsError


def make_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def make_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    state = {
        key: torch.rand_like(t) if t.is_floating_point() else t + 5
        for key, t in make_net().state_dict().items()
    }
    assert len(state) == 7
    return state


def write(folder: Path, state: dict[str, torch.Tensor] | None = None, name: str = "w.safetensors") -> Path:
    save_file(make_state() if state is None else state, folder / name)
    return folder / name


def refused(path: Path, **arguments) -> str:
    net = make_net()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(net, path, **arguments)
    assert all(torch.equal(before[key], tensor) for key, tensor in net.state_dict().items())
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)
    return str(caught.value)


def assert_loaded(net: nn.Module) -> None:
    assert all(torch.equal(tensor, make_state()[key]) for key, tensor in net.state_dict().items())


def test_whole_file_with_the_right_digest_is_loaded(tmp_path):
    path, net = write(tmp_path), make_net()
    load_weights(net, path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    assert_loaded(net)


def test_header_of_any_length_is_no_pickle(tmp_path):
    """A pickle starts with byte 0x80; so does a safetensors file whose header length ends in it."""
    for length in range(256):
        path = tmp_path / f"{length}.safetensors"
        save_file(make_state(), path, metadata={"note": "x" * length})
        if path.read_bytes()[0] == 0x80:
            net = make_net()
            load_weights(net, path)
            assert_loaded(net)
            return
    pytest.fail("no header length ended in 0x80")


def test_missing_file_says_where_to_set_another(tmp_path):
    text = refused(tmp_path / "none.safetensors")
    assert "do not exist; expected a safetensors file" in text
    assert "--set model.weights=PATH" in text


@pytest.mark.parametrize("place", [".", "/dev/zero"])
def test_folders_and_devices_are_no_weights_files(tmp_path, place):
    assert "are no regular file; expected a safetensors file" in refused(tmp_path / place)


def test_wrong_digest_names_both(tmp_path):
    path = write(tmp_path)
    text = refused(path, sha256="0" * 64)
    assert hashlib.sha256(path.read_bytes()).hexdigest() in text
    assert f"expects {'0' * 64}" in text
    assert "model.sha256" in text


def test_torch_save_file_is_refused_without_trust(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(make_state(), path)
    text = refused(path)
    assert "are a pickle, which can run code" in text
    assert "pass --trust" in text


@pytest.mark.parametrize("wrap", ["", "state_dict", "params", "model"])
def test_trusted_torch_save_file_is_loaded_as_tensors(tmp_path, wrap):
    path, net = tmp_path / "w.pth", make_net()
    torch.save({wrap: make_state()} if wrap else make_state(), path)
    load_weights(net, path, trust=True)
    assert_loaded(net)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", ["pickle", "torch"])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("trust", [False, True])
def test_pickle_never_runs_its_code_under_any_name(tmp_path, save, name, trust):
    path, proof = tmp_path / name, tmp_path / "it_ran"
    if save == "torch":
        torch.save({"weight": Bomb(proof)}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": Bomb(proof)}))
    text = refused(path, trust=trust)
    assert ("cannot be loaded as tensors only" if trust else "are a pickle") in text
    assert not proof.exists()


def test_trusted_file_without_tensors_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"epoch": 3}, path)
    assert "are not a state_dict (name -> tensor)" in refused(path, trust=True)


def test_zip_with_another_name_is_taken_for_a_pickle(tmp_path):
    path = tmp_path / "w.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    assert "are a pickle" in refused(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_value_that_is_not_finite_is_refused_by_name(tmp_path, value):
    state = make_state()
    state["1.running_var"][2] = value
    assert "NaN or infinity in 1 tensors, the first is '1.running_var'" in refused(write(tmp_path, state))


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_file_is_refused(tmp_path, keep):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    assert "are not a whole safetensors file" in refused(path)


def test_file_of_another_network_is_refused_with_counts(tmp_path):
    state = make_state()
    state["tail.weight"] = state.pop("0.weight")
    text = refused(write(tmp_path, state))
    assert (
        "do not fit Sequential: 1 keys missing, 1 unknown, 0 of another shape, the first is '0.weight'"
        in text
    )
    assert "model.arguments" in text


def test_file_of_another_width_is_refused_with_both_shapes(tmp_path):
    state = make_state() | {"0.weight": torch.zeros(8, 3, 3, 3)}
    text = refused(write(tmp_path, state))
    assert "1 of another shape, the first is '0.weight', (8, 3, 3, 3) against (4, 3, 3, 3)" in text


def test_untrained_norms_take_the_statistics_of_what_they_see():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    x = torch.rand(5, 3, 8, 12)
    assert settle_norms(net, (x,)) == 2
    with torch.no_grad():
        seen = net[0](x)
        torch.testing.assert_close(net[1].running_mean, seen.mean((0, 2, 3)))
        torch.testing.assert_close(net[1].running_var, seen.var((0, 2, 3)))
    assert not any(module.training for module in net.modules())
    assert {norm.momentum for norm in (net[1], net[3])} == {0.1}


def test_norms_of_a_network_that_cannot_run_are_left_in_evaluation_mode():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(4, 4, 1)).eval()
    with pytest.raises(RuntimeError):
        settle_norms(net, (torch.rand(2, 3, 4, 6),))
    assert not net[0].training
    assert net[0].momentum == 0.1


def test_batch_norm_that_keeps_no_statistics_is_left_alone():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4)
    ).eval()
    assert settle_norms(net, (torch.rand(2, 3, 4, 6),)) == 1
    assert net[1].running_var is None


def test_every_path_of_a_network_that_picks_one_is_seen():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

        def forward(self, x):
            return self.norms[0](x)

        def every_path(self, x):
            return [norm(x) for norm in self.norms]

    assert settle_norms(Picky().eval(), (torch.rand(2, 3, 4, 6),)) == 2


def test_norm_statistics_that_are_not_finite_are_refused():
    net = nn.Sequential(nn.BatchNorm2d(3)).eval()
    with pytest.raises(ModelError, match=r"BatchNorm '0' has statistics .* not finite"):
        settle_norms(net, (torch.full((2, 3, 4, 6), float("inf")),))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.int64,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
    ids=str,
)
def test_weights_of_another_kind_of_number_are_refused(tmp_path, dtype):
    state = make_state()
    state["0.weight"] = torch.ones_like(state["0.weight"]).to(dtype)
    message = refused(write(tmp_path, state))
    assert f"{dtype} in '0.weight'; expected floating-point values" in message


def test_a_count_that_is_no_integer_is_refused(tmp_path):
    state = make_state()
    state["1.num_batches_tracked"] = torch.tensor(1.5)
    assert "'1.num_batches_tracked'; expected integer values" in refused(write(tmp_path, state))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_floating_point_weights_of_another_width_are_taken(tmp_path, dtype):
    state = {key: t.to(dtype) if t.is_floating_point() else t.int() for key, t in make_state().items()}
    net = make_net()
    load_weights(net, write(tmp_path, state))
    assert all(torch.equal(t, state[key].to(t.dtype)) for key, t in net.state_dict().items())

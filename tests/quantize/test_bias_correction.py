"""Without NNCF everything works but bias correction, which is refused before long work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_networks import make_input, make_net
from typer.testing import CliRunner

from edgedyn import pipeline, quantize, targets
from edgedyn.cli.app import app
from edgedyn.errors import TargetMissingError
from edgedyn.quantize import CalibrationInputs, Int8Method
from edgedyn.recipe.keys import QuantizeSection

RECIPES = Path(__file__).parents[2] / "recipes"
SCHEME = targets.load("executorch").int8
WITHOUT_NNCF = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "nncf":
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
"""


def run_without_nncf(code: str) -> subprocess.CompletedProcess:
    tests = Path(__file__).parents[1]
    script = f"{WITHOUT_NNCF}\nsys.path.insert(0, {str(tests)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_int8_is_calibrated_and_applied_without_nncf():
    done = run_without_nncf(
        """
import edgedyn.quantize.rounding.bias_correction, torch
from small_int8 import quantize_program
from small_networks import make_input, make_net
from edgedyn import targets
from edgedyn.recipe.keys import QuantizeSection

x = (make_input((1, 3, 10, 14)),)
made = quantize_program(
    torch.export.export(make_net(), x), x,
    scheme=targets.load("executorch").int8, section=QuantizeSection(finetune=1), samples=[x],
)
assert not [name for name in sys.modules if name.startswith("nncf")]
print(made.int8_mac_share)
"""
    )
    assert done.stdout == "1.0\n", done.stderr


def test_block_of_nncf_blocks():
    assert "nncf is blocked" in run_without_nncf("import nncf").stderr


@pytest.fixture
def without_nncf(monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)  # an import of it raises ImportError


@pytest.mark.parametrize("how", ["fast", "full"])
def test_bias_correction_is_refused_before_a_sample_is_looked_at(how, without_nncf):
    program = torch.export.export(make_net(), (make_input((1, 3, 10, 14)),))
    method = Int8Method(SCHEME, QuantizeSection(bias_correction=how))
    with pytest.raises(TargetMissingError, match=rf"^quantize\.bias_correction: {how} .*NNCF") as error:
        quantize.calibrate(program, CalibrationInputs([]), method)  # without samples: refused after NNCF is
    assert 'Install it: pip install "edgedyn[nncf]"' in str(error.value)
    assert error.value.exit_code == 3


def test_ablation_needs_nncf_whatever_the_method_is(without_nncf):
    quantize.refuse_missing_tools(QuantizeSection())
    with pytest.raises(TargetMissingError, match=r"^the ablation corrects .*or leave the ablation out"):
        quantize.refuse_missing_tools(QuantizeSection(), ablates=True)


@pytest.mark.parametrize("options", [["--set", "quantize.bias_correction=fast"], ["--ablation"]])
def test_command_ends_with_3_before_the_network_is_rewritten(tmp_path, monkeypatch, without_nncf, options):
    monkeypatch.setattr(pipeline, "rewrite_network", lambda *_, **__: pytest.fail("long work began"))
    recipe = str(RECIPES / "mallenet-s.phone.int8.yaml")
    done = CliRunner().invoke(app, ["calibrate", recipe, *options, "-o", str(tmp_path / "table.json")])
    assert isinstance(done.exception, TargetMissingError), done.output
    assert done.exception.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_installed_nncf_is_accepted():
    quantize.refuse_missing_tools(QuantizeSection(bias_correction="full"), ablates=True)

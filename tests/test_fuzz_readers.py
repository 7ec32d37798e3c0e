"""A few damaged files for every reader; ``make test-long`` damages 10,000 for each."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from random import Random

import fuzz_readers
import pytest
import reader_targets
from mutations import mutate, mutate_json
from reader_targets import TARGETS, Target

from edgedyn.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore")  # of Pillow, about damaged TIFF
MUTATIONS = 40
QUICK = [name for name in reader_targets.quick() if not fuzz_readers.missing(name)]


@pytest.mark.parametrize("name", QUICK)
def test_reader_takes_damaged_files_or_refuses_them(name):
    target = TARGETS[name]()
    found = list(fuzz_readers.outcomes(target, name, range(10**6, 10**6 + MUTATIONS)))
    assert [outcome for outcome in found if outcome not in ("ok", "refused")] == []
    assert "refused" in found


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(TARGETS) - set(reader_targets.quick())))
def test_bundle_with_damage_and_digests_that_fit_is_no_wrong_ok(name):
    found = list(fuzz_readers.run_batch(name, 10**6, 20, 60, time.monotonic() + 900))
    assert len(found) == 20
    assert {outcome for outcome, _ in found} <= {"ok", "refused"}


def read(path: Path) -> object:
    """Read a file whose first letter chooses an outcome."""
    letter = path.read_bytes()[:1]
    if letter == b"r":
        raise UsageError("refused")
    if letter == b"u":
        raise UsageError(f"{path.read_bytes()!r}") from None
    if letter == b"e":
        raise KeyError("x")
    if letter == b"w":
        raise reader_targets.WrongOkError("other output")
    if letter == b"c":
        os.kill(os.getpid(), signal.SIGSEGV)
    if letter == b"h":
        time.sleep(60)
    return None


def letters() -> Target:
    turn = iter("orewcho" * 10)
    order = [next(turn).encode() for _ in range(14)]
    return Target((b"o",), "file", read, damage=lambda random: order[random.randrange(14)])


def test_each_kind_of_fault_is_counted_and_the_run_goes_on(tmp_path, monkeypatch):
    script = tmp_path / "fuzz.py"
    tools = Path(fuzz_readers.__file__).parent
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(tools)!r}, {str(Path(__file__).parent)!r}]\n"
        "import reader_targets, fuzz_readers, test_fuzz_readers, typer\n"
        "reader_targets.TARGETS['letters'] = test_fuzz_readers.letters\n"
        "typer.run(fuzz_readers.main)\n"
    )
    monkeypatch.setattr(fuzz_readers, "__file__", str(script))
    monkeypatch.setitem(TARGETS, "letters", letters)
    found = [outcome for outcome, _ in fuzz_readers.run_batch("letters", 0, 20, 1.0, time.monotonic() + 300)]
    assert len(found) == 20
    assert set(found) == {"ok", "refused", "exceptions", "wrong_ok", "crashes", "hangs"}
    out = tmp_path / "counts.json"
    for mutations in (10, 15):
        with pytest.raises(SystemExit):
            fuzz_readers.main(["recipe"], mutations=mutations, out=out)
        assert json.loads(out.read_text())["targets"]["recipe"]["mutations"] == mutations


def test_a_target_that_refuses_whole_files_is_an_error_and_no_success(tmp_path, monkeypatch):
    script = tmp_path / "fuzz.py"
    script.write_text("import sys\nprint('no such package', file=sys.stderr)\nsys.exit(1)\n")
    monkeypatch.setattr(fuzz_readers, "__file__", str(script))
    with pytest.raises(RuntimeError, match="no such package"):
        list(fuzz_readers.run_batch("recipe", 0, 10, 1.0, time.monotonic() + 60))


def test_a_seed_repeats_its_damage_and_damage_is_of_every_kind():
    data = bytes(range(256)) * 4
    first = [mutate(data, [data], Random(seed), is_text=False) for seed in range(200)]
    assert first == [mutate(data, [data], Random(seed), is_text=False) for seed in range(200)]
    assert len(set(first)) > 190
    assert {len(x) > len(data) for x in first} == {True, False}
    values = {"a": [1, 2.5, {"b": "c"}], "d": None}
    trees = [json.dumps(mutate_json(values, Random(seed))) for seed in range(200)]
    assert len(set(trees)) > 100
    assert values == {"a": [1, 2.5, {"b": "c"}], "d": None}

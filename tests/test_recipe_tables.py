"""recipes/README.md: every recipe in the table of its network, with the numbers of docs/measurements/."""

from __future__ import annotations

import re
from pathlib import Path

import recipe_tables

PAGE = recipe_tables.recipes_page()
RECIPES = Path(recipe_tables.ROOT, "recipes")


def section(network: str) -> str:
    return PAGE.partition(f"\n## {network}\n")[2].partition("\n## ")[0]


def test_every_recipe_stands_in_the_table_of_its_network():
    for path in RECIPES.glob("*.yaml"):
        row = f"| [{path.stem}]({path.name}) |"
        assert row in section(path.name.partition(".")[0])
        assert PAGE.count(row) == 1


def test_numbers_are_those_of_the_measurements():
    rows = section("ffdnet-color").splitlines()
    (int8,) = (row for row in rows if "phone.int8" in row)
    assert re.search(r"\| 97\.5 % \| [\d.]+ \| - \| \[0\.\d+, 0\.\d+, 0\.\d+ dB\]", int8)
    assert int8.endswith("(../docs/measurements/int8-ffdnet-color.json) at sigma 15, 25, 50 |")
    (jetson,) = (row for row in rows if "jetson.int8" in row)
    assert jetson.split(" | ")[2] == "-"  # bench.json has no Jetson
    (built,) = (row for row in section("mallenet-s").splitlines() if "phone.fp32" in row)
    assert re.search(r"\| - \| \d+\.\d \| \d\.\d\d MB \| - \|$", built)


def test_summary_names_neither_target_nor_precision():
    assert "\nSlimmable DnCNN (DDS-Net), 4 widths and a gate. Not trained:" in section("slimmable-dncnn")
    assert not re.search(r"\. (ExecuTorch|TensorRT), ", PAGE)


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert len(links) > 60
    assert [link for link in links if not (RECIPES / link).is_file()] == []

"""Copies recipes/ and calib/ into the wheel, as edgedyn/shipped/; pyproject.toml has everything else.

A wheel has one top-level folder, ``edgedyn``, and setuptools copies package data only from inside of it. An
editable install copies nothing: there both folders stand beside the package.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copy the package, then the recipes with their weights and image sets."""

    def run(self) -> None:
        """Build as setuptools does, and add the two folders."""
        super().run()
        if self.editable_mode:
            return
        for folder in ("recipes", "calib"):
            copy = Path(self.build_lib, "edgedyn", "shipped", folder)
            shutil.rmtree(copy, ignore_errors=True)  # of an earlier build
            shutil.copytree(folder, copy)


setup(cmdclass={"build_py": BuildWithRecipes})

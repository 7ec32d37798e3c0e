"""Every reader of files of strangers, as a target of ``fuzz_readers.py``: its seeds and how it is called.

A target reads one damaged file. It returns, or it raises an EdgedynError; anything else is a fault.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from mutations import mutate, mutate_json

from edgedyn.cache import cached_path
from edgedyn.device import programs
from edgedyn.errors import EdgedynError

ROOT = Path(__file__).parents[1]


def _folder() -> Path:
    """Return a folder for whole files that take long to make; another one after each change of the code."""
    sources = sorted((ROOT / "edgedyn").rglob("*.py"))
    path = cached_path("seeds", sources)
    path.mkdir(parents=True, exist_ok=True)
    return path


class WrongOkError(Exception):
    """Damage was accepted, and the outputs are other ones."""


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        seeds: whole files, by the name of the file that the reader is given.
        read: reads the file at a path, in a folder of its own.
        is_text: whether words are damaged rather than bytes.
        damage: in place of ``mutate``: random -> bytes.
    """

    seeds: tuple[bytes, ...]
    name: str
    read: Callable[[Path], object]
    is_text: bool = False
    damage: Callable[[Random], bytes] | None = None

    def file(self, random: Random) -> bytes:
        """Return a damaged file."""
        if self.damage is not None and random.random() < 0.8:
            return self.damage(random)
        return mutate(random.choice(self.seeds), self.seeds, random, is_text=self.is_text)


def _recipe() -> Target:
    from edgedyn.recipe.recipe import load_recipe

    seeds = tuple(path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))[::4])
    seeds += ((ROOT / "recipes/mallenet-s.phone.int8.yaml").read_bytes(),)

    def read(path: Path) -> object:
        recipe = load_recipe(path)
        return recipe.to_yaml(), recipe.digest(), recipe.input_specs(), recipe.sets_noise

    return Target(seeds, "net.yaml", read, is_text=True)


def _override() -> Target:
    from edgedyn.recipe.recipe import load_recipe

    texts = ["precision=fp32", "quantize.keep_float=[tail, levels.*]", "input.shape=[1, 3, 64, 96]"]
    texts += ["limits.drop_db=1e-1", "model.arguments={width: 4}", "model.weights=a.safetensors"]
    texts += ["noise={kind: gaussian, sigma: [5.0], clip: true}", "quantize.ranges.percentile=99.9"]

    def read(path: Path) -> object:
        override = path.read_bytes().decode("utf-8", "surrogateescape")
        recipe = load_recipe(ROOT / "recipes/mallenet-s.phone.int8.yaml", [override])
        return recipe.to_yaml(), recipe.digest()

    return Target(tuple(text.encode() for text in texts), "override", read, is_text=True)


def _set_manifest() -> Target:
    from edgedyn.images.manifest import read_manifest

    seeds = tuple(path.read_bytes() for path in sorted((ROOT / "calib").glob("*.yaml")))
    return Target(seeds, "set.yaml", read_manifest, is_text=True)


def _labels() -> Target:
    from edgedyn.images.folder import list_folder

    def read(path: Path) -> object:
        for name in ("a.png", "b.png"):
            (path.parent / name).touch()
        return list_folder(path.parent)

    return Target((b"file,class\na.png,cat\nb.png,dog\n", b"a.png,0\nb.png,12\n"), "labels.csv", read, True)


def _training_recipe() -> Target:
    from edgedyn.training.recipe import load_training_recipe

    seeds = tuple(path.read_bytes() for path in sorted((ROOT / "recipes/train").glob("*.yaml")))
    return Target(seeds, "train.yaml", lambda path: load_training_recipe(path).plan.plan(), is_text=True)


def _table() -> Target:
    from edgedyn.quantize.observe.histogram import Histogram
    from edgedyn.quantize.table.entries import Entry, LayerCost, Outcome, Point, Precision, sealed
    from edgedyn.quantize.table.table import CalibrationTable, _whole, read_table

    histogram = Histogram.of(np.random.default_rng(0).standard_normal(50))
    entries = (
        Entry("x", "feature", histogram, "mse", (0.1, -3), 0.2),
        Entry("a.weight", "weight", histogram, "minmax", channels=(0.25, 0.1)),
    )
    precision = Precision((LayerCost("a", 0.5, 20.0, 0.1),), (Point(0, 1.0, 0.2),), ("a",), 0.1)
    table = CalibrationTable(
        {"model": {"network": "net"}, "data": "cd"},
        {"name": "photos", "files": [{"name": "a.png"}]},
        {"forward": entries},
        {"forward/a.bias": np.float32([1, 2])},
        {"forward": precision},
        {"forward": {"rounding": 0.1}},
        (Outcome("mask", "a", 3, 7, 4, 0.1, 0.9),),
    )
    whole = _folder() / "t.json"
    table.write(whole)
    beside, values = whole.with_name("t.json.safetensors").read_bytes(), json.loads(whole.read_text())

    def bare(row: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if key != "sha256"}

    def damage(random: Random) -> bytes:
        """Damage the values of a table and write their digests anew."""
        broken = json.loads(json.dumps(values))
        part = random.choice(("programs", "precision", "coverage", "key", "images"))
        broken[part] = mutate_json(broken[part], random)
        try:
            for rows in broken["programs"].values():
                rows[:] = [sealed(bare(row)) for row in rows]
            for name, row in broken["precision"].items():
                broken["precision"][name] = sealed(bare(row))
            broken["coverage"] = [sealed(bare(row)) for row in broken["coverage"]]
            broken["sha256"] = _whole(broken)
        except (AttributeError, TypeError, KeyError):
            pass  # no table any more
        return json.dumps(broken).encode()

    def read(path: Path) -> object:
        path.with_name("t.json.safetensors").write_bytes(beside)
        found = read_table(path)
        return (
            repr(found),
            found.mismatch({"model": 1}),
            [e.to_json() for x in found.programs.values() for e in x],
        )

    return Target((whole.read_bytes(),), "t.json", read, is_text=True, damage=damage)


def _weights() -> Target:
    import torch
    from safetensors.torch import save

    from edgedyn.checkpoints.weights import load_weights

    def net() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))

    state = net().state_dict()
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}

    def read(path: Path) -> object:
        load_weights(net(), path)
        return None

    return Target((save(state), save(half)), "w.safetensors", read)


def _pickled_weights() -> Target:
    import torch

    from edgedyn.checkpoints.weights import load_weights

    def net() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))

    seeds = []
    for values in (net().state_dict(), {"state_dict": net().state_dict()}):
        file = io.BytesIO()
        torch.save(values, file)
        seeds.append(file.getvalue())

    def read(path: Path) -> object:
        load_weights(net(), path, trust=True)
        return None

    return Target(tuple(seeds), "w.pth", read)


def _picture(seed: int = 0) -> np.ndarray:
    rows, columns = np.mgrid[0:24, 0:40]
    noise = np.random.default_rng(seed).integers(0, 40, (24, 40, 3))
    return (np.stack([rows * 8, columns * 5, rows + columns], 2) + noise).clip(0, 255).astype(np.uint8)


def _photo(name: str, kind: str, variants: tuple[tuple[str, dict[str, Any]], ...]) -> Callable[[], Target]:
    def make() -> Target:
        from PIL import Image

        from edgedyn.images.formats import need_reader
        from edgedyn.images.photo import read_image

        need_reader(kind)
        seeds = []
        for mode, options in variants:
            file = io.BytesIO()
            Image.fromarray(_picture()).convert(mode).save(file, kind, **options)
            seeds.append(file.getvalue())
        damage = partial(_damage_png, seeds) if kind == "PNG" else None
        return Target(tuple(seeds), name, lambda path: _touch(read_image(path)), damage=damage)

    return make


def _damage_png(seeds: list[bytes], random: Random) -> bytes:
    """Damage one chunk of a PNG and write its checksum anew, so that the damage is read."""
    data = random.choice(seeds)
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    place = random.randrange(len(chunks))
    kind, content = chunks[place]
    if kind == b"IDAT" and random.random() < 0.7:
        content = zlib.compress(mutate(zlib.decompress(content), [content], random, is_text=False))
    else:
        content = mutate(content, [content], random, is_text=False)
    chunks[place] = (random.choice((kind, kind, kind, b"tRNS", b"PLTE", b"iCCP", b"eXIf", b"acTL")), content)
    checked = (
        len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
        for kind, content in chunks
    )
    return data[:8] + b"".join(checked)


def _touch(photo: Any) -> object:
    return photo.pixels.sum(), photo.alpha


def _tiff() -> Target:
    import tifffile

    from edgedyn.images.photo import read_image

    picture, seeds = _picture(), []
    for values, options in (
        (picture, {"photometric": "rgb"}),
        (picture.astype(np.uint16) * 257, {"photometric": "rgb", "compression": "zlib"}),
        (picture.astype(np.float32) / 255, {"photometric": "rgb"}),
        (picture[..., 0], {"tile": (16, 16)}),
    ):
        file = io.BytesIO()
        tifffile.imwrite(file, values, **options)
        seeds.append(file.getvalue())
    return Target(tuple(seeds), "a.tif", lambda path: _touch(read_image(path)))


def _array(name: str) -> Callable[[], Target]:
    def make() -> Target:
        from edgedyn.images.pixels import read_pixels

        file, half = io.BytesIO(), io.BytesIO()
        values = _picture().astype(np.float32) / 255
        (np.savez_compressed if name.endswith("npz") else np.save)(file, values)
        (np.savez if name.endswith("npz") else np.save)(half, values.astype(np.float16))
        return Target((file.getvalue(), half.getvalue()), name, read_pixels)

    return make


def _raw() -> Target:
    from edgedyn.images.bayer import RawSection
    from edgedyn.images.pixels import read_pixels

    raw = RawSection(width=8, height=6, bits=12, pattern="RGGB", black=64, white=4095)
    seed = np.random.default_rng(0).integers(0, 4096, 48, np.uint16).tobytes()
    return Target((seed,), "a.raw", lambda path: read_pixels(path, raw))


class _ForkedTrials:
    """The trial of a program, in a fork of this process: a new Python would import the runtime each time.

    Every 200th trial runs as users run it.
    """

    def __init__(self) -> None:
        self.run_tool, self.count = programs.run_tool, 0

    def __call__(self, command: Sequence[str], *, seconds: float) -> subprocess.CompletedProcess[str]:
        self.count += 1
        if self.count % 200 == 0:
            return self.run_tool(command, seconds=seconds)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                with suppress(EdgedynError):
                    programs._try_here(Path(command[-1]))
                status = 0
            finally:
                os._exit(status)
        end = time.monotonic() + seconds
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise subprocess.TimeoutExpired(command, seconds)
            time.sleep(0.002)
        return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(ended[1]), "", "")


class _Bundle:
    """A small bundle whose files are damaged and listed with their new digests."""

    def __init__(self, target: str) -> None:
        self.whole = _folder() / f"bundle-{target}"
        if not self.whole.is_dir():
            _build_bundle(self.whole, target)
        self.files = {
            p.relative_to(self.whole).as_posix(): p.read_bytes() for p in self.whole.rglob("*") if p.is_file()
        }
        self.manifest = json.loads(self.files["manifest.json"])
        from edgedyn.device.session import open_session

        if not isinstance(programs.run_tool, _ForkedTrials):
            programs.run_tool = _ForkedTrials()  # type: ignore[assignment]
        session = open_session(self.whole)
        (vector,) = session.bundle.vectors[:1]
        self.inputs = [np.load(self.whole / name) for name in vector.inputs]
        self.output = np.array(session.run(*self.inputs)[0])
        self.limit = float(np.max(vector.max_abs))

    def put(self, folder: Path, changed: dict[str, bytes], manifest: dict[str, Any] | None = None) -> Path:
        """Write the bundle with changed files into a folder; its digests fit."""
        from edgedyn.bundle.manifest import canonical, seal

        out = folder / "bundle"
        shutil.rmtree(out, ignore_errors=True)
        (out / "vectors").mkdir(parents=True)
        values = json.loads(json.dumps(self.manifest if manifest is None else manifest))
        for name, data in {**self.files, **changed}.items():
            if name != "manifest.json":
                (out / name).write_bytes(data)
                if isinstance(values.get("files"), dict):
                    values["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (out / "manifest.json").write_bytes(changed.get("manifest.json", b"") or canonical(seal(values)))
        return out

    def use(self, out: Path) -> object:
        """Open and check a bundle; a verdict of ok is wrong where the output is another one."""
        from edgedyn.device.session import check, open_session

        session = open_session(out)
        report = check(session)
        if report.ok and session.bundle.vectors:
            output = np.asarray(session.run(*self.inputs)[0])
            if output.shape != self.output.shape or not np.abs(output - self.output).max() <= 2 * self.limit:
                raise WrongOkError(f"check says ok; output {output.shape} is not the one of the whole bundle")
        return repr(session)


def _build_bundle(out: Path, target: str) -> None:
    """Build the bundle of one small convolution, without limits."""
    from edgedyn import pipeline
    from edgedyn.recipe.recipe import load_recipe
    from edgedyn.targets.quiet import quiet_libraries

    overrides = [f"target={target}", "input.shape=[1, 3, 32, 32]", "tile.overlap=8", "model.weights=null"]
    overrides += ["model.sha256=null", "model.arguments={width: 4}"]
    with quiet_libraries():
        recipe = load_recipe(ROOT / "recipes/mallenet-s.phone.fp32.yaml", overrides)
        pipeline.build(recipe, out, compare=False)


def _in_bundle(target: str, pattern: str) -> Callable[[], Target]:
    """Return a target that damages one kind of file in a bundle."""

    def make() -> Target:
        bundle = _Bundle(target)
        names = sorted(name for name in bundle.files if Path(name).match(pattern))

        def damage(random: Random) -> bytes:
            name = random.choice(names)
            others = [bundle.files[other] for other in names]
            text = name.endswith((".json", ".yaml", ".html"))
            return name.encode() + b"\0" + mutate(bundle.files[name], others, random, is_text=text)

        def read(path: Path) -> object:
            name, _, data = path.read_bytes().partition(b"\0")
            key = name.decode(errors="replace")
            return bundle.use(bundle.put(path.parent, {key if key in bundle.files else names[0]: data}))

        seeds = tuple(name.encode() + b"\0" + bundle.files[name] for name in names)
        return Target(seeds, "file", read, damage=damage)

    return make


def _manifest() -> Target:
    bundle = _Bundle("onnxruntime")

    def damage(random: Random) -> bytes:
        return b"J" + json.dumps(mutate_json(bundle.manifest, random)).encode()

    def read(path: Path) -> object:
        data = path.read_bytes()
        if data[:1] != b"J":
            return bundle.use(bundle.put(path.parent, {"manifest.json": data}))
        values = json.loads(data[1:])
        return bundle.use(
            bundle.put(path.parent, {}, values if isinstance(values, dict) else {"files": values})
        )

    return Target((bundle.files["manifest.json"],), "file", read, is_text=True, damage=damage)


def _report() -> Target:
    from edgedyn.report.stored import rewrite_report

    bundle = _Bundle("onnxruntime")
    values = json.loads(bundle.files["report.json"])

    def damage(random: Random) -> bytes:
        if random.random() < 0.5:
            return json.dumps(mutate_json(values, random)).encode()
        facts = mutate_json(bundle.manifest["facts"], random)
        return b"F" + json.dumps(facts).encode()

    def read(path: Path) -> object:
        data = path.read_bytes()
        if data[:1] == b"F":
            facts = json.loads(data[1:])
            out = bundle.put(path.parent, {}, {**bundle.manifest, "facts": facts})
        else:
            out = bundle.put(path.parent, {"report.json": data})
        return rewrite_report(out)

    return Target((bundle.files["report.json"],), "file", read, is_text=True, damage=damage)


TARGETS: dict[str, Callable[[], Target]] = {
    "recipe": _recipe,
    "override": _override,
    "set-manifest": _set_manifest,
    "labels": _labels,
    "training-recipe": _training_recipe,
    "calibration-table": _table,
    "weights": _weights,
    "weights-pickle": _pickled_weights,
    "png": _photo("a.png", "PNG", (("RGB", {}), ("RGBA", {}), ("P", {}), ("L", {"bits": 4}), ("I;16", {}))),
    "jpeg": _photo("a.jpg", "JPEG", (("RGB", {}), ("L", {}), ("CMYK", {}), ("RGB", {"progressive": True}))),
    "webp": _photo("a.webp", "WEBP", (("RGB", {}), ("RGBA", {"lossless": True}))),
    "bmp": _photo("a.bmp", "BMP", (("RGB", {}), ("L", {}), ("1", {}))),
    "gif": _photo("a.gif", "GIF", (("RGB", {}), ("L", {}))),
    "avif": _photo("a.avif", "AVIF", (("RGB", {}), ("RGBA", {}))),
    "heic": _photo("a.heic", "HEIF", (("RGB", {}),)),
    "tiff": _tiff,
    "npy": _array("a.npy"),
    "npz": _array("a.npz"),
    "raw": _raw,
    "manifest": _manifest,
    "report": _report,
    "vector": _in_bundle("onnxruntime", "vectors/*.npy"),
    "onnx": _in_bundle("onnxruntime", "*.onnx"),
    "pte": _in_bundle("executorch", "*.pte"),
    "bundle": _in_bundle("onnxruntime", "*"),
}


def quick() -> Iterator[str]:
    """Yield the names of targets that need no bundle: a mutation takes a few milliseconds."""
    slow = {"manifest", "report", "vector", "onnx", "pte", "bundle"}
    yield from (name for name in TARGETS if name not in slow)

"""The manifest of a bundle: its one serialization, its rules, and the digests of the files.

    manifest.json   canonical JSON (sorted keys, indent 1, newline at the end) with its own sha256 inside
    files           {name: {size, sha256}} of every other file; plain names, one folder ``vectors/``;
                    kinds of data only, so that nothing in a bundle is ever code to import or start

A manifest that passes these checks is complete: later reads need no further check. Device side: standard
library only.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedyn.bundle.tensors import ORDERS, ROLES, TensorSpec, contract_keys
from edgedyn.errors import BundleError
from edgedyn.reading import TextError, open_regular, parse_json, read_bytes

FORMAT = 4  # 4: role, range, mean, std and order of tensors; several outputs per vector
MANIFEST = "manifest.json"
VECTORS = "vectors"
RULES = ("argmax", "fallback")
ROUTER = "router"
FORWARD = "forward"  # the one program of a bundle without routing
_KINDS = ("pte", "onnx", "engine", "npy", "json", "yaml", "html", "safetensors", "bin", "txt")
_PLAIN_NAME = re.compile(
    rf"({VECTORS}/[A-Za-z0-9][A-Za-z0-9._-]*\.npy|[A-Za-z0-9][A-Za-z0-9._-]*\.({'|'.join(_KINDS)}))"
)
_PROGRAM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NAMES = f"letters, digits, . _ - and an ending of {', '.join(_KINDS)}; {VECTORS}/ holds npy"
_MAX_MANIFEST_BYTES = 16 * 2**20
_MAX_QUOTED = 300  # characters of a value that a message quotes
_NUMBER = (int, float)
_LONGEST_SIDE = 2**14  # pixels of a photo that is resized for a network that predicts
_DTYPES = ("float16", "float32")
_MANIFEST_KEYS: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "ok": (bool,),
    **dict.fromkeys(("name", "edgedyn", "target", "precision"), (str,)),
    **dict.fromkeys(("inputs", "outputs", "vectors"), (list,)),
    **dict.fromkeys(("programs", "routing", "forms", "tile", "versions", "digests", "facts"), (dict,)),
}
_TENSOR_KEYS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "dtype", "meaning", "role"), (str,)),
    "shape": (list,),
}
_CONTRACT_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("range", "mean", "std"), (list,)),
    "order": (str,),
    "value": _NUMBER,
}
_PREDICTION_KEYS: dict[str, tuple[type, ...]] = {"task": (str,), "short_side": (int,), "classes": (list,)}
PREDICTING = ("classify", "keypoints")
_ROUTING_KEYS: dict[str, tuple[type, ...]] = {"rule": (str,), "router": (str,), "variants": (list,)}
VECTOR_KEYS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("inputs", "outputs", "max_abs", "rms"), (list,)),
}


@dataclass(frozen=True)
class Routing:
    """How a routed network chooses a variant.

    Attributes:
        rule: ``argmax`` or ``fallback``.
        router: name of the program that gives the logits; empty for ``fallback``.
        variants: names of the variants' programs, in the order of the logits.
    """

    rule: str
    router: str
    variants: tuple[str, ...]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Routing | None:
        """Read the values of ``to_json``; None for an empty object: one program, nothing to choose."""
        return cls(values["rule"], values["router"], tuple(values["variants"])) if values else None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"rule": self.rule, "router": self.router, "variants": list(self.variants)}


def canonical(manifest: dict[str, Any]) -> bytes:
    """Return the one serialization of a manifest.

    Raises:
        BundleError: if it holds anything but finite numbers, strings, booleans, None, lists and dictionaries.
    """
    try:
        return (json.dumps(manifest, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")
    except (TypeError, ValueError) as error:
        raise BundleError(f"the manifest is not plain JSON: {error}. Give it plain finite values.") from error


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest with the sha256 of its serialization inside."""
    bare = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return {**bare, "manifest_sha256": hashlib.sha256(canonical(bare)).hexdigest()}


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest in the directory ``path``; the files that it lists are not read.

    Raises:
        BundleError: if it is missing, of another format, not canonical, changed, or its values do not fit.
    """
    data = _manifest_bytes(path)
    manifest = _parse(path, data)
    if manifest.get("format") != FORMAT:
        actual = f"{manifest.get('format')!r} (written by edgedyn {manifest.get('edgedyn', 'unknown')})"
        raise refusal(path, "format", actual, str(FORMAT), "Use that edgedyn, or build it again.")
    if data != canonical(manifest):
        raise refusal(path, MANIFEST, "another serialization", "the canonical one")
    expected = seal(manifest)["manifest_sha256"]
    if manifest.get("manifest_sha256") != expected:
        raise refusal(path, "manifest_sha256", repr(manifest.get("manifest_sha256")), expected)
    _check_values(path, manifest)
    return manifest


def listed_names(path: Path) -> set[str]:
    """Return the names that the manifest in the directory ``path`` lists, unverified.

    Raises:
        BundleError: if there is no manifest, or it is not strict JSON.
    """
    return set(_parse(path, _manifest_bytes(path))["files"])


def check_files(path: Path, files: dict[str, Any], *, rebuilt: Collection[str] = ()) -> None:
    """Compare every byte in the directory ``path`` with the entries ``files``, but not the files ``rebuilt``.

    Raises:
        BundleError: for a name that is not plain, a file that is missing, changed or not listed.
    """
    for name in files:
        if not _PLAIN_NAME.fullmatch(name):
            raise refusal(path, "a listed name", repr(name), _NAMES)
    taken = [name.lower() for name in (MANIFEST, VECTORS, *files)]
    if len(set(taken)) != len(taken):
        raise refusal(path, "listed names", str(sorted(files)), f"distinct ones in any case, no {MANIFEST}")
    here = list_files(path) - {MANIFEST, *rebuilt}
    if missing := sorted(set(files) - here - set(rebuilt)):
        raise refusal(path, "listed files", f"no {', '.join(missing)}", "every listed file")
    if extra := sorted(here - set(files)):
        raise refusal(path, "other files", ", ".join(extra), f"only those in {MANIFEST}", "Remove them.")
    for name, entry in files.items():
        if name in rebuilt:
            continue
        actual = describe_file(path / name)
        if actual != entry:
            raise refusal(path, f"file {name}", str(actual), str(entry))


def list_files(path: Path) -> set[str]:
    """Return the names of the files in the directory ``path`` and its vectors, the manifest's too.

    Raises:
        BundleError: for anything but plain files of plain names.
    """
    names = set()
    for entry in [*path.iterdir(), *(path / VECTORS).glob("*")]:
        name = entry.relative_to(path).as_posix()
        kind = entry.lstat().st_mode
        if name == VECTORS and stat.S_ISDIR(kind):
            continue
        if not stat.S_ISREG(kind):
            raise refusal(path, f"entry {name!r}", "a link or folder", "plain files", "Remove it.")
        if not _PLAIN_NAME.fullmatch(name):
            raise refusal(path, f"entry {name!r}", "a file of another kind or name", _NAMES, "Remove it.")
        names.add(name)
    return names


def describe_file(path: Path) -> dict[str, Any]:
    """Return a file's entry in the manifest: its size in bytes and its sha256.

    Raises:
        OSError: for anything but a regular file, too: a stranger's list may name a device without end.
    """
    sha256 = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(2**20):
            sha256.update(block)
    return {"size": path.stat().st_size, "sha256": sha256.hexdigest()}


def tensor_specs(entries: list[dict[str, Any]]) -> list[TensorSpec]:
    """Return the tensors that a checked manifest lists under ``inputs`` or ``outputs``."""
    return [TensorSpec.from_json(entry) for entry in entries]


def refusal(path: Path, part: str, actual: str, expected: str, fix: str = "Build it again.") -> BundleError:
    """Return the error for a bundle in which a part is not as expected, to be raised."""
    short = actual if len(actual) <= _MAX_QUOTED else f"{actual[:_MAX_QUOTED]}..."
    return BundleError(f"bundle {path}: {part}: found {short}, expected {expected}. {fix}")


def _manifest_bytes(path: Path) -> bytes:
    file = path / MANIFEST
    if file.is_symlink() or not file.is_file():
        raise refusal(path, MANIFEST, "no such plain file", "the manifest of a bundle", "Check the path.")
    try:
        return read_bytes(file, _MAX_MANIFEST_BYTES)
    except OSError as error:
        raise refusal(path, MANIFEST, str(error.strerror), "a readable file", "Check it.") from error


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        manifest = parse_json(data)
    except TextError as error:
        raise refusal(path, MANIFEST, str(error), "strict JSON in ASCII") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise refusal(path, MANIFEST, "no object with the key 'files'", "the manifest of a bundle")
    return manifest


def _check_values(path: Path, manifest: dict[str, Any]) -> None:
    _check_types(path, "manifest", manifest, _MANIFEST_KEYS)
    _check_types(path, "tile", manifest["tile"], {"overlap": (int,)})
    rules = [
        ("tile.overlap", manifest["tile"]["overlap"], "from 0", manifest["tile"]["overlap"] >= 0),
        ("programs", manifest["programs"], "plain file names", _are_programs(manifest["programs"])),
        ("routing", manifest["routing"], f"programs of the bundle, by {RULES}", _is_routing(manifest)),
        ("inputs", manifest["inputs"], "at least one", bool(manifest["inputs"])),
        ("outputs", manifest["outputs"], "at least one", bool(manifest["outputs"])),
    ]
    for tensor in manifest["inputs"] + manifest["outputs"]:
        _check_types(path, "a tensor", tensor, _TENSOR_KEYS)
        sized = all(type(size) is int and 0 < size < 2**31 for size in tensor["shape"])
        rules.append(("shape", tensor["shape"], "sizes from 1", sized))
        rules.append(("dtype", tensor["dtype"], f"one of {_DTYPES}", tensor["dtype"] in _DTYPES))
        rules.append(("role", tensor["role"], f"one of {ROLES}", tensor["role"] in ROLES))
        rules.append(("a tensor", tensor, "the keys of its role, with values that fit", _is_contract(tensor)))
    for vector in manifest["vectors"]:
        _check_types(path, "a vector", vector, VECTOR_KEYS)
        expected = "listed files, one per input and output, max_abs and rms from 0 per output"
        rules.append(("a vector", vector, expected, _is_vector(vector, manifest)))
    if "predictions" in manifest:  # absent in a bundle of pictures
        _check_types(path, "predictions", manifest["predictions"], _PREDICTION_KEYS)
        expected = f"one of {PREDICTING}, short_side from 0 to {_LONGEST_SIDE}, class names"
        rules.append(("predictions", manifest["predictions"], expected, _predicts(manifest["predictions"])))
    for part, actual, expected, holds in rules:
        if not holds:
            raise refusal(path, part, repr(actual), expected)


def _predicts(predictions: dict[str, Any]) -> bool:
    """Whether a photo can be framed as the contract of a network that predicts says."""
    named = all(isinstance(name, str) for name in predictions["classes"])
    return named and predictions["task"] in PREDICTING and 0 <= predictions["short_side"] <= _LONGEST_SIDE


def _is_contract(tensor: dict[str, Any]) -> bool:
    """Whether a tensor has the keys of its role, and pixels can be converted by them and back."""
    if tensor["role"] not in ROLES:
        return False
    values: dict[str, Any] = {key: tensor.get(key) for key in contract_keys(tensor["role"])}
    if any(type(value) not in _CONTRACT_TYPES[key] for key, value in values.items()):
        return False
    numbers = [number for value in values.values() if isinstance(value, list) for number in value]
    if "range" not in values or any(type(number) not in _NUMBER for number in numbers):
        return not numbers
    channels = tensor["shape"][1] if len(tensor["shape"]) == 4 else 0
    per_channel = all(len(values[key]) in (1, channels or 1) for key in ("mean", "std"))
    ordered = values["order"] in ORDERS and (values["order"] == ORDERS[0] or channels == 3)
    increases = len(values["range"]) == 2 and values["range"][0] < values["range"][1]
    return per_channel and ordered and increases and min(values["std"]) > 0


def _is_vector(vector: dict[str, Any], manifest: dict[str, Any]) -> bool:
    """Whether a vector has one listed file per tensor, and one limit of each kind per output."""
    names, limits = [*vector["inputs"], *vector["outputs"]], [*vector["max_abs"], *vector["rms"]]
    counts = [len(vector[key]) for key in ("outputs", "max_abs", "rms")]
    return (
        all(isinstance(name, str) and name in manifest["files"] for name in names)
        and len(vector["inputs"]) == len(manifest["inputs"])
        and counts == [len(manifest["outputs"])] * 3
        and all(type(limit) in _NUMBER and limit >= 0 for limit in limits)
    )


def _are_programs(programs: dict[str, Any]) -> bool:
    plain = all(isinstance(name, str) and _PLAIN_NAME.fullmatch(name) for name in programs.values())
    return bool(programs) and plain and all(_PROGRAM.fullmatch(name) for name in programs)


def _is_routing(manifest: dict[str, Any]) -> bool:
    """Whether every program has its place: one called forward, or a router and its variants."""
    routing, programs = manifest["routing"], manifest["programs"]
    if not routing:
        return set(programs) == {FORWARD}
    if any(type(routing.get(key)) not in kinds for key, kinds in _ROUTING_KEYS.items()):
        return False
    variants, router = routing["variants"], routing["router"]
    named = [*variants, *([router] if router else [])]
    counted = len(variants) >= 2 and bool(router) == (routing["rule"] == "argmax")
    plain = all(isinstance(name, str) for name in named) and len(set(named)) == len(named)
    return routing["rule"] in RULES and counted and plain and set(named) == set(programs)


def _check_types(path: Path, part: str, values: Any, kinds: dict[str, tuple[type, ...]]) -> None:
    if not isinstance(values, dict):
        raise refusal(path, part, repr(values), f"an object of {sorted(kinds)}")
    for key, allowed in kinds.items():
        if type(values.get(key)) not in allowed:
            expected = " or ".join(kind.__name__ for kind in allowed)
            raise refusal(path, f"{part}, key {key!r}", repr(values.get(key, "nothing")), expected)

"""Files that hold no weights of PyTorch, named by first bytes, contents or suffix before a reader fails."""

from __future__ import annotations

import zipfile
from pathlib import Path

from edgedyn.errors import WeightsError

_SAVE = "Save the weights of the PyTorch network: safetensors.torch.save_file(model.state_dict(), PATH)."
_STARTS = {
    b"version https://git-lfs": ("a Git LFS pointer, without the file itself", "Run git lfs pull."),
    b"<": ("a web page", "Fetch the file itself, not the page that shows it."),
    b"\x89HDF": ("an HDF5 file of Keras", _SAVE),
    b"\x93NUMPY": ("a NumPy array", _SAVE),
    b"GGUF": ("a GGUF file", _SAVE),
}
_SUFFIXES = {
    **{
        ".onnx": "an ONNX model",
        ".pb": "a TensorFlow graph",
        ".index": "the index of a TensorFlow checkpoint",
    },
    **{
        ".tflite": "a TensorFlow Lite model",
        ".pt2": "a program of torch.export",
        ".pte": "an ExecuTorch program",
    },
}
_SHARDS = (
    "the index of several files",
    "Join them: safetensors.torch.save_file({k: v for f in FILES for k, v in load_file(f).items()}, PATH).",
)


def refuse_others(path: Path) -> None:
    """Refuse a file that is known and holds no weights of PyTorch.

    Raises:
        WeightsError: with the name of its format.
    """
    with path.open("rb") as file:
        start = file.read(64)
    if start[8:9] == b"{":  # safetensors: 8 bytes of length, of any value, then JSON
        return
    found = next((kind for magic, kind in _STARTS.items() if start.lstrip().startswith(magic)), None)
    if path.suffix.lower() in _SUFFIXES:
        found = (_SUFFIXES[path.suffix.lower()], _SAVE)
    elif path.name.endswith(".index.json"):
        found = _SHARDS
    elif any(name.endswith(".npy") for name in _names(path)):
        found = ("a NumPy archive", _SAVE)
    if found:
        raise WeightsError(
            f"weights {path} are {found[0]}; expected a safetensors file, or a torch.save file of tensors. "
            f"{found[1]}"
        )


def _names(path: Path) -> list[str]:
    """Return the names in a zip archive; none of another file, or of a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return []

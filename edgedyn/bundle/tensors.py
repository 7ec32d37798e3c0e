"""Inputs and outputs of a deployed program, and the values that a picture has in them.

    x = (low + v * (high - low) - mean) / std        v: pixel, 0 black, 1 white        low, high: ``range``
    v = (x * std + mean - low) / (high - low)

Pixels are in the order R, G, B everywhere; a tensor of order BGR holds them reversed, and has its mean and
std in its own order. Calibration, validation, ``Session.process`` and an app convert by these two lines.
Device side: standard library; numpy only where values are converted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

PICTURE, GUIDE, CONSTANT, NOISE_LEVEL, OTHER = ROLES = (
    "picture",
    "guide",
    "constant",
    "noise_level",
    "other",
)
ORDERS = ("RGB", "BGR")
_CONTRACT = {  # keys of a role beside name, dtype, shape, role and meaning
    **dict.fromkeys((PICTURE, GUIDE), ("range", "mean", "std", "order")),
    **dict.fromkeys((CONSTANT, NOISE_LEVEL), ("value",)),
    OTHER: (),
}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a program.

    Attributes:
        name: of the input in the recipe, or of the output in the network.
        dtype: numpy name, ``float32`` or ``float16``.
        shape: fixed shape, B C H W for pictures.
        meaning: one phrase for people: colour space, order, values of black and white.
        role: ``picture``; ``guide``, the picture that guides a joint upsampler; ``constant``, an input that
            always holds ``value``; ``noise_level``, an input that holds the standard deviation of the
            picture's noise, 0..1 scale, times ``value``; ``other``, an output that is no picture.
        range: values of black and white before mean and std.
        mean: one number, or one per channel.
        std: one number, or one per channel.
        order: of three channels, ``RGB`` or ``BGR``.
        value: the constant, or the factor of a noise level.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    meaning: str
    role: str = PICTURE
    range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    order: str = "RGB"
    value: float = 0.0

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TensorSpec:
        """Read the values of ``to_json``; other keys are ignored."""
        keys = ("name", "dtype", "shape", "meaning", "role", *contract_keys(values["role"]))
        known: dict[str, Any] = {k: tuple(v) if isinstance(v := values[k], list) else v for k in keys}
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values; keys that its role does not have are left out."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        keys = ("name", "dtype", "shape", "meaning", "role", *contract_keys(self.role))
        return {key: values[key] for key in keys}

    @property
    def is_plain(self) -> bool:
        """Whether the tensor holds the pixels themselves, 0 black, 1 white."""
        moments = {*self.mean, *(std - 1 for std in self.std)}
        return self.order == ORDERS[0] and tuple(self.range) == (0, 1) and moments == {0}

    def scale_and_offset(self, dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Return (C or 1, 1, 1) arrays: x = v * scale + offset, channels in the tensor's order."""
        import numpy as np

        (low, high), mean, std = self.range, np.array(self.mean), np.array(self.std)
        scale, offset = (high - low) / std, (low - mean) / std
        return scale.astype(dtype)[:, None, None], offset.astype(dtype)[:, None, None]

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Return the tensor's values for pixels (..., C, H, W), 0 black, 1 white, R before B; same dtype."""
        if self.is_plain:
            return pixels
        scale, offset = self.scale_and_offset(pixels.dtype)
        encoded: np.ndarray = self._reordered(pixels) * scale + offset
        return encoded

    def decode(self, values: np.ndarray) -> np.ndarray:
        """Return the pixels that the tensor's values (..., C, H, W) stand for; the inverse of ``encode``.

        An output that is no picture is returned as it is.
        """
        if self.role == OTHER or self.is_plain:
            return values
        scale, offset = self.scale_and_offset(values.dtype)
        return self._reordered((values - offset) / scale)

    def filled(self, noise_level: float) -> np.ndarray:
        """Return the input of a constant, or of a noise level (standard deviation, 0..255 scale); float32."""
        import numpy as np

        value = self.value if self.role == CONSTANT else self.value * noise_level / 255
        return np.full(self.shape, value, np.float32)

    def _reordered(self, values: np.ndarray) -> np.ndarray:
        return values[..., ::-1, :, :].copy() if self.order == "BGR" else values


def contract_keys(role: str) -> tuple[str, ...]:
    """Return the keys that a tensor of a role has beside name, dtype, shape, role and meaning."""
    return _CONTRACT[role]


def encode_inputs(
    specs: tuple[TensorSpec, ...], pictures: tuple[np.ndarray, ...], noise_level: float
) -> tuple[np.ndarray, ...]:
    """Return the values of every input: of the picture, of its guide, of constants and noise levels.

    Args:
        specs: of the inputs, pictures first.
        pictures: pixels (1, C, H, W) of the picture and, for a joint upsampler, of its guide.
        noise_level: standard deviation of the picture's noise, 0..255 scale.
    """
    shown, others = specs[: len(pictures)], specs[len(pictures) :]
    encoded = [spec.encode(pixels) for spec, pixels in zip(shown, pictures, strict=True)]
    return (*encoded, *(spec.filled(noise_level) for spec in others))


def describe_picture(channels: int, value_range: tuple[float, float], order: str, *, is_moved: bool) -> str:
    """Return the meaning of a picture's tensor in one phrase."""
    kinds = {
        1: "gray image",
        3: f"sRGB image, {order} order",
        4: "packed Bayer image: red, green of the red rows, green of the blue rows, blue",
    }
    low, high = value_range
    behind = ", then minus mean, divided by std" if is_moved else ""
    return f"{kinds.get(channels, 'image')}, {low:g} black, {high:g} white{behind}"

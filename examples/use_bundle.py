"""Denoise an image that is in memory with a bundle: the device side alone, no torch for an ONNX bundle.

python examples/use_bundle.py BUNDLE
"""

from __future__ import annotations

import sys

import numpy as np

import edgedyn

session = edgedyn.open_session(sys.argv[1])  # refuses a bundle with a changed or an additional file
spec = session.bundle.inputs[0]
print(spec.name, spec.shape, spec.meaning)

ramp = np.linspace(0, 1, 100, dtype=np.float32)
noisy = np.stack([ramp[:, None] * np.ones(130, np.float32)] * 3, axis=2)  # H, W, C; larger than one tile
noisy += np.random.default_rng(0).normal(0, 25 / 255, noisy.shape).astype(np.float32)
print(noisy.shape, session.process(noisy).shape)

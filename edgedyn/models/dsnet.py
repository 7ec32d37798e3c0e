"""DS-Net, the classifier of DDS-Net's group with a gate behind its first stages (arXiv 2103.13258).

Its reference, which loads the authors' checkpoints, is ``edgedyn/layers/ddsnet/dsnet.py``.
"""

from __future__ import annotations

from edgedyn.layers.ddsnet.dsnet import DSNet

NETWORK = DSNet

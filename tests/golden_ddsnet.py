"""How the authors call DS-Net's layers, blocks and networks: at given widths, prefix after prefix."""

from __future__ import annotations

import re

from golden_check import Golden
from torch import Tensor

from edgedyn.checkpoints.authors import from_authors
from edgedyn.layers import canonicalize
from edgedyn.layers.ddsnet.blocks import SlimmableBlock
from edgedyn.layers.ddsnet.slimmable import SlimmableDepthwiseConv2d


def build(golden: Golden):
    return from_authors(golden.official, golden.constructor, golden.parameters)


def outputs(golden: Golden, pattern: str):
    """Yield (name, numbers in it) of the file's outputs that match."""
    for name in golden.outputs:
        if match := re.fullmatch(pattern, name):
            yield name, *(int(number) for number in match.groups())


def conv(golden: Golden) -> dict[str, Tensor]:
    module, x, found = build(golden), golden.inputs["x"], {}
    for name, i, o in outputs(golden, r"y_in(\d+)_out(\d+)"):
        prefix = x[:, :i]
        if isinstance(module, SlimmableDepthwiseConv2d):
            assert i == o
            found |= {name: module(prefix), f"{name}@canonical": module.static(i)(prefix)}
        else:
            found |= {name: module(prefix, o), f"{name}@canonical": module.static(i, o)(prefix)}
    return found


def width(golden: Golden) -> dict[str, Tensor]:
    """A norm or a linear layer, at each width."""
    module, x, found = build(golden), golden.inputs["x"], {}
    for name, i in outputs(golden, r"y_w(\d+)"):
        found |= {name: module(x[:, :i]), f"{name}@canonical": module.static(i)(x[:, :i])}
    return found


def gate(golden: Golden) -> dict[str, Tensor]:
    module, x, found = build(golden), golden.inputs["x"], width(golden)
    for name, i in outputs(golden, r"logits_w(\d+)"):
        y, logits = module.static_gate(i)(x[:, :i])
        found |= {name: module.logits(x[:, :i]), f"{name}@canonical": logits, f"y_w{i}@canonical": y}
    for name, i in outputs(golden, r"mid\.argmax_w(\d+)"):
        found[name] = module.logits(x[:, :i]).argmax(1)
    return found


def block(golden: Golden) -> dict[str, Tensor]:
    module, x, found = build(golden), golden.inputs["x"], {}
    for name, i, o in outputs(golden, r"y_in(\d+)_out(\d+)"):
        found |= {name: module(x[:, :i], o)}
        if isinstance(module, SlimmableBlock):
            found[f"{name}@canonical"] = module.static(i, o)(x[:, :i])
    for name, i in outputs(golden, r"mid\.gate_logits_in(\d+)"):
        features, logits = module.static_opening(i)(x[:, :i])
        o = module.out_channels_list[-1]
        found |= {name: module.logits(x[:, :i]), f"{name}@canonical": logits}
        found |= {f"y_in{i}_out{o}@canonical": module.static_closing(i, o)(features, x[:, :i])}
    return found


def network(golden: Golden) -> dict[str, Tensor]:
    module, x = build(golden), golden.inputs["x"]
    smallest = tuple(widths[0] for widths in module.lists)
    found = {"y_smallest": module.run_widths(x, smallest), "y_largest": module.run_widths(x, module.largest)}
    for name, choice in outputs(golden, r"y_uniform(\d+)"):
        found |= {name: module(x, choice), f"{name}@canonical": module.static(choice)(x)}
    if "gate_logits" in golden.outputs:
        logits = module.logits(x)
        found |= {"gate_logits": logits, "gate_logits@canonical": module.router()(x)[0]}
        found["mid.gate_argmax"] = logits.argmax(1)
    if "y_dynamic_argmax" in golden.outputs:
        name = "y_dynamic_argmax"
        found |= {name: module(x), f"{name}@canonical": canonicalize(module)(x)}
    return {name: y for name, y in found.items() if name.split("@")[0] in golden.outputs}


DYN_SLIM = "dyn_slim.models.dyn_slim_"
# the longest beginning decides: convolutions of three names, blocks and stages are the rest of their files
RULES = {
    f"{DYN_SLIM}ops.": conv,
    f"{DYN_SLIM}ops.DSBatchNorm2d": width,
    f"{DYN_SLIM}ops.DSLinear": width,
    DYN_SLIM: block,
    f"{DYN_SLIM}blocks.MultiHeadGate": gate,
    f"{DYN_SLIM}net.DSNet": network,
}

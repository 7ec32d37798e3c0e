"""How the authors call DynConv's mask units, blocks and networks; masks of every block are compared too."""

from __future__ import annotations

from golden_check import Golden
from torch import Tensor, nn

from edgedyn.checkpoints.authors import from_authors
from edgedyn.layers import canonicalize
from edgedyn.layers.dynconv.masks import CanonicalMaskUnit, MaskUnit


def run(module: nn.Module, golden: Golden) -> dict[str, Tensor]:
    """Run a block or a network; return its outputs, every mask, and the modules that the call keeps."""
    found: dict[str, Tensor] = {}

    def keep_masks(path: str):
        def hook(unit, inputs, masks) -> None:
            block = path.removesuffix("masker").removesuffix(".") or "block"
            found[f"mid.{block}.mask_logits"] = masks.logits
            found[f"mid.{block}.mask"] = masks.mask.byte()
            if isinstance(unit, MaskUnit):  # the canonical one has the size of the convolution
                found[f"mid.{block}.mask_dilated"] = masks.dilated.byte()

        return hook

    def keep_output(path: str):
        def hook(module, inputs, y) -> None:
            found[f"mid.{path}.out"] = y

        return hook

    for path, part in module.named_modules():
        if isinstance(part, MaskUnit | CanonicalMaskUnit):
            part.register_forward_hook(keep_masks(path))
        if path in golden.call.get("keep", ()):
            part.register_forward_hook(keep_output(path))
    y = module(golden.inputs["x"])
    if isinstance(y, tuple):
        return found | {f"heatmaps{k}": heatmap for k, heatmap in enumerate(y)}
    return found | {"y": y}


def network(golden: Golden) -> dict[str, Tensor]:
    reference = from_authors(golden.official, golden.constructor, golden.parameters)
    # the file's tolerance is that of its output; of the intermediate values the canonical module has masks
    canonical = {
        f"{name}@canonical": y
        for name, y in run(canonicalize(reference), golden).items()
        if not (name.startswith("mid.") and y.is_floating_point())
    }
    return canonical | run(reference, golden)


def mask_unit(golden: Golden) -> dict[str, Tensor]:
    unit = from_authors(golden.official, golden.constructor, golden.parameters)
    x = golden.inputs["x"]
    masks = unit(x)
    outputs = {"logits": masks.logits, "mask": masks.mask.byte(), "mask_dilated": masks.dilated.byte()}
    canonical = CanonicalMaskUnit(unit, stride=unit.dilate_stride)(x)
    outputs |= {"logits@canonical": canonical.logits, "mask@canonical": canonical.mask.byte()}
    if canonical.dilated.shape == masks.dilated.shape:  # else it is cut to the size of x
        outputs["mask_dilated@canonical"] = canonical.dilated.byte()
    return outputs


RULES = {
    "dynconv.maskunit.MaskUnit": mask_unit,
    "models.resnet": network,
    "models.hourglass_mn": network,
}

"""From a folded program and the steps of its tensors to a program of Q/DQ pairs: PT2E, by torchao."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torchao.quantization.pt2e import ObserverBase, PlaceholderObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)

from edgedyn.quantize.plan import Plan, QParams, QuantizableLayer
from edgedyn.quantize.rounding.paired_run import SCALE_EPSILON
from edgedyn.targets import Int8Scheme


def insert_qdq(
    module: fx.GraphModule,
    plan: Plan,
    steps: QParams,
    scheme: Int8Scheme,
    *,
    fold: bool = True,
) -> fx.GraphModule:
    """Quantize and dequantize what the plan says, by the given steps; the module itself is used up.

    Args:
        module: a folded program.
        plan: its INT8 layers.
        steps: of every tensor that they read and, where the scheme wants it, write.
        scheme: how the target annotates INT8.
        fold: store int8 weights; else float weights are quantized in the graph, as NNCF wants it.
    """
    prepared = prepare_pt2e(module, make_quantizer(plan, steps, scheme))
    return convert_pt2e(prepared, fold_quantize=fold)  # type: ignore[no-any-return]


class _FixedChannels(ObserverBase):  # type: ignore[misc]
    """Gives the weight of a layer the scales that were chosen before; observes nothing."""

    def __init__(self, channel_scales: Tensor, **spec: Any) -> None:
        super().__init__(dtype=spec["dtype"])
        self.qscheme, self.ch_axis = torch.per_channel_symmetric, 0
        self.quant_min, self.quant_max = spec["quant_min"], spec["quant_max"]
        self.channel_scales = channel_scales

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.channel_scales, torch.zeros(len(self.channel_scales), dtype=torch.int64)


def make_quantizer(plan: Plan, steps: QParams, scheme: Int8Scheme) -> Any:
    """Make the PT2E quantizer of a plan: int8 activations by tensor, symmetric int8 weights by channel."""

    def activation(tensor: str) -> Any:
        scale, zero_point = steps.of(tensor)
        kind = torch.per_tensor_symmetric if scheme.symmetric else torch.per_tensor_affine
        return FixedQParamsQuantizationSpec(torch.int8, scale, zero_point, -128, 127, kind)

    of_each_image = QuantizationSpec(
        torch.int8,
        PlaceholderObserver.with_args(eps=SCALE_EPSILON),
        -128,
        127,
        torch.per_tensor_affine,
        is_dynamic=True,
    )

    def weight(site: QuantizableLayer) -> Any:
        return QuantizationSpec(
            dtype=torch.int8,
            quant_min=-127,
            quant_max=127,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
            observer_or_fake_quant_ctr=_FixedChannels.with_args(channel_scales=steps.weights[site.weight]),
        )

    def annotate(node: fx.Node, read: dict[Any, Any], written: Any = None) -> None:
        node.meta["quantization_annotation"] = QuantizationAnnotation(read, written, _annotated=True)

    class Int8Quantizer(Quantizer):  # type: ignore[misc]
        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            nodes = {node.name: node for node in model.graph.nodes}
            for call, x in plan.kernels.items():
                annotate(nodes[call.name], {nodes[call.name].args[0]: activation(x)})
            has_step = set(plan.quantized_outputs(scheme))
            for site in plan.layers:
                node = nodes[site.node.name]
                last = nodes[site.output_node.name]
                written = activation(site.output) if site in has_step else None
                x = of_each_image if site.node in plan.dynamic else activation(site.input)
                read = {node.args[0]: x, node.args[1]: weight(site)}
                annotate(node, read, written if last is node else None)
                if last is not node:
                    annotate(last, {}, written)
            return model

        def validate(self, model: fx.GraphModule) -> None:
            """Nothing to refuse: annotate writes only what the scheme allows."""

    return Int8Quantizer()

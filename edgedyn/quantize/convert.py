"""From a folded program and its quantization parameters to a program with Q/DQ pairs, by torchao (PT2E)."""

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

from edgedyn.quantize.fake_quantize import SCALE_EPSILON
from edgedyn.quantize.fold import hide_norms, show_norms
from edgedyn.quantize.plan import Plan, QParams, QuantizableLayer
from edgedyn.targets import Int8Scheme


def insert_qdq(
    module: fx.GraphModule,
    plan: Plan,
    qparams: QParams,
    scheme: Int8Scheme,
    *,
    fold: bool = True,
) -> fx.GraphModule:
    """Insert the Q/DQ pairs of a plan; the module itself is used up.

    Args:
        module: a folded program.
        plan: its INT8 layers.
        qparams: of the weights and inputs of these layers, and of their outputs where the scheme wants that.
        scheme: how the target annotates INT8.
        fold: store int8 weights; else the graph quantizes float weights, as NNCF expects.
    """
    hide_norms(module)
    prepared = prepare_pt2e(module, make_quantizer(plan, qparams, scheme))
    converted: fx.GraphModule = convert_pt2e(prepared, fold_quantize=fold)
    show_norms(converted)
    return converted


class _FixedChannels(ObserverBase):  # type: ignore[misc]
    """Sets the scales of a weight to those of its calibration; observes nothing."""

    def __init__(self, channel_scales: Tensor, **spec: Any) -> None:
        super().__init__(dtype=spec["dtype"])
        self.qscheme, self.ch_axis = torch.per_channel_symmetric, 0
        self.quant_min, self.quant_max = spec["quant_min"], spec["quant_max"]
        self.channel_scales = channel_scales

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.channel_scales, torch.zeros(len(self.channel_scales), dtype=torch.int64)


def make_quantizer(plan: Plan, qparams: QParams, scheme: Int8Scheme) -> Any:
    """Make the PT2E quantizer of a plan: per-tensor int8 activations, symmetric per-channel int8 weights."""

    def activation(tensor: str) -> Any:
        scale, zero_point = qparams.of(tensor)
        kind = torch.per_tensor_symmetric if scheme.symmetric else torch.per_tensor_affine
        return FixedQParamsQuantizationSpec(torch.int8, scale, zero_point, -128, 127, kind)

    dynamic = QuantizationSpec(
        torch.int8,
        PlaceholderObserver.with_args(eps=SCALE_EPSILON),
        -128,
        127,
        torch.per_tensor_affine,
        is_dynamic=True,
    )

    def weight(layer: QuantizableLayer) -> Any:
        return QuantizationSpec(
            dtype=torch.int8,
            quant_min=-127,
            quant_max=127,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
            observer_or_fake_quant_ctr=_FixedChannels.with_args(channel_scales=qparams.weights[layer.weight]),
        )

    def annotate(node: fx.Node, inputs: dict[Any, Any], output: Any = None) -> None:
        node.meta["quantization_annotation"] = QuantizationAnnotation(inputs, output, _annotated=True)

    class Int8Quantizer(Quantizer):  # type: ignore[misc]
        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            nodes = {node.name: node for node in model.graph.nodes}
            for call, x in plan.kernels.items():
                annotate(nodes[call.name], {nodes[call.name].args[0]: activation(x)})
            quantized_outputs = set(plan.quantized_outputs(scheme))
            for layer in plan.layers:
                node = nodes[layer.node.name]
                last = nodes[layer.output_node.name]
                output = activation(layer.output) if layer in quantized_outputs else None
                x = dynamic if layer.node in plan.dynamic else activation(layer.input)
                inputs = {node.args[0]: x, node.args[1]: weight(layer)}
                annotate(node, inputs, output if last is node else None)
                if last is not node:
                    annotate(last, {}, output)
            return model

        def validate(self, model: fx.GraphModule) -> None:
            """Accept every model: annotate follows the scheme."""

    return Int8Quantizer()

"""Our ops as TensorRT plugins in Python: IPluginV3 around the CUDA kernels, called by ``ctypes``.

They need nvcc and no headers of TensorRT; an engine that holds them runs only in a Python that has registered
them. The plugins in C++ (``plugin_library``) are free of both. Device side: ``trt`` is the module tensorrt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgedyn.errors import ModelError
from edgedyn.targets.tensorrt.cuda_kernels import Affine, Array
from edgedyn.targets.tensorrt.signatures import NAMESPACE, SCALES, SIGNATURES, VERSION, node_type

Launch = Callable[..., None]  # ``cuda_kernels.call`` of a library


def make_creators(trt: Any, launch: Launch) -> list[Any]:
    """Return a plugin creator an op, to be registered and kept: TensorRT does not hold them.

    Args:
        trt: the module ``tensorrt``, or ``tensorrt_rtx``, which has the same classes.
        launch: starts a kernel on its stream; called as ``cuda_kernels.call`` is behind its library.
    """
    plugin_class = _plugin_class(trt, launch)
    return [_creator_class(trt, plugin_class)(op) for op in SIGNATURES]


class _Dimension:
    """An expression of TensorRT's that a signature multiplies and divides like a number."""

    def __init__(self, trt: Any, builder: Any, expression: Any) -> None:
        self._trt, self._builder, self.expression = trt, builder, expression

    def __mul__(self, other: _Dimension) -> _Dimension:
        return self._combine(self._trt.DimensionOperation.PROD, other)

    def __floordiv__(self, other: _Dimension) -> _Dimension:
        return self._combine(self._trt.DimensionOperation.FLOOR_DIV, other)

    def _combine(self, operation: Any, other: _Dimension) -> _Dimension:
        made = self._builder.operation(operation, self.expression, other.expression)
        return _Dimension(self._trt, self._builder, made)


def _plugin_class(trt: Any, launch: Launch) -> type:
    bases: Any = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class Plugin(*bases):  # type: ignore[misc]
        """One node: its op, its attributes and, in INT8, its scales."""

        def __init__(self, op: str, attributes: tuple[int, ...], scales: tuple[float, ...]) -> None:
            for base in bases:
                base.__init__(self)
            self.plugin_name, self.plugin_version = node_type(op), VERSION
            self.plugin_namespace, self.num_outputs = NAMESPACE, 1
            self.op, self.attributes, self.scales = op, attributes, scales
            # a PluginField points at its array and does not keep it (tensorrt_rtx 1.7)
            self.kept = [np.array([value], np.int32) for value in attributes]
            self.kept += [np.array([value], np.float32) for value in scales]

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.op, self.attributes, self.scales)

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [input_types[0]]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Any, builder: Any) -> list[Any]:
            given = [[_Dimension(trt, builder, d) for d in shape] for shape in inputs]
            signature = SIGNATURES[self.op]
            y = signature.output(*signature.arrange(given))
            return [trt.DimsExprs([dimension.expression for dimension in y])]

        def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
            described, x = in_out[pos].desc, in_out[0].desc.type
            if described.format != trt.TensorFormat.LINEAR:
                return False
            if pos == 0:
                wanted = (trt.DataType.INT8,) if self.scales else (trt.DataType.FLOAT, trt.DataType.HALF)
                return x in wanted
            is_generated = bool(self.scales) and pos < num_inputs
            return bool(described.type == (trt.DataType.FLOAT if is_generated else x))

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            return 0

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            pass

        def get_fields_to_serialize(self) -> Any:
            kinds = {"int32": trt.PluginFieldType.INT32, "float32": trt.PluginFieldType.FLOAT32}
            names = (*SIGNATURES[self.op].attributes, *SCALES)
            return trt.PluginFieldCollection(
                [
                    trt.PluginField(name, array, kinds[array.dtype.name])
                    for name, array in zip(names, self.kept, strict=False)
                ]
            )

        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            described = zip(inputs, input_desc, strict=True)
            given = [Array(pointer, tuple(description.dims)) for pointer, description in described]
            of_x, of_y = (Affine(scale) for scale in self.scales or (1.0, 1.0))
            launch(
                self.op,
                np.dtype(trt.nptype(input_desc[0].type)).name,
                inputs=SIGNATURES[self.op].arrange(given),
                attributes=self.attributes,
                output=outputs[0],
                of_x=of_x,
                of_y=of_y,
                stream=stream,
            )

    return Plugin


def _creator_class(trt: Any, plugin_class: type) -> type:
    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Makes the plugins of an op from a node's attributes, or from what an engine has kept of them."""

        def __init__(self, op: str) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.op, self.name = op, node_type(op)
            self.plugin_namespace, self.plugin_version = NAMESPACE, VERSION
            kinds, none = trt.PluginFieldType, np.array([])
            fields = [trt.PluginField(k, none, kinds.INT32) for k in SIGNATURES[op].attributes]
            fields += [trt.PluginField(k, none, kinds.FLOAT32) for k in SCALES]
            self.field_names = trt.PluginFieldCollection(fields)

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            found = {field.name: field for field in fields}
            names = SIGNATURES[self.op].attributes
            given = [name for name in SCALES if name in found]
            attributes = tuple(int(_read(trt, self.name, found, k, "INT32")) for k in names)
            scales = tuple(float(_read(trt, self.name, found, k, "FLOAT32")) for k in SCALES if given)
            if any(scale <= 0 for scale in scales):
                raise ModelError(f"{self.name} got scales {scales}; expected both above 0. Build it again.")
            return plugin_class(self.op, attributes, scales)

    return Creator


def _read(trt: Any, plugin: str, found: dict[str, Any], name: str, kind: str) -> Any:
    """Return the one value of a field.

    Raises:
        ModelError: where it is missing or of another type; TensorRT logs it and gives up.
    """
    if name not in found:
        raise ModelError(
            f"{plugin} got no attribute {name}, only {sorted(found)}; expected every argument of the op. "
            "Export the ONNX with edgedyn build."
        )
    field = found[name]
    values = np.asarray(field.data).reshape(-1)
    if field.type != getattr(trt.PluginFieldType, kind) or len(values) != 1:
        raise ModelError(
            f"{plugin} got attribute {name} of type {field.type.name}, {len(values)} values; expected 1 of "
            f"type {kind}. Export the ONNX with edgedyn build."
        )
    return values[0]

"""Our ops as TensorRT plugins in Python: IPluginV3 around the CUDA kernels, which ``ctypes`` calls.

They need nvcc and no headers of TensorRT; an engine with them runs only in a Python process that registered
them. The plugins in C++ (``plugin_library``) avoid both limits. Device side: ``trt`` is the module tensorrt.
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
    """Return one plugin creator per op, to be registered and kept alive: TensorRT does not own them.

    Args:
        trt: the module ``tensorrt``, or ``tensorrt_rtx``, which has the same classes.
        launch: ``cuda_kernels.call`` without its first argument, the library.
    """
    plugin_class = _plugin_class(trt, launch)
    return [_creator_class(trt, plugin_class)(op) for op in SIGNATURES]


class _Dimension:
    """An expression of TensorRT that a signature multiplies and divides like a number."""

    def __init__(self, trt: Any, builder: Any, expression: Any) -> None:
        self._trt, self._builder, self.expression = trt, builder, expression

    def __mul__(self, other: _Dimension) -> _Dimension:
        return self._combine(self._trt.DimensionOperation.PROD, other)

    def __floordiv__(self, other: _Dimension) -> _Dimension:
        return self._combine(self._trt.DimensionOperation.FLOOR_DIV, other)

    def _combine(self, operation: Any, other: _Dimension) -> _Dimension:
        expression = self._builder.operation(operation, self.expression, other.expression)
        return _Dimension(self._trt, self._builder, expression)


class _Node:
    """One node: its op, its attributes and, in INT8, its scales; the methods that TensorRT calls on a plugin.

    ``_plugin_class`` adds TensorRT's interfaces, which are known only with the module ``trt``.
    """

    trt: Any
    launch: Launch

    def __init__(self, op: str, attributes: tuple[int, ...], scales: tuple[float, ...]) -> None:
        self.plugin_name, self.plugin_version = node_type(op), VERSION
        self.plugin_namespace, self.num_outputs = NAMESPACE, 1
        self.op, self.attributes, self.scales = op, attributes, scales
        # a PluginField points at its array and does not own it (tensorrt_rtx 1.7)
        self.kept = [np.array([value], np.int32) for value in attributes]
        self.kept += [np.array([value], np.float32) for value in scales]

    def get_capability_interface(self, kind: Any) -> Any:
        return self

    def clone(self) -> Any:
        return type(self)(self.op, self.attributes, self.scales)

    def attach_to_context(self, context: Any) -> Any:
        return self.clone()

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        return [input_types[0]]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Any, builder: Any) -> list[Any]:
        shapes = [[_Dimension(self.trt, builder, d) for d in shape] for shape in inputs]
        signature = SIGNATURES[self.op]
        y = signature.output(*signature.arrange(shapes))
        return [self.trt.DimsExprs([dimension.expression for dimension in y])]

    def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        trt, described, x = self.trt, in_out[pos].desc, in_out[0].desc.type
        if described.format != trt.TensorFormat.LINEAR:
            return False
        if pos == 0:
            return x in ((trt.DataType.INT8,) if self.scales else (trt.DataType.FLOAT, trt.DataType.HALF))
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
        kinds = {"int32": self.trt.PluginFieldType.INT32, "float32": self.trt.PluginFieldType.FLOAT32}
        names = (*SIGNATURES[self.op].attributes, *SCALES)
        return self.trt.PluginFieldCollection(
            [
                self.trt.PluginField(name, array, kinds[array.dtype.name])
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
        arrays = [Array(pointer, tuple(description.dims)) for pointer, description in described]
        of_x, of_y = (Affine(scale) for scale in self.scales or (1.0, 1.0))
        type(self).launch(
            self.op,
            np.dtype(self.trt.nptype(input_desc[0].type)).name,
            inputs=SIGNATURES[self.op].arrange(arrays),
            attributes=self.attributes,
            output=outputs[0],
            of_x=of_x,
            of_y=of_y,
            stream=stream,
        )


def _plugin_class(trt_module: Any, launch_kernel: Launch) -> type:
    """Return ``_Node`` with the interfaces of a module ``tensorrt``."""
    bases: Any = (
        trt_module.IPluginV3,
        trt_module.IPluginV3OneCore,
        trt_module.IPluginV3OneBuild,
        trt_module.IPluginV3OneRuntime,
    )

    class Plugin(_Node, *bases):  # type: ignore[misc]
        """A plugin that TensorRT owns."""

        trt, launch = trt_module, staticmethod(launch_kernel)

        def __init__(self, op: str, attributes: tuple[int, ...], scales: tuple[float, ...]) -> None:
            for base in bases:
                base.__init__(self)
            _Node.__init__(self, op, attributes, scales)

    return Plugin


def _creator_class(trt: Any, plugin_class: type) -> type:
    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Creates the plugins of an op from a node's attributes, or from those that an engine stores."""

        def __init__(self, op: str) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.op, self.name = op, node_type(op)
            self.plugin_namespace, self.plugin_version = NAMESPACE, VERSION
            kinds, none = trt.PluginFieldType, np.array([])
            fields = [trt.PluginField(k, none, kinds.INT32) for k in SIGNATURES[op].attributes]
            fields += [trt.PluginField(k, none, kinds.FLOAT32) for k in SCALES]
            self.field_names = trt.PluginFieldCollection(fields)

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            by_name = {field.name: field for field in fields}
            names = SIGNATURES[self.op].attributes
            is_int8 = any(name in by_name for name in SCALES)
            attributes = tuple(int(_read(trt, self.name, by_name, k, "INT32")) for k in names)
            scales = tuple(float(_read(trt, self.name, by_name, k, "FLOAT32")) for k in SCALES if is_int8)
            if any(scale <= 0 for scale in scales):
                raise ModelError(f"{self.name} got scales {scales}; expected both above 0. Build it again.")
            return plugin_class(self.op, attributes, scales)

    return Creator


def _read(trt: Any, plugin: str, fields: dict[str, Any], name: str, kind: str) -> Any:
    """Return the one value of a field.

    Raises:
        ModelError: where the field is missing or of another type; TensorRT logs the error and stops.
    """
    if name not in fields:
        raise ModelError(
            f"{plugin} got no attribute {name}, only {sorted(fields)}; expected every argument of the op. "
            "Export the ONNX with edgedyn build."
        )
    field = fields[name]
    values = np.asarray(field.data).reshape(-1)
    if field.type != getattr(trt.PluginFieldType, kind) or len(values) != 1:
        raise ModelError(
            f"{plugin} got attribute {name} of type {field.type.name}, {len(values)} values; expected 1 of "
            f"type {kind}. Export the ONNX with edgedyn build."
        )
    return values[0]

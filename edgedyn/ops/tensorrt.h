// Shared by all TensorRT plugins: IPluginV3 around one C function of cuda.h (TensorRT 10.3 and newer).
//
//   inputs      the tensors of the op's schema in order, the optional one last, left out where absent
//   types       x and y float32 or float16, all else the same; or x and y INT8, all else float32. Dense NCHW.
//   fields      the op's other arguments as int32; x_scale and y_scale as float32, which make the plugin INT8
//
// An op adds a file plugin_tensorrt.cpp with one Creator. The library exports getCreators and
// setLoggerFinder, which trtexec --dynamicPlugins and IPluginRegistry::loadLibrary call.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "cuda.h"

namespace edgedyn::plugins {

// Writes an error into TensorRT's log.
void report(const std::string& text);

// Computes dimensions from dimensions, as expressions: TensorRT may ask before it knows the sizes.
class Dimensions {
 public:
  explicit Dimensions(nvinfer1::IExprBuilder& builder) : builder_(builder) {}
  using Expression = const nvinfer1::IDimensionExpr*;
  Expression product(Expression a, Expression b) { return make(nvinfer1::DimensionOperation::kPROD, a, b); }
  Expression quotient(Expression a, Expression b) {
    return make(nvinfer1::DimensionOperation::kFLOOR_DIV, a, b);
  }

 private:
  Expression make(nvinfer1::DimensionOperation what, Expression a, Expression b) {
    return builder_.operation(what, *a, *b);
  }
  nvinfer1::IExprBuilder& builder_;
};

// An op: its row of edgedyn/targets/tensorrt/signatures.py.
struct Signature {
  const char* type;                     // of the ONNX node
  std::vector<const char*> inputs;      // in the schema's order; "bias?" is optional
  std::vector<const char*> attributes;  // in the schema's order
  // y's shape from the node's inputs, which stand in the node's order
  nvinfer1::DimsExprs (*output)(const nvinfer1::DimsExprs* inputs, Dimensions& dimensions);
  int (*compute)(const Call* call);  // 0 or a cudaError_t
};

class Creator : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(const Signature& signature);  // and adds itself to those that getCreators returns

  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* given,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &names_; }
  const char* getPluginName() const noexcept override { return signature_.type; }
  const char* getPluginVersion() const noexcept override { return "1"; }
  const char* getPluginNamespace() const noexcept override { return "edgedyn"; }

 private:
  Signature signature_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection names_;
};

}  // namespace edgedyn::plugins

// The one plugin class, parameterized by a Signature, and the functions that the library exports.
#include <algorithm>
#include <array>
#include <cstring>
#include <iostream>

#include "tensorrt.h"

namespace edgedyn::plugins {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr int32_t kFailed = 1;

nvinfer1::ILoggerFinder* logger_finder = nullptr;

std::vector<nvinfer1::IPluginCreatorInterface*>& creators() {
  static std::vector<nvinfer1::IPluginCreatorInterface*> all;
  return all;
}

bool is_optional(const char* input) { return input[std::strlen(input) - 1] == '?'; }

// Index in the schema of each of a node's inputs; the optional one is last.
std::vector<int32_t> node_order(const Signature& op) {
  std::vector<int32_t> order(op.inputs.size());
  for (size_t k = 0; k < order.size(); ++k) order[k] = static_cast<int32_t>(k);
  std::stable_partition(order.begin(), order.end(), [&](int32_t k) { return !is_optional(op.inputs[k]); });
  return order;
}

struct Arguments {
  std::array<int32_t, 8> values{};  // in the order of the schema
  float x_scale = 0, y_scale = 0;   // 0 where the tensors are not INT8
};

class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(const Signature& op, const Arguments& arguments)
      : op_(op), arguments_(arguments), order_(node_order(op)) {}

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  nvinfer1::IPluginV3* clone() noexcept override { return new Plugin(op_, arguments_, inputs_); }
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    return clone();
  }

  const char* getPluginName() const noexcept override { return op_.type; }
  const char* getPluginVersion() const noexcept override { return "1"; }
  const char* getPluginNamespace() const noexcept override { return "edgedyn"; }
  int32_t getNbOutputs() const noexcept override { return 1; }

  int32_t getOutputDataTypes(DataType* y, int32_t, const DataType* inputs, int32_t) const noexcept override {
    *y = inputs[0];
    return 0;
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t count, const nvinfer1::DimsExprs*,
                          int32_t, nvinfer1::DimsExprs* y, int32_t,
                          nvinfer1::IExprBuilder& builder) noexcept override {
    if (!takes(count)) return kFailed;
    Dimensions dimensions(builder);
    *y = op_.output(inputs, dimensions);
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t) noexcept override {
    const auto& [type, format] = std::pair(tensors[position].desc.type, tensors[position].desc.format);
    const DataType x = tensors[0].desc.type;
    const bool stores_int8 = arguments_.x_scale != 0;
    if (format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (position == 0)
      return stores_int8 ? x == DataType::kINT8 : x == DataType::kFLOAT || x == DataType::kHALF;
    return type == (stores_int8 && position < inputs ? DataType::kFLOAT : x);
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc*, int32_t inputs, const DynamicPluginTensorDesc*,
                          int32_t) noexcept override {
    inputs_ = inputs;
    return takes(inputs) ? 0 : kFailed;
  }

  int32_t onShapeChange(const PluginTensorDesc*, int32_t inputs, const PluginTensorDesc*,
                        int32_t) noexcept override {
    inputs_ = inputs;
    return takes(inputs) ? 0 : kFailed;
  }

  int32_t enqueue(const PluginTensorDesc* described, const PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void*, cudaStream_t stream) noexcept override {
    Call call{};
    const DataType type = described[0].type;
    call.type = type == DataType::kINT8 ? kInt8 : type == DataType::kHALF ? kFloat16 : kFloat32;
    for (int32_t k = 0; k < inputs_; ++k) {
      call.inputs[order_[k]] = inputs[k];
      std::copy_n(described[k].dims.d, described[k].dims.nbDims, call.shapes[order_[k]]);
    }
    std::copy(arguments_.values.begin(), arguments_.values.end(), call.attributes);
    call.output = outputs[0];
    if (type == DataType::kINT8) {
      call.of_x = {arguments_.x_scale, 0, 1 / arguments_.x_scale};
      call.of_y = {arguments_.y_scale, 0, 1 / arguments_.y_scale};
    }
    call.stream = stream;
    const int error = op_.compute(&call);
    if (error)
      report(std::string(op_.type) + ": the kernel was not launched, CUDA error " + std::to_string(error));
    return error;
  }

  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    fields_.clear();
    for (size_t k = 0; k < op_.attributes.size(); ++k)
      fields_.emplace_back(op_.attributes[k], &arguments_.values[k], PluginFieldType::kINT32, 1);
    if (arguments_.x_scale != 0) {
      fields_.emplace_back("x_scale", &arguments_.x_scale, PluginFieldType::kFLOAT32, 1);
      fields_.emplace_back("y_scale", &arguments_.y_scale, PluginFieldType::kFLOAT32, 1);
    }
    serialized_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &serialized_;
  }

 private:
  Plugin(const Signature& op, const Arguments& arguments, int32_t inputs) : Plugin(op, arguments) {
    inputs_ = inputs;
  }

  bool takes(int32_t inputs) const {
    const auto most = static_cast<int32_t>(order_.size());
    const int32_t least = most - static_cast<int32_t>(is_optional(op_.inputs[order_.back()]));
    if (inputs >= least && inputs <= most) return true;
    report(std::string(op_.type) + " got " + std::to_string(inputs) + " inputs; expected " +
           std::to_string(least) + (least < most ? " or " + std::to_string(most) : "") +
           ". Export the ONNX with edgedyn build.");
    return false;
  }

  const Signature& op_;  // of the creator, which lives as long as the library
  Arguments arguments_;
  std::vector<int32_t> order_;
  int32_t inputs_ = 0;
  std::vector<PluginField> fields_;
  nvinfer1::PluginFieldCollection serialized_{};
};

// Reads a field into its place, or logs why not.
bool read(const Signature& op, const PluginField& field, Arguments* arguments) {
  const std::string name = field.name;
  const bool is_scale = name == "x_scale" || name == "y_scale";
  const auto place = std::find(op.attributes.begin(), op.attributes.end(), name);
  if (!is_scale && place == op.attributes.end()) return true;  // plugin_version, plugin_namespace
  const auto expected = is_scale ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;
  if (field.type != expected || field.length != 1 || field.data == nullptr) {
    report(std::string(op.type) + " got attribute " + name + " of type " +
           std::to_string(static_cast<int32_t>(field.type)) + ", " + std::to_string(field.length) +
           " values; expected 1 of type " + std::to_string(static_cast<int32_t>(expected)) +
           " (PluginFieldType). Export the ONNX with edgedyn build.");
    return false;
  }
  if (is_scale) {
    std::memcpy(name == "x_scale" ? &arguments->x_scale : &arguments->y_scale, field.data, sizeof(float));
  } else {
    std::memcpy(&arguments->values[place - op.attributes.begin()], field.data, sizeof(int32_t));
  }
  return true;
}

}  // namespace

void report(const std::string& text) {
  nvinfer1::ILogger* logger = logger_finder == nullptr ? nullptr : logger_finder->findLogger();
  if (logger != nullptr) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
  } else {
    std::cerr << text << std::endl;
  }
}

Creator::Creator(const Signature& signature) : signature_(signature) {
  for (const char* name : signature_.attributes)
    fields_.emplace_back(name, nullptr, PluginFieldType::kINT32, 1);
  for (const char* name : {"x_scale", "y_scale"})
    fields_.emplace_back(name, nullptr, PluginFieldType::kFLOAT32, 1);
  names_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  creators().push_back(this);
}

nvinfer1::IPluginV3* Creator::createPlugin(const char*, const nvinfer1::PluginFieldCollection* given,
                                           nvinfer1::TensorRTPhase) noexcept {
  Arguments arguments;
  std::vector<std::string> found;
  for (int32_t k = 0; k < given->nbFields; ++k) {
    if (!read(signature_, given->fields[k], &arguments)) return nullptr;
    found.emplace_back(given->fields[k].name);
  }
  for (const char* name : signature_.attributes) {
    if (std::find(found.begin(), found.end(), name) != found.end()) continue;
    report(std::string(signature_.type) + " got no attribute " + name +
           "; expected every argument of the op. Export the ONNX with edgedyn build.");
    return nullptr;
  }
  const bool has_scales = arguments.x_scale > 0 && arguments.y_scale > 0;
  if (!has_scales && (arguments.x_scale != 0 || arguments.y_scale != 0)) {
    report(std::string(signature_.type) + " got x_scale " + std::to_string(arguments.x_scale) +
           " and y_scale " + std::to_string(arguments.y_scale) +
           "; expected both above 0 for INT8, or neither.");
    return nullptr;
  }
  return new Plugin(signature_, arguments);
}

}  // namespace edgedyn::plugins

#define EDGEDYN_EXPORT extern "C" __attribute__((visibility("default")))

EDGEDYN_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  auto& all = edgedyn::plugins::creators();
  count = static_cast<int32_t>(all.size());
  return all.data();
}

EDGEDYN_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  edgedyn::plugins::logger_finder = finder;
}

// Walks through a TensorRT plugin of ours as a builder and an engine do, without TensorRT's libraries and a GPU.
//
//   plugin_host TYPE[,FIELD=VALUE...] float32|float16|int8 B,C,H,W [B,C,H,W ...]
//
// Prints what the interfaces answer, a word and its values a line. The kernels are stand-ins that print their Call:
// compile with -DKERNELS='KERNEL(op) ...', one for each op.
#include <NvInferRuntime.h>

#include <cstdlib>
#include <deque>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "cuda.h"

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);
extern "C" void setLoggerFinder(ILoggerFinder* finder);

static void print_call(const char* op, const edgedyn::Call* call) {
  std::cout << "call " << op << " type " << call->type << " inputs";
  for (const void* input : call->inputs) std::cout << ' ' << reinterpret_cast<intptr_t>(input);
  std::cout << " shapes";
  for (const auto& shape : call->shapes)
    for (int64_t size : shape) std::cout << ' ' << size;
  std::cout << " attributes";
  for (int64_t value : call->attributes) std::cout << ' ' << value;
  std::cout << " output " << reinterpret_cast<intptr_t>(call->output) << " x " << call->of_x.scale << ' '
            << call->of_x.zero_point << ' ' << call->of_x.inverse << " y " << call->of_y.scale << ' '
            << call->of_y.zero_point << ' ' << call->of_y.inverse << " stream "
            << reinterpret_cast<intptr_t>(call->stream) << std::endl;
}
static int kernel_error = 0;
#define KERNEL(op)                                             \
  extern "C" int edgedyn_##op(const edgedyn::Call* call) {     \
    print_call(#op, call);                                     \
    return kernel_error;                                       \
  }
KERNELS

// Dimension expressions that know their value.
struct Number : IDimensionExpr, apiv::VDimensionExpr {
  explicit Number(int64_t v) : value(v) { IDimensionExpr::mImpl = this; }
  bool isConstant() const noexcept override { return true; }
  int64_t getConstantValue() const noexcept override { return value; }
  bool isSizeTensor() const noexcept override { return false; }
  int64_t value;
};

struct Builder : IExprBuilder, apiv::VExprBuilder {
  Builder() { IExprBuilder::mImpl = this; }
  IDimensionExpr const* constant(int64_t value) noexcept override { return &numbers.emplace_back(value); }
  IDimensionExpr const* operation(DimensionOperation what, IDimensionExpr const& a,
                                  IDimensionExpr const& b) noexcept override {
    const int64_t x = a.getConstantValue(), y = b.getConstantValue();
    if (what != DimensionOperation::kPROD && what != DimensionOperation::kFLOOR_DIV) std::abort();
    return constant(what == DimensionOperation::kPROD ? x * y : x / y);
  }
  IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
    std::abort();
  }
  std::deque<Number> numbers;
};

struct Log : ILogger, ILoggerFinder {
  void log(Severity, AsciiChar const* text) noexcept override { std::cout << "log " << text << std::endl; }
  ILogger* findLogger() override { return this; }
};

static std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

static IPluginCreatorV3One* find_creator(const std::string& type) {
  int32_t count = 0;
  auto* const* all = getCreators(count);
  for (int32_t k = 0; k < count; ++k) {
    auto* creator = static_cast<IPluginCreatorV3One*>(all[k]);
    if (creator->getPluginName() == type) return creator;
  }
  std::exit(2);
}

// Fields of a node: NAME=3 is an int32, NAME=0.5 a float32, as TensorRT's parser makes them.
struct Fields {
  explicit Fields(const std::vector<std::string>& given) {
    for (size_t k = 1; k < given.size(); ++k) {
      const auto& text = names.emplace_back(given[k].substr(0, given[k].find('=')));
      const auto value = given[k].substr(given[k].find('=') + 1);
      if (value.find('.') == std::string::npos) {
        fields.emplace_back(text.c_str(), &ints.emplace_back(std::stoi(value)), PluginFieldType::kINT32, 1);
      } else {
        fields.emplace_back(text.c_str(), &floats.emplace_back(std::stof(value)), PluginFieldType::kFLOAT32, 1);
      }
    }
    collection = {static_cast<int32_t>(fields.size()), fields.data()};
  }
  std::deque<std::string> names;
  std::deque<int32_t> ints;
  std::deque<float> floats;
  std::vector<PluginField> fields;
  PluginFieldCollection collection;
};

static void print_fields(const char* what, const PluginFieldCollection* found) {
  std::cout << what;
  for (int32_t k = 0; k < found->nbFields; ++k) {
    const PluginField& field = found->fields[k];
    const bool is_float = field.type == PluginFieldType::kFLOAT32;
    std::cout << ' ' << field.name << (is_float ? ":float" : ":int");
    if (field.data == nullptr) continue;
    std::cout << '=';
    is_float ? std::cout << *static_cast<const float*>(field.data)
             : std::cout << *static_cast<const int32_t*>(field.data);
  }
  std::cout << std::endl;
}

// Every combination of type and layout that the plugin takes, tensor by tensor: one digit a tensor, its DataType.
static void print_formats(IPluginV3OneBuild& build, int32_t inputs) {
  const std::vector<DataType> types{DataType::kFLOAT, DataType::kHALF, DataType::kINT8, DataType::kINT32};
  std::vector<DynamicPluginTensorDesc> tensors(inputs + 1);
  size_t combinations = 1;
  for (int32_t k = 0; k <= inputs; ++k) combinations *= types.size();
  std::cout << "formats";
  for (auto format : {TensorFormat::kLINEAR, TensorFormat::kCHW4, TensorFormat::kHWC8}) {
    for (size_t code = 0; code < combinations; ++code) {
      std::string taken;
      size_t rest = code;
      for (int32_t k = 0; k <= inputs; ++k, rest /= types.size()) {
        tensors[k].desc.type = types[rest % types.size()];
        tensors[k].desc.format = format;
        if (!build.supportsFormatCombination(k, tensors.data(), inputs, 1)) break;
        taken += std::to_string(static_cast<int32_t>(tensors[k].desc.type));
      }
      if (taken.size() == tensors.size()) std::cout << ' ' << static_cast<int32_t>(format) << ':' << taken;
    }
  }
  std::cout << std::endl;
}

int main(int count, char** words) {
  Log log;
  setLoggerFinder(&log);
  const auto given = split(words[1]);
  const std::string kind = words[2];
  const auto type = kind == "int8" ? DataType::kINT8 : kind == "float16" ? DataType::kHALF : DataType::kFLOAT;
  IPluginCreatorV3One* creator = find_creator(given[0]);
  std::cout << "creator " << creator->getPluginName() << ' ' << creator->getPluginVersion() << ' '
            << creator->getPluginNamespace() << std::endl;
  print_fields("names", creator->getFieldNames());
  Fields fields(given);
  IPluginV3* made = creator->createPlugin("node", &fields.collection, TensorRTPhase::kBUILD);
  if (made == nullptr) return 3;

  auto* build = static_cast<IPluginV3OneBuild*>(made->getCapabilityInterface(PluginCapabilityType::kBUILD));
  Builder builder;
  const int32_t inputs = count - 3;
  std::vector<DimsExprs> shapes(inputs);
  std::vector<PluginTensorDesc> described(inputs);
  std::vector<DataType> types(inputs, type == DataType::kINT8 ? DataType::kFLOAT : type);
  types[0] = type;
  for (int32_t k = 0; k < inputs; ++k) {
    for (const auto& size : split(words[3 + k])) {
      shapes[k].d[shapes[k].nbDims++] = builder.constant(std::stoll(size));
      described[k].dims.d[described[k].dims.nbDims++] = std::stoll(size);
    }
    described[k].type = types[k];
  }
  DimsExprs y{};
  if (build->getOutputShapes(shapes.data(), inputs, nullptr, 0, &y, 1, builder) != 0) {
    delete made;
    return 4;
  }
  std::cout << "shape";
  for (int32_t k = 0; k < y.nbDims; ++k) std::cout << ' ' << y.d[k]->getConstantValue();
  DataType y_type{};
  build->getOutputDataTypes(&y_type, 1, types.data(), inputs);
  std::cout << std::endl << "type " << static_cast<int32_t>(y_type) << std::endl;
  print_formats(*build, inputs);
  std::cout << "workspace " << build->getWorkspaceSize(nullptr, inputs, nullptr, 1) << " outputs "
            << build->getNbOutputs() << std::endl;

  // into an engine, out of it, and into a context: what is kept are the fields
  IPluginV3* cloned = made->clone();
  delete made;
  auto* kept = static_cast<IPluginV3OneRuntime*>(cloned->getCapabilityInterface(PluginCapabilityType::kRUNTIME))
                   ->getFieldsToSerialize();
  print_fields("serialized", kept);
  IPluginV3* read = creator->createPlugin("node", kept, TensorRTPhase::kRUNTIME);
  delete cloned;
  auto* runtime = static_cast<IPluginV3OneRuntime*>(read->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  IPluginV3* attached = runtime->attachToContext(nullptr);
  delete read;
  runtime = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  auto* core = static_cast<IPluginV3OneCore*>(attached->getCapabilityInterface(PluginCapabilityType::kCORE));
  std::cout << "plugin " << core->getPluginName() << ' ' << core->getPluginVersion() << ' '
            << core->getPluginNamespace() << std::endl;
  PluginTensorDesc output{};
  output.type = type;
  if (runtime->onShapeChange(described.data(), inputs, &output, 1) != 0) return 5;
  std::vector<const void*> pointers;
  for (int32_t k = 0; k < inputs; ++k) pointers.push_back(reinterpret_cast<const void*>(intptr_t{100} + k));
  void* outputs[] = {reinterpret_cast<void*>(intptr_t{200})};
  auto stream = reinterpret_cast<cudaStream_t>(intptr_t{300});
  for (kernel_error = 0; kernel_error < 10; kernel_error += 9) {
    std::cout << "returned " << runtime->enqueue(described.data(), &output, pointers.data(), outputs, nullptr, stream)
              << std::endl;
  }
  delete attached;
}

// Runs programs of ExecuTorch without Python: on a phone, on a board, under an emulator.
//
//   edgedyn_runner PROGRAM.pte METHOD FOLDER [PROGRAM.pte METHOD FOLDER]...
//
// Reads FOLDER/input_0.npy, input_1.npy, ... and writes FOLDER/output_0.npy, ... A program fixes types and
// shapes, so a file is read by comparing: its header must be the one that NumPy writes for the tensor that
// the program takes.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor_ptr.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace edgedyn {
namespace {

using ::executorch::aten::ScalarType;
using ::executorch::aten::Tensor;
using ::executorch::extension::make_tensor_ptr;
using ::executorch::extension::Module;
using ::executorch::extension::TensorPtr;
using ::executorch::runtime::Error;
using ::executorch::runtime::EValue;
using ::executorch::runtime::Program;
using Sizes = std::vector<::executorch::aten::SizesType>;

[[noreturn]] void Refuse(const std::string& what) { throw std::runtime_error(what); }

void Demand(Error error, const std::string& what) {
  if (error == Error::Ok) return;
  Refuse(what + ": the runtime says " + ::executorch::runtime::to_string(error) +
         ", and why in the lines above");
}

// ----------------------------------------------------------------------------------------------------
// NumPy's files

const char* TypeName(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "<f4";
    case ScalarType::Double:
      return "<f8";
    case ScalarType::Char:
      return "|i1";
    case ScalarType::Byte:
      return "|u1";
    case ScalarType::Int:
      return "<i4";
    case ScalarType::Long:
      return "<i8";
    case ScalarType::Bool:
      return "|b1";
    default:
      Refuse("a tensor of type " + std::to_string(static_cast<int>(type)) +
             " has no place in a .npy file here");
  }
}

// {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), } as numpy.save writes it, without the padding.
std::string Header(ScalarType type, const Sizes& sizes) {
  std::string shape;
  for (size_t k = 0; k < sizes.size(); ++k) shape += (k ? ", " : "") + std::to_string(sizes[k]);
  if (sizes.size() == 1) shape += ",";
  return std::string("{'descr': '") + TypeName(type) + "', 'fortran_order': False, 'shape': (" + shape +
         "), }";
}

constexpr char kMagic[] =
    "\x93NUMPY\x01";  // and a 0, of version 1.0; the length of the header follows in two bytes
constexpr size_t kPrefix = 10;

std::vector<uint8_t> ReadNpy(const std::string& path, ScalarType type, const Sizes& sizes, size_t bytes) {
  std::ifstream file(path, std::ios::binary);
  if (!file) Refuse(path + " cannot be read; expected one .npy file an input of the method");
  const std::string all{std::istreambuf_iterator<char>(file), {}};
  if (all.size() < kPrefix || all.compare(0, 8, std::string(kMagic, 8)) != 0)
    Refuse(path + " is no .npy file of version 1.0");
  const size_t length =
      static_cast<uint8_t>(all[8]) + 256 * static_cast<size_t>(static_cast<uint8_t>(all[9]));
  const std::string header = all.substr(kPrefix, length), expected = Header(type, sizes);
  if (header.compare(0, expected.size(), expected) != 0)
    Refuse(path + " holds " + header.substr(0, header.find('}') + 1) + "; expected " + expected);
  if (all.size() != kPrefix + length + bytes)
    Refuse(path + " has " + std::to_string(all.size()) + " bytes; expected " +
           std::to_string(kPrefix + length + bytes));
  return {all.end() - bytes, all.end()};
}

void WriteNpy(const std::string& path, const Tensor& tensor) {
  std::string header = Header(tensor.scalar_type(), Sizes(tensor.sizes().begin(), tensor.sizes().end()));
  header.append(63 - (kPrefix + header.size()) % 64, ' ').append("\n");  // data begin at a multiple of 64
  std::ofstream file(path, std::ios::binary);
  file.write(kMagic, 8);
  file.put(static_cast<char>(header.size() % 256)).put(static_cast<char>(header.size() / 256));
  file << header;
  file.write(static_cast<const char*>(tensor.const_data_ptr()),
             static_cast<std::streamsize>(tensor.nbytes()));
  if (!file.flush()) Refuse(path + " cannot be written");
}

// ------------------------------------------------------------------------------------------------------- a
// program

std::string PathOf(const std::string& folder, const char* which, size_t k) {
  return folder + "/" + which + "_" + std::to_string(k) + ".npy";
}

std::vector<TensorPtr> ReadInputs(Module& module, const std::string& method, const std::string& folder) {
  const auto meta = module.method_meta(method);
  Demand(meta.error(), "the program has no method " + method);
  std::vector<TensorPtr> inputs;
  for (size_t k = 0; k < meta->num_inputs(); ++k) {
    const auto input = meta->input_tensor_meta(k);
    Demand(input.error(), "input " + std::to_string(k) + " is no tensor");
    const Sizes sizes(input->sizes().begin(), input->sizes().end());
    std::vector<uint8_t> bytes =
        ReadNpy(PathOf(folder, "input", k), input->scalar_type(), sizes, input->nbytes());
    inputs.push_back(make_tensor_ptr(sizes, std::move(bytes), {}, {}, input->scalar_type()));
  }
  if (std::ifstream(PathOf(folder, "input", inputs.size())))
    Refuse(folder + " holds more inputs than the " + std::to_string(inputs.size()) + " that " + method +
           " takes");
  return inputs;
}

// Whether the axes lie in order in memory, as those of a .npy file do.
bool IsInOrder(const Tensor& tensor) {
  const auto order = tensor.dim_order();
  for (size_t k = 0; k < order.size(); ++k) {
    if (order[k] != k) return false;
  }
  return true;
}

void RunJob(const std::string& path, const std::string& method, const std::string& folder) {
  Module module(path);
  Demand(module.load(Program::Verification::InternalConsistency), path + " is no program of this runtime");
  const std::vector<TensorPtr> inputs = ReadInputs(module, method, folder);
  Demand(module.load_method(method), "method " + method + " cannot be loaded");
  const auto outputs = module.execute(method, std::vector<EValue>(inputs.begin(), inputs.end()));
  Demand(outputs.error(), "method " + method + " cannot be run");
  for (size_t k = 0; k < outputs->size(); ++k) {
    const EValue& output = (*outputs)[k];
    if (!output.isTensor() || !IsInOrder(output.toTensor()))
      Refuse("output " + std::to_string(k) + " is no tensor whose axes lie in order");
    WriteNpy(PathOf(folder, "output", k), output.toTensor());
  }
}

}  // namespace
}  // namespace edgedyn

int main(int count, char** arguments) {
  if (count < 4 || count % 3 != 1) {
    std::fprintf(stderr, "usage: %s PROGRAM.pte METHOD FOLDER [PROGRAM.pte METHOD FOLDER]...\n",
                 arguments[0]);
    return 2;
  }
  for (int k = 1; k < count; k += 3) {
    try {
      edgedyn::RunJob(arguments[k], arguments[k + 1], arguments[k + 2]);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "edgedyn_runner: %s: %s\n", arguments[k], error.what());
      return 1;
    }
  }
  return 0;
}

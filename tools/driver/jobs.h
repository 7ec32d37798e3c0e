// Calls of ops from a file, written by tools/drivers.py: each tensor in a buffer that shows who steps over its edge.
//
//   job     name, arguments; the last argument is the output and holds what stood there before
//   value   'n' none | 'i' int64 | 'd' double | 'b' byte | 's' text | 't' tensor
//   tensor  element type as numpy writes it, sizes, strides, elements behind a 64-byte line, bytes in memory's order
//   result  status, message, sizes of the output, its bytes
//
// Numbers are the machine's own. Texts and lists begin with their length, 64 bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, size) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(begin, size) static_cast<void>(0)
#endif

namespace edgedyn::driver {

// Bytes between two bands that are NaN as float, double and half, and -128 as INT8.
class Buffer {
 public:
  Buffer(const std::string& bytes, bool is_int8, size_t shift)
      : size_(bytes.size()), lead_(kBand + shift), whole_(lead_ + size_ + kBand), poison_(is_int8 ? '\x80' : '\xff'),
        memory_(static_cast<char*>(std::aligned_alloc(64, (whole_ + 63) / 64 * 64)), std::free) {
    std::memset(memory_.get(), poison_, whole_);
    std::memcpy(data(), bytes.data(), size_);
    ASAN_POISON_MEMORY_REGION(memory_.get(), lead_);
    ASAN_POISON_MEMORY_REGION(data() + size_, kBand);
  }

  char* data() const { return memory_.get() + lead_; }
  std::string bytes() const { return std::string(data(), size_); }

  // Whether nobody wrote beside the bytes; call it last, the bands may be read afterwards.
  bool is_intact() const {
    ASAN_UNPOISON_MEMORY_REGION(memory_.get(), whole_);
    const auto is_poison = [this](char c) { return c == poison_; };
    return std::all_of(memory_.get(), data(), is_poison) &&
           std::all_of(data() + size_, memory_.get() + whole_, is_poison);
  }

 private:
  static constexpr size_t kBand = 256;  // more than two of the widest vectors
  size_t size_, lead_, whole_;
  char poison_;
  std::unique_ptr<char, void (*)(void*)> memory_;
};

struct JobTensor {
  char type;  // f d e b
  std::vector<int64_t> sizes, strides;
  std::string given;  // the bytes at first
  Buffer buffer;
};

struct Value {
  char kind;
  int64_t integer = 0;
  double real = 0;
  std::string text;
  std::unique_ptr<JobTensor> tensor;
};

struct Job {
  std::string name;
  std::vector<Value> values;

  const JobTensor& out() const { return *values.back().tensor; }

  // What a call broke beside its result, or an empty text.
  std::string Damage() const {
    for (size_t k = 0; k < values.size(); ++k) {
      const JobTensor* tensor = values[k].tensor.get();
      if (tensor == nullptr) continue;
      if (k + 1 < values.size() && tensor->buffer.bytes() != tensor->given) return Blame("wrote to", k);
      if (!tensor->buffer.is_intact()) return Blame("wrote outside of", k);
    }
    return "";
  }

 private:
  static std::string Blame(const char* deed, size_t k) { return std::string(deed) + " argument " + std::to_string(k); }
};

class JobFile {
 public:
  explicit JobFile(const char* path) : file_(path, std::ios::binary) {}

  bool Next(Job& job) {
    if (file_.peek() == std::ifstream::traits_type::eof()) return false;
    job.name = Text();
    job.values.clear();
    for (auto left = Number<int64_t>(); left > 0; --left) job.values.push_back(ReadValue());
    return static_cast<bool>(file_);
  }

 private:
  template <typename T>
  T Number() {
    T value{};
    file_.read(reinterpret_cast<char*>(&value), sizeof(value));
    return value;
  }

  std::string Text() {
    std::string text(Number<int64_t>(), '\0');
    file_.read(text.data(), static_cast<std::streamsize>(text.size()));
    return text;
  }

  std::vector<int64_t> Numbers() {
    std::vector<int64_t> numbers(Number<int64_t>());
    for (int64_t& number : numbers) number = Number<int64_t>();
    return numbers;
  }

  Value ReadValue() {
    Value value;
    value.kind = Number<char>();
    if (value.kind == 'i') value.integer = Number<int64_t>();
    if (value.kind == 'd') value.real = Number<double>();
    if (value.kind == 'b') value.integer = Number<char>();
    if (value.kind == 's') value.text = Text();
    if (value.kind == 't') value.tensor = ReadTensor();
    return value;
  }

  std::unique_ptr<JobTensor> ReadTensor() {
    const char type = Number<char>();
    auto sizes = Numbers(), strides = Numbers();
    const auto shift = static_cast<size_t>(Number<int64_t>());
    std::string bytes = Text();
    Buffer buffer(bytes, type == 'b', shift);
    return std::unique_ptr<JobTensor>(
        new JobTensor{type, std::move(sizes), std::move(strides), std::move(bytes), std::move(buffer)});
  }

  std::ifstream file_;
};

// Each result is on the disk before the next job begins: their number tells which call ended the process.
class ResultFile {
 public:
  explicit ResultFile(const char* path) : file_(path, std::ios::binary) {}

  void Write(int64_t status, const std::string& message, const std::vector<int64_t>& sizes, const std::string& bytes) {
    Number(status);
    Text(message);
    Number(static_cast<int64_t>(sizes.size()));
    for (int64_t size : sizes) Number(size);
    Text(bytes);
    file_.flush();
  }

 private:
  void Number(int64_t value) { file_.write(reinterpret_cast<const char*>(&value), sizeof(value)); }
  void Text(const std::string& text) {
    Number(static_cast<int64_t>(text.size()));
    file_.write(text.data(), static_cast<std::streamsize>(text.size()));
  }

  std::ofstream file_;
};

}  // namespace edgedyn::driver

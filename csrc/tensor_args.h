// SPDX-License-Identifier: Apache-2.0
// Tensors as arguments and as results, read and made through DLPack's C interface.

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "convert.h"
#include "dlpack.h"
#include "op_checks.h"

namespace llmdd {

// A contiguous int64 tensor on the CPU that Python hands over: the tensor's own memory, or a copy
// where that is not contiguous. ValueError for any other tensor, TypeError for no tensor.
class Int64Values {
 public:
  const int64_t* data() const { return copy_.empty() ? data_ : copy_.data(); }
  size_t size() const { return static_cast<size_t>(count_); }
  // Addresses cross the border as int64 and mean uint64.
  const uint64_t* as_addresses() const { return reinterpret_cast<const uint64_t*>(data()); }
  std::vector<int64_t> values() const { return {data(), data() + count_}; }

 protected:
  void read(PyObject* object, const char* name, int32_t dims);
  int64_t shape_[2] = {0, 0};

 private:
  void copy_strided(const dlpack::Tensor& tensor);

  const int64_t* data_ = nullptr;
  int64_t count_ = 0;
  std::vector<int64_t> copy_;
};

// With one dimension.
class Int64Vector : public Int64Values {
 public:
  Int64Vector(PyObject* object, const char* name) { read(object, name, 1); }
};

// With two.
class Int64Table : public Int64Values {
 public:
  Int64Table(PyObject* object, const char* name) { read(object, name, 2); }
  int64_t rows() const { return shape_[0]; }
  int64_t columns() const { return shape_[1]; }
};

template <>
struct From<Int64Vector> {
  static Int64Vector get(PyObject* object, const char* name) { return {object, name}; }
};

template <>
struct From<Int64Table> {
  static Int64Table get(PyObject* object, const char* name) { return {object, name}; }
};

// The list of tensors that a copy works on (op_checks.h).
template <>
struct From<TensorRows> {
  static TensorRows get(PyObject* object, const char* name);
};

// How many threads a copy may take: torch's own number where the call leaves it out.
struct Threads {
  int count;
};

template <>
struct From<Threads> {
  static Threads get(PyObject* object, const char* name);
};

// A torch.dtype.
struct ElementType {
  dlpack::DataType type;
  int64_t nbytes;
};

template <>
struct From<ElementType> {
  static ElementType get(PyObject* object, const char* name);
};

// A result: an int64 tensor of [values / columns, columns], or of one dimension for 0 columns.
struct NewInt64 {
  std::vector<int64_t> values;
  int64_t columns = 0;
};

template <>
struct To<NewInt64> {
  static PyRef make(NewInt64 made);
};

// A result: a contiguous tensor over memory that `owner` keeps alive, and lets go of when the last
// tensor on that memory is gone, in whatever thread, with or without the GIL. Never an inference
// tensor: those could not be written outside of inference mode.
struct MemoryTensor {
  void* data;
  std::vector<int64_t> shape;
  ElementType type;
  std::shared_ptr<void> owner;
};

template <>
struct To<MemoryTensor> {
  static PyRef make(MemoryTensor made);
};

// Bytes of a contiguous tensor; ValueError for what no memory can hold.
uint64_t bytes_of(const std::vector<int64_t>& shape, const ElementType& type);

// Any tensor, kept alive: where it is now, as far as torch says. This keeps the memory that the
// tensor has now, and not what it had before. Needs the GIL.
class HeldTensor {
 public:
  HeldTensor(PyObject* object, const char* name);
  // Addresses of its first byte and of the byte behind its last; {0, 0} where it has no memory.
  std::pair<uint64_t, uint64_t> extent() const;

 private:
  PyRef tensor_;
};

template <>
struct From<HeldTensor> {
  static HeldTensor get(PyObject* object, const char* name) { return {object, name}; }
};

// A uint8 tensor [nbytes] that Python hands over, and that stays alive with this.
class HeldBytes {
 public:
  HeldBytes(PyObject* object, const char* name);
  HeldBytes(HeldBytes&& other) noexcept : tensor_(std::exchange(other.tensor_, nullptr)) {}
  ~HeldBytes();
  HeldBytes(const HeldBytes&) = delete;
  HeldBytes& operator=(const HeldBytes&) = delete;

  char* data() const;
  uint64_t nbytes() const { return static_cast<uint64_t>(tensor_->tensor.shape[0]); }
  bool in_host_memory() const { return tensor_->tensor.device.type == dlpack::kCpu; }

 private:
  dlpack::ManagedTensor* tensor_;
};

template <>
struct From<std::shared_ptr<HeldBytes>> {
  static std::shared_ptr<HeldBytes> get(PyObject* object, const char* name) {
    return std::make_shared<HeldBytes>(object, name);
  }
};

}  // namespace llmdd

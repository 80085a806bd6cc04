// SPDX-License-Identifier: Apache-2.0

#include "tensor_args.h"

#include <unordered_map>
#include <utility>

namespace llmdd {
namespace {

// torch.Tensor and its table of functions. The class is never unloaded, so both are kept.
struct TensorClass {
  PyTypeObject* type;
  const dlpack::Exchange* exchange;
};

TensorClass find_tensor_class() {
  PyRef type = attribute(import("torch").get(), "Tensor");
  PyObject* capsule = PyObject_GetAttrString(type.get(), dlpack::kExchangeAttribute);
  if (capsule == nullptr) {
    PyErr_SetString(PyExc_ImportError,
                    "this torch has no torch.Tensor.__dlpack_c_exchange_api__: torch 2.10 or later "
                    "is needed");
    throw PythonError();
  }
  const PyRef held = PyRef::take(capsule);
  const auto* table =
      static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule, dlpack::kExchangeCapsule));
  if (table == nullptr) throw PythonError();
  while (table != nullptr && table->version.major != dlpack::kMajorVersion) table = table->older;
  if (table == nullptr) {
    PyErr_Format(PyExc_ImportError, "this torch speaks another DLPack than version %u",
                 dlpack::kMajorVersion);
    throw PythonError();
  }
  return {reinterpret_cast<PyTypeObject*>(type.release()), table};
}

const TensorClass& tensor_class() {
  static TensorClass found{nullptr, nullptr};  // under the GIL
  if (found.type == nullptr) found = find_tensor_class();
  return found;
}

void check_is_tensor(PyObject* object, const char* name) {
  if (PyObject_TypeCheck(object, tensor_class().type) == 0) {
    PyErr_Format(PyExc_TypeError, "%s must be a torch.Tensor, got %R", name, object);
    throw PythonError();
  }
}

std::string text_of_attribute(PyObject* object, const char* name) {
  const PyRef value = attribute(object, name);
  const PyRef text = PyRef::take(PyObject_Str(value.get()));
  return From<std::string>::get(text.get(), name);
}

std::string description(PyObject* tensor) {
  return "shape " + text_of_attribute(tensor, "shape") + " of " +
         text_of_attribute(tensor, "dtype") + " on " + text_of_attribute(tensor, "device");
}

// False, with no error set, where DLPack can't describe the tensor: one without memory, without
// strides, or of a quantized type.
bool look_at(PyObject* tensor, dlpack::Tensor* out) {
  if (tensor_class().exchange->look_at(tensor, out) == 0) {
    out->data = static_cast<char*>(out->data) + out->byte_offset;
    return true;
  }
  PyErr_Clear();
  return false;
}

bool is_true_of(PyObject* tensor, PyObject* method) {
  return is_true(PyRef::take(PyObject_CallMethodObjArgs(tensor, method, nullptr)));
}

int64_t nbytes_of(const dlpack::DataType& type) {
  return (int64_t{type.bits} * type.lanes + 7) / 8;
}

int64_t stride_of(const dlpack::Tensor& tensor, int32_t dim) {
  if (tensor.strides != nullptr) return tensor.strides[dim];
  int64_t elements = 1;
  for (int32_t d = dim + 1; d < tensor.ndim; ++d) elements *= tensor.shape[d];
  return elements;
}

bool is_contiguous(const dlpack::Tensor& tensor) {
  int64_t expected = 1;
  for (int32_t d = tensor.ndim; d-- > 0;) {
    if (tensor.shape[d] == 0) return true;
    if (tensor.shape[d] != 1 && stride_of(tensor, d) != expected) return false;
    expected *= tensor.shape[d];
  }
  return true;
}

// The bits are not the values: torch applies the sign or the conjugation when it reads. Only views
// of complex tensors have it, and those are of the types that the parts of complex numbers have.
bool is_lazy(PyObject* tensor, const dlpack::DataType& type) {
  static PyObject* is_conj = PyUnicode_InternFromString("is_conj");
  static PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  if (type.code == dlpack::kComplex && is_true_of(tensor, is_conj)) return true;
  return (type.code == dlpack::kComplex || type.code == dlpack::kFloat) &&
         is_true_of(tensor, is_neg);
}

Rows rows_of_tensor(PyObject* object, const dlpack::Tensor& tensor, const char* name,
                    size_t index) {
  check_value(tensor.ndim >= 1, name, "[", index,
              "] has no dimension, dimension 0 must be the row or block");
  const int64_t itemsize = nbytes_of(tensor.dtype);
  Rows layout{0, tensor.shape[0], 0, itemsize};
  for (int32_t d = 1; d < tensor.ndim; ++d) layout.nbytes *= tensor.shape[d];
  // A single row may have any stride; it is never used.
  layout.row_stride_bytes = layout.rows > 1 ? stride_of(tensor, 0) * itemsize : layout.nbytes;
  if (layout.rows == 0 || layout.nbytes == 0) {
    layout.row_stride_bytes = layout.nbytes;
    return layout;
  }
  int64_t expected = 1;
  for (int32_t d = tensor.ndim - 1; d >= 1; --d) {
    if (tensor.shape[d] != 1 && stride_of(tensor, d) != expected) {
      throw std::invalid_argument(text_of(name, "[", index, "] of ", description(object),
                                          " has rows that are not contiguous"));
    }
    expected *= tensor.shape[d];
  }
  check_value(layout.row_stride_bytes >= layout.nbytes, name, "[", index, "] has rows of ",
              layout.nbytes, " bytes only ", layout.row_stride_bytes,
              " bytes apart, so they overlap");
  layout.base = reinterpret_cast<uint64_t>(tensor.data);
  check_value(layout.base != 0, name, "[", index, "] has no memory (data_ptr() is 0)");
  return layout;
}

// Has its own copy of the shape; torch copies neither that nor the memory.
struct Handover {
  dlpack::ManagedTensor managed;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
  std::shared_ptr<void> owner;
};

PyRef hand_over(void* data, std::vector<int64_t> shape, dlpack::DataType type,
                std::shared_ptr<void> owner) {
  const dlpack::Exchange* exchange = tensor_class().exchange;
  auto made = std::make_unique<Handover>();
  made->shape = std::move(shape);
  made->strides.resize(made->shape.size());
  int64_t elements = 1;
  for (size_t d = made->shape.size(); d-- > 0;) {
    made->strides[d] = elements;
    elements *= made->shape[d];
  }
  made->owner = std::move(owner);
  made->managed.version = {dlpack::kMajorVersion, 0};
  made->managed.context = made.get();
  made->managed.deleter = [](dlpack::ManagedTensor* self) {
    delete static_cast<Handover*>(self->context);
  };
  made->managed.flags = 0;
  made->managed.tensor = {data, {dlpack::kCpu, 0},  static_cast<int32_t>(made->shape.size()),
                          type, made->shape.data(), made->strides.data(),
                          0};
  void* tensor = nullptr;
  if (exchange->import_owned(&made->managed, &tensor) != 0) throw PythonError();
  (void)made.release();  // the tensor's from now on
  return PyRef::take(static_cast<PyObject*>(tensor));
}

// Ordinary tensors are made while it lives, also in inference mode.
class NoInferenceMode {
 public:
  NoInferenceMode() {
    const PyRef torch = import("torch");
    const PyRef asks = attribute(torch.get(), "is_inference_mode_enabled");
    if (is_true(PyRef::take(PyObject_CallObject(asks.get(), nullptr)))) {
      const PyRef kind = attribute(torch.get(), "inference_mode");
      const PyRef off = To<std::tuple<bool>>::make({false});
      mode_ = PyRef::take(PyObject_CallObject(kind.get(), off.get()));
      call("__enter__", PyRef::take(PyTuple_New(0)));
    }
  }
  ~NoInferenceMode() {
    if (!mode_) return;
    PyObject *type, *value, *trace;  // of an error on its way
    PyErr_Fetch(&type, &value, &trace);
    PyObject* none = PyTuple_Pack(3, Py_None, Py_None, Py_None);
    try {
      call("__exit__", PyRef::take(none));
    } catch (const PythonError&) {
      PyErr_Clear();
    }
    PyErr_Restore(type, value, trace);
  }
  NoInferenceMode(const NoInferenceMode&) = delete;
  NoInferenceMode& operator=(const NoInferenceMode&) = delete;

 private:
  void call(const char* name, const PyRef& arguments) {
    const PyRef bound = attribute(mode_.get(), name);
    (void)PyRef::take(PyObject_CallObject(bound.get(), arguments.get()));
  }

  PyRef mode_;
};

}  // namespace

// ---- index tensors

void Int64Values::read(PyObject* object, const char* name, int32_t dims) {
  check_is_tensor(object, name);
  dlpack::Tensor tensor;
  const bool right = look_at(object, &tensor) && tensor.device.type == dlpack::kCpu &&
                     tensor.dtype.code == dlpack::kInt && tensor.dtype.bits == 64 &&
                     tensor.ndim == dims;
  if (!right) {
    throw std::invalid_argument(text_of(name, " must be a ", dims, "-D int64 tensor on the CPU, ",
                                        "got one of ", description(object)));
  }
  count_ = 1;
  for (int32_t d = 0; d < dims; ++d) {
    shape_[d] = tensor.shape[d];
    count_ *= tensor.shape[d];
  }
  data_ = static_cast<const int64_t*>(tensor.data);
  if (!is_contiguous(tensor)) copy_strided(tensor);
}

void Int64Values::copy_strided(const dlpack::Tensor& tensor) {
  const int64_t columns = tensor.ndim == 2 ? tensor.shape[1] : 1;
  const int64_t step = tensor.ndim == 2 ? stride_of(tensor, 1) : 0;
  copy_.reserve(size());
  for (int64_t row = 0; row < tensor.shape[0]; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      copy_.push_back(data_[row * stride_of(tensor, 0) + column * step]);
    }
  }
}

// ---- tensors that are copied

TensorRows From<TensorRows>::get(PyObject* object, const char* name) {
  const std::vector<PyRef> items = detail::items_of(object, name);
  TensorRowsBuilder builder(name, items.size());
  dlpack::Device device{dlpack::kCpu, 0};
  for (size_t i = 0; i < items.size(); ++i) {
    PyObject* item = items[i].get();
    check_is_tensor(item, name);
    dlpack::Tensor tensor;
    if (!look_at(item, &tensor)) {
      throw std::invalid_argument(text_of(name, "[", i, "] of ", description(item), " and layout ",
                                          text_of_attribute(item, "layout"),
                                          " has no bytes that can be copied"));
    }
    if (i == 0) device = tensor.device;
    if (tensor.device.type != device.type || tensor.device.index != device.index) {
      throw std::invalid_argument(text_of(
          name, "[", i, "] is on ", text_of_attribute(item, "device"), ", but ", name, "[0] on ",
          text_of_attribute(items[0].get(), "device"), ": one call works on one device"));
    }
    check_value(!is_lazy(item, tensor.dtype), name, "[", i,
                "] is conjugated or negated lazily, so its bytes are not its values");
    builder.add(rows_of_tensor(item, tensor, name, i));
  }
  TensorRows rows = builder.finish();
  rows.place = {device.type, device.index};
  return rows;
}

Threads From<Threads>::get(PyObject* object, const char* name) {
  if (object != nullptr) return {From<int>::get(object, name)};
  static PyObject* get_num_threads = attribute(import("torch").get(), "get_num_threads").release();
  return {From<int>::get(PyRef::take(PyObject_CallObject(get_num_threads, nullptr)).get(), name)};
}

// ---- new tensors

namespace {

ElementType ask_for_element_type(PyObject* dtype, const char* name) {
  const PyRef torch = import("torch");
  const PyRef kind = attribute(torch.get(), "dtype");
  const int is_dtype = PyObject_IsInstance(dtype, kind.get());
  if (is_dtype < 0) throw PythonError();
  if (is_dtype == 0) {
    PyErr_Format(PyExc_TypeError, "%s must be a torch.dtype, got %R", name, dtype);
    throw PythonError();
  }
  const PyRef make = attribute(torch.get(), "empty");
  const PyRef arguments = To<std::tuple<int>>::make({0});
  const PyRef named = PyRef::take(PyDict_New());
  if (PyDict_SetItemString(named.get(), "dtype", dtype) != 0) throw PythonError();
  const PyRef sample = PyRef::take(PyObject_Call(make.get(), arguments.get(), named.get()));
  dlpack::Tensor tensor;
  if (!look_at(sample.get(), &tensor)) {
    PyErr_Format(PyExc_TypeError, "%s=%R has elements that DLPack can't describe", name, dtype);
    throw PythonError();
  }
  return {tensor.dtype, nbytes_of(tensor.dtype)};
}

}  // namespace

ElementType From<ElementType>::get(PyObject* object, const char* name) {
  // A dtype is one object for as long as torch is there. Under the GIL.
  static auto* known = new std::unordered_map<PyObject*, ElementType>();
  auto found = known->find(object);
  if (found == known->end()) {
    const ElementType type = ask_for_element_type(object, name);
    Py_INCREF(object);
    found = known->emplace(object, type).first;
  }
  return found->second;
}

PyRef To<NewInt64>::make(NewInt64 made) {
  auto values = std::make_shared<std::vector<int64_t>>(std::move(made.values));
  std::vector<int64_t> shape = {static_cast<int64_t>(values->size())};
  if (made.columns > 0) shape = {shape[0] / made.columns, made.columns};
  return hand_over(values->data(), std::move(shape), {dlpack::kInt, 64, 1}, values);
}

PyRef To<MemoryTensor>::make(MemoryTensor made) {
  const NoInferenceMode guard;
  return hand_over(made.data, std::move(made.shape), made.type.type, std::move(made.owner));
}

uint64_t bytes_of(const std::vector<int64_t>& shape, const ElementType& type) {
  uint64_t nbytes = static_cast<uint64_t>(type.nbytes);
  bool countable = true;
  for (const int64_t dim : shape) {
    check_value(dim > 0, "shape has a dimension of ", dim, ", which is not positive");
    countable = countable && !__builtin_mul_overflow(nbytes, static_cast<uint64_t>(dim), &nbytes);
  }
  check_value(countable && nbytes <= static_cast<uint64_t>(INT64_MAX),
              "shape has more bytes than int64 can count");
  return nbytes;
}

// ---- memory that tensors are made in

namespace {

uint64_t extent_of(const dlpack::Tensor& tensor) {
  int64_t last = 0;  // element
  for (int32_t d = 0; d < tensor.ndim; ++d) {
    if (tensor.shape[d] == 0) return 0;
    last += (tensor.shape[d] - 1) * stride_of(tensor, d);
  }
  return static_cast<uint64_t>((last + 1) * nbytes_of(tensor.dtype));
}

}  // namespace

HeldTensor::HeldTensor(PyObject* object, const char* name) {
  check_is_tensor(object, name);
  tensor_ = PyRef::share(object);
}

std::pair<uint64_t, uint64_t> HeldTensor::extent() const {
  dlpack::Tensor tensor;
  if (!look_at(tensor_.get(), &tensor)) return {0, 0};
  const uint64_t start = reinterpret_cast<uint64_t>(tensor.data);
  return {start, start + extent_of(tensor)};
}

HeldBytes::HeldBytes(PyObject* object, const char* name) : tensor_(nullptr) {
  check_is_tensor(object, name);
  dlpack::Tensor tensor;
  const bool readable = look_at(object, &tensor);
  check<TypeMismatch>(readable && tensor.dtype.code == dlpack::kUInt && tensor.dtype.bits == 8,
                      name, " must be a uint8 tensor");
  check_value(tensor.ndim == 1 && is_contiguous(tensor) && tensor.shape[0] > 0, name,
              " must be contiguous, with one dimension and at least one byte");
  if (tensor_class().exchange->export_owned(object, &tensor_) != 0) throw PythonError();
}

HeldBytes::~HeldBytes() {
  if (tensor_ != nullptr && tensor_->deleter != nullptr) tensor_->deleter(tensor_);
}

char* HeldBytes::data() const {
  return static_cast<char*>(tensor_->tensor.data) + tensor_->tensor.byte_offset;
}

}  // namespace llmdd

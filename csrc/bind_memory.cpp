// SPDX-License-Identifier: Apache-2.0
// Python face of this process's cache memory: regions and arenas that turn into tensors, and
// questions about raw addresses. pybind11, because these are handles and addresses, not tensor
// operations.

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/StorageImpl.h>
#include <torch/extension.h>

#include <mutex>

#include "address_probe.h"
#include "arena.h"
#include "bindings.h"
#include "host_region.h"
#include "os_error.h"
#include "tensor_args.h"

namespace llmdd {
namespace {

namespace py = pybind11;

// A tensor of `shape` at `byte_offset` of `storage`; not a view in autograd's sense, so that its
// neighbours can be written without counting as writes to it.
at::Tensor tensor_on(c10::Storage storage, int64_t byte_offset, c10::IntArrayRef shape,
                     c10::ScalarType dtype) {
  const int64_t itemsize = static_cast<int64_t>(c10::elementSize(dtype));
  const c10::Device device = storage.device();
  std::vector<int64_t> strides(shape.size());
  int64_t numel = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = numel;
    numel *= shape[i];
  }
  if (device.is_cpu()) {  // what set_ comes to, without its dispatch
    at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
        c10::scalarTypeToTypeMeta(dtype));
    tensor.unsafeGetTensorImpl()->set_storage_offset(byte_offset / itemsize);
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(shape, strides);
    return tensor;
  }
  at::Tensor tensor = at::empty({0}, at::TensorOptions().dtype(dtype).device(device));
  return tensor.set_(std::move(storage), byte_offset / itemsize, shape, strides);
}

// Bytes of one tensor; refuses what no memory can hold.
uint64_t bytes_of(c10::IntArrayRef shape, c10::ScalarType dtype) {
  uint64_t nbytes = c10::elementSize(dtype);
  for (const int64_t dim : shape) {
    TORCH_CHECK_VALUE(dim > 0, "shape=", shape, " has a dimension that is not positive");
    TORCH_CHECK_VALUE(!__builtin_mul_overflow(nbytes, static_cast<uint64_t>(dim), &nbytes) &&
                          nbytes <= static_cast<uint64_t>(INT64_MAX),
                      "shape=", shape, " has more bytes than int64 can count");
  }
  return nbytes;
}

// ---- HostRegion

void drop_region(void* context) { delete static_cast<std::shared_ptr<HostRegion>*>(context); }

std::vector<at::Tensor> region_tensors(const std::shared_ptr<HostRegion>& region,
                                       const std::vector<int64_t>& offsets,
                                       const std::vector<int64_t>& shape, c10::ScalarType dtype) {
  // Tensors made under inference mode could never be written outside it.
  c10::InferenceMode normal_tensors(false);
  const uint64_t nbytes = bytes_of(shape, dtype);
  const int64_t itemsize = static_cast<int64_t>(c10::elementSize(dtype));
  for (size_t i = 0; i < offsets.size(); ++i) {
    TORCH_CHECK_VALUE(offsets[i] >= 0 && offsets[i] % itemsize == 0, "offsets[", i,
                      "]=", offsets[i], " is not a non-negative multiple of the ", itemsize,
                      " bytes of an element");
    TORCH_CHECK_VALUE(nbytes <= region->nbytes() &&
                          static_cast<uint64_t>(offsets[i]) <= region->nbytes() - nbytes,
                      "offsets[", i, "]=", offsets[i], " plus ", nbytes, " bytes ends beyond the ",
                      region->nbytes(), " bytes of the region");
  }
  auto* context = new std::shared_ptr<HostRegion>(region);
  c10::DataPtr data(region->data(), context, &drop_region, c10::Device(c10::kCPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), region->nbytes(), std::move(data));
  std::vector<at::Tensor> tensors;
  tensors.reserve(offsets.size());
  for (const int64_t offset : offsets) tensors.push_back(tensor_on(storage, offset, shape, dtype));
  return tensors;
}

// ---- Arena

// What the tensors of an arena hold on to: the book-keeping and the memory. It holds the storage
// and not the tensor, because a storage goes without asking Python.
struct ArenaMemory {
  ArenaMemory(c10::Storage base_storage, char* first_byte, uint64_t nbytes, unsigned page_shift)
      : arena(nbytes, page_shift), base(std::move(base_storage)), first(first_byte) {}
  Arena arena;
  c10::Storage base;
  char* first;
};

struct SpanLease {
  std::shared_ptr<ArenaMemory> memory;
  uint64_t offset;
};

// Runs wherever the last reference dies, with or without the GIL.
void return_span(void* context) {
  auto* lease = static_cast<SpanLease*>(context);
  lease->memory->arena.release(lease->offset);
  delete lease;
}

class TensorArena {
 public:
  TensorArena(const at::Tensor& region_base, int64_t page_shift) {
    TORCH_CHECK_TYPE(region_base.scalar_type() == at::kByte,
                     "region_base must be a uint8 tensor, not ", region_base.scalar_type());
    TORCH_CHECK_VALUE(
        region_base.dim() == 1 && region_base.is_contiguous() && region_base.numel() > 0,
        "region_base must be contiguous, with one dimension and at least one byte");
    TORCH_CHECK_VALUE(page_shift >= 10 && page_shift < 31, "page_shift=", page_shift,
                      " is out of range [10, 31)");
    memory_ = std::make_shared<ArenaMemory>(
        region_base.storage(), static_cast<char*>(region_base.data_ptr()),
        static_cast<uint64_t>(region_base.numel()), static_cast<unsigned>(page_shift));
  }

  std::optional<std::vector<at::Tensor>> allocate(int64_t count, const std::vector<int64_t>& shape,
                                                  c10::ScalarType dtype) {
    TORCH_CHECK_VALUE(count > 0, "count=", count, " is not positive");
    c10::InferenceMode normal_tensors(false);
    const uint64_t nbytes = bytes_of(shape, dtype);
    std::vector<uint64_t> offsets;
    if (!memory_->arena.allocate(static_cast<size_t>(count), nbytes, &offsets)) return std::nullopt;
    std::vector<at::Tensor> tensors;
    tensors.reserve(offsets.size());
    size_t owned = 0;  // spans that a storage will return
    try {
      for (const uint64_t offset : offsets) {
        std::unique_ptr<SpanLease> lease(new SpanLease{memory_, offset});
        char* data = memory_->first + offset;
        c10::DataPtr span(data, lease.release(), &return_span, memory_->base.device());
        ++owned;
        tensors.push_back(tensor_on(
            c10::make_storage_impl(c10::StorageImpl::use_byte_size_t(), c10::SymInt(nbytes),
                                   std::move(span), nullptr, false, memory_->base.device()),
            0, shape, dtype));
      }
    } catch (...) {
      for (size_t i = owned; i < offsets.size(); ++i) memory_->arena.release(offsets[i]);
      throw;
    }
    return tensors;
  }

  std::tuple<uint64_t, uint64_t, uint64_t, uint64_t> stats() const {
    const ArenaStats stats = memory_->arena.stats();
    return {stats.total_bytes, stats.free_bytes, stats.largest_free_bytes, stats.spans_in_use};
  }

 private:
  std::shared_ptr<ArenaMemory> memory_;
};

// ---- Raw addresses

at::Tensor tensor_over(uint64_t address, const std::vector<int64_t>& shape, c10::ScalarType dtype) {
  c10::InferenceMode normal_tensors(false);
  const uint64_t nbytes = bytes_of(shape, dtype);
  TORCH_CHECK_VALUE(address != 0, "address=0 holds no tensor");
  TORCH_CHECK_VALUE(address % c10::elementSize(dtype) == 0, "address=", address,
                    " is not a multiple of the ", c10::elementSize(dtype), " bytes of an element");
  c10::DataPtr data(reinterpret_cast<void*>(static_cast<uintptr_t>(address)),
                    c10::Device(c10::kCPU));
  return tensor_on(c10::Storage(c10::Storage::use_byte_size_t(), nbytes, std::move(data)), 0, shape,
                   dtype);
}

std::pair<int64_t, const char*> probe(const at::Tensor& addresses, int64_t nbytes) {
  check_index_tensor(addresses, "addrs", 1);
  TORCH_CHECK_VALUE(nbytes > 0, "nbytes=", nbytes, " is not positive");
  const at::Tensor list = addresses.contiguous();
  const ProbeResult result = probe_extents(as_addresses(list), static_cast<size_t>(list.size(0)),
                                           static_cast<uint64_t>(nbytes));
  return {result.index, result.reason};
}

int64_t mapped(const at::Tensor& addresses, int64_t nbytes) {
  check_index_tensor(addresses, "addrs", 1);
  TORCH_CHECK_VALUE(nbytes > 0, "nbytes=", nbytes, " is not positive");
  const at::Tensor list = addresses.contiguous();
  return check_mapped(as_addresses(list), static_cast<size_t>(list.size(0)),
                      static_cast<uint64_t>(nbytes));
}

void raise_os_error(std::exception_ptr pending) {
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const OsError& error) {
    // OSError(errno, text) picks its own subclass: PermissionError, ProcessLookupError, ...
    const py::object instance =
        py::reinterpret_borrow<py::object>(PyExc_OSError)(error.code(), error.what());
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(instance.ptr())), instance.ptr());
  }
}

}  // namespace

void bind_memory(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::register_local_exception_translator(&raise_os_error);

  py::class_<HostRegion, std::shared_ptr<HostRegion>>(
      m, "HostRegion", "Zeroed host memory on a 2 MiB boundary, freed with its last reference.")
      .def_static("create", &HostRegion::create, py::arg("nbytes"), py::arg("shareable") = true,
                  no_gil)
      .def_property_readonly(
          "address",
          [](const HostRegion& region) { return reinterpret_cast<uintptr_t>(region.data()); })
      .def_property_readonly("nbytes", &HostRegion::nbytes)
      .def_property_readonly("fd", &HostRegion::fd,
                             "Descriptor that a peer can open; -1 = not shareable.")
      .def_property_readonly("inode", &HostRegion::inode)
      .def_property_readonly("device", &HostRegion::device, "st_dev of the descriptor.")
      .def_property_readonly("reason", &HostRegion::reason,
                             "Why it is not shareable; \"\" if it is.")
      .def("tensors", &region_tensors, py::arg("offsets"), py::arg("shape"), py::arg("dtype"),
           "Tensors at byte offsets; they share one storage, which keeps the region alive.");

  py::class_<TensorArena>(m, "Arena", "Page-granular best-fit allocator of tensors in one region.")
      .def(py::init<const at::Tensor&, int64_t>(), py::arg("region_base"), py::arg("page_shift"))
      .def("allocate", &TensorArena::allocate, py::arg("count"), py::arg("shape"), py::arg("dtype"),
           no_gil, "Tensors that return their spans when they die; None = doesn't fit.")
      .def("stats", &TensorArena::stats, "(total, free, largest free) bytes, and spans in use.");

  m.def("tensor_over", &tensor_over, py::arg("address"), py::arg("shape"), py::arg("dtype"),
        "Tensor over host memory that it does not own.");
  m.def(
      "probe_extents", &probe, py::arg("addrs"), py::arg("nbytes"), no_gil,
      "(index, reason) of the first extent that isn't mapped, readable and writable; (-1, \"\").");
  m.def("check_mapped", &mapped, py::arg("addrs"), py::arg("nbytes"), no_gil,
        "Index of the first extent that isn't mapped; -1 = all are.");
}

}  // namespace llmdd

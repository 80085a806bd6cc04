// SPDX-License-Identifier: Apache-2.0
// The op that gives a guard its tensors.

#include <torch/library.h>

#include <exception>
#include <memory>
#include <vector>

#include "lease_guard.h"

namespace llmdd {
namespace {

class WatchedTensors : public TensorList {
 public:
  explicit WatchedTensors(at::TensorList tensors) : tensors_(tensors.vec()) {}

  size_t size() const override { return tensors_.size(); }

  TensorPlace place(size_t index) const override {
    const at::Tensor& tensor = tensors_[index];
    try {
      // Never the mutable pointer: it would copy a storage that is copied on write.
      const auto address = reinterpret_cast<uint64_t>(tensor.const_data_ptr());
      const auto start = reinterpret_cast<uint64_t>(tensor.storage().data());
      return {start == 0 ? 0 : address, start + tensor.storage().nbytes()};
    } catch (const std::exception&) {  // a tensor without memory now
      return {0, 0};
    }
  }

 private:
  const std::vector<at::Tensor> tensors_;
};

void watch_tensors(at::TensorList tensors, int64_t guard) {
  auto* watching = reinterpret_cast<LeaseGuard*>(static_cast<uintptr_t>(guard));
  TORCH_CHECK_VALUE(watching != nullptr, "guard=0 is no guard");
  watching->watch(std::make_unique<WatchedTensors>(tensors));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(llm_datadist_torch, m) {
  m.def("watch_tensors(Tensor[] tensors, int guard) -> ()", &watch_tensors);
}

}  // namespace llmdd

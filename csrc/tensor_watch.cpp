// SPDX-License-Identifier: Apache-2.0
// Gives a guard its tensors.

#include <memory>
#include <utility>
#include <vector>

#include "bindings.h"
#include "lease_guard.h"
#include "tensor_args.h"

namespace llmdd {
namespace {

// Looked at with the GIL, as guards are used by Python only. Nothing here runs Python code, so that
// nobody can ask for the guard's lock, which is held meanwhile.
class WatchedTensors : public TensorList {
 public:
  explicit WatchedTensors(std::vector<HeldTensor> tensors) : tensors_(std::move(tensors)) {}

  size_t size() const override { return tensors_.size(); }

  TensorPlace place(size_t index) const override {
    const auto [start, end] = tensors_[index].extent();
    return {start, end};
  }

 private:
  const std::vector<HeldTensor> tensors_;
};

void watch_tensors(std::vector<HeldTensor> tensors, uint64_t guard) {
  check_value(guard != 0, "guard=0 is no guard");
  reinterpret_cast<LeaseGuard*>(guard)->watch(std::make_unique<WatchedTensors>(std::move(tensors)));
}

}  // namespace

void bind_tensor_watch(Module& module) {
  module.function<&watch_tensors>("watch_tensors", {{"tensors"}, {"guard"}},
                                  "Has the guard of this handle watch the tensors, and keep them.",
                                  Gil::kKeep);
}

}  // namespace llmdd

// SPDX-License-Identifier: Apache-2.0
#include "kernel.h"

#include <ATen/ops/from_blob.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "../sim_api.h"

namespace ascend_sim {
namespace {

// A task runs on whichever thread waits for it. What that thread has switched on (autograd, Python
// dispatch modes, autocast, a profiler) is for the program's own calls, not for the kernels.
class PlainCpuCalls {
 public:
  PlainCpuCalls()
      : keys_(c10::default_included_set.remove(c10::DispatchKey::ADInplaceOrView),
              c10::default_excluded_set | c10::autograd_dispatch_keyset_with_ADInplaceOrView) {}

 private:
  c10::impl::ForceDispatchKeyGuard keys_;
  at::DisableRecordFunctionGuard records_;
};

// The name of the kernel stands in front of what the runtime says about a failed task.
int run_task(void* argument) {
  auto* executor = static_cast<aclOpExecutor*>(argument);
  PlainCpuCalls calls;
  try {
    executor->run();
    return ACL_SUCCESS;
  } catch (const std::exception& error) {
    ascend_sim_fail(kKernelError, "%s", first_line(error).c_str());
  } catch (...) {
    ascend_sim_fail(kKernelError, "unknown error");
  }
  return kKernelError;
}

void drop_task(void* argument) { delete static_cast<aclOpExecutor*>(argument); }

}  // namespace

std::string first_line(const std::exception& error) {
  const auto* detailed = dynamic_cast<const c10::Error*>(&error);
  std::string text = detailed == nullptr ? error.what() : detailed->what_without_backtrace();
  return text.substr(0, text.find('\n'));
}

Tensor view_of(const aclTensor& tensor) {
  const auto options = at::TensorOptions().dtype(tensor.dtype);
  const Ints& shape = *tensor.shape;
  int64_t last = 0;
  bool empty = false;
  for (size_t i = 0; i < shape.size(); ++i) {
    TORCH_CHECK(shape[i] >= 0 && tensor.strides[i] >= 0, "shape ", shape, " with strides ",
                tensor.strides, ": neither may be negative");
    empty = empty || shape[i] == 0;
    last += (shape[i] - 1) * tensor.strides[i];
  }
  if (empty) {
    return at::from_blob(nullptr, shape, options);
  }
  const auto item = static_cast<int64_t>(c10::elementSize(tensor.dtype));
  const char* first = static_cast<const char*>(tensor.storage) + tensor.offset * item;
  const auto nbytes = static_cast<size_t>((last + 1) * item);
  void* alias = tensor.storage == nullptr ? nullptr : ascend_sim_alias(first, nbytes);
  TORCH_CHECK(alias != nullptr, nbytes, " bytes at ", static_cast<const void*>(first),
              " (a tensor of shape ", shape, ", ", tensor.dtype,
              ") aren't allocated when the kernel runs");
  return at::from_blob(alias, shape, tensor.strides, options);
}

void Out::operator=(const Tensor& result) const {
  TORCH_CHECK(memory_.defined(), "there's no tensor for a result");
  TORCH_CHECK(result.sizes() == memory_.sizes(), "the result has shape ", result.sizes(),
              ", but the tensor for it ", memory_.sizes());
  memory_.copy_(result);
}

void Resized::operator=(const Tensor& result) const {
  TORCH_CHECK(memory_.defined(), "there's no tensor for a result");
  TORCH_CHECK(result.numel() <= memory_.numel(), "the result has ", result.numel(),
              " elements, but the tensor for it only ", memory_.numel());
  // from_blob: the elements lie one after the other from the start, in the result's own shape.
  at::from_blob(memory_.data_ptr(), result.sizes(), memory_.options()).copy_(result);
  *shape_ = result.sizes().vec();
}

int preparation_failed(const char* name) {
  try {
    throw;
  } catch (const std::exception& error) {
    ascend_sim_fail(kParameterError, "%s: %s", name, first_line(error).c_str());
  } catch (...) {
    ascend_sim_fail(kParameterError, "%s: unknown error", name);
  }
  return kParameterError;
}

int launch(const char* name, aclOpExecutor* executor, aclrtStream stream) {
  if (executor == nullptr) {
    ascend_sim_fail(kParameterError, "%s: no executor", name);
    return kParameterError;
  }
  if (const int fault = ascend_sim_fault(name); fault != ACL_SUCCESS) {
    drop_task(executor);
    return fault;
  }
  const bool resizes = executor->resizes;
  const int status = ascend_sim_submit(stream, name, run_task, drop_task, executor);
  if (status != ACL_SUCCESS || !resizes) {
    return status;
  }
  return aclrtSynchronizeStream(stream);
}

}  // namespace ascend_sim

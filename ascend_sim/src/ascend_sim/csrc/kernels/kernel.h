// SPDX-License-Identifier: Apache-2.0
// What turns a lambda over at::Tensor into a pair of aclnn functions.
//
//   ACLNN(Adds, [](Tensor self, Scalar other, Scalar alpha, Out out) {
//     out = at::add(self, other, alpha);
//   })
//
// defines aclnnAddsGetWorkspaceSize, which keeps descriptions of the arguments in an executor, and
// aclnnAdds, which queues the executor on a stream. The lambda runs on the host, over the
// simulator's alias of device memory, when the stream gets there. The types of its parameters say
// how they come in, and so the signature; see `Argument`.

#pragma once

#include <acl/acl_rt.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "objects.h"

// A launch that is prepared: a kernel and what it keeps of its arguments.
struct aclOpExecutor {
  const char* name;
  bool resizes;  // the caller reads the size of a result right after the launch
  aclOpExecutor(const char* kernel, bool resizes_result) : name(kernel), resizes(resizes_result) {}
  aclOpExecutor(const aclOpExecutor&) = delete;
  aclOpExecutor& operator=(const aclOpExecutor&) = delete;
  virtual ~aclOpExecutor() = default;
  virtual void run() const = 0;
};

namespace ascend_sim {

using at::Scalar;
using at::Tensor;
using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

// ACLNN_ERR_PARAM_INVALID, and what a task returns that a kernel failed in (an AI core exception).
constexpr int kParameterError = 161002;
constexpr int kKernelError = 507015;

// A tensor over the simulator's alias of the memory; throws if that was freed meanwhile.
ACLNN_SHARED Tensor view_of(const aclTensor& tensor);

// libtorch's messages go on with a C++ stack.
std::string first_line(const std::exception& error);

// Where a kernel puts a result: assignment copies into the caller's memory, whatever its
// type and strides, and throws if the result has another shape.
class Out {
 public:
  explicit Out(Tensor memory) : memory_(std::move(memory)) {}
  void operator=(const Tensor& result) const;
  // The memory itself, for kernels that change it in place. Undefined if the caller wants none.
  const Tensor& get() const { return memory_; }
  operator const Tensor&() const { return memory_; }
  explicit operator bool() const { return memory_.defined(); }
  at::ScalarType dtype() const { return memory_.scalar_type(); }

 private:
  Tensor memory_;
};

// A result whose size only the kernel knows, and tells the caller.
class Resized {
 public:
  Resized(Tensor memory, std::shared_ptr<Ints> shape)
      : memory_(std::move(memory)), shape_(std::move(shape)) {}
  void operator=(const Tensor& result) const;

 private:
  Tensor memory_;
  std::shared_ptr<Ints> shape_;
};

// How a parameter of a kernel comes in: the `Handle` in the C function's signature, what is kept of
// it (the caller destroys its objects right after the launch), and `load`, when the kernel runs.
template <typename T>
struct Argument {
  static_assert(std::is_arithmetic_v<T>, "no such parameter type");
  using Handle = T;
  T value;
  explicit Argument(Handle handle) : value(handle) {}
  T load() const { return value; }
};

template <>
struct Argument<Tensor> {
  using Handle = const aclTensor*;
  std::optional<aclTensor> kept;
  explicit Argument(Handle handle) {
    if (handle == nullptr) return;
    TORCH_CHECK(handle->problem.empty(), handle->problem);
    kept = *handle;
  }
  Tensor load() const { return kept ? view_of(*kept) : Tensor(); }
};

template <>
struct Argument<Out> : Argument<Tensor> {
  using Argument<Tensor>::Argument;
  Out load() const { return Out(Argument<Tensor>::load()); }
};

template <>
struct Argument<Resized> : Argument<Tensor> {
  using Argument<Tensor>::Argument;
  Resized load() const { return Resized(Argument<Tensor>::load(), kept ? kept->shape : nullptr); }
};

template <>
struct Argument<Tensors> {
  using Handle = const aclTensorList*;
  std::vector<Argument<Tensor>> kept;
  explicit Argument(Handle handle) {
    if (handle == nullptr) return;
    for (const auto& tensor : handle->tensors) kept.emplace_back(tensor.get());
  }
  Tensors load() const {
    Tensors tensors;
    for (const auto& argument : kept) tensors.push_back(argument.load());
    return tensors;
  }
};

template <>
struct Argument<Scalar> {
  using Handle = const aclScalar*;
  Scalar value;
  explicit Argument(Handle handle) {
    TORCH_CHECK(handle != nullptr, "a scalar is missing");
    value = handle->value;
  }
  Scalar load() const { return value; }
};

template <>
struct Argument<std::optional<Scalar>> {
  using Handle = const aclScalar*;
  std::optional<Scalar> value;
  explicit Argument(Handle handle) {
    if (handle != nullptr) value = handle->value;
  }
  std::optional<Scalar> load() const { return value; }
};

template <>
struct Argument<Ints> {
  using Handle = const aclIntArray*;
  Ints values;
  explicit Argument(Handle handle) {
    if (handle != nullptr) values = handle->values;
  }
  Ints load() const { return values; }
};

template <>
struct Argument<at::ScalarType> {
  using Handle = aclDataType;
  at::ScalarType value;
  explicit Argument(Handle handle) : value(scalar_type(handle)) {}
  at::ScalarType load() const { return value; }
};

template <>
struct Argument<std::string> {
  using Handle = const char*;
  std::string value;
  explicit Argument(Handle handle) : value(handle == nullptr ? "" : handle) {}
  std::string load() const { return value; }
};

// Text as an argument of a template.
template <size_t N>
struct Name {
  char text[N];
  constexpr Name(const char (&literal)[N]) { std::copy_n(literal, N, text); }  // NOLINT: implicit
};

// A tensor that the caller may give, but that the simulator has no use for: it is refused by name.
template <Name name>
struct Absent {};

template <Name name>
struct Argument<Absent<name>> {
  using Handle = const aclTensor*;
  explicit Argument(Handle handle) {
    const bool is_empty =
        handle == nullptr || std::count(handle->shape->begin(), handle->shape->end(), 0) > 0;
    TORCH_CHECK(is_empty, name.text, " isn't simulated");
  }
  Absent<name> load() const { return {}; }
};

// Makes the exception being handled the text of aclGetRecentErrMsg; returns kParameterError.
ACLNN_SHARED int preparation_failed(const char* name);

// Queues an executor on a stream, and deletes it after it ran.
ACLNN_SHARED int launch(const char* name, aclOpExecutor* executor, aclrtStream stream);

// All kernels with the same parameters share one of these, which keeps compilation short.
template <typename... Parameters>
class Launch : public aclOpExecutor {
 public:
  using Body = void (*)(Parameters...);

  Launch(const char* name, Body body, typename Argument<Parameters>::Handle... handles)
      : aclOpExecutor(name, (std::is_same_v<Parameters, Resized> || ...)),
        body_(body),
        kept_(Argument<Parameters>(handles)...) {}

  void run() const override {
    std::apply([this](const auto&... arguments) { body_(arguments.load()...); }, kept_);
  }

  static int prepare(const char* name, Body body, typename Argument<Parameters>::Handle... handles,
                     uint64_t* workspace, aclOpExecutor** executor) {
    try {
      *executor = new Launch(name, body, handles...);
      *workspace = 0;
      return 0;
    } catch (...) {
      return preparation_failed(name);
    }
  }

 private:
  Body body_;
  std::tuple<Argument<Parameters>...> kept_;
};

// The C function of a kernel, with the signature that its lambda's parameters say.
template <typename Kernel, typename Body = decltype(+Kernel::body)>
struct Entry;

template <typename Kernel, typename... Parameters>
struct Entry<Kernel, void (*)(Parameters...)> {
  static int get_workspace_size(typename Argument<Parameters>::Handle... handles,
                                uint64_t* workspace, aclOpExecutor** executor) {
    return Launch<Parameters...>::prepare(Kernel::name, Kernel::body, handles..., workspace,
                                          executor);
  }
};

}  // namespace ascend_sim

#define ACLNN_EXPORT extern "C" __attribute__((visibility("default")))

// The exported name of the first function is an indirect one (ifunc): a C name can't be given to
// an instance of a template, but dlsym calls the resolver and returns what that returns.
#define ACLNN(op, ...)                                                                        \
  namespace {                                                                                 \
  struct op##Kernel {                                                                         \
    static constexpr const char* name = "aclnn" #op;                                          \
    static constexpr auto body = __VA_ARGS__;                                                 \
  };                                                                                          \
  }                                                                                           \
  extern "C" __attribute__((used)) void (*ascend_sim_resolve_##op())() {                      \
    return reinterpret_cast<void (*)()>(&ascend_sim::Entry<op##Kernel>::get_workspace_size);  \
  }                                                                                           \
  ACLNN_EXPORT void aclnn##op##GetWorkspaceSize()                                             \
      __attribute__((ifunc("ascend_sim_resolve_" #op)));                                      \
  ACLNN_EXPORT int aclnn##op(void* /*workspace*/, uint64_t /*size*/, aclOpExecutor* executor, \
                             aclrtStream stream) {                                            \
    return ascend_sim::launch("aclnn" #op, executor, stream);                                 \
  }

// SPDX-License-Identifier: Apache-2.0
// Makes Python functions of C++ ones, on the limited API; binding_class.h makes classes. To add a
// function, write it with plain C++ types (convert.h lists them), and one line in a bind_<topic>():
//
//   module.function<&copy_runs>("copy_runs", {{"dst_bases"}, {"runs"}, {"deadline_ns", 0}},
//   "Doc.");
//
// The call takes positional and named arguments, converts them, releases the GIL for as long as the
// C++ function runs (Gil::kKeep for those that take less than a microsecond), converts the result,
// and turns exceptions into Python's (errors.h).
//
// A template is compiled for every function, so what does not depend on the function's types is in
// binding.cpp.

#pragma once

#include <initializer_list>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "convert.h"
#include "python.h"

namespace llmdd {

enum class Gil { kRelease, kKeep };

// A parameter's name, and what it is where the call leaves it out.
struct Parameter {
  const char* name;
  std::optional<int64_t> otherwise = std::nullopt;
};

// Those of one function, as long as the expression lasts that lists them.
class Parameters {
 public:
  Parameters() = default;
  Parameters(std::initializer_list<Parameter> listed) { set(listed.begin(), listed.size()); }
  Parameters(const std::vector<Parameter>& listed) { set(listed.data(), listed.size()); }
  const Parameter* begin() const { return begin_; }
  const Parameter* end() const { return end_; }

 private:
  void set(const Parameter* first, size_t count) {
    begin_ = first;
    end_ = first + count;
  }

  const Parameter* begin_ = nullptr;
  const Parameter* end_ = nullptr;
};

namespace detail {

// A method's first parameter is the object.
enum class Form { kFunction, kMethod };

// What Python knows of one function, and what it takes.
struct Signature {
  PyMethodDef definition{};
  std::vector<Parameter> parameters;  // as the C++ function has them
  Form form = Form::kFunction;
  Gil gil = Gil::kRelease;
};

// Python's call of a function.
struct Call {
  PyObject* self;
  PyObject* const* given;
  Py_ssize_t positional;
  PyObject* keywords;
};

// No function has more parameters.
constexpr size_t kMaxParameters = 16;

// Fills in the signature of a C++ function of `count` parameters, of which `listed` are those that
// Python sees. `entry` is what Python calls.
using EntryPoint = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);
void define(Signature* signature, Form form, const char* name, Parameters listed, const char* doc,
            size_t count, EntryPoint entry);
// Sorts the arguments by parameter, and has `run` convert them, call the function and convert its
// result. TypeError for those that don't fit the signature.
PyObject* run_call(const Signature& signature, PyObject* (*run)(PyObject**),
                   const Call& call) noexcept;
// Sets the Python error that the exception being handled means.
void set_python_error() noexcept;

// For functions that are bound with Gil::kKeep and decide for themselves, too.
class WithoutGil {
 public:
  explicit WithoutGil(Gil gil) : state_(gil == Gil::kRelease ? PyEval_SaveThread() : nullptr) {}
  ~WithoutGil() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

template <class T>
T argument(PyObject* object, const Parameter& parameter) {
  if (object == nullptr) {  // only where there is a default
    if constexpr (std::is_integral_v<T>) return static_cast<T>(*parameter.otherwise);
  }
  return From<T>::get(object, parameter.name);
}

// The arguments of one call. Much less to compile than std::tuple is.
template <size_t index, class T>
struct Value {
  T value;
};
template <class Indices, class... T>
struct Values;
template <size_t... I, class... T>
struct Values<std::index_sequence<I...>, T...> : Value<I, T>... {
  template <class F>
  decltype(auto) call(F* function) {
    return function(static_cast<T&&>(Value<I, T>::value)...);
  }
};

template <auto function>
struct Entry;

// The C function that Python calls for `function`.
template <class R, class... A, R (*function)(A...)>
struct Entry<function> {
  static inline Signature signature;

  // The signature is filled in when Python is told of the function.
  static Signature* define(Form form, const char* name, Parameters parameters, const char* doc) {
    detail::define(&signature, form, name, parameters, doc, sizeof...(A), &call);
    return &signature;
  }

  static PyObject* call(PyObject* self, PyObject* const* given, Py_ssize_t positional,
                        PyObject* keywords) noexcept {
    static_assert(sizeof...(A) <= kMaxParameters);
    return run_call(signature, &run, {self, given, positional, keywords});
  }

 private:
  static PyObject* run(PyObject** sorted) {
    return run_with(sorted, std::index_sequence_for<A...>());
  }

  template <size_t... I>
  static PyObject* run_with(PyObject** sorted, std::index_sequence<I...>) {
    // In braces, so that they are converted, and refused, from left to right.
    Values<std::index_sequence<I...>, std::decay_t<A>...> values{
        {argument<std::decay_t<A>>(sorted[I], signature.parameters[I])}...};
    if constexpr (std::is_void_v<R>) {
      {
        const WithoutGil free(signature.gil);
        values.call(function);
      }
      return PyRef::share(Py_None).release();
    } else {
      auto result = [&] {
        const WithoutGil free(signature.gil);
        return values.call(function);
      }();
      return To<std::decay_t<R>>::make(std::move(result)).release();
    }
  }
};
template <class R, class... A, R (*function)(A...) noexcept>
struct Entry<function> : Entry<static_cast<R (*)(A...)>(function)> {};

}  // namespace detail

class Module {
 public:
  explicit Module(PyObject* module) : module_(module) {}

  template <auto called>
  void function(const char* name, Parameters parameters, const char* doc, Gil gil = Gil::kRelease) {
    using detail::Form;
    add_function(detail::Entry<called>::define(Form::kFunction, name, parameters, doc), gil);
  }

  void add(const char* name, const PyRef& object);

 private:
  void add_function(detail::Signature* signature, Gil gil);

  PyObject* module_;
};

}  // namespace llmdd

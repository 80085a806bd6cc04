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

#pragma once

#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
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

// What one function is called, and what it takes.
struct Signature {
  const char* name = "";
  std::vector<Parameter> parameters;
  Gil gil = Gil::kRelease;
};

namespace detail {

// Sorts the arguments of a call by parameter; null where one is left out that may be. TypeError for
// those that don't fit the signature.
void sort_arguments(const Signature& signature, PyObject* const* given, Py_ssize_t positional,
                    PyObject* keywords, PyObject** sorted);
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

template <class F>
struct Shape;
template <class R, class... A>
struct Shape<R (*)(A...)> {
  using Result = R;
  using Values = std::tuple<std::decay_t<A>...>;
};
template <class R, class... A>
struct Shape<R (*)(A...) noexcept> : Shape<R (*)(A...)> {};

template <class T>
T argument(PyObject* object, const Parameter& parameter) {
  if (object == nullptr) {  // only where there is a default
    if constexpr (std::is_integral_v<T>) return static_cast<T>(*parameter.otherwise);
  }
  return From<T>::get(object, parameter.name);
}

// The C function that Python calls for `function`. Of a method the first parameter is the object.
template <auto function, bool method>
struct Entry {
  using Values = typename Shape<decltype(function)>::Values;
  using Result = typename Shape<decltype(function)>::Result;
  static constexpr size_t kCount = std::tuple_size_v<Values>;

  static inline Signature signature;
  static inline PyMethodDef definition;

  template <size_t... I>
  static Values values_of(PyObject** sorted, std::index_sequence<I...>) {
    // In braces, so that they are converted, and refused, from left to right.
    return Values{argument<std::tuple_element_t<I, Values>>(sorted[I], signature.parameters[I])...};
  }

  static PyObject* run(PyObject** sorted) {
    Values values = values_of(sorted, std::make_index_sequence<kCount>());
    if constexpr (std::is_void_v<Result>) {
      {
        const WithoutGil free(signature.gil);
        std::apply(function, std::move(values));
      }
      return PyRef::share(Py_None).release();
    } else {
      auto result = [&] {
        const WithoutGil free(signature.gil);
        return std::apply(function, std::move(values));
      }();
      return To<std::decay_t<Result>>::make(std::move(result)).release();
    }
  }

  static PyObject* call(PyObject* self, PyObject* const* given, Py_ssize_t positional,
                        PyObject* keywords) noexcept {
    try {
      std::array<PyObject*, kCount + 1> sorted{};
      sort_arguments(signature, given, positional, keywords, sorted.data() + method);
      if constexpr (method) sorted[0] = self;
      return run(sorted.data());
    } catch (...) {
      set_python_error();
      return nullptr;
    }
  }

  // `parameters` are those that Python sees.
  static PyMethodDef define(const char* name, std::vector<Parameter> parameters, const char* doc,
                            Gil gil, int flags) {
    if (method) parameters.insert(parameters.begin(), Parameter{"self"});
    signature = {name, std::move(parameters), gil};
    if (signature.parameters.size() != kCount) Py_FatalError(name);
    definition = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)),
                  METH_FASTCALL | METH_KEYWORDS | flags, doc};
    return definition;
  }
};

}  // namespace detail

class Module {
 public:
  explicit Module(PyObject* module) : module_(module) {}

  template <auto called>
  void function(const char* name, std::vector<Parameter> parameters, const char* doc,
                Gil gil = Gil::kRelease) {
    using Entry = detail::Entry<called, false>;
    Entry::define(name, std::move(parameters), doc, gil, 0);
    add(name, PyRef::take(PyCFunction_NewEx(&Entry::definition, nullptr, nullptr)));
  }

  void add(const char* name, const PyRef& object) {
    if (PyModule_AddObjectRef(module_, name, object.get()) != 0) throw PythonError();
  }

 private:
  PyObject* module_;
};

}  // namespace llmdd

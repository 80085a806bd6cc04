// SPDX-License-Identifier: Apache-2.0
// Values on their way from Python to C++ (From) and back (To). A new type of argument or result is
// a new specialisation; binding.h uses them for every function. Everything here needs the GIL.

#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "errors.h"
#include "python.h"

namespace llmdd {

// From<T>::get(object, name) is the value of an argument that messages call `name`.
template <class T, class = void>
struct From;
// To<T>::make(value) is a new Python object.
template <class T, class = void>
struct To;

namespace detail {
int64_t signed_of(PyObject* object, const char* name);
uint64_t unsigned_of(PyObject* object, const char* name);
std::string text_from(PyObject* object, const char* name);
std::vector<PyRef> items_of(PyObject* object, const char* name);  // of a list or tuple
}  // namespace detail

// Integers, refused where they don't fit (OverflowError) or are no ints (TypeError).
template <class T>
struct From<T, std::enable_if_t<std::is_integral_v<T>>> {
  static T get(PyObject* object, const char* name) {
    if constexpr (std::is_same_v<T, bool>) {
      const int truth = PyObject_IsTrue(object);
      if (truth < 0) throw PythonError();
      return truth != 0;
    } else if constexpr (std::is_unsigned_v<T>) {
      static_assert(sizeof(T) == sizeof(uint64_t));
      return detail::unsigned_of(object, name);
    } else {
      const int64_t value = detail::signed_of(object, name);
      if (value < std::numeric_limits<T>::min() || value > std::numeric_limits<T>::max()) {
        PyErr_Format(PyExc_OverflowError, "%s=%lld does not fit in %d bits", name,
                     static_cast<long long>(value), static_cast<int>(8 * sizeof(T)));
        throw PythonError();
      }
      return static_cast<T>(value);
    }
  }
};

template <class T>
struct To<T, std::enable_if_t<std::is_integral_v<T>>> {
  static PyRef make(T value) {
    if constexpr (std::is_same_v<T, bool>) {
      return PyRef::take(PyBool_FromLong(value));
    } else if constexpr (std::is_unsigned_v<T>) {
      return PyRef::take(PyLong_FromUnsignedLongLong(value));
    } else {
      return PyRef::take(PyLong_FromLongLong(value));
    }
  }
};

template <>
struct From<std::string> {
  static std::string get(PyObject* object, const char* name) {
    return detail::text_from(object, name);
  }
};

template <>
struct To<std::string> {
  static PyRef make(const std::string& text) {
    const auto size = static_cast<Py_ssize_t>(text.size());
    return PyRef::take(PyUnicode_DecodeUTF8(text.data(), size, "replace"));
  }
};

template <>
struct To<const char*> {
  static PyRef make(const char* text) { return To<std::string>::make(text); }
};

template <class T>
struct From<std::vector<T>> {
  static std::vector<T> get(PyObject* object, const char* name) {
    std::vector<T> values;
    for (const PyRef& item : detail::items_of(object, name)) {
      values.push_back(From<T>::get(item.get(), name));
    }
    return values;
  }
};

template <class T>
struct To<std::vector<T>> {
  static PyRef make(std::vector<T> values) {
    PyRef list = PyRef::take(PyList_New(static_cast<Py_ssize_t>(values.size())));
    for (size_t i = 0; i < values.size(); ++i) {
      PyList_SetItem(list.get(), static_cast<Py_ssize_t>(i),
                     To<T>::make(std::move(values[i])).release());
    }
    return list;
  }
};

template <class... T>
struct To<std::tuple<T...>> {
  static PyRef make(std::tuple<T...> values) {
    PyRef made = PyRef::take(PyTuple_New(sizeof...(T)));
    Py_ssize_t at = 0;
    std::apply(
        [&](auto&... value) {
          (PyTuple_SetItem(made.get(), at++,
                           To<std::decay_t<decltype(value)>>::make(std::move(value)).release()),
           ...);
        },
        values);
    return made;
  }
};

template <class A, class B>
struct From<std::pair<A, B>> {
  static std::pair<A, B> get(PyObject* object, const char* name) {
    const std::vector<PyRef> items = detail::items_of(object, name);
    check<TypeMismatch>(items.size() == 2, name, " must have 2 items, not ", items.size());
    return {From<A>::get(items[0].get(), name), From<B>::get(items[1].get(), name)};
  }
};

template <class A, class B>
struct To<std::pair<A, B>> {
  static PyRef make(std::pair<A, B> values) {
    return To<std::tuple<A, B>>::make({std::move(values.first), std::move(values.second)});
  }
};

template <class T>
struct To<std::optional<T>> {
  static PyRef make(std::optional<T> value) {
    return value ? To<T>::make(std::move(*value)) : PyRef::share(Py_None);
  }
};

}  // namespace llmdd

// SPDX-License-Identifier: Apache-2.0
// CPython's limited API of 3.10, of which one build serves every later Python, and a reference that
// counts by itself. Everything here needs the GIL.

#pragma once

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <utility>

namespace llmdd {

// A Python error is set already; whoever meets this returns to Python.
class PythonError : public std::exception {
 public:
  const char* what() const noexcept override { return "a Python error is set"; }
};

// An owned reference to a Python object, or none.
class PyRef {
 public:
  PyRef() = default;
  // Takes over a reference, as functions of Python return it; null is the error they have set.
  static PyRef take(PyObject* object) {
    if (object == nullptr) throw PythonError();
    return PyRef(object);
  }
  static PyRef share(PyObject* object) {
    Py_INCREF(object);
    return PyRef(object);
  }
  PyRef(PyRef&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  PyRef& operator=(PyRef&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  PyRef(const PyRef&) = delete;
  PyRef& operator=(const PyRef&) = delete;
  ~PyRef() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  explicit PyRef(PyObject* object) : object_(object) {}
  PyObject* object_ = nullptr;
};

inline PyRef attribute(PyObject* object, const char* name) {
  return PyRef::take(PyObject_GetAttrString(object, name));
}

inline PyRef import(const char* module) { return PyRef::take(PyImport_ImportModule(module)); }

// For a Python int or bool.
inline bool is_true(const PyRef& object) {
  const int truth = PyObject_IsTrue(object.get());
  if (truth < 0) throw PythonError();
  return truth != 0;
}

}  // namespace llmdd

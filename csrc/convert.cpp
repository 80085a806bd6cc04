// SPDX-License-Identifier: Apache-2.0

#include "convert.h"

namespace llmdd::detail {
namespace {

// An int, also one of NumPy; TypeError that names the argument for anything else.
PyRef int_of(PyObject* object, const char* name) {
  PyObject* number = PyNumber_Index(object);
  if (number == nullptr) {
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s must be an int, got %R", name, object);
    throw PythonError();
  }
  return PyRef::take(number);
}

[[noreturn]] void does_not_fit(PyObject* number, const char* name, const char* kind) {
  PyErr_Clear();
  PyErr_Format(PyExc_OverflowError, "%s=%R does not fit in %s", name, number, kind);
  throw PythonError();
}

}  // namespace

int64_t signed_of(PyObject* object, const char* name) {
  const PyRef number = int_of(object, name);
  const long long value = PyLong_AsLongLong(number.get());
  if (value == -1 && PyErr_Occurred() != nullptr) {
    does_not_fit(number.get(), name, "int64");
  }
  return value;
}

uint64_t unsigned_of(PyObject* object, const char* name) {
  const PyRef number = int_of(object, name);
  const unsigned long long value = PyLong_AsUnsignedLongLong(number.get());
  if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred() != nullptr) {
    does_not_fit(number.get(), name, "uint64");
  }
  return value;
}

std::string text_from(PyObject* object, const char* name) {
  if (PyUnicode_Check(object) == 0) {
    PyErr_Format(PyExc_TypeError, "%s must be a str, got %R", name, object);
    throw PythonError();
  }
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(object, &size);
  if (text == nullptr) throw PythonError();
  return std::string(text, static_cast<size_t>(size));
}

std::vector<PyRef> items_of(PyObject* object, const char* name) {
  const bool is_list = PyList_Check(object) != 0;
  if (!is_list && PyTuple_Check(object) == 0) {
    PyErr_Format(PyExc_TypeError, "%s must be a list or a tuple, got %R", name, object);
    throw PythonError();
  }
  const Py_ssize_t count = is_list ? PyList_Size(object) : PyTuple_Size(object);
  std::vector<PyRef> items;
  items.reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* item = is_list ? PyList_GetItem(object, i) : PyTuple_GetItem(object, i);
    if (item == nullptr) throw PythonError();  // another thread has shortened the list
    items.push_back(PyRef::share(item));
  }
  return items;
}

}  // namespace llmdd::detail

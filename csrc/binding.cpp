// SPDX-License-Identifier: Apache-2.0

#include "binding.h"

#include <new>

#include "acl_runtime.h"
#include "os_error.h"

namespace llmdd::detail {
namespace {

// Raises what `maker` of values/device_errors.py makes of the arguments.
void set_device_error(const char* maker, const PyRef& arguments) {
  const PyRef make = attribute(import("llm_datadist_torch.values.device_errors").get(), maker);
  const PyRef error = PyRef::take(PyObject_CallObject(make.get(), arguments.get()));
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.get())), error.get());
}

void set_os_error(const OsError& error) {
  // OSError(errno, text) picks its own subclass: PermissionError, ProcessLookupError, ...
  const PyRef arguments =
      To<std::tuple<int, std::string>>::make({error.code(), std::string(error.what())});
  const PyRef made = PyRef::take(PyObject_CallObject(PyExc_OSError, arguments.get()));
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(made.get())), made.get());
}

void rethrow_as_python_error() {
  try {
    throw;
  } catch (const PythonError&) {  // set already
  } catch (const AclError& error) {
    set_device_error("runtime_error", To<std::tuple<std::string, int, std::string>>::make(
                                          {error.call(), error.code(), error.detail()}));
  } catch (const AclMissing& error) {
    set_device_error("missing_runtime",
                     To<std::tuple<std::string>>::make({std::string(error.what())}));
  } catch (const OsError& error) {
    set_os_error(error);
  } catch (const TypeMismatch& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::length_error& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::out_of_range& error) {
    PyErr_SetString(PyExc_IndexError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

// The place of a named argument; TypeError for a name that no parameter has, or that is given
// already.
size_t place_of(const Signature& signature, size_t first, PyObject* keyword, PyObject** sorted) {
  for (size_t i = first; i < signature.parameters.size(); ++i) {
    if (PyUnicode_CompareWithASCIIString(keyword, signature.parameters[i].name) == 0) {
      if (sorted[i - first] == nullptr) return i - first;
      PyErr_Format(PyExc_TypeError, "%s() got %R twice", signature.name, keyword);
      throw PythonError();
    }
  }
  PyErr_Format(PyExc_TypeError, "%s() has no parameter %R", signature.name, keyword);
  throw PythonError();
}

}  // namespace

void sort_arguments(const Signature& signature, PyObject* const* given, Py_ssize_t positional,
                    PyObject* keywords, PyObject** sorted) {
  const std::vector<Parameter>& parameters = signature.parameters;
  // The object of a method is no argument.
  const size_t first = !parameters.empty() && std::strcmp(parameters[0].name, "self") == 0 ? 1 : 0;
  const size_t count = parameters.size() - first;
  const size_t places = static_cast<size_t>(positional);
  check<TypeMismatch>(places <= count, signature.name, "() takes ", count, " arguments, got ",
                      places);
  for (size_t i = 0; i < places; ++i) {
    sorted[i] = given[i];
  }
  const Py_ssize_t named = keywords == nullptr ? 0 : PyTuple_Size(keywords);
  for (Py_ssize_t i = 0; i < named; ++i) {
    sorted[place_of(signature, first, PyTuple_GetItem(keywords, i), sorted)] =
        given[positional + i];
  }
  for (size_t i = 0; i < count; ++i) {
    check<TypeMismatch>(sorted[i] != nullptr || parameters[first + i].otherwise.has_value(),
                        signature.name, "() lacks the argument ", parameters[first + i].name);
  }
}

void set_python_error() noexcept {
  try {
    rethrow_as_python_error();
  } catch (const PythonError&) {  // making the error failed, which is an error as well
  } catch (...) {
    PyErr_SetString(PyExc_SystemError, "an error could not be described");
  }
}

}  // namespace llmdd::detail

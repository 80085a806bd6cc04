// SPDX-License-Identifier: Apache-2.0

#include "binding.h"

#include <new>
#include <string>
#include <tuple>

#include "acl_runtime.h"
#include "binding_class.h"
#include "os_error.h"

namespace llmdd {
namespace detail {
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

// The index of the parameter that a named argument is for; TypeError for a name that none has, or
// that is given already.
size_t index_of(const Signature& signature, size_t first, PyObject* keyword,
                PyObject* const* sorted) {
  for (size_t i = first; i < signature.parameters.size(); ++i) {
    if (PyUnicode_CompareWithASCIIString(keyword, signature.parameters[i].name) == 0) {
      if (sorted[i] == nullptr) return i;
      PyErr_Format(PyExc_TypeError, "%s() got %R twice", signature.definition.ml_name, keyword);
      throw PythonError();
    }
  }
  PyErr_Format(PyExc_TypeError, "%s() has no parameter %R", signature.definition.ml_name, keyword);
  throw PythonError();
}

// `sorted` has a place for each parameter, null where an argument is left out that may be.
void sort_arguments(const Signature& signature, const Call& call, PyObject** sorted) {
  const std::vector<Parameter>& parameters = signature.parameters;
  const char* name = signature.definition.ml_name;
  const size_t first = signature.form == Form::kMethod ? 1 : 0;
  const size_t count = parameters.size() - first;
  const size_t positional = static_cast<size_t>(call.positional);
  if (signature.form == Form::kMethod) sorted[0] = call.self;
  check<TypeMismatch>(positional <= count, name, "() takes ", count, " arguments, got ",
                      positional);
  for (size_t i = 0; i < positional; ++i) {
    sorted[first + i] = call.given[i];
  }
  const Py_ssize_t named = call.keywords == nullptr ? 0 : PyTuple_Size(call.keywords);
  for (Py_ssize_t i = 0; i < named; ++i) {
    PyObject* keyword = PyTuple_GetItem(call.keywords, i);
    sorted[index_of(signature, first, keyword, sorted)] = call.given[call.positional + i];
  }
  for (size_t i = first; i < parameters.size(); ++i) {
    check<TypeMismatch>(sorted[i] != nullptr || parameters[i].otherwise.has_value(), name,
                        "() lacks the argument ", parameters[i].name);
  }
}

PyRef function_of(Signature* signature) {
  return PyRef::take(PyCFunction_NewEx(&signature->definition, nullptr, nullptr));
}

void release_object(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  delete reinterpret_cast<PyObjectOf*>(object)->held;
  PyObject_Free(object);
  Py_DECREF(reinterpret_cast<PyObject*>(type));
}

}  // namespace

void define(Signature* signature, Form form, const char* name, Parameters listed, const char* doc,
            size_t count, EntryPoint entry) {
  signature->parameters.assign(listed.begin(), listed.end());
  signature->form = form;
  if (form == Form::kMethod) {
    signature->parameters.insert(signature->parameters.begin(), Parameter{"self"});
  }
  if (signature->parameters.size() != count) Py_FatalError(name);
  signature->definition = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry)),
                           METH_FASTCALL | METH_KEYWORDS, doc};
}

PyObject* run_call(const Signature& signature, PyObject* (*run)(PyObject**),
                   const Call& call) noexcept {
  try {
    PyObject* sorted[kMaxParameters] = {};
    sort_arguments(signature, call, sorted);
    return run(sorted);
  } catch (...) {
    set_python_error();
    return nullptr;
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

void ClassBuilder::add_method(Signature* signature, Gil gil, int flags) {
  signature->gil = gil;
  signature->definition.ml_flags |= flags;
  methods_.push_back(signature->definition);
}

void ClassBuilder::add_property(const char* name, getter get, const char* doc) {
  properties_.push_back({name, get, nullptr, doc, nullptr});
}

PyTypeObject* ClassBuilder::finish(Module& module) {
  methods_.push_back({});
  properties_.push_back({});
  // Python keeps pointers to both tables for as long as the class lives, which is for ever, and
  // does not promise to copy the name.
  auto* methods = new std::vector<PyMethodDef>(std::move(methods_));
  auto* properties = new std::vector<PyGetSetDef>(std::move(properties_));
  const auto* full = new std::string(std::string("llm_datadist_torch._C.") + name_);
  PyType_Slot slots[] = {
      {Py_tp_doc, const_cast<char*>(doc_)},
      {Py_tp_dealloc, reinterpret_cast<void*>(&release_object)},
      {Py_tp_methods, methods->data()},
      {Py_tp_getset, properties->data()},
      {Py_tp_new, reinterpret_cast<void*>(make_)},
      {0, nullptr},
  };
  PyType_Spec spec{full->c_str(), sizeof(PyObjectOf), 0, Py_TPFLAGS_DEFAULT, slots};
  PyRef type = PyRef::take(PyType_FromSpec(&spec));
  module.add(name_, type);
  return reinterpret_cast<PyTypeObject*>(type.release());
}

PyObject* ClassBuilder::refuse(PyTypeObject*, PyObject*, PyObject*) {
  PyErr_SetString(PyExc_TypeError, "objects of this class are made by its static methods");
  return nullptr;
}

PyObject* construct(Signature* signature, PyObject* positional, PyObject* keywords) {
  PyObject* function = PyCFunction_NewEx(&signature->definition, nullptr, nullptr);
  if (function == nullptr) return nullptr;
  PyObject* made = PyObject_Call(function, positional, keywords);
  Py_DECREF(function);
  return made;
}

const std::shared_ptr<void>& held_by(PyObject* object, PyTypeObject* type, const char* name) {
  if (PyObject_TypeCheck(object, type) == 0) {
    PyErr_Format(PyExc_TypeError, "%s must be a %R, got %R", name, type, object);
    throw PythonError();
  }
  return *reinterpret_cast<PyObjectOf*>(object)->held;
}

PyRef make_object(PyTypeObject* type, std::shared_ptr<void> held) {
  auto kept = std::make_unique<std::shared_ptr<void>>(std::move(held));
  PyRef object = PyRef::take(PyType_GenericAlloc(type, 0));
  reinterpret_cast<PyObjectOf*>(object.get())->held = kept.release();
  return object;
}

}  // namespace detail

void Module::add(const char* name, const PyRef& object) {
  if (PyModule_AddObjectRef(module_, name, object.get()) != 0) throw PythonError();
}

void Module::add_function(detail::Signature* signature, Gil gil) {
  signature->gil = gil;
  add(signature->definition.ml_name, detail::function_of(signature));
}

}  // namespace llmdd

// SPDX-License-Identifier: Apache-2.0
// Makes Python classes of C++ ones; binding.h is about functions.

#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "binding.h"

namespace llmdd {
namespace detail {

// A Python object that holds a C++ one.
template <class T>
struct PyObjectOf {
  PyObject_HEAD std::shared_ptr<T>* held;
};

// The Python class of T, made by Class<T>; lives as long as the process.
template <class T>
inline PyTypeObject* type_of = nullptr;

}  // namespace detail

// A Python class over a C++ one, held by std::shared_ptr. Give it its members, then finish() it.
//
//   Class<HostRegion>("HostRegion", "Doc.")
//       .static_method<&HostRegion::create>("create", {{"nbytes"}, {"shareable", 1}}, "Doc.")
//       .property<&region_address>("address", "Doc.")  // uint64_t region_address(Held<HostRegion>)
//       .method<&region_tensors>("tensors", {{"offsets"}}, "Doc.")
//       .finish(module);
template <class T>
class Class {
 public:
  Class(const char* name, const char* doc) : name_(name), doc_(doc) {}

  // What Class(...) calls: a function that returns std::shared_ptr<T>.
  template <auto function>
  Class& constructor(std::vector<Parameter> parameters) {
    using Entry = detail::Entry<function, false>;
    Entry::define(name_, std::move(parameters), doc_, Gil::kRelease, 0);
    make_ = [](PyTypeObject*, PyObject* positional, PyObject* keywords) -> PyObject* {
      PyObject* called = nullptr;
      PyObject* plain = PyCFunction_NewEx(&Entry::definition, nullptr, nullptr);
      if (plain != nullptr) called = PyObject_Call(plain, positional, keywords);
      Py_XDECREF(plain);
      return called;
    };
    return *this;
  }

  template <auto function>
  Class& method(const char* name, std::vector<Parameter> parameters, const char* doc,
                Gil gil = Gil::kRelease) {
    methods_.push_back(
        detail::Entry<function, true>::define(name, std::move(parameters), doc, gil, 0));
    return *this;
  }

  template <auto function>
  Class& static_method(const char* name, std::vector<Parameter> parameters, const char* doc) {
    methods_.push_back(detail::Entry<function, false>::define(name, std::move(parameters), doc,
                                                              Gil::kRelease, METH_STATIC));
    return *this;
  }

  // An attribute to read: a function of the object alone, called with the GIL.
  template <auto function>
  Class& property(const char* name, const char* doc) {
    using Entry = detail::Entry<function, true>;
    Entry::define(name, {}, doc, Gil::kKeep, 0);
    properties_.push_back(
        {name,
         [](PyObject* self, void*) -> PyObject* { return Entry::call(self, nullptr, 0, nullptr); },
         nullptr, doc, nullptr});
    return *this;
  }

  void finish(Module& module) {
    methods_.push_back({});
    properties_.push_back({});
    // Python keeps pointers to both tables for as long as the class lives, which is for ever.
    auto* methods = new std::vector<PyMethodDef>(methods_);
    auto* properties = new std::vector<PyGetSetDef>(properties_);
    const std::string full = std::string("llm_datadist_torch._C.") + name_;
    std::vector<PyType_Slot> slots = {
        {Py_tp_doc, const_cast<char*>(doc_)},
        {Py_tp_dealloc, reinterpret_cast<void*>(&dealloc)},
        {Py_tp_methods, methods->data()},
        {Py_tp_getset, properties->data()},
        {Py_tp_new, reinterpret_cast<void*>(make_)},
        {0, nullptr},
    };
    PyType_Spec spec{full.c_str(), sizeof(detail::PyObjectOf<T>), 0, Py_TPFLAGS_DEFAULT,
                     slots.data()};
    const PyRef type = PyRef::take(PyType_FromSpec(&spec));
    module.add(name_, type);
    Py_INCREF(type.get());
    detail::type_of<T> = reinterpret_cast<PyTypeObject*>(type.get());
  }

 private:
  static void dealloc(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    delete reinterpret_cast<detail::PyObjectOf<T>*>(self)->held;
    PyObject_Free(self);
    Py_DECREF(reinterpret_cast<PyObject*>(type));
  }

  static PyObject* refuse(PyTypeObject*, PyObject*, PyObject*) {
    PyErr_SetString(PyExc_TypeError, "objects of this class are made by its static methods");
    return nullptr;
  }

  const char* name_;
  const char* doc_;
  newfunc make_ = &refuse;
  std::vector<PyMethodDef> methods_;
  std::vector<PyGetSetDef> properties_;
};

// The first parameter of methods and properties.
template <class T>
using Held = std::shared_ptr<T>;

template <class T>
struct From<std::shared_ptr<T>> {
  static std::shared_ptr<T> get(PyObject* object, const char* name) {
    if (PyObject_TypeCheck(object, detail::type_of<T>) == 0) {
      PyErr_Format(PyExc_TypeError, "%s must be a %R, got %R", name, detail::type_of<T>, object);
      throw PythonError();
    }
    return *reinterpret_cast<detail::PyObjectOf<T>*>(object)->held;
  }
};

template <class T>
struct To<std::shared_ptr<T>> {
  static PyRef make(std::shared_ptr<T> value) {
    auto held = std::make_unique<std::shared_ptr<T>>(std::move(value));
    PyRef object = PyRef::take(PyType_GenericAlloc(detail::type_of<T>, 0));
    reinterpret_cast<detail::PyObjectOf<T>*>(object.get())->held = held.release();
    return object;
  }
};

}  // namespace llmdd

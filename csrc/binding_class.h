// SPDX-License-Identifier: Apache-2.0
// Makes Python classes of C++ ones; binding.h is about functions.

#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "binding.h"

namespace llmdd {
namespace detail {

// A Python object that holds a C++ one.
struct PyObjectOf {
  PyObject_HEAD std::shared_ptr<void>* held;
};

// The Python class of T, made by Class<T>; lives as long as the process.
template <class T>
inline PyTypeObject* type_of = nullptr;

// What of a class does not depend on T.
class ClassBuilder {
 public:
  ClassBuilder(const char* name, const char* doc) : name_(name), doc_(doc) {}

  void set_constructor(newfunc make) { make_ = make; }
  void add_method(Signature* signature, Gil gil, int flags);
  void add_property(const char* name, getter get, const char* doc);
  PyTypeObject* finish(Module& module);

  const char* name() const { return name_; }
  const char* doc() const { return doc_; }

 private:
  static PyObject* refuse(PyTypeObject*, PyObject*, PyObject*);

  const char* name_;
  const char* doc_;
  newfunc make_ = &refuse;
  std::vector<PyMethodDef> methods_;
  std::vector<PyGetSetDef> properties_;
};

// Has a function make the object that Python's call of a class asks for.
PyObject* construct(Signature* signature, PyObject* positional, PyObject* keywords);
// What `object`, of a class that is made here, holds; TypeError for any other.
const std::shared_ptr<void>& held_by(PyObject* object, PyTypeObject* type, const char* name);
PyRef make_object(PyTypeObject* type, std::shared_ptr<void> held);

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
  Class(const char* name, const char* doc) : builder_(name, doc) {}

  // What Class(...) calls: a function that returns std::shared_ptr<T>.
  template <auto function>
  Class& constructor(Parameters parameters) {
    using Entry = detail::Entry<function>;
    Entry::define(Form::kFunction, builder_.name(), parameters, builder_.doc());
    builder_.set_constructor([](PyTypeObject*, PyObject* positional, PyObject* keywords) {
      return detail::construct(&Entry::signature, positional, keywords);
    });
    return *this;
  }

  template <auto function>
  Class& method(const char* name, Parameters parameters, const char* doc, Gil gil = Gil::kRelease) {
    using Entry = detail::Entry<function>;
    builder_.add_method(Entry::define(Form::kMethod, name, parameters, doc), gil, 0);
    return *this;
  }

  template <auto function>
  Class& static_method(const char* name, Parameters parameters, const char* doc) {
    using Entry = detail::Entry<function>;
    builder_.add_method(Entry::define(Form::kFunction, name, parameters, doc), Gil::kRelease,
                        METH_STATIC);
    return *this;
  }

  // An attribute to read: a function of the object alone, called with the GIL.
  template <auto function>
  Class& property(const char* name, const char* doc) {
    using Entry = detail::Entry<function>;
    Entry::define(Form::kMethod, name, {}, doc)->gil = Gil::kKeep;
    builder_.add_property(
        name, [](PyObject* self, void*) { return Entry::call(self, nullptr, 0, nullptr); }, doc);
    return *this;
  }

  void finish(Module& module) { detail::type_of<T> = builder_.finish(module); }

 private:
  using Form = detail::Form;

  detail::ClassBuilder builder_;
};

// The first parameter of methods and properties.
template <class T>
using Held = std::shared_ptr<T>;

template <class T>
struct From<std::shared_ptr<T>> {
  static std::shared_ptr<T> get(PyObject* object, const char* name) {
    return std::static_pointer_cast<T>(detail::held_by(object, detail::type_of<T>, name));
  }
};

template <class T>
struct To<std::shared_ptr<T>> {
  static PyRef make(std::shared_ptr<T> value) {
    return detail::make_object(detail::type_of<T>, std::move(value));
  }
};

}  // namespace llmdd

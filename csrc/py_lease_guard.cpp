// SPDX-License-Identifier: Apache-2.0
#include "py_lease_guard.h"

#include <algorithm>
#include <exception>
#include <new>
#include <utility>
#include <vector>

#include "clock.h"
#include "lease_guard.h"

namespace llmdd {
namespace {

constexpr int64_t kSignalCheckNs = 20'000'000;

struct GuardObject {
  PyObject_HEAD LeaseGuard* guard;
  PyObject* refuse;   // (outcome, index, from, to) -> exception
  PyObject* on_idle;  // () -> None; nullptr before end()
};

struct LeaseObject {
  PyObject_HEAD GuardObject* guard;  // nullptr once given back
  PyObject* value;
};

PyTypeObject* lease_type = nullptr;

void free_object(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  const auto free_memory = reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free));
  free_memory(self);
  Py_DECREF(type);
}

// ---- Lease

// Returns false with a Python error set if what has to happen after the last lease failed.
bool give_back(LeaseObject* lease) {
  GuardObject* guard = std::exchange(lease->guard, nullptr);
  if (guard == nullptr) return true;
  bool fine = true;
  if (guard->guard->release() && guard->on_idle != nullptr) {
    PyObject* callback = guard->on_idle;
    Py_INCREF(callback);
    PyObject* result = PyObject_CallObject(callback, nullptr);
    Py_DECREF(callback);
    fine = result != nullptr;
    Py_XDECREF(result);
  }
  Py_DECREF(reinterpret_cast<PyObject*>(guard));
  return fine;
}

PyObject* lease_enter(PyObject* self, PyObject*) {
  PyObject* value = reinterpret_cast<LeaseObject*>(self)->value;
  Py_INCREF(value);
  return value;
}

PyObject* lease_release(PyObject* self, PyObject*) {
  if (!give_back(reinterpret_cast<LeaseObject*>(self))) return nullptr;
  Py_RETURN_NONE;
}

PyObject* lease_check(PyObject* self, PyObject*);

void lease_dealloc(PyObject* self) {
  PyObject_GC_UnTrack(self);
  auto* lease = reinterpret_cast<LeaseObject*>(self);
  if (lease->guard != nullptr) {
    // Whatever error is under way here must be there afterwards.
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (!give_back(lease)) PyErr_WriteUnraisable(nullptr);
    PyErr_Restore(type, value, trace);
  }
  Py_CLEAR(lease->value);
  free_object(self);
}

int lease_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  auto* lease = reinterpret_cast<LeaseObject*>(self);
  Py_VISIT(reinterpret_cast<PyObject*>(lease->guard));
  Py_VISIT(lease->value);
  return 0;
}

int lease_clear(PyObject* self) {
  Py_CLEAR(reinterpret_cast<LeaseObject*>(self)->value);
  return 0;
}

PyObject* lease_held(PyObject* self, void*) {
  return PyBool_FromLong(reinterpret_cast<LeaseObject*>(self)->guard != nullptr);
}

// ---- CacheGuard

const char* name_of(LeaseGuard::Outcome outcome) {
  switch (outcome) {
    case LeaseGuard::Outcome::kEnded:
      return "ended";
    case LeaseGuard::Outcome::kDraining:
      return "draining";
    default:
      return "moved";
  }
}

void raise_refusal(GuardObject* self, LeaseGuard::Outcome outcome, const LeaseGuard::Move& move) {
  PyObject* error = PyObject_CallFunction(
      self->refuse, "snKK", name_of(outcome), static_cast<Py_ssize_t>(move.index),
      static_cast<unsigned long long>(move.from), static_cast<unsigned long long>(move.to));
  if (error == nullptr) return;
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error)), error);
  Py_DECREF(error);
}

PyObject* new_lease(PyObject* self, PyObject* value, bool shared) {
  auto* guard = reinterpret_cast<GuardObject*>(self);
  const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(lease_type, Py_tp_alloc));
  auto* lease = reinterpret_cast<LeaseObject*>(allocate(lease_type, 0));
  if (lease == nullptr) return nullptr;
  Py_INCREF(value);
  lease->value = value;
  LeaseGuard::Move move;
  const LeaseGuard::Outcome outcome = guard->guard->acquire(shared, &move);
  if (outcome != LeaseGuard::Outcome::kTaken) {
    Py_DECREF(reinterpret_cast<PyObject*>(lease));
    raise_refusal(guard, outcome, move);
    return nullptr;
  }
  Py_INCREF(self);
  lease->guard = guard;
  return reinterpret_cast<PyObject*>(lease);
}

PyObject* guard_acquire(PyObject* self, PyObject* value) { return new_lease(self, value, false); }

PyObject* guard_share(PyObject* self, PyObject* value) { return new_lease(self, value, true); }

PyObject* guard_check(PyObject* self, PyObject*) {
  auto* guard = reinterpret_cast<GuardObject*>(self);
  LeaseGuard::Move move;
  if (guard->guard->moved(&move)) {
    raise_refusal(guard, LeaseGuard::Outcome::kMoved, move);
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* guard_end(PyObject* self, PyObject* on_idle) {
  auto* guard = reinterpret_cast<GuardObject*>(self);
  Py_INCREF(on_idle);
  PyObject* before = std::exchange(guard->on_idle, on_idle);
  const size_t leases = guard->guard->end();
  Py_XDECREF(before);
  return PyLong_FromSize_t(leases);
}

PyObject* guard_drain(PyObject* self, PyObject* argument) {
  const long long deadline_ns = PyLong_AsLongLong(argument);
  if (deadline_ns == -1 && PyErr_Occurred()) return nullptr;
  LeaseGuard* guard = reinterpret_cast<GuardObject*>(self)->guard;
  guard->begin_drain();
  size_t left = guard->wait_idle(0);
  while (left > 0) {
    const int64_t rest = deadline_ns == 0 ? kSignalCheckNs : deadline_ns - now_ns();
    if (rest <= 0) break;
    Py_BEGIN_ALLOW_THREADS;
    left = guard->wait_idle(std::min(rest, kSignalCheckNs));
    Py_END_ALLOW_THREADS;
    if (left > 0 && PyErr_CheckSignals() != 0) {
      guard->cancel_drain();
      return nullptr;
    }
  }
  if (left > 0) guard->cancel_drain();
  return PyLong_FromSize_t(left);
}

PyObject* guard_forget(PyObject* self, PyObject*) {
  reinterpret_cast<GuardObject*>(self)->guard->forget();
  Py_RETURN_NONE;
}

PyObject* guard_leases(PyObject* self, void*) {
  return PyLong_FromSize_t(reinterpret_cast<GuardObject*>(self)->guard->leases());
}

PyObject* guard_handle(PyObject* self, void*) {
  return PyLong_FromVoidPtr(reinterpret_cast<GuardObject*>(self)->guard);
}

bool read_addresses(PyObject* list, std::vector<uint64_t>* addrs) {
  const Py_ssize_t count = PyList_Size(list);
  if (count < 0) return false;
  addrs->reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    // Addresses above the int64 range may come as negative numbers.
    const unsigned long long address = PyLong_AsUnsignedLongLongMask(PyList_GetItem(list, i));
    if (PyErr_Occurred()) return false;
    addrs->push_back(address);
  }
  return true;
}

PyObject* guard_new(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject *list, *refuse;
  unsigned long long nbytes;
  if (!PyArg_ParseTuple(args, "OKO:CacheGuard", &list, &nbytes, &refuse)) return nullptr;
  LeaseGuard* guard = nullptr;
  try {
    std::vector<uint64_t> addrs;
    if (!read_addresses(list, &addrs)) return nullptr;
    guard = new LeaseGuard(std::move(addrs), nbytes);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
  const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
  auto* self = reinterpret_cast<GuardObject*>(allocate(type, 0));
  if (self == nullptr) {
    delete guard;
    return nullptr;
  }
  self->guard = guard;
  Py_INCREF(refuse);
  self->refuse = refuse;
  return reinterpret_cast<PyObject*>(self);
}

void guard_dealloc(PyObject* self) {
  PyObject_GC_UnTrack(self);
  auto* guard = reinterpret_cast<GuardObject*>(self);
  Py_CLEAR(guard->refuse);
  Py_CLEAR(guard->on_idle);
  delete guard->guard;
  free_object(self);
}

int guard_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  auto* guard = reinterpret_cast<GuardObject*>(self);
  Py_VISIT(guard->refuse);
  Py_VISIT(guard->on_idle);
  return 0;
}

int guard_clear(PyObject* self) {
  // `refuse` stays: a guard without it could not say why it refuses.
  Py_CLEAR(reinterpret_cast<GuardObject*>(self)->on_idle);
  return 0;
}

PyObject* lease_check(PyObject* self, PyObject*) {
  GuardObject* guard = reinterpret_cast<LeaseObject*>(self)->guard;
  if (guard == nullptr) {
    PyErr_SetString(PyExc_RuntimeError, "the lease has been given back");
    return nullptr;
  }
  return guard_check(reinterpret_cast<PyObject*>(guard), nullptr);
}

constexpr const char* kLeaseDoc =
    "One lease on a cache: its memory stays the cache's until the lease is given back.\n\n"
    "As a context manager it yields the value that it was taken with, and gives itself back at "
    "the\n"
    "end. It also goes back when the object ends, so that no exception can lose it. Taking, "
    "entering\n"
    "and leaving it run no Python code: Ctrl-C comes before or after, not in between.";

PyMethodDef lease_methods[] = {
    {"__enter__", lease_enter, METH_NOARGS, "The value that the lease was taken with."},
    {"__exit__", lease_release, METH_VARARGS, "Gives the lease back."},
    {"release", lease_release, METH_NOARGS, "Gives the lease back; idempotent."},
    {"check", lease_check, METH_NOARGS, "Raises if a tensor has moved since the lease was taken."},
    {nullptr, nullptr, 0, nullptr}};

PyGetSetDef lease_getset[] = {
    {"held", lease_held, nullptr, "Whether it has not been given back yet.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyType_Slot lease_slots[] = {{Py_tp_doc, const_cast<char*>(kLeaseDoc)},
                             {Py_tp_dealloc, reinterpret_cast<void*>(lease_dealloc)},
                             {Py_tp_traverse, reinterpret_cast<void*>(lease_traverse)},
                             {Py_tp_clear, reinterpret_cast<void*>(lease_clear)},
                             {Py_tp_methods, lease_methods},
                             {Py_tp_getset, lease_getset},
                             {0, nullptr}};

PyType_Spec lease_spec = {
    "llm_datadist_torch._C.Lease", sizeof(LeaseObject), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION, lease_slots};

constexpr const char* kGuardDoc =
    "CacheGuard(addrs, nbytes, refuse): counts the leases on one cache and watches its tensors.\n\n"
    "Whoever uses a cache takes a lease, and gets with it the proof that each tensor still is "
    "where\n"
    "the cache says::\n\n"
    "    with entry.guard.acquire(entry) as entry:\n"
    "        ...  # entry.addrs are right, and the memory is not freed meanwhile\n\n"
    "acquire() is one C call for all tensors. Where a tensor has moved, or the cache has ended, "
    "it\n"
    "raises what refuse(outcome, index, from, to) returns: outcome is 'moved', 'ended' or "
    "'draining'.\n"
    "Tensors are given by watch_tensors(tensors, guard.handle): "
    "tensor k\n"
    "must be at addrs[k % len(addrs)], its storage as large as nbytes.\n\n"
    "Thread safety: all methods may be called from any thread.";

PyMethodDef guard_methods[] = {
    {"acquire", guard_acquire, METH_O, "acquire(value) -> Lease. Yields value; see the class."},
    {"share", guard_share, METH_O,
     "share(value) -> Lease, also of a cache that has ended, where another lease is held."},
    {"check", guard_check, METH_NOARGS, "Raises if a tensor has moved."},
    {"end", guard_end, METH_O,
     "end(on_idle) -> leases that are held. No new ones; on_idle() is called after the last."},
    {"drain", guard_drain, METH_O,
     "drain(deadline_ns) -> leases that are left. Gives no new leases and waits for the last one,\n"
     "until CLOCK_MONOTONIC is deadline_ns (0: for ever). Where some are left, or it is "
     "interrupted,\n"
     "new leases are given again."},
    {"forget", guard_forget, METH_NOARGS, "Stops watching, so that the guard keeps no memory."},
    {nullptr, nullptr, 0, nullptr}};

PyGetSetDef guard_getset[] = {
    {"leases", guard_leases, nullptr, "Leases that are held.", nullptr},
    {"handle", guard_handle, nullptr, "What watch_tensors() knows it by.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyType_Slot guard_slots[] = {{Py_tp_doc, const_cast<char*>(kGuardDoc)},
                             {Py_tp_new, reinterpret_cast<void*>(guard_new)},
                             {Py_tp_dealloc, reinterpret_cast<void*>(guard_dealloc)},
                             {Py_tp_traverse, reinterpret_cast<void*>(guard_traverse)},
                             {Py_tp_clear, reinterpret_cast<void*>(guard_clear)},
                             {Py_tp_methods, guard_methods},
                             {Py_tp_getset, guard_getset},
                             {0, nullptr}};

PyType_Spec guard_spec = {"llm_datadist_torch._C.CacheGuard", sizeof(GuardObject), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, guard_slots};

}  // namespace

int add_lease_guard(PyObject* module) {
  PyObject* lease = PyType_FromSpec(&lease_spec);
  if (lease == nullptr) return -1;
  lease_type = reinterpret_cast<PyTypeObject*>(lease);  // keeps the reference
  if (PyObject_SetAttrString(module, "Lease", lease) != 0) return -1;
  PyObject* guard = PyType_FromSpec(&guard_spec);
  if (guard == nullptr) return -1;
  const int result = PyObject_SetAttrString(module, "CacheGuard", guard);
  Py_DECREF(guard);
  return result;
}

}  // namespace llmdd

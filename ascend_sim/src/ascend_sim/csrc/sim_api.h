// SPDX-License-Identifier: Apache-2.0
// What the libraries of the simulated Ascend runtime share beyond AscendCL. All of it is exported
// by libascendcl.so with C linkage, so that Python can call it through ctypes too.
#pragma once

#include <cstddef>
#include <cstdint>

#define ASCEND_SIM_API extern "C" __attribute__((visibility("default")))

// Where the simulator itself may read and write `nbytes` bytes at `address`: a private alias of
// device memory, the address itself for host memory. NULL if it is device address space that isn't
// wholly allocated. The alias stays mapped (with poison in it) after the memory is freed, so a late
// access is wrong but never a crash.
ASCEND_SIM_API void* ascend_sim_alias(const void* address, size_t nbytes);

// The number of the device that owns `address`, -1 for host memory.
ASCEND_SIM_API int ascend_sim_device_of(const void* address);

// Queues a task on a stream (NULL: the default stream of the current device). `task` returns an
// aclError; `drop` frees `arg` whether the task ran or not (it may be NULL). Returns an aclError;
// if that isn't 0, `arg` was dropped.
ASCEND_SIM_API int ascend_sim_submit(void* stream, const char* name, int (*task)(void*),
                                     void (*drop)(void*), void* arg);

// Counts a call of `function`, applies the delay that fault injection wants, and returns the
// aclError that it wants for this call, or 0.
ASCEND_SIM_API int ascend_sim_fault(const char* function);

// Sets the text that aclGetRecentErrMsg returns on this thread. `code` is put in front of it.
ASCEND_SIM_API void ascend_sim_fail(int code, const char* format, ...)
    __attribute__((format(printf, 2, 3)));

// What another process needs to reach memory of this one by process_vm_readv and process_vm_writev.
struct AscendSimMemory {
  int32_t kind;         // ASCEND_SIM_DEVICE, ASCEND_SIM_PINNED or ASCEND_SIM_HOST
  int32_t device;       // the device's number, -1 for host memory
  uint64_t alias;       // the address to read and write in this process
  uint64_t allocation;  // the first address of the allocation that holds the range (0: not known,
                        // host memory)
  uint64_t allocation_size;  // and its size in bytes
};
enum { ASCEND_SIM_HOST = 0, ASCEND_SIM_PINNED = 1, ASCEND_SIM_DEVICE = 2 };

// Describes a range of memory. Returns 0, or -1 if it is device address space that isn't wholly
// allocated.
ASCEND_SIM_API int ascend_sim_describe(const void* address, size_t nbytes, AscendSimMemory* out);

// Whether this thread has a current device (aclrtSetDevice or aclrtSetCurrentContext was called):
// its number, or -1.
ASCEND_SIM_API int ascend_sim_current_device(void);

// The number in the machine of a device that this process sees as `device`
// (ASCEND_RT_VISIBLE_DEVICES).
ASCEND_SIM_API int ascend_sim_number_of_device(int device);

// "lazy", "random" or "inline".
ASCEND_SIM_API const char* ascend_sim_scheduler(void);

// The next number of the seeded generator that the random scheduler uses.
ASCEND_SIM_API uint64_t ascend_sim_random(void);

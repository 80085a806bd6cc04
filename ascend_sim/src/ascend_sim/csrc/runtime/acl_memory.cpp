// SPDX-License-Identifier: Apache-2.0
// Memory as AscendCL has it: of devices, of the host, and addresses apart from memory (expandable
// segments).
#include <map>
#include <mutex>

#include "../sim_api.h"
#include "acl/acl.h"
#include "errors.h"
#include "faults.h"
#include "handles.h"
#include "ipc.h"
#include "memory.h"
#include "settings.h"

using sim::fail;
using sim::PhysicalPtr;
using sim::to_int;

namespace {

int allocate(void** out, size_t nbytes) {
  const int device = ascend_sim_current_device();
  if (device < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "this thread has set no device");
  if (out == nullptr || nbytes == 0)
    return fail(ACL_ERROR_INVALID_PARAM, "0 bytes, or nowhere to put the address");
  const PhysicalPtr physical = sim::take_physical(device, nbytes);
  if (physical == nullptr) {
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION,
                "device %d has %zu bytes, %zu of them are in use: not %zu more", device,
                sim::settings().memory, sim::used_bytes(device), nbytes);
  }
  const uintptr_t start = sim::reserve_addresses(nbytes, sim::kHugePage);
  if (start == 0 || !sim::map_physical(start, nbytes, physical, 0)) {
    if (start != 0) sim::release_addresses(start);
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host has no memory for %zu bytes of a device",
                nbytes);
  }
  *out = sim::to_pointer(start);
  return 0;
}

int allocate_host(void** out, size_t nbytes) {
  if (out == nullptr || nbytes == 0)
    return fail(ACL_ERROR_INVALID_PARAM, "0 bytes, or nowhere to put the address");
  *out = sim::allocate_pinned(nbytes);
  if (*out == nullptr)
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host has no %zu bytes", nbytes);
  return 0;
}

int register_host(void* address, size_t nbytes) {
  if (address == nullptr || !sim::register_pinned(to_int(address), nbytes)) {
    return fail(ACL_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "%p: %zu bytes can't be registered",
                address, nbytes);
  }
  return 0;
}

}  // namespace

aclError aclrtMalloc(void** out, size_t nbytes, aclrtMemMallocPolicy) {
  ASCEND_SIM_ENTER(aclrtMalloc);
  return allocate(out, nbytes);
}

aclError aclrtMallocAlign32(void** out, size_t nbytes, aclrtMemMallocPolicy) {
  ASCEND_SIM_ENTER(aclrtMallocAlign32);
  return allocate(out, nbytes);
}

aclError aclrtMallocWithCfg(void** out, size_t nbytes, aclrtMemMallocPolicy, aclrtMallocConfig*) {
  ASCEND_SIM_ENTER(aclrtMallocWithCfg);
  return allocate(out, nbytes);
}

aclError aclrtFree(void* address) {
  ASCEND_SIM_ENTER(aclrtFree);
  sim::Range range;
  const uintptr_t start = to_int(address);
  if (!sim::is_device_address(start) || !sim::find_range(start, &range) || range.start != start ||
      range.physical->is_imported() || range.physical->is_apart) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%p was not allocated, or was freed before", address);
  }
  if (!sim::end_exports(start)) {
    return fail(
        ACL_ERROR_RT_IPC_ERROR,
        "%p: another process has this memory open by its key (aclrtIpcMemClose there first)",
        address);
  }
  sim::release_addresses(start);
  return 0;
}

aclError aclrtMallocHost(void** out, size_t nbytes) {
  ASCEND_SIM_ENTER(aclrtMallocHost);
  return allocate_host(out, nbytes);
}

aclError aclrtMallocHostWithCfg(void** out, uint64_t nbytes, aclrtMallocConfig*) {
  ASCEND_SIM_ENTER(aclrtMallocHostWithCfg);
  return allocate_host(out, nbytes);
}

aclError aclrtFreeHost(void* address) {
  ASCEND_SIM_ENTER(aclrtFreeHost);
  if (sim::free_pinned(address)) return 0;
  return fail(ACL_ERROR_RT_PARAM_INVALID,
              "%p was not allocated by aclrtMallocHost, or was freed before", address);
}

aclError aclrtHostRegister(void* address, uint64_t nbytes, aclrtHostRegisterType,
                           void** device_address) {
  ASCEND_SIM_ENTER(aclrtHostRegister);
  *device_address = address;
  return register_host(address, nbytes);
}

aclError aclrtHostRegisterV2(void* address, uint64_t nbytes, uint32_t) {
  ASCEND_SIM_ENTER(aclrtHostRegisterV2);
  return register_host(address, nbytes);
}

aclError aclrtHostUnregister(void* address) {
  ASCEND_SIM_ENTER(aclrtHostUnregister);
  if (sim::unregister_pinned(to_int(address))) return 0;
  return fail(ACL_ERROR_HOST_MEMORY_NOT_REGISTERED, "%p is not registered", address);
}

aclError aclrtPointerGetAttributes(const void* address, aclrtPtrAttributes* out) {
  ASCEND_SIM_ENTER(aclrtPointerGetAttributes);
  *out = {};
  AscendSimMemory memory;
  if (out == nullptr || ascend_sim_describe(address, 1, &memory) != 0 ||
      memory.kind == ASCEND_SIM_HOST) {
    out->location.type = ACL_MEM_LOCATION_TYPE_UNREGISTERED;
    return 0;
  }
  const bool is_device = memory.kind == ASCEND_SIM_DEVICE;
  out->location.type = is_device ? ACL_MEM_LOCATION_TYPE_DEVICE : ACL_MEM_LOCATION_TYPE_HOST;
  out->location.id = is_device ? static_cast<uint32_t>(memory.device) : 0;
  out->pageSize = is_device ? sim::kHugePage : sim::kPage;
  return 0;
}

aclError aclrtMemGetAddressRange(void* address, void** base, size_t* size) {
  ASCEND_SIM_ENTER(aclrtMemGetAddressRange);
  AscendSimMemory memory;
  if (ascend_sim_describe(address, 1, &memory) != 0 || memory.kind != ASCEND_SIM_DEVICE) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%p is no device memory", address);
  }
  *base = sim::to_pointer(memory.allocation);
  *size = memory.allocation_size;
  return 0;
}

aclError aclrtReserveMemAddress(void** out, size_t nbytes, size_t alignment, void*, uint64_t) {
  ASCEND_SIM_ENTER(aclrtReserveMemAddress);
  const uintptr_t start = nbytes == 0 ? 0 : sim::reserve_addresses(nbytes, alignment);
  if (start == 0) return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "no addresses for %zu bytes", nbytes);
  *out = sim::to_pointer(start);
  return 0;
}

aclError aclrtReleaseMemAddress(void* address) {
  ASCEND_SIM_ENTER(aclrtReleaseMemAddress);
  if (sim::release_addresses(to_int(address))) return 0;
  return fail(ACL_ERROR_RT_PARAM_INVALID, "%p was not reserved", address);
}

aclError aclrtMallocPhysical(aclrtDrvMemHandle* out, size_t nbytes,
                             const aclrtPhysicalMemProp* wanted, uint64_t) {
  ASCEND_SIM_ENTER(aclrtMallocPhysical);
  const int device = static_cast<int>(wanted->location.id);
  if (wanted->location.type != ACL_MEM_LOCATION_TYPE_DEVICE || device >= sim::settings().devices) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "there is no device %d", device);
  }
  if (nbytes == 0 || nbytes % sim::kHugePage != 0) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%zu bytes are no multiple of 2 MiB", nbytes);
  }
  const PhysicalPtr physical = sim::take_physical(device, nbytes);
  if (physical == nullptr) {
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION,
                "device %d has %zu bytes, %zu of them are in use: not %zu more", device,
                sim::settings().memory, sim::used_bytes(device), nbytes);
  }
  physical->is_apart = true;
  *out = sim::add_handle(physical);
  return 0;
}

aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
  ASCEND_SIM_ENTER(aclrtFreePhysical);
  return sim::drop_handle(handle) ? 0 : fail(ACL_ERROR_RT_INVALID_HANDLE, "no such memory handle");
}

aclError aclrtMapMem(void* address, size_t nbytes, size_t offset, aclrtDrvMemHandle handle,
                     uint64_t) {
  ASCEND_SIM_ENTER(aclrtMapMem);
  const PhysicalPtr physical = sim::find_handle(handle);
  if (physical == nullptr) return fail(ACL_ERROR_RT_INVALID_HANDLE, "no such memory handle");
  if (offset > physical->size || nbytes > physical->size - offset ||
      !sim::map_physical(to_int(address), nbytes, physical, offset)) {
    return fail(ACL_ERROR_RT_PARAM_INVALID,
                "%zu bytes can't be mapped at %p: not reserved, or mapped already", nbytes,
                address);
  }
  return 0;
}

aclError aclrtUnmapMem(void* address) {
  ASCEND_SIM_ENTER(aclrtUnmapMem);
  return sim::unmap_physical(to_int(address))
             ? 0
             : fail(ACL_ERROR_RT_PARAM_INVALID, "nothing is mapped at %p", address);
}

aclError aclrtMemGetAllocationGranularity(aclrtPhysicalMemProp*, aclrtMemGranularityOptions,
                                          size_t* granularity) {
  ASCEND_SIM_ENTER(aclrtMemGetAllocationGranularity);
  *granularity = sim::kHugePage;
  return 0;
}

// SPDX-License-Identifier: Apache-2.0
// Copies and fills as AscendCL has them: at once, in a stream, in two dimensions, in batches.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "../sim_api.h"
#include "acl/acl.h"
#include "copy.h"
#include "errors.h"
#include "faults.h"
#include "memory.h"
#include "settings.h"
#include "streams.h"

using sim::Copy;
using sim::fail;
using sim::StreamPtr;

namespace {

constexpr size_t kMaxSyncBatch = 4096;

// Queues copies as one task; waits for it if the host's side is pageable, as the real runtime does.
int submit_copies(const char* name, aclrtStream handle, std::vector<Copy> copies) {
  const StreamPtr stream = sim::find_stream(handle);
  if (stream == nullptr)
    return fail(ACL_ERROR_RT_INVALID_HANDLE, "%s: there is no such stream", name);
  const bool is_pageable = std::any_of(copies.begin(), copies.end(), sim::touches_pageable);
  const uint64_t position = sim::submit(
      stream, {name, [copies = std::move(copies)] { return sim::run(copies); }, nullptr, nullptr});
  if (!is_pageable) return 0;
  sim::finish(stream, position);
  return 0;
}

int fill(void* address, size_t limit, int32_t value, size_t count) {
  if (count > limit)
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%zu bytes are more than the limit %zu", count, limit);
  if (count == 0) return 0;
  void* alias = ascend_sim_alias(address, count);
  if (alias == nullptr) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%p: %zu bytes aren't wholly allocated", address,
                count);
  }
  std::memset(alias, value, count);
  return 0;
}

struct Batch {
  void** dsts;
  size_t* limits;
  void** srcs;
  size_t* sizes;
  size_t count;
  aclrtMemcpyBatchAttr* attributes;
  size_t* indexes;
  size_t attribute_count;
};

bool is_at(const void* address, const aclrtMemLocation& location) {
  const int device = ascend_sim_device_of(address);
  if (location.type == ACL_MEM_LOCATION_TYPE_DEVICE) return device == static_cast<int>(location.id);
  return location.type == ACL_MEM_LOCATION_TYPE_HOST && device < 0;
}

// Attribute k is for the copies from indexes[k] up to the next one's.
int check_batch(const Batch& batch, std::vector<Copy>* copies, size_t* failed) {
  *failed = SIZE_MAX;
  if (batch.count == 0 || batch.attribute_count == 0 || batch.attribute_count > batch.count ||
      batch.indexes[0] != 0) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%zu copies with %zu attributes", batch.count,
                batch.attribute_count);
  }
  size_t k = 0;
  for (size_t i = 0; i < batch.count; ++i) {
    if (k + 1 < batch.attribute_count && batch.indexes[k + 1] == i) ++k;
    const Copy copy{batch.dsts[i], batch.srcs[i], batch.sizes[i]};
    const aclrtMemcpyBatchAttr& attribute = batch.attributes[k];
    *failed = i;
    if (!is_at(copy.dst, attribute.dstLoc) || !is_at(copy.src, attribute.srcLoc)) {
      return fail(ACL_ERROR_RT_PARAM_INVALID,
                  "copy %zu: the attributes don't say where its memory is", i);
    }
    if ((ascend_sim_device_of(copy.dst) < 0) == (ascend_sim_device_of(copy.src) < 0)) {
      return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
                  "copy %zu: batches are between host and device only", i);
    }
    if (const int code = sim::check(copy, batch.limits[i], ACL_MEMCPY_DEFAULT); code != 0)
      return code;
    copies->push_back(copy);
  }
  if (k + 1 != batch.attribute_count) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "the attributes' indexes aren't ascending");
  }
  *failed = SIZE_MAX;
  // A batch has no order in itself.
  for (size_t i = copies->size(); i > 1; --i)
    std::swap((*copies)[i - 1], (*copies)[sim::random_number() % i]);
  return 0;
}

int run_batch(const Batch& batch, size_t* failed) {
  std::vector<Copy> copies;
  if (batch.count > kMaxSyncBatch) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%zu copies are more than the limit %zu", batch.count,
                kMaxSyncBatch);
  }
  if (const int code = check_batch(batch, &copies, failed); code != 0) return code;
  return sim::run(copies);
}

int submit_batch(const Batch& batch, size_t* failed, aclrtStream stream) {
  std::vector<Copy> copies;
  if (const int code = check_batch(batch, &copies, failed); code != 0) return code;
  return submit_copies("aclrtMemcpyBatchAsync", stream, std::move(copies));
}

// The rows of a two-dimensional copy.
int rows_of(const Copy& first, size_t dst_pitch, size_t src_pitch, size_t height,
            aclrtMemcpyKind kind, std::vector<Copy>* rows) {
  if (first.count > dst_pitch || first.count > src_pitch) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "rows of %zu bytes don't fit pitches %zu and %zu",
                first.count, dst_pitch, src_pitch);
  }
  for (size_t i = 0; i < height; ++i) {
    const Copy row{static_cast<char*>(first.dst) + i * dst_pitch,
                   static_cast<const char*>(first.src) + i * src_pitch, first.count};
    if (const int code = sim::check(row, row.count, kind); code != 0) return code;
    rows->push_back(row);
  }
  return 0;
}

}  // namespace

aclError aclrtMemcpy(void* dst, size_t limit, const void* src, size_t count, aclrtMemcpyKind kind) {
  ASCEND_SIM_ENTER(aclrtMemcpy);
  const Copy copy{dst, src, count};
  if (const int code = sim::check(copy, limit, kind); code != 0) return code;
  return sim::run({copy});
}

aclError aclrtMemcpyAsync(void* dst, size_t limit, const void* src, size_t count,
                          aclrtMemcpyKind kind, aclrtStream stream) {
  ASCEND_SIM_ENTER(aclrtMemcpyAsync);
  const Copy copy{dst, src, count};
  if (const int code = sim::check_async(copy, limit, kind); code != 0) return code;
  return submit_copies("aclrtMemcpyAsync", stream, {copy});
}

aclError aclrtMemcpyAsyncWithCondition(void* dst, size_t limit, const void* src, size_t count,
                                       aclrtMemcpyKind kind, aclrtStream stream) {
  ASCEND_SIM_ENTER(aclrtMemcpyAsyncWithCondition);
  return aclrtMemcpyAsync(dst, limit, src, count, kind, stream);
}

aclError aclrtMemcpy2d(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t width,
                       size_t height, aclrtMemcpyKind kind) {
  ASCEND_SIM_ENTER(aclrtMemcpy2d);
  std::vector<Copy> rows;
  if (const int code = rows_of({dst, src, width}, dst_pitch, src_pitch, height, kind, &rows);
      code != 0)
    return code;
  return sim::run(rows);
}

aclError aclrtMemcpy2dAsync(void* dst, size_t dst_pitch, const void* src, size_t src_pitch,
                            size_t width, size_t height, aclrtMemcpyKind kind, aclrtStream stream) {
  ASCEND_SIM_ENTER(aclrtMemcpy2dAsync);
  std::vector<Copy> rows;
  if (const int code = sim::check_async({dst, src, width}, width, kind); code != 0) return code;
  if (const int code = rows_of({dst, src, width}, dst_pitch, src_pitch, height, kind, &rows);
      code != 0)
    return code;
  return submit_copies("aclrtMemcpy2dAsync", stream, std::move(rows));
}

aclError aclrtMemcpyBatch(void** dsts, size_t* limits, void** srcs, size_t* sizes, size_t count,
                          aclrtMemcpyBatchAttr* attributes, size_t* indexes, size_t attribute_count,
                          size_t* failed) {
  ASCEND_SIM_ENTER(aclrtMemcpyBatch);
  return run_batch({dsts, limits, srcs, sizes, count, attributes, indexes, attribute_count},
                   failed);
}

aclError aclrtMemcpyBatchV2(void** dsts, size_t* limits, void** srcs, size_t* sizes, size_t count,
                            aclrtMemcpyBatchAttr* attributes, size_t* indexes,
                            size_t attribute_count) {
  ASCEND_SIM_ENTER(aclrtMemcpyBatchV2);
  size_t failed = 0;
  return run_batch({dsts, limits, srcs, sizes, count, attributes, indexes, attribute_count},
                   &failed);
}

aclError aclrtMemcpyBatchAsync(void** dsts, size_t* limits, void** srcs, size_t* sizes,
                               size_t count, aclrtMemcpyBatchAttr* attributes, size_t* indexes,
                               size_t attribute_count, size_t* failed, aclrtStream stream) {
  ASCEND_SIM_ENTER(aclrtMemcpyBatchAsync);
  return submit_batch({dsts, limits, srcs, sizes, count, attributes, indexes, attribute_count},
                      failed, stream);
}

aclError aclrtMemcpyBatchAsyncV2(void** dsts, size_t* limits, void** srcs, size_t* sizes,
                                 size_t count, aclrtMemcpyBatchAttr* attributes, size_t* indexes,
                                 size_t attribute_count, aclrtStream stream) {
  ASCEND_SIM_ENTER(aclrtMemcpyBatchAsyncV2);
  size_t failed = 0;
  return submit_batch({dsts, limits, srcs, sizes, count, attributes, indexes, attribute_count},
                      &failed, stream);
}

aclError aclrtMemset(void* address, size_t limit, int32_t value, size_t count) {
  ASCEND_SIM_ENTER(aclrtMemset);
  return fill(address, limit, value, count);
}

aclError aclrtMemsetAsync(void* address, size_t limit, int32_t value, size_t count,
                          aclrtStream handle) {
  ASCEND_SIM_ENTER(aclrtMemsetAsync);
  const StreamPtr stream = sim::find_stream(handle);
  if (stream == nullptr)
    return fail(ACL_ERROR_RT_INVALID_HANDLE, "aclrtMemsetAsync: there is no such stream");
  if (count > limit || (count > 0 && ascend_sim_alias(address, count) == nullptr)) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%p: %zu bytes aren't wholly allocated, or over %zu",
                address, count, limit);
  }
  sim::submit(stream, {"aclrtMemsetAsync", [=] { return fill(address, limit, value, count); },
                       nullptr, nullptr});
  return 0;
}

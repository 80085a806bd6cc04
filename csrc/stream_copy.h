// SPDX-License-Identifier: Apache-2.0
// Copying one stretch of bytes past the cache. Torch-free; plain memcpy on anything but x86-64.

#pragma once

#include <cstddef>
#include <cstdint>

namespace llmdd {

// Copies `nbytes` with stores that do not first read the destination into the cache (non-temporal
// stores), which saves a third of the memory traffic of a copy that is larger than the caches.
// Prefetches the start of `next_src` (may be null), where the caller continues. The two stretches
// must not overlap. A thread calls stream_fence() once after its last stream_copy(), before it
// tells anybody that the bytes are there.
void stream_copy(uint8_t* dst, const uint8_t* src, size_t nbytes, const uint8_t* next_src);
void stream_fence();

}  // namespace llmdd

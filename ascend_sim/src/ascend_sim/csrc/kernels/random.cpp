// SPDX-License-Identifier: Apache-2.0
// Random numbers. The numbers aren't those of an NPU, but the same seed and offset give the same
// ones.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/multinomial.h>
#include <ATen/ops/normal.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "kernel.h"

using namespace ascend_sim;  // NOLINT: the tables below are written in its words

namespace {

// The generator advances by `offset` between two calls with one seed: both say which numbers come.
at::Generator generator(int64_t seed, int64_t offset) {
  const auto mixed = static_cast<uint64_t>(seed) * 0x9E3779B97F4A7C15u +
                     static_cast<uint64_t>(offset) * 0xD1B54A32D192ED03u;
  return at::make_generator<at::CPUGeneratorImpl>(mixed ^ (mixed >> 31));
}

// Kernels of masks work on bits: bit i of the mask keeps element i.
Tensor draw_mask(const Tensor& mask, int64_t count, double drop, const at::Generator& random) {
  const Tensor kept = at::rand({count}, random, at::kFloat).ge(drop);
  const Tensor packed = at::zeros({mask.numel()}, at::kByte);
  const auto* keep = kept.const_data_ptr<bool>();
  auto* bits = packed.mutable_data_ptr<uint8_t>();
  TORCH_CHECK(mask.numel() * 8 >= count, "a mask of ", mask.numel(), " bytes for ", count,
              " elements");
  for (int64_t i = 0; i < count; ++i) {
    bits[i / 8] |= static_cast<uint8_t>(keep[i]) << (i % 8);
  }
  return packed.view(mask.sizes());
}

Tensor apply_mask(const Tensor& self, const Tensor& mask, double drop) {
  const Tensor packed = mask.contiguous();
  TORCH_CHECK(packed.numel() * 8 >= self.numel(), "a mask of ", packed.numel(), " bytes for ",
              self.numel(), " elements");
  const Tensor kept = at::empty({self.numel()}, at::kBool);
  const auto* bits = static_cast<const uint8_t*>(packed.const_data_ptr());
  auto* keep = kept.mutable_data_ptr<bool>();
  for (int64_t i = 0; i < self.numel(); ++i) {
    keep[i] = ((bits[i / 8] >> (i % 8)) & 1) != 0;
  }
  const Tensor zero = at::zeros({}, self.options());
  const Tensor scaled = drop < 1 ? self.div(1 - drop) : zero.expand_as(self);
  return at::where(kept.view(self.sizes()), scaled, zero);
}

int64_t product(const Ints& shape) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

}  // namespace

ACLNN(InplaceUniform, [](Out self, double from, double to, uint64_t seed, uint64_t offset) {
  self.get().uniform_(from, to, generator(seed, offset));
})
ACLNN(InplaceNormal, [](Out self, float mean, float std, int64_t seed, int64_t offset) {
  self.get().normal_(mean, std, generator(seed, offset));
})
ACLNN(InplaceRandom, [](Out self, int64_t from, int64_t to, int64_t seed, int64_t offset) {
  self.get().random_(from, to, generator(seed, offset));
})
ACLNN(InplaceRandomWithoutFromTo,
      [](Out self, int64_t seed, int64_t offset) { self.get().random_(generator(seed, offset)); })
ACLNN(InplaceBernoulli, [](Out self, Scalar p, int64_t seed, int64_t offset) {
  self.get().bernoulli_(p.toDouble(), generator(seed, offset));
})
ACLNN(InplaceBernoulliTensor, [](Out self, Tensor p, int64_t seed, int64_t offset) {
  self.get().bernoulli_(p, generator(seed, offset));
})
ACLNN(SimThreadExponential,
      [](Out self, int64_t /*count*/, double lambda, int64_t seed, int64_t offset) {
        self.get().exponential_(lambda, generator(seed, offset));
      })
ACLNN(NormalFloatFloat, [](float mean, float std, int64_t seed, int64_t offset, Out out) {
  out.get().normal_(mean, std, generator(seed, offset));
})
ACLNN(NormalFloatTensor, [](float mean, Tensor std, int64_t seed, int64_t offset, Out out) {
  out = at::normal(mean, std, generator(seed, offset));
})
ACLNN(NormalTensorFloat, [](Tensor mean, float std, int64_t seed, int64_t offset, Out out) {
  out = at::normal(mean, std, generator(seed, offset));
})
ACLNN(NormalTensorTensor, [](Tensor mean, Tensor std, int64_t seed, int64_t offset, Out out) {
  out = at::normal(mean, std, generator(seed, offset));
})
ACLNN(Multinomial,
      [](Tensor self, int64_t samples, bool replacement, int64_t seed, int64_t offset, Out out) {
        out = at::multinomial(self, samples, replacement, generator(seed, offset));
      })
ACLNN(Randperm, [](int64_t n, int64_t seed, int64_t offset, Out out) {
  out = at::randperm(n, generator(seed, offset), out.get().options());
})
ACLNN(DropoutGenMask, [](Ints shape, double drop, int64_t seed, int64_t offset, Out mask) {
  mask = draw_mask(mask, product(shape), drop, generator(seed, offset));
})
ACLNN(DropoutGenMaskV2,
      [](Ints shape, double drop, int64_t seed, int64_t offset, at::ScalarType /*dtype*/,
         Out mask) { mask = draw_mask(mask, product(shape), drop, generator(seed, offset)); })
ACLNN(DropoutDoMask,
      [](Tensor self, Tensor mask, double drop, Out out) { out = apply_mask(self, mask, drop); })
ACLNN(DropoutV3, [](Tensor self, Tensor /*noise_shape*/, double drop, int64_t seed, int64_t offset,
                    Out out, Out mask) {
  const Tensor drawn = draw_mask(mask, self.numel(), drop, generator(seed, offset));
  mask = drawn;
  out = apply_mask(self, drawn, drop);
})

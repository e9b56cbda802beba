// Storage dtypes: fp32, bf16 and fp16 to fp32 and back, to nearest or stochastically, in integer arithmetic: the same
// bits everywhere, and loops over these functions vectorise.  `zo_kernels/rounding.py` is the specification.
//   stochastic: away from zero when r + floor(2^16 frac) >= 2^16, frac the place of |x| between its two neighbours,
//   0 <= r < 2^16.  A non-finite x is converted, never rounded: 0x7fffffff plus bits would become -0.
#pragma once
#include "normal.h"

namespace zo {

struct Float32 {
  using Storage = float;

  ZO_INLINE float load(float x) { return x; }
  ZO_INLINE float nearest(float x) { return x; }
  ZO_INLINE float stochastic(float x, uint32_t) { return x; }
};

struct BFloat16 {
  using Storage = uint16_t;

  ZO_INLINE float load(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

  ZO_INLINE uint16_t nearest(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u), quiet = bits | 0x400000u;
    return uint16_t(((bits & 0x7FFFFFFFu) <= 0x7F800000u ? rounded : quiet) >> 16);
  }

  ZO_INLINE uint16_t stochastic(float x, uint32_t r) {
    const uint32_t bits = bits_of(x);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    const uint32_t carry = magnitude < 0x7F800000u ? r : 0u, quiet = magnitude > 0x7F800000u ? 0x400000u : 0u;
    return uint16_t(((bits + carry) | quiet) >> 16);
  }
};

struct Float16 {
  using Storage = uint16_t;

  ZO_INLINE float load(uint16_t bits) {
    const uint32_t shifted = uint32_t(bits & 0x7FFFu) << 13;
    const uint32_t finite = bits_of(float_of(shifted) * 0x1p112f);  // exact, subnormals included
    const uint32_t magnitude = shifted < 0x0F800000u ? finite : shifted | 0x7F800000u;
    return float_of(magnitude | uint32_t(bits & 0x8000u) << 16);
  }

  ZO_INLINE uint16_t nearest(float x) {
    const uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
    const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t capped = normal < 0x7C00u ? normal : 0x7C00u;
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;  // ulp(1/2) is the smallest step
    const uint32_t rounded = magnitude < 0x38800000u ? subnormal : capped;
    return uint16_t((magnitude <= 0x7F800000u ? rounded : 0x7E00u) | (bits_of(x) >> 16 & 0x8000u));
  }

  ZO_INLINE uint16_t stochastic(float x, uint32_t r) {
    const uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
    // |x| in 2^-16 of an fp16 step: up to the smallest normal, 2^-14, and from there up to 65536, which is infinity.
    const uint32_t small = magnitude < 0x38800000u ? magnitude : 0x38800000u;
    const uint32_t large = magnitude > 0x38800000u ? magnitude : 0x38800000u;
    const uint32_t steps = uint32_t(int32_t(float_of(small) * 0x1p40f)) +
                           (((large < 0x47800000u ? large : 0x47800000u) - 0x38800000u) << 3);
    const uint32_t rounded = (steps + r) >> 16;
    return uint16_t((magnitude <= 0x7F800000u ? rounded : 0x7E00u) | (bits_of(x) >> 16 & 0x8000u));
  }
};

}  // namespace zo

// bf16 and fp16 to and from fp32, rounded to nearest or stochastically, in integer arithmetic: the same bits
// everywhere, and loops over these functions vectorise.  `zo_kernels/rounding.py` is the specification.
#pragma once
#include "normal.h"

namespace zo {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

ZO_INLINE float to_float(float x) { return x; }

ZO_INLINE float to_float(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }

ZO_INLINE float to_float(Float16 x) {
  const uint32_t shifted = uint32_t(x.bits & 0x7FFFu) << 13;
  const uint32_t finite = bits_of(float_of(shifted) * 0x1p112f);  // exact, subnormals included
  const uint32_t magnitude = shifted >= 0x0F800000u ? shifted | 0x7F800000u : finite;
  return float_of(magnitude | uint32_t(x.bits & 0x8000u) << 16);
}

ZO_INLINE void round_nearest(float x, float* out) { *out = x; }

ZO_INLINE void round_nearest(float x, BFloat16* out) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  out->bits = uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}

ZO_INLINE void round_nearest(float x, Float16* out) {
  const uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t capped = normal < 0x7C00u ? normal : 0x7C00u;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;  // the ulp of 1/2 is fp16's smallest step
  const uint32_t rounded = magnitude < 0x38800000u ? subnormal : capped;
  out->bits = uint16_t((magnitude > 0x7F800000u ? 0x7E00u : rounded) | (bits_of(x) >> 16 & 0x8000u));
}

// Away from zero when r + floor(2^16 frac) >= 2^16, frac the place of |x| between its two neighbours; r < 2^16.
// A non-finite x is converted, never rounded: 0x7fffffff plus bits would become -0.
ZO_INLINE void round_stochastic(float x, uint32_t r, BFloat16* out) {
  BFloat16 converted;
  round_nearest(x, &converted);
  const uint32_t bits = bits_of(x);
  out->bits = uint16_t((bits & 0x7FFFFFFFu) < 0x7F800000u ? (bits + r) >> 16 : converted.bits);
}

ZO_INLINE void round_stochastic(float x, uint32_t r, Float16* out) {
  Float16 converted;
  round_nearest(x, &converted);
  const uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
  const int32_t field = int32_t(magnitude >> 23);                              // exponent + 127
  const uint32_t mantissa = (magnitude & 0x7FFFFFu) | (field > 0 ? 0x800000u : 0u);
  const int32_t below = 113 - field;                                           // binades below fp16's smallest normal
  const uint32_t shift = uint32_t(below < 0 ? 0 : below > 31 ? 31 : below);
  const uint32_t steps = ((mantissa << 3) >> shift) + r;                       // in 2^-16 of an fp16 step
  const uint32_t base = uint32_t(below < 0 ? -below : 0) << 10;
  const uint32_t rounded = base + (steps >> 16);                               // the implicit bit carries into the exponent
  const uint32_t capped = rounded < 0x7C00u ? rounded : 0x7C00u;
  out->bits = uint16_t(magnitude < 0x7F800000u ? capped | (bits_of(x) >> 16 & 0x8000u) : converted.bits);
}

}  // namespace zo

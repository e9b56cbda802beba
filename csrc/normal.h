// Two standard normals from one Philox word (Box & Muller 1958), in fp32 with explicit fma and polynomials of our own:
// the same bits from every compiler and instruction set.  The contract (zo_kernels/noise.py):
//   u = fma(float(w), 2^-32, 2^-33),  r = sqrt(-2 ln u),  angle = 2 pi (w & 0xffff) / 65536;  r cos, r sin
// and at most 1e-6 + 2e-6 r from float64; these err by at most 7.1e-7 (at r = 6), 8 % of the allowance.
#pragma once
#include <cstring>

#include "philox.h"

namespace zo {

ZO_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

ZO_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

ZO_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// -2 ln u for u in [2^-33, 1].  u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt 2);  ln(1 + f) = f + f^2 P(f), P minimax
// for the relative error of the logarithm (3e-8), so that the smallest radii are right too.
ZO_INLINE float minus_two_log(float u) {
  const uint32_t shifted = bits_of(u) - 0x3F3504F3u;  // sqrt(1/2)
  const float e = float(int32_t(shifted) >> 23);
  const float f = float_of((shifted & 0x7FFFFFu) + 0x3F3504F3u) - 1.0f;
  float p = 0.0873484448f;
  p = fma(p, f, -0.143075225f);
  p = fma(p, f, 0.149179735f);
  p = fma(p, f, -0.165705081f);
  p = fma(p, f, 0.199620721f);
  p = fma(p, f, -0.250017553f);
  p = fma(p, f, 0.333339502f);
  p = fma(p, f, -0.499999916f);
  return -2.0f * fma(e, 0.693147181f, fma(f * f, p, f));
}

// Cosine and sine of 2 pi k / 65536, k the lower half of the word.  The reduction to an eighth of a turn is exact:
// k = 16384 quadrant + d, d in [-8192, 8192), and the polynomials (minimax, 3e-9) take x = d / 8192, angle pi/4 x.
ZO_INLINE void cos_sin(uint32_t word, float* cosine, float* sine) {
  const uint32_t k = word & 0xFFFFu;
  const uint32_t quadrant = (k + 8192u) >> 14;
  const float x = float(int32_t(k) - int32_t(quadrant << 14)) * 0x1p-13f;
  const float y = x * x;
  float s = -3.59545078e-05f;
  s = fma(s, y, 2.49000713e-03f);
  s = fma(s, y, -8.07454348e-02f);
  s = fma(s, y, 7.85398161e-01f) * x;
  float c = 3.52981134e-06f;
  c = fma(c, y, -3.25938614e-04f);
  c = fma(c, y, 1.58543252e-02f);
  c = fma(c, y, -3.08425135e-01f);
  c = fma(c, y, 1.0f);
  const bool odd = quadrant & 1u;
  *cosine = float_of(bits_of(odd ? s : c) ^ (((quadrant + 1u) & 2u) << 30));
  *sine = float_of(bits_of(odd ? c : s) ^ ((quadrant & 2u) << 30));
}

// Radius of the two normals of a word: elements 2j (times the cosine) and 2j + 1 (times the sine) of a group.
ZO_INLINE float radius(uint32_t word) {
  // float(word) rounded once, from halves that a signed conversion takes exactly: AVX2 has no unsigned conversion.
  const float w = fma(float(int32_t(word >> 16)), 65536.0f, float(int32_t(word & 0xFFFFu)));
  return __builtin_sqrtf(__builtin_fabsf(minus_two_log(fma(w, 0x1p-32f, 0x1p-33f))));
}

}  // namespace zo

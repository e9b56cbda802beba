// Mean and variance in one pass, around a shift s that is one of the values (Chan, Golub & LeVeque 1983):
//   d = x - s,  mean = s + sum d / n,  m2 = sum d^2 - (sum d)^2 / n,  sum x^2 = m2 + n mean^2 (no cancellation).
// In fp64.  A constant has d = 0, so its variance is exactly 0.  The subtraction in m2 costs little: s is one of the n
// values, so sum d^2 <= (n + 1) m2, and with n / 16 + 4 additions in a row m2 errs by at most
// 3 (n / 16 + 5) 2^-53 (n + 1) of itself: 1e-10 for a piece of 2048, even where s is an outlier.
#pragma once
#include "normal.h"

namespace zo {

constexpr int PIECE = 2048, SUMS = 16;  // elements summed at a time, in lanes of fixed place: the same bits everywhere

// Count, mean and sum of squared deviations of a part of a tensor, and how many of its values are not finite: with any
// of those, mean and m2 mean nothing.
struct Moments {
  double count, mean, m2;
  int64_t nonfinite;
};

// Moments of two parts together (Chan, Golub & LeVeque 1979).  Exact when both are the same constant.
ZO_INLINE Moments combined(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const double count = a.count + b.count, delta = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share, a.nonfinite + b.nonfinite};
}

// The sum of the lanes, halved until one is left.
ZO_INLINE double folded(double* lanes) {
  for (int half = SUMS / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Moments of 1 to PIECE values.  Writes past the last one, up to a multiple of SUMS.
ZO_INLINE Moments moments_of(float* x, int length) {
  const int padded = (length + SUMS - 1) / SUMS * SUMS;
  for (int i = length; i < padded; ++i) x[i] = x[0];  // d = 0 adds nothing
  const double shift = x[0];
  double sums[SUMS] = {}, squares[SUMS] = {};
  for (int i = 0; i < padded; i += SUMS)
    for (int lane = 0; lane < SUMS; ++lane) {
      const double d = double(x[i + lane]) - shift;
      sums[lane] += d;
      squares[lane] = __builtin_fma(d, d, squares[lane]);
    }
  const double sum = folded(sums);
  int64_t nonfinite = 0;
  if (!__builtin_isfinite(sum))  // finite values have a finite sum: 2^11 * 2^129 is far below 2^1024
    for (int i = 0; i < length; ++i) nonfinite += (bits_of(x[i]) & 0x7F800000u) == 0x7F800000u;
  const double m2 = folded(squares) - sum * (sum / length);
  return {double(length), shift + sum / length, m2 > 0 ? m2 : 0, nonfinite};
}

}  // namespace zo

// What cpu/kernels.cpp provides, once per instruction set: work on consecutive elements of one tensor, one thread.
#pragma once
#include "philox.h"
#include "zo.h"

namespace zo {

// theta = round(decay * theta + sum_k steps[k] * z_k), steps[k] = coefs[k] * scale of the tensor.
struct Update {
  const uint64_t* seeds;
  const float* steps;
  int64_t count;
  const float* decay;             // null: 1
  const uint64_t* rounding_seed;  // null: to nearest
  uint32_t tensor_id;
  DType dtype;
  Dist dist;
};

// Count, mean and sum of squared deviations of a part of a tensor.
struct Moments {
  double count, mean, m2;
};

// Moments of two parts together (Chan, Golub & LeVeque 1979).  Exact when both are the same constant.
ZO_INLINE Moments combined(Moments a, Moments b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const double count = a.count + b.count, delta = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// Element indices are global; `in` and `out` (which may be equal) point to element `first`.
struct Kernels {
  const char* name;
  void (*words)(uint32_t* out, uint64_t first_group, int64_t groups, uint64_t seed, uint32_t tensor_id,
                uint32_t stream);
  void (*noise)(float* out, uint64_t first, int64_t count, uint64_t seed, uint32_t tensor_id, Dist dist);
  void (*axpy)(const void* in, void* out, uint64_t first, int64_t count, const Update& update);
  Moments (*moments)(const void* in, int64_t count, DType dtype);
};

extern const Kernels kernels_generic;
#if defined(ZO_X86)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

}  // namespace zo

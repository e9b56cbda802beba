// What cpu/kernels.cpp provides, once per instruction set: work on consecutive elements of one tensor, one thread.
#pragma once
#include "moments.h"
#include "philox.h"
#include "zo.h"

namespace zo {

// The parts of a pass.  A part that is all zeros is left out.

// theta = round(decay * theta + sum_k steps[k] * z_k), steps[k] = coefs[k] * scale of the tensor.
struct Advance {
  const uint64_t* seeds;
  const float* steps;
  int64_t count;
  const float* decay;             // null: 1
  const uint64_t* rounding_seed;  // null: to nearest
};

// sums[k] += sum of theta * z_k.
struct Project {
  const uint64_t* seeds;
  int64_t count;
  double* sums;
};

// out = round(theta + step * z), mirror (null: none) = round(theta - step * z), of the theta that `Advance` stored.
struct Displace {
  void* out;
  void* mirror;
  uint64_t seed;  // of z, and of the rounding bits
  float step;
  bool stochastic;
};

// One read of theta, and what is done with every tile of it, in this order.
struct Pass {
  void* theta;  // element `first` of the global tensor, as are the pointers of a displacement; `Advance` writes it
  uint64_t first;
  int64_t count;
  uint32_t tensor_id;
  DType dtype;
  Dist dist;
  Advance advance;
  Moments* moments;  // of the values that remain in theta
  Project project;
  Displace displace;
};

struct Kernels {
  const char* name;
  void (*words)(uint32_t* out, uint64_t first_group, int64_t groups, uint64_t seed, uint32_t tensor_id,
                uint32_t stream);
  void (*noise)(float* out, uint64_t first, int64_t count, uint64_t seed, uint32_t tensor_id, uint32_t stream,
                Dist dist);
  void (*pass)(const Pass& pass);
};

extern const Kernels kernels_generic;
#if defined(ZO_X86)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

}  // namespace zo

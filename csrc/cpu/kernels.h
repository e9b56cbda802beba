// What kernels.cpp and rules.cpp provide, once per instruction set: work on consecutive elements of one tensor, by one
// thread.
#pragma once
#include "moments.h"
#include "philox.h"
#include "zo.h"

namespace zo {

// The form of a tensor's directions; the state's pointer is at the element where the work begins.
struct Form {
  FormKind kind;
  DType dtype;
  const void* state;
  float value;
};

// The parts of a pass.  A part that is all zeros is left out.

// theta = round(decay * theta + sum_k steps[k] * z_k), steps[k] = coefs[k] * scale of the tensor.
struct Advance {
  const uint64_t* seeds;
  const float* steps;
  int64_t count;
  const float* decay;             // null: 1
  const uint64_t* rounding_seed;  // null: to nearest
  Form form;
};

// sums[k] += sum of theta * z_k.
struct Project {
  const uint64_t* seeds;
  int64_t count;
  double* sums;
};

// out = round(theta + sum_k steps[k] * z_k), mirror (null: none) = round(theta - sum_k ...), of the theta that
// `Advance` stored.
struct Displace {
  void* out;
  void* mirror;
  const uint64_t* seeds;  // the first one gives the rounding bits
  const float* steps;
  int64_t count;
  bool stochastic;
  Form form;
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

// One read of theta and the states of a rule, and one write.
struct RulePass {
  void* theta;  // element `first` of the global tensor, as are the states
  float* states[MOST_STATES];
  uint64_t first;
  int64_t count;
  uint32_t tensor_id;
  DType dtype;
  Dist dist;
  Rule rule;
  const float* numbers;
  const float* weights;  // of SHIFTED_MEAN: steps of theta along the directions
  Advance advance;       // its sum of directions is the gradient
};

struct Kernels {
  const char* name;
  void (*words)(uint32_t* out, uint64_t first_group, int64_t groups, uint64_t seed, uint32_t tensor_id,
                uint32_t stream);
  void (*noise)(float* out, uint64_t first, int64_t count, uint64_t seed, uint32_t tensor_id, Dist dist,
                uint32_t stream);
  void (*pass)(const Pass& pass);
  void (*rule_pass)(const RulePass& pass);
};

extern const Kernels kernels_generic;
#if defined(ZO_X86)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

// name_isa, in a file that is compiled once per instruction set.
#define ZO_STRING_OF(name) #name
#define ZO_STRING(name) ZO_STRING_OF(name)
#define ZO_JOIN_OF(a, b) a##b
#define ZO_JOIN(a, b) ZO_JOIN_OF(a, b)

}  // namespace zo

// Philox4x32-10 (Salmon et al., SC'11): the random words behind every direction, noise contract version 1.
// Scalar and free of state, for host and device; `zo_kernels/noise.py` is the specification.
#pragma once
#include <cstdint>

// Internal linkage on purpose: cpu/kernels.cpp is compiled once per instruction set, and the linker would merge inline
// functions of external linkage, perhaps into the copy that this machine cannot run.
#if defined(__CUDACC__)
#define ZO_INLINE static __host__ __device__ __forceinline__
#else
#define ZO_INLINE static inline __attribute__((always_inline))
#endif

namespace zo {

enum Stream : uint32_t { DIRECTION = 0, ROUNDING = 1, LOW_RANK = 2 };

struct Words {
  uint32_t x, y, z, w;
};

// Key: low, high half of the seed.  Counter: low, high half of the group index, tensor id, stream.
ZO_INLINE Words philox(uint64_t seed, uint64_t group, uint32_t tensor_id, uint32_t stream) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  Words c{uint32_t(group), uint32_t(group >> 32), tensor_id, stream};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c.x, b = uint64_t(0xCD9E8D57u) * c.z;
    c = {uint32_t(b >> 32) ^ c.y ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c.w ^ k1, uint32_t(a)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace zo

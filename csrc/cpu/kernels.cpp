// The inner loops of the CPU backend.  CMake compiles this file once per instruction set, with ZO_KERNELS naming the
// result; ops.cpp chooses at run time.  Only +, -, *, sqrt and explicit fma on floats, no contraction and no
// reassociation, so all copies give the same bits (tests/test_ops.py compares them).
//
// A tensor is walked in tiles of 128 elements, aligned in the global index: 16 Philox groups of 8 normals, or one of
// 128 signs.  Words, noise and accumulator of a tile stay in L1 (1.3 KB), so theta is read and written once for any
// number of directions.  Loops have constant trip counts and no branches: the compiler vectorises them (see
// -fopt-info-vec); only Philox's 32 x 32 -> 64 bit product needs a word of help, 3x faster than what GCC 12 finds.
//
// Everything but the table at the end has internal linkage, and no C++ library header is used here: see ZO_INLINE.
#include "kernels.h"

#include "dtype.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace zo {
namespace {

constexpr int GROUPS = 16, TILE = 8 * GROUPS;

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#else
constexpr int BYTES = 32;
#endif
constexpr int LANES = BYTES / 8, VECTORS = GROUPS / LANES;

// 32-bit values in 64-bit lanes.  The upper halves hold garbage that nothing reads: a product takes the lower halves.
typedef uint64_t Lanes __attribute__((vector_size(BYTES)));

ZO_INLINE Lanes product(Lanes a, uint32_t multiplier) {
  const Lanes m = Lanes{} + multiplier;
#if defined(__AVX512F__)
  return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)m);
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)m);
#else
  return (a & 0xFFFFFFFFu) * m;
#endif
}

// Words of 16 consecutive groups, in order: philox() of philox.h, four or eight groups to a vector.
ZO_INLINE void words_of_tile(uint64_t first_group, uint64_t seed, uint32_t tensor_id, uint32_t stream,
                             uint32_t* __restrict out) {
  static const uint64_t PLACE[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  Lanes c0[VECTORS], c1[VECTORS], c2[VECTORS], c3[VECTORS], place;
  memcpy(&place, PLACE, sizeof place);
  for (int v = 0; v < VECTORS; ++v) {
    const Lanes group = place + (first_group + uint64_t(v * LANES));
    c0[v] = group;
    c1[v] = group >> 32;
    c2[v] = Lanes{} + tensor_id;
    c3[v] = Lanes{} + stream;
  }
  Lanes k0 = Lanes{} + seed, k1 = Lanes{} + (seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int v = 0; v < VECTORS; ++v) {
      const Lanes a = product(c0[v], 0xD2511F53u), b = product(c2[v], 0xCD9E8D57u);
      c0[v] = (b >> 32) ^ c1[v] ^ k0;
      c1[v] = b;
      c2[v] = (a >> 32) ^ c3[v] ^ k1;
      c3[v] = a;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  uint64_t low[GROUPS], high[GROUPS];
  for (int v = 0; v < VECTORS; ++v) {
    const Lanes first = (c0[v] & 0xFFFFFFFFu) | (c1[v] << 32), second = (c2[v] & 0xFFFFFFFFu) | (c3[v] << 32);
    memcpy(low + v * LANES, &first, BYTES);
    memcpy(high + v * LANES, &second, BYTES);
  }
  for (int g = 0; g < GROUPS; ++g) {
    out[4 * g] = uint32_t(low[g]);
    out[4 * g + 1] = uint32_t(low[g] >> 32);
    out[4 * g + 2] = uint32_t(high[g]);
    out[4 * g + 3] = uint32_t(high[g] >> 32);
  }
}

// z of the tile that begins at element `first`, a multiple of 128.
ZO_INLINE void direction(uint64_t first, uint64_t seed, uint32_t tensor_id, Dist dist, float* __restrict z) {
  if (dist == Dist::NORMAL) {
    alignas(64) uint32_t w[TILE / 2];
    words_of_tile(first >> 3, seed, tensor_id, DIRECTION, w);
    for (int i = 0; i < TILE / 2; ++i) normal_pair(w[i], z + 2 * i, z + 2 * i + 1);
  } else {
    const Words v = philox(seed, first >> 7, tensor_id, DIRECTION);
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
    for (int j = 0; j < 4; ++j)
      for (uint32_t i = 0; i < 32; ++i) z[32 * j + i] = float_of(0xBF800000u ^ ((w[j] >> i) << 31));  // bit 1: +1
  }
}

// 16 random bits for every element of a tile.
ZO_INLINE void rounding_bits(uint64_t first, uint64_t seed, uint32_t tensor_id, uint32_t* __restrict bits) {
  alignas(64) uint32_t w[TILE / 2];
  words_of_tile(first >> 3, seed, tensor_id, ROUNDING, w);
  for (int i = 0; i < TILE / 2; ++i) {
    bits[2 * i] = w[i] & 0xFFFFu;
    bits[2 * i + 1] = w[i] >> 16;
  }
}

// Calls body(first element of the tile, place of the part's first element in the tile, length, elements done before).
template <class Body>
ZO_INLINE void for_tiles(uint64_t first, int64_t count, Body body) {
  for (int64_t done = 0; done < count;) {
    const int from = int((first + uint64_t(done)) % TILE);
    const int length = count - done < TILE - from ? int(count - done) : TILE - from;
    body(first + uint64_t(done) - uint64_t(from), from, length, done);
    done += length;
  }
}

template <class T>
ZO_INLINE void load(const T* __restrict in, int length, float* __restrict acc) {
  for (int i = 0; i < length; ++i) acc[i] = to_float(in[i]);
}

template <class T>
ZO_INLINE void store(const float* __restrict acc, const uint32_t* __restrict bits, int length, T* __restrict out) {
  if (bits)
    for (int i = 0; i < length; ++i) round_stochastic(acc[i], bits[i], out + i);
  else
    for (int i = 0; i < length; ++i) round_nearest(acc[i], out + i);
}

ZO_INLINE void store(const float* __restrict acc, const uint32_t*, int length, float* __restrict out) {
  for (int i = 0; i < length; ++i) out[i] = acc[i];  // fp32 is never rounded again
}

template <class T>
void axpy_as(const T* in, T* out, uint64_t first, int64_t count, const Update& update) {
  alignas(64) float acc[TILE] = {}, z[TILE];
  alignas(64) uint32_t random[TILE];
  const bool stochastic = update.rounding_seed && update.dtype != DType::FLOAT32;
  for_tiles(first, count, [&](uint64_t tile, int from, int length, int64_t done) {
    if (length == TILE)
      load(in + done, TILE, acc);  // a constant trip count
    else
      load(in + done, length, acc + from);
    if (update.decay)
      for (int i = 0; i < TILE; ++i) acc[i] *= *update.decay;
    for (int64_t k = 0; k < update.count; ++k) {
      direction(tile, update.seeds[k], update.tensor_id, update.dist, z);
      for (int i = 0; i < TILE; ++i) acc[i] = fma(update.steps[k], z[i], acc[i]);
    }
    if (stochastic) rounding_bits(tile, *update.rounding_seed, update.tensor_id, random);
    const uint32_t* bits = stochastic ? random + from : nullptr;
    if (length == TILE)
      store(acc, bits, TILE, out + done);
    else
      store(acc + from, bits, length, out + done);
  });
}

void axpy(const void* in, void* out, uint64_t first, int64_t count, const Update& update) {
  if (update.dtype == DType::FLOAT32)
    axpy_as(static_cast<const float*>(in), static_cast<float*>(out), first, count, update);
  else if (update.dtype == DType::BFLOAT16)
    axpy_as(static_cast<const BFloat16*>(in), static_cast<BFloat16*>(out), first, count, update);
  else
    axpy_as(static_cast<const Float16*>(in), static_cast<Float16*>(out), first, count, update);
}

void noise(float* out, uint64_t first, int64_t count, uint64_t seed, uint32_t tensor_id, Dist dist) {
  alignas(64) float z[TILE];
  for_tiles(first, count, [&](uint64_t tile, int from, int length, int64_t done) {
    direction(tile, seed, tensor_id, dist, z);
    memcpy(out + done, z + from, sizeof(float) * size_t(length));
  });
}

void words(uint32_t* out, uint64_t first_group, int64_t groups, uint64_t seed, uint32_t tensor_id, uint32_t stream) {
  alignas(64) uint32_t w[4 * GROUPS];
  for (int64_t done = 0; done < groups; done += GROUPS) {
    words_of_tile(first_group + uint64_t(done), seed, tensor_id, stream, w);
    const int64_t left = groups - done < GROUPS ? groups - done : GROUPS;
    memcpy(out + 4 * done, w, 4 * sizeof(uint32_t) * size_t(left));
  }
}

// Two passes over a piece that fits in L1: the mean, then squared deviations from it, each in 16 fixed lanes.  The sum
// of 4096 equal fp32 values is exact in fp64, so the variance of a constant tensor is exactly 0.
constexpr int PIECE = 4096, SUMS = 16;

template <class T>
ZO_INLINE double sum_of_powers(const T* __restrict in, int64_t count, double shift, bool squared) {
  double sums[SUMS] = {};
  for (int64_t i = 0; i < count; i += SUMS) {
    const int64_t lanes = count - i < SUMS ? count - i : SUMS;
    if (lanes == SUMS) {
      for (int l = 0; l < SUMS; ++l) {
        const double x = double(to_float(in[i + l])) - shift;
        sums[l] += squared ? x * x : x;
      }
    } else {
      for (int64_t l = 0; l < lanes; ++l) {
        const double x = double(to_float(in[i + l])) - shift;
        sums[l] += squared ? x * x : x;
      }
    }
  }
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

template <class T>
Moments moments_as(const T* in, int64_t count) {
  Moments all{0, 0, 0};
  for (int64_t done = 0; done < count; done += PIECE) {
    const int64_t n = count - done < PIECE ? count - done : PIECE;
    const double mean = sum_of_powers(in + done, n, 0.0, false) / double(n);
    all = combined(all, {double(n), mean, sum_of_powers(in + done, n, mean, true)});
  }
  return all;
}

Moments moments(const void* in, int64_t count, DType dtype) {
  if (dtype == DType::FLOAT32) return moments_as(static_cast<const float*>(in), count);
  if (dtype == DType::BFLOAT16) return moments_as(static_cast<const BFloat16*>(in), count);
  return moments_as(static_cast<const Float16*>(in), count);
}

}  // namespace

#define ZO_STRING_OF(name) #name
#define ZO_STRING(name) ZO_STRING_OF(name)
#define ZO_JOIN_OF(a, b) a##b
#define ZO_JOIN(a, b) ZO_JOIN_OF(a, b)
extern const Kernels ZO_JOIN(kernels_, ZO_ISA){ZO_STRING(ZO_ISA), words, noise, axpy, moments};

}  // namespace zo

// The inner loops of the CPU backend.  CMake compiles this file once per instruction set, with ZO_ISA naming the
// result; ops.cpp chooses at run time.  Only +, -, *, sqrt and explicit fma on floats, no contraction and no
// reassociation, so all copies give the same bits (tests/test_ops.py compares them).
//
// A tensor is walked in tiles of up to 512 elements.  Words, noise and accumulator of a tile stay in L1 (10 KB), so
// that theta is read and written once for any number of directions.  Each stage of a tile is one simple loop, which
// the compiler vectorises (-fopt-info-vec); Philox alone has its vectors written out, in lanes.h.  Tiles of 128
// elements are 1.2x slower: the processor drains between the stages.
//
// Everything but the table at the end has internal linkage, and nothing of the C++ library is called: see ZO_INLINE.
#include "kernels.h"

#include "dtype.h"
#include "lanes.h"

namespace zo {
namespace {

// A run is 128 elements at a multiple of 128: 16 Philox groups of 8 normals, or one of 128 signs.  Noise is made by
// whole runs: a loop over `runs * RUN` elements needs no remainder.
constexpr int RUN = 8 * GROUPS, TILE = 4 * RUN;

void make_words(uint64_t first_group, uint64_t seed, uint32_t tensor_id, uint32_t stream, int runs, uint32_t* w) {
  for (int run = 0; run < runs; ++run)
    philox_groups(first_group + uint64_t(run * GROUPS), seed, tensor_id, stream, w + run * (RUN / 2));
}

void make_normals(const uint32_t* __restrict w, int runs, float* __restrict z) {
  alignas(64) float r[TILE / 2], cosine[TILE / 2], sine[TILE / 2];
  for (int i = 0; i < runs * (RUN / 2); ++i) r[i] = radius(w[i]);
  for (int i = 0; i < runs * (RUN / 2); ++i) cos_sin(w[i], cosine + i, sine + i);
  for (int i = 0; i < runs * (RUN / 2); ++i) {
    z[2 * i] = r[i] * cosine[i];
    z[2 * i + 1] = r[i] * sine[i];
  }
}

void make_signs(uint64_t first_group, uint64_t seed, uint32_t tensor_id, int runs, float* __restrict z) {
  for (int run = 0; run < runs; ++run, z += RUN) {
    const Words words = philox(seed, first_group + uint64_t(run), tensor_id, DIRECTION);
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
    for (int j = 0; j < 4; ++j)
      for (uint32_t i = 0; i < 32; ++i) z[32 * j + i] = float_of(0xBF800000u ^ ((w[j] >> i) << 31));  // bit 1: +1
  }
}

// 16 random bits for every element.
void make_bits(const uint32_t* __restrict w, int runs, uint32_t* __restrict bits) {
  for (int i = 0; i < runs * (RUN / 2); ++i) {
    bits[2 * i] = w[i] & 0xFFFFu;
    bits[2 * i + 1] = w[i] >> 16;
  }
}

void multiply(float factor, int runs, float* __restrict acc) {
  for (int i = 0; i < runs * RUN; ++i) acc[i] *= factor;
}

void multiply_add(float step, const float* __restrict z, int runs, float* __restrict acc) {
  for (int i = 0; i < runs * RUN; ++i) acc[i] = fma(step, z[i], acc[i]);
}

// z of `runs` runs, the first at element `first`, a multiple of 128.
ZO_INLINE void make_direction(uint64_t first, uint64_t seed, uint32_t tensor_id, Dist dist, int runs, uint32_t* w,
                              float* z) {
  if (dist == Dist::NORMAL) {
    make_words(first >> 3, seed, tensor_id, DIRECTION, runs, w);
    make_normals(w, runs, z);
  } else {
    make_signs(first >> 7, seed, tensor_id, runs, z);
  }
}

template <class T>
void load(const typename T::Storage* __restrict in, int length, float* __restrict acc) {
  for (int i = 0; i < length; ++i) acc[i] = T::load(in[i]);
}

template <class T>
void store_nearest(const float* __restrict acc, int length, typename T::Storage* __restrict out) {
  for (int i = 0; i < length; ++i) out[i] = T::nearest(acc[i]);
}

template <class T>
void store_stochastic(const float* __restrict acc, const uint32_t* __restrict bits, int length,
                      typename T::Storage* __restrict out) {
  for (int i = 0; i < length; ++i) out[i] = T::stochastic(acc[i], bits[i]);
}

// `length` elements of a tile that begins at element `first` (a multiple of 128), from place `from` (below 128) on;
// `done` elements of the whole range came before.
struct Tile {
  uint64_t first;
  int from, length, runs;
  int64_t done;
};

template <class Body>
ZO_INLINE void for_tiles(uint64_t first, int64_t count, Body body) {
  int from = int(first % RUN);
  for (int64_t done = 0; done < count; from = 0) {
    const int length = count - done < TILE - from ? int(count - done) : TILE - from;
    body(Tile{first + uint64_t(done) - uint64_t(from), from, length, (from + length + RUN - 1) / RUN, done});
    done += length;
  }
}

template <class T>
void axpy_as(const void* source, void* target, uint64_t first, int64_t count, const Update& update) {
  const auto* in = static_cast<const typename T::Storage*>(source);
  auto* out = static_cast<typename T::Storage*>(target);
  alignas(64) float acc[TILE] = {}, z[TILE];
  alignas(64) uint32_t w[TILE / 2], bits[TILE];
  const bool stochastic = update.rounding_seed && update.dtype != DType::FLOAT32;
  for_tiles(first, count, [&](const Tile& tile) {
    load<T>(in + tile.done, tile.length, acc + tile.from);
    if (update.decay) multiply(*update.decay, tile.runs, acc);
    for (int64_t k = 0; k < update.count; ++k) {
      make_direction(tile.first, update.seeds[k], update.tensor_id, update.dist, tile.runs, w, z);
      multiply_add(update.steps[k], z, tile.runs, acc);
    }
    if (stochastic) {
      make_words(tile.first >> 3, *update.rounding_seed, update.tensor_id, ROUNDING, tile.runs, w);
      make_bits(w, tile.runs, bits);
      store_stochastic<T>(acc + tile.from, bits + tile.from, tile.length, out + tile.done);
    } else {
      store_nearest<T>(acc + tile.from, tile.length, out + tile.done);
    }
  });
}

void axpy(const void* in, void* out, uint64_t first, int64_t count, const Update& update) {
  if (update.dtype == DType::FLOAT32)
    axpy_as<Float32>(in, out, first, count, update);
  else if (update.dtype == DType::BFLOAT16)
    axpy_as<BFloat16>(in, out, first, count, update);
  else
    axpy_as<Float16>(in, out, first, count, update);
}

void noise(float* out, uint64_t first, int64_t count, uint64_t seed, uint32_t tensor_id, Dist dist) {
  alignas(64) float z[TILE];
  alignas(64) uint32_t w[TILE / 2];
  for_tiles(first, count, [&](const Tile& tile) {
    make_direction(tile.first, seed, tensor_id, dist, tile.runs, w, z);
    memcpy(out + tile.done, z + tile.from, sizeof(float) * size_t(tile.length));
  });
}

void words(uint32_t* out, uint64_t first_group, int64_t groups, uint64_t seed, uint32_t tensor_id, uint32_t stream) {
  alignas(64) uint32_t w[RUN / 2];
  for (int64_t done = 0; done < groups; done += GROUPS) {
    make_words(first_group + uint64_t(done), seed, tensor_id, stream, 1, w);
    const int64_t left = groups - done < GROUPS ? groups - done : GROUPS;
    memcpy(out + 4 * done, w, 4 * sizeof(uint32_t) * size_t(left));
  }
}

// Two passes over a piece that stays in L1: the mean, then squared deviations from it, in 16 fixed lanes of fp64.  The
// sum of 2048 equal fp32 values is exact in fp64, so the variance of a constant tensor is exactly 0.
constexpr int PIECE = 2048, SUMS = 16;

ZO_INLINE double total(const double* sums) {
  double sum = 0;
  for (int lane = 0; lane < SUMS; ++lane) sum += sums[lane];
  return sum;
}

double sum_of(const float* __restrict x, int length) {
  double sums[SUMS] = {};
  for (int i = 0; i < length; i += SUMS)
    for (int lane = 0; lane < SUMS; ++lane) sums[lane] += double(x[i + lane]);
  return total(sums);
}

double squares_of(const float* __restrict x, int length, double mean) {
  double sums[SUMS] = {};
  for (int i = 0; i < length; i += SUMS)
    for (int lane = 0; lane < SUMS; ++lane) {
      const double deviation = double(x[i + lane]) - mean;
      sums[lane] += deviation * deviation;
    }
  return total(sums);
}

template <class T>
Moments moments_as(const void* source, int64_t count) {
  const auto* in = static_cast<const typename T::Storage*>(source);
  alignas(64) float x[PIECE];
  Moments all{0, 0, 0};
  for (int64_t done = 0; done < count; done += PIECE) {
    const int length = count - done < PIECE ? int(count - done) : PIECE, whole = length / SUMS * SUMS;
    load<T>(in + done, length, x);
    double sum = sum_of(x, whole);
    for (int i = whole; i < length; ++i) sum += double(x[i]);
    const double mean = sum / length;
    double squares = squares_of(x, whole, mean);
    for (int i = whole; i < length; ++i) squares += (double(x[i]) - mean) * (double(x[i]) - mean);
    all = combined(all, {double(length), mean, squares});
  }
  return all;
}

Moments moments(const void* in, int64_t count, DType dtype) {
  if (dtype == DType::FLOAT32) return moments_as<Float32>(in, count);
  if (dtype == DType::BFLOAT16) return moments_as<BFloat16>(in, count);
  return moments_as<Float16>(in, count);
}

}  // namespace

#define ZO_STRING_OF(name) #name
#define ZO_STRING(name) ZO_STRING_OF(name)
#define ZO_JOIN_OF(a, b) a##b
#define ZO_JOIN(a, b) ZO_JOIN_OF(a, b)
extern const Kernels ZO_JOIN(kernels_, ZO_ISA){ZO_STRING(ZO_ISA), words, noise, axpy, moments};

}  // namespace zo

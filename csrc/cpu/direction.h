// Noise and rounding bits of consecutive elements, as arrays that stay in L1.  Each stage is one simple loop, which the
// compiler vectorises (-fopt-info-vec); Philox alone has its vectors written out, in lanes.h.
#pragma once
#include "lanes.h"
#include "normal.h"
#include "zo.h"

namespace zo {
namespace {

// A run is 128 elements at a multiple of 128: 16 Philox groups of 8 normals, or one of 128 signs.  Noise is made by
// whole runs: a loop over `runs * RUN` elements needs no remainder.  A tile is what the stages hand on: with 512
// elements all arrays stay in L1; with 128 a pass is 1.2x slower, as the processor drains between the stages.
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

void make_signs(uint64_t first_group, uint64_t seed, uint32_t tensor_id, uint32_t stream, int runs,
                float* __restrict z) {
  for (int run = 0; run < runs; ++run, z += RUN) {
    const Words words = philox(seed, first_group + uint64_t(run), tensor_id, stream);
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
    for (int j = 0; j < 4; ++j)
      for (uint32_t i = 0; i < 32; ++i) z[32 * j + i] = float_of(0xBF800000u ^ ((w[j] >> i) << 31));  // bit 1: +1
  }
}

// z of `runs` runs, the first at element `first`, a multiple of 128.
ZO_INLINE void make_direction(uint64_t first, uint64_t seed, uint32_t tensor_id, uint32_t stream, Dist dist, int runs,
                              float* z) {
  if (dist == Dist::NORMAL) {
    alignas(64) uint32_t w[TILE / 2];
    make_words(first >> 3, seed, tensor_id, stream, runs, w);
    make_normals(w, runs, z);
  } else {
    make_signs(first >> 7, seed, tensor_id, stream, runs, z);
  }
}

// 16 random bits for every element of those runs.
ZO_INLINE void make_bits(uint64_t first, uint64_t seed, uint32_t tensor_id, int runs, uint32_t* __restrict bits) {
  alignas(64) uint32_t w[TILE / 2];
  make_words(first >> 3, seed, tensor_id, ROUNDING, runs, w);
  for (int i = 0; i < runs * (RUN / 2); ++i) {
    bits[2 * i] = w[i] & 0xFFFFu;
    bits[2 * i + 1] = w[i] >> 16;
  }
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

}  // namespace
}  // namespace zo

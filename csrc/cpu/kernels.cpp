// The inner loops of the CPU backend: a pass over weights, any part of which may be left out,
//   theta = round(decay * theta + sum_k step_k * z_k)      for any number of directions
//   mean, variance, non-finite count of theta;  <theta, z_k>
//   out = round(theta + sum_k step_k * z_k),  mirror = round(theta - sum_k step_k * z_k)
// reads 2 or 4 bytes per element once, and writes as many for each of theta, out and mirror.
//
// CMake compiles this file once per instruction set, with ZO_ISA naming the result; ops.cpp chooses at run time.  Only
// exactly rounded operations (+, -, *, /, sqrt, explicit fma), no contraction and no reassociation, so all copies give
// the same bits (tests/test_cpu_kernels.py compares them).  A tensor is walked in pieces (moments.h) of tiles
// (direction.h), whose arrays stay in L1 (22 KB).
//
// Everything but the table at the end has internal linkage, and nothing of the C++ library is called: see ZO_INLINE.
#include "stages.h"

namespace zo {
namespace {

// Sum of products, which are exact in fp64.
ZO_INLINE double dot(const float* __restrict x, const float* __restrict z, int runs) {
  double sums[SUMS] = {};
  for (int i = 0; i < runs * RUN; i += SUMS)
    for (int lane = 0; lane < SUMS; ++lane)
      sums[lane] += double(x[i + lane]) * double(z[i + lane]);
  return folded(sums);
}

template <class T>
void pass_as(const Pass& pass) {
  using Storage = typename T::Storage;
  auto* const theta = static_cast<Storage*>(pass.theta);
  alignas(64) float acc[TILE], other[TILE], aside[TILE], z[TILE], values[PIECE];
  alignas(64) uint32_t bits[TILE];

  // Theta in acc, and zeros around it up to whole runs.
  const auto read = [&](const Tile& tile, const Storage* in) { load_runs<T>(in, tile, 0, acc); };
  const auto draw = [&](const Tile& tile, uint64_t seed, const Form& form) {
    make_direction(tile.first, seed, pass.tensor_id, DIRECTION, pass.dist, tile.runs, z);
    shape(form, aside, tile.runs, z);
  };
  // The random bits of a rounding, null for one to nearest.
  const auto draw_bits = [&](const Tile& tile, const uint64_t* seed) -> const uint32_t* {
    if (!seed || pass.dtype == DType::FLOAT32) return nullptr;
    make_bits(tile.first, *seed, pass.tensor_id, tile.runs, bits);
    return bits;
  };

  const auto advance = [&](const Tile& tile, int64_t at) {
    const Advance& update = pass.advance;
    const int64_t last = update.count - 1;
    open_form(update.form, tile, at, acc, aside);
    if (update.decay) multiply(*update.decay, tile.runs, acc);
    if (load_mean(update.form, tile, at, z)) multiply_add(update.form.value, z, tile.runs, acc);
    // Weights probed in place come back and are updated along one z: it is drawn once.
    const auto next = [&](int64_t k) {
      if (k == 0 || update.seeds[k] != update.seeds[k - 1]) draw(tile, update.seeds[k], update.form);
    };
    for (int64_t k = 0; k < last; ++k) {
      next(k);
      multiply_add(update.steps[k], z, tile.runs, acc);
    }
    next(last);
    store<T>(tile, update.steps[last], z, acc, draw_bits(tile, update.rounding_seed), theta + at);
    if (pass.moments || pass.displace.out) read(tile, theta + at);
  };
  const auto project = [&](const Tile& tile) {
    const Project& onto = pass.project;
    for (int64_t k = 0; k < onto.count; ++k) {
      draw(tile, onto.seeds[k], Form{});
      onto.sums[k] += dot(acc, z, tile.runs);
    }
  };
  const auto displace = [&](const Tile& tile, int64_t at) {
    const Displace& probe = pass.displace;
    const int64_t last = probe.count - 1;
    float* const minus = probe.mirror && (last > 0 || probe.form.kind == FormKind::SHIFTED) ? other : acc;
    open_form(probe.form, tile, at, acc, aside);
    if (minus != acc) memcpy(minus, acc, sizeof(float) * size_t(tile.runs * RUN));
    const auto add = [&](float step) {
      multiply_add(step, z, tile.runs, acc);
      if (minus != acc) multiply_add(-step, z, tile.runs, minus);
    };
    if (load_mean(probe.form, tile, at, z)) add(probe.form.value);
    for (int64_t k = 0; k < last; ++k) {
      draw(tile, probe.seeds[k], probe.form);
      add(probe.steps[k]);
    }
    draw(tile, probe.seeds[last], probe.form);
    const uint32_t* const random = draw_bits(tile, probe.stochastic ? probe.seeds : nullptr);
    store<T>(tile, probe.steps[last], z, acc, random, static_cast<Storage*>(probe.out) + at);
    if (probe.mirror) store<T>(tile, -probe.steps[last], z, minus, random, static_cast<Storage*>(probe.mirror) + at);
  };

  Moments moments{};
  for (int64_t piece = 0; piece < pass.count; piece += PIECE) {
    const int length = pass.count - piece < PIECE ? int(pass.count - piece) : PIECE;
    for_tiles(pass.first + uint64_t(piece), length, [&](const Tile& tile) {
      const int64_t at = piece + tile.done;
      read(tile, theta + at);
      if (pass.advance.count) advance(tile, at);
      if (pass.moments) memcpy(values + tile.done, acc + tile.from, sizeof(float) * size_t(tile.length));
      project(tile);
      if (pass.displace.out) displace(tile, at);
    });
    if (pass.moments) moments = combined(moments, moments_of(values, length));
  }
  if (pass.moments) *pass.moments = moments;
}

void pass(const Pass& pass) {
  if (pass.dtype == DType::FLOAT32)
    pass_as<Float32>(pass);
  else if (pass.dtype == DType::BFLOAT16)
    pass_as<BFloat16>(pass);
  else
    pass_as<Float16>(pass);
}

void noise(float* out, uint64_t first, int64_t count, uint64_t seed, uint32_t tensor_id, Dist dist,
           uint32_t stream) {
  alignas(64) float z[TILE];
  for_tiles(first, count, [&](const Tile& tile) {
    make_direction(tile.first, seed, tensor_id, stream, dist, tile.runs, z);
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

}  // namespace

void ZO_JOIN(rule_pass_, ZO_ISA)(const RulePass& pass);  // rules.cpp
extern const Kernels ZO_JOIN(kernels_, ZO_ISA){ZO_STRING(ZO_ISA), words, noise, pass, ZO_JOIN(rule_pass_, ZO_ISA)};

}  // namespace zo

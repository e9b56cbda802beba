// The stages of a tile of weights, shared by the passes (kernels.cpp) and the rules that keep state (rules.cpp):
// reading and writing a dtype, sums of directions, forms of a direction.  Simple loops over arrays that stay in L1.
#pragma once
#include "direction.h"
#include "dtype.h"
#include "kernels.h"

namespace zo {
namespace {

void multiply(float factor, int runs, float* __restrict acc) {
  for (int i = 0; i < runs * RUN; ++i) acc[i] *= factor;
}

void multiply_add(float step, const float* __restrict z, int runs, float* __restrict acc) {
  for (int i = 0; i < runs * RUN; ++i) acc[i] = fma(step, z[i], acc[i]);
}

void divide_by_root(const float* __restrict h, int runs, float* __restrict z) {
  for (int i = 0; i < runs * RUN; ++i) z[i] /= __builtin_sqrtf(h[i]);
}

void select_below(const float* __restrict theta, float limit, int runs, float* __restrict z) {
  for (int i = 0; i < runs * RUN; ++i) z[i] = __builtin_fabsf(theta[i]) <= limit ? z[i] : 0.0f;
}

template <class T>
void load(const typename T::Storage* __restrict in, int length, float* __restrict x) {
  for (int i = 0; i < length; ++i) x[i] = T::load(in[i]);
}

// A tile of storage in x, and `around` on both sides of it up to whole runs.
template <class T>
ZO_INLINE void load_runs(const typename T::Storage* in, const Tile& tile, float around, float* x) {
  const int end = tile.from + tile.length;
  for (int i = 0; i < tile.from; ++i) x[i] = around;
  load<T>(in, tile.length, x + tile.from);
  for (int i = end; i < tile.runs * RUN; ++i) x[i] = around;
}

// out = round(acc + step * z).
template <class T>
void store_nearest(float step, const float* __restrict z, const float* __restrict acc, int length,
                   typename T::Storage* __restrict out) {
  for (int i = 0; i < length; ++i) out[i] = T::nearest(fma(step, z[i], acc[i]));
}

template <class T>
void store_stochastic(float step, const float* __restrict z, const float* __restrict acc,
                      const uint32_t* __restrict bits, int length, typename T::Storage* __restrict out) {
  for (int i = 0; i < length; ++i) out[i] = T::stochastic(fma(step, z[i], acc[i]), bits[i]);
}

// bits: null rounds to nearest.
template <class T>
ZO_INLINE void store(const Tile& tile, float step, const float* z, const float* acc, const uint32_t* bits,
                     typename T::Storage* out) {
  if (bits)
    store_stochastic<T>(step, z + tile.from, acc + tile.from, bits + tile.from, tile.length, out);
  else
    store_nearest<T>(step, z + tile.from, acc + tile.from, tile.length, out);
}

// What all directions of a tile need of their form, in `aside`: h, or theta as it was read.  The tile begins at element
// `at` of the pass, theta lies in runs.
ZO_INLINE void open_form(const Form& form, const Tile& tile, int64_t at, const float* theta, float* aside) {
  if (form.kind == FormKind::WEIGHTED) load_runs<Float32>(static_cast<const float*>(form.state) + at, tile, 1, aside);
  if (form.kind == FormKind::BELOW) memcpy(aside, theta, sizeof(float) * size_t(tile.runs * RUN));
}

// The mean of the directions in x; false where they have none.
ZO_INLINE bool load_mean(const Form& form, const Tile& tile, int64_t at, float* x) {
  if (form.kind != FormKind::SHIFTED) return false;
  if (form.dtype == DType::FLOAT32)
    load_runs<Float32>(static_cast<const float*>(form.state) + at, tile, 0, x);
  else
    load_runs<BFloat16>(static_cast<const uint16_t*>(form.state) + at, tile, 0, x);
  return true;
}

ZO_INLINE void shape(const Form& form, const float* aside, int runs, float* z) {
  if (form.kind == FormKind::WEIGHTED) divide_by_root(aside, runs, z);
  if (form.kind == FormKind::BELOW) select_below(aside, form.value, runs, z);
}

}  // namespace
}  // namespace zo

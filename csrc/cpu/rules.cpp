// Updates by a rule that keeps state: theta and up to three fp32 states per weight, read once and written once.  The
// equations are in zo_kernels/rules.py; every operation is rounded by itself, and fused only where fma is written.
//
// Compiled once per instruction set, like kernels.cpp and under its conditions.
#include "stages.h"

namespace zo {
namespace {

void momentum(float beta, const float* __restrict e, int runs, float* __restrict m) {
  for (int i = 0; i < runs * RUN; ++i) m[i] = fma(beta, m[i], e[i]);
}

void average(float beta, const float* __restrict e, int runs, float* __restrict m) {
  const float rest = 1.0f - beta;
  for (int i = 0; i < runs * RUN; ++i) m[i] = fma(beta, m[i], rest * e[i]);
}

void average_square(float beta, const float* __restrict e, int runs, float* __restrict v) {
  const float rest = 1.0f - beta;
  for (int i = 0; i < runs * RUN; ++i) v[i] = fma(beta, v[i], rest * (e[i] * e[i]));
}

void larger(const float* __restrict v, int runs, float* __restrict vmax) {
  for (int i = 0; i < runs * RUN; ++i) vmax[i] = v[i] > vmax[i] ? v[i] : vmax[i];
}

// ratio = rate * m / (sqrt(v / correction) + eps).
void ratios(float rate, float correction, float eps, const float* __restrict m, const float* __restrict v, int runs,
            float* __restrict ratio) {
  for (int i = 0; i < runs * RUN; ++i) ratio[i] = rate * m[i] / (__builtin_sqrtf(v[i] / correction) + eps);
}

void signs(const float* __restrict x, int runs, float* __restrict sign) {
  for (int i = 0; i < runs * RUN; ++i) sign[i] = (x[i] > 0.0f ? 1.0f : 0.0f) - (x[i] < 0.0f ? 1.0f : 0.0f);
}

void curve(float a, float c, const float* __restrict z, int runs, float* __restrict h) {
  const float rest = 1.0f - a, gain = a * c;
  for (int i = 0; i < runs * RUN; ++i) h[i] = fma(rest, h[i], gain * (z[i] * z[i] * h[i]));
}

int states_of(Rule rule) {
  return rule == Rule::SIGN ? 0 : rule == Rule::ADAM ? 2 : rule == Rule::ADAMM ? 3 : 1;
}

template <class T>
void rule_pass_as(const RulePass& pass) {
  using Storage = typename T::Storage;
  const Advance& update = pass.advance;
  const int states = states_of(pass.rule);
  const int64_t last = update.count - 1;
  const float* const n = pass.numbers;
  alignas(64) float acc[TILE], aside[TILE], z[TILE], e[TILE], s[MOST_STATES][TILE];
  alignas(64) uint32_t bits[TILE];

  // What is left to do is theta = round(acc + step * along).
  struct Left {
    float step;
    const float* along;
  };

  const auto draw = [&](const Tile& tile, int64_t k) {
    make_direction(tile.first, update.seeds[k], pass.tensor_id, DIRECTION, pass.dist, tile.runs, z);
  };
  const auto gradient = [&](const Tile& tile, int64_t at) {
    memset(e, 0, sizeof(float) * size_t(tile.runs * RUN));
    if (load_mean(update.form, tile, at, z)) multiply_add(update.form.value, z, tile.runs, e);
    for (int64_t k = 0; k <= last; ++k) {
      draw(tile, k);
      shape(update.form, aside, tile.runs, z);
      multiply_add(update.steps[k], z, tile.runs, e);
    }
  };
  const auto against = [&](const Tile& tile) -> Left {
    const int runs = tile.runs;
    switch (pass.rule) {
      case Rule::MOMENTUM:
        momentum(n[1], e, runs, s[0]);
        return {-n[0], s[0]};
      case Rule::SIGN:
        signs(e, runs, z);
        return {-n[0], z};
      case Rule::SIGN_EMA:
        average(n[1], e, runs, s[0]);
        signs(s[0], runs, z);
        return {-n[0], z};
      default:
        average(n[1], e, runs, s[0]);
        average_square(n[2], e, runs, s[1]);
        if (pass.rule == Rule::ADAM) {
          ratios(n[0] / n[4], n[5], n[3], s[0], s[1], runs, z);
        } else {
          larger(s[1], runs, s[2]);
          ratios(n[0], 1.0f, n[3], s[0], s[2], runs, z);
        }
        return {-1.0f, z};
    }
  };
  const auto along_curvature = [&](const Tile& tile) -> Left {
    draw(tile, 0);
    curve(n[0], n[1], z, tile.runs, s[0]);
    for (int64_t k = 0; k <= last; ++k) {
      if (k > 0) draw(tile, k);
      divide_by_root(s[0], tile.runs, z);
      if (k < last) multiply_add(update.steps[k], z, tile.runs, acc);
    }
    return {update.steps[last], z};
  };
  const auto along_mean = [&](const Tile& tile) -> Left {
    multiply_add(n[0], s[0], tile.runs, acc);
    for (int64_t k = 0; k <= last; ++k) {
      draw(tile, k);
      if (k < last) multiply_add(pass.weights[k], z, tile.runs, acc);
      multiply_add(update.steps[k], z, tile.runs, s[0]);
    }
    return {pass.weights[last], z};
  };

  auto* const theta = static_cast<Storage*>(pass.theta);
  for_tiles(pass.first, pass.count, [&](const Tile& tile) {
    const int64_t at = tile.done;
    load_runs<T>(theta + at, tile, 0, acc);
    for (int i = 0; i < states; ++i) load_runs<Float32>(pass.states[i] + at, tile, 0, s[i]);
    open_form(update.form, tile, at, acc, aside);
    if (update.decay) multiply(*update.decay, tile.runs, acc);
    Left left;
    if (pass.rule == Rule::CURVATURE) {
      left = along_curvature(tile);
    } else if (pass.rule == Rule::SHIFTED_MEAN) {
      left = along_mean(tile);
    } else {
      gradient(tile, at);
      left = against(tile);
    }
    const bool stochastic = update.rounding_seed && pass.dtype != DType::FLOAT32;
    if (stochastic) make_bits(tile.first, *update.rounding_seed, pass.tensor_id, tile.runs, bits);
    store<T>(tile, left.step, left.along, acc, stochastic ? bits : nullptr, theta + at);
    for (int i = 0; i < states; ++i)
      memcpy(pass.states[i] + at, s[i] + tile.from, sizeof(float) * size_t(tile.length));
  });
}

}  // namespace

void ZO_JOIN(rule_pass_, ZO_ISA)(const RulePass& pass) {
  if (pass.dtype == DType::FLOAT32)
    rule_pass_as<Float32>(pass);
  else if (pass.dtype == DType::BFLOAT16)
    rule_pass_as<BFloat16>(pass);
  else
    rule_pass_as<Float16>(pass);
}

}  // namespace zo

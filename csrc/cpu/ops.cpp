// The CPU ops: cut the work into chunks, share them among threads, call the kernels of the best instruction set.
// An element's result depends on its global index alone, and sums of chunks are combined in order, so threads never
// change a bit.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "kernels.h"
#include "parallel.h"

namespace zo {
namespace {

constexpr int64_t CHUNK = 1 << 16;  // elements: 128 KB or more, tens of microseconds

int64_t chunks_of(int64_t numel) { return (numel + CHUNK - 1) / CHUNK; }

int64_t bytes_of(DType dtype) { return dtype == DType::FLOAT32 ? 4 : 2; }

char* at(void* data, int64_t element, DType dtype) {
  return data ? static_cast<char*>(data) + element * bytes_of(dtype) : nullptr;
}

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found{&kernels_generic};
#if defined(ZO_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&kernels_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      found.push_back(&kernels_avx512);
  }
#endif
  return found;
}

std::atomic<const Kernels*> chosen{available().back()};

// fl32(coefs[k] * scale_kb), those of a block together.
std::vector<float> steps_of(const Update& update, size_t blocks) {
  std::vector<float> steps;
  steps.reserve(blocks * size_t(update.count));
  for (size_t b = 0; b < blocks; ++b)
    for (size_t k = 0; k < size_t(update.count); ++k)
      steps.push_back(update.scale ? update.coefs[k] * update.scale[update.per_direction ? k * blocks + b : b]
                                   : update.coefs[k]);
  return steps;
}

// The form of a block's directions, from its element `first` on.
Form form_of(const Forms& forms, size_t block, int64_t first) {
  if (forms.kind == FormKind::PLAIN) return {};
  const char* const state =
      forms.states.empty() ? nullptr : static_cast<const char*>(forms.states[block]) + first * bytes_of(forms.dtype);
  const float* const value = forms.kind == FormKind::BELOW ? forms.value + block : forms.value;
  return {forms.kind, forms.dtype, state, value ? *value : 0.0f};
}

Advance advance_of(const Update& update, const std::vector<float>& steps, const Table::Chunk& chunk) {
  const float* const own = &steps[chunk.block * size_t(update.count)];
  const Form form = form_of(update.forms, chunk.block, chunk.first);
  return {update.seeds, own, update.count, update.decay, update.rounding_seed, form};
}

// fl32(coefs[k] * scale_k).
std::vector<float> steps_of(const Probe& probe) {
  std::vector<float> steps(probe.coefs, probe.coefs + probe.count);
  for (size_t k = 0; probe.scale && k < steps.size(); ++k) steps[k] *= probe.scale[probe.per_direction ? k : 0];
  return steps;
}

// From element `first` of theta to element `to` of the outputs.
Displace displace_of(const Probe& probe, const std::vector<float>& steps, int64_t first, int64_t to, DType dtype) {
  const bool nearest = !probe.nearest_above || std::fabs(steps[0]) >= *probe.nearest_above;
  return {at(probe.out, to, dtype), at(probe.mirror, to, dtype), probe.seeds, steps.data(), probe.count, !nearest,
          form_of(probe.forms, 0, first)};
}

// The statistics of every block from the moments of the chunks, combined in order.
void fill(const Stats& stats, const Table& table, const std::vector<Moments>& parts) {
  std::vector<Moments> whole(table.blocks.size());
  for (size_t chunk = 0; chunk < parts.size(); ++chunk) {
    Moments& block = whole[table.chunks[chunk].block];
    block = combined(block, parts[chunk]);
  }
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  for (size_t b = 0; b < whole.size(); ++b) {
    const auto [count, mean, m2, nonfinite] = whole[b];
    stats.mean[b] = count > 0 && !nonfinite ? float(mean) : nan;
    stats.var[b] = nonfinite ? nan : float(m2 / std::max(count - 1, 1.0));
    stats.norm[b] = nonfinite ? nan : float(std::sqrt(m2 + count * mean * mean));
    stats.nonfinite[b] = nonfinite;
  }
}

// All of a pass but its parts.
Pass pass_over(const Block& block, int64_t first, int64_t count, Dist dist) {
  Pass pass{};
  pass.theta = at(block.data, first, block.dtype);
  pass.first = block.offset + uint64_t(first);
  pass.count = count;
  pass.tensor_id = block.tensor_id;
  pass.dtype = block.dtype;
  pass.dist = dist;
  return pass;
}

// One read of every block; add_parts(pass, chunk) says what is done with a chunk.
template <class AddParts>
void for_chunks(const Table& table, Dist dist, const Stats* stats, int threads, AddParts add_parts) {
  const Kernels& kernels = *chosen.load();
  std::vector<Moments> moments(stats ? table.chunks.size() : 0);
  parallel_for(int64_t(table.chunks.size()), threads, [&](int64_t chunk) {
    const auto [block, first, count] = table.chunks[size_t(chunk)];
    Pass pass = pass_over(table.blocks[block], first, count, dist);
    if (stats) pass.moments = &moments[size_t(chunk)];
    add_parts(pass, size_t(chunk));
    kernels.pass(pass);
  });
  if (stats) fill(*stats, table, moments);
}

}  // namespace

Table::Table(std::vector<Block> list) : blocks(std::move(list)) {
  for (size_t b = 0; b < blocks.size(); ++b)
    for (int64_t first = 0; first < blocks[b].numel; first += CHUNK)
      chunks.push_back({b, first, std::min(CHUNK, blocks[b].numel - first)});
}

void words(uint32_t* out, int64_t groups, uint64_t seed, uint32_t tensor_id, uint32_t stream, uint64_t first_group,
           int threads) {
  const Kernels& kernels = *chosen.load();
  parallel_for(chunks_of(groups), threads, [&](int64_t chunk) {
    const int64_t first = chunk * CHUNK;
    kernels.words(out + 4 * first, first_group + uint64_t(first), std::min(CHUNK, groups - first), seed, tensor_id,
                  stream);
  });
}

void noise(float* out, int64_t numel, uint64_t seed, uint32_t tensor_id, uint64_t start, Dist dist, uint32_t stream,
           int threads) {
  const Kernels& kernels = *chosen.load();
  parallel_for(chunks_of(numel), threads, [&](int64_t chunk) {
    const int64_t first = chunk * CHUNK;
    kernels.noise(out + first, start + uint64_t(first), std::min(CHUNK, numel - first), seed, tensor_id, dist,
                  stream);
  });
}

void axpy(const Table& table, const Update& update, Dist dist, const Stats* stats, int threads) {
  const DefaultFloatingPoint ieee;
  const std::vector<float> steps = steps_of(update, table.blocks.size());
  for_chunks(table, dist, stats, threads,
             [&](Pass& pass, size_t chunk) { pass.advance = advance_of(update, steps, table.chunks[chunk]); });
}

void replay(const Table& table, const Update& update, const Sequence& sequence, Dist dist, int threads) {
  constexpr int64_t SPAN = 1 << 12;  // elements: 16 KB of fp32, which stay in L1 from pass to pass
  const Kernels& kernels = *chosen.load();
  const DefaultFloatingPoint ieee;
  const std::vector<float> steps = steps_of(update, table.blocks.size());
  parallel_for(int64_t(table.chunks.size()), threads, [&](int64_t i) {
    const Table::Chunk& chunk = table.chunks[size_t(i)];
    const float* const own = &steps[chunk.block * size_t(update.count)];
    for (int64_t done = 0; done < chunk.count; done += SPAN) {
      const int64_t count = std::min(SPAN, chunk.count - done);
      Pass pass = pass_over(table.blocks[chunk.block], chunk.first + done, count, dist);
      int64_t first = 0;
      for (size_t p = 0; p < sequence.ends.size(); ++p) {
        const float* const decay = sequence.decays ? sequence.decays + p : nullptr;
        const uint64_t* const rounding = sequence.stochastic[p] ? sequence.rounding_seeds + p : nullptr;
        pass.advance = {update.seeds + first, own + first, sequence.ends[p] - first, decay, rounding, Form{}};
        kernels.pass(pass);
        first = sequence.ends[p];
      }
    }
  });
}

void update_state(const Table& table, const Ruled& ruled, const Update& update, Dist dist, int threads) {
  if (ruled.keep && !*ruled.keep) return;
  const Kernels& kernels = *chosen.load();
  const DefaultFloatingPoint ieee;
  const size_t blocks = table.blocks.size();
  const std::vector<float> steps = steps_of(update, blocks);
  std::vector<float> weights;
  if (ruled.rule == Rule::SHIFTED_MEAN) {
    Update along = update;
    along.coefs = ruled.numbers + 1;
    weights = steps_of(along, blocks);
  }
  parallel_for(int64_t(table.chunks.size()), threads, [&](int64_t i) {
    const Table::Chunk& chunk = table.chunks[size_t(i)];
    const Block& block = table.blocks[chunk.block];
    RulePass pass{};
    pass.theta = at(block.data, chunk.first, block.dtype);
    for (size_t s = 0; s < ruled.states.size(); ++s) pass.states[s] = ruled.states[s][chunk.block] + chunk.first;
    pass.first = block.offset + uint64_t(chunk.first);
    pass.count = chunk.count;
    pass.tensor_id = block.tensor_id;
    pass.dtype = block.dtype;
    pass.dist = dist;
    pass.rule = ruled.rule;
    pass.numbers = ruled.numbers;
    if (!weights.empty()) pass.weights = &weights[chunk.block * size_t(update.count)];
    pass.advance = advance_of(update, steps, chunk);
    kernels.rule_pass(pass);
  });
}

void scratch(const Block& theta, const Probe& probe, Dist dist, const Stats* stats, int threads) {
  const DefaultFloatingPoint ieee;
  const std::vector<float> steps = steps_of(probe);
  const Table table({theta});
  for_chunks(table, dist, stats, threads, [&](Pass& pass, size_t chunk) {
    const int64_t first = table.chunks[chunk].first;
    pass.displace = displace_of(probe, steps, first, first, theta.dtype);
  });
}

void scratch_rows(const Block& theta, const Rows& rows, const Probe& probe, Dist dist, int threads) {
  for (int64_t i = 0; i < rows.count; ++i)
    if (rows.index[i] < 0 || rows.index[i] >= rows.of)
      throw std::out_of_range("rows[" + std::to_string(i) + "] is " + std::to_string(rows.index[i]) +
                              ", outside theta's " + std::to_string(rows.of) + " rows");
  const Kernels& kernels = *chosen.load();
  const DefaultFloatingPoint ieee;
  const std::vector<float> steps = steps_of(probe);
  const int64_t together = std::max<int64_t>(1, CHUNK / std::max<int64_t>(1, rows.width));
  parallel_for((rows.count + together - 1) / together, threads, [&](int64_t task) {
    const int64_t end = std::min(rows.count, (task + 1) * together);
    for (int64_t i = task * together; i < end; ++i) {
      const int64_t first = rows.index[i] * rows.width;
      Pass pass = pass_over(theta, first, rows.width, dist);
      pass.displace = displace_of(probe, steps, first, i * rows.width, theta.dtype);
      kernels.pass(pass);
    }
  });
}

void update_scratch(const Block& theta, const Update& update, const Probe& probe, Dist dist, const Stats* stats,
                    int threads) {
  const DefaultFloatingPoint ieee;
  const std::vector<float> steps = steps_of(update, 1), next_steps = steps_of(probe);
  const Table table({theta});
  for_chunks(table, dist, stats, threads, [&](Pass& pass, size_t chunk) {
    const int64_t first = table.chunks[chunk].first;
    pass.advance = advance_of(update, steps, table.chunks[chunk]);
    pass.displace = displace_of(probe, next_steps, first, first, theta.dtype);
  });
}

void dot_noise(const Table& table, const uint64_t* seeds, int64_t count, float* out, Dist dist, const Stats* stats,
               int threads) {
  const DefaultFloatingPoint ieee;
  const size_t blocks = table.blocks.size(), directions = size_t(count);
  const size_t stride = directions + 8;  // so that no two threads write to one cache line
  std::vector<double> parts(table.chunks.size() * stride);
  for_chunks(table, dist, stats, threads,
             [&](Pass& pass, size_t chunk) { pass.project = {seeds, count, &parts[chunk * stride]}; });
  std::vector<double> sums(directions * blocks);
  for (size_t chunk = 0; chunk < table.chunks.size(); ++chunk)
    for (size_t k = 0; k < directions; ++k)
      sums[k * blocks + table.chunks[chunk].block] += parts[chunk * stride + k];
  for (size_t i = 0; i < sums.size(); ++i) out[i] = float(sums[i]);
}

void block_stats(const Table& table, const Stats& stats, int threads) {
  const DefaultFloatingPoint ieee;
  for_chunks(table, Dist::NORMAL, &stats, threads, [](Pass&, size_t) {});
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) names.push_back(kernels->name);
  return names;
}

std::string isa() { return chosen.load()->name; }

void set_isa(const std::string& name) {
  for (const Kernels* kernels : available())
    if (name == kernels->name) {
      chosen = kernels;
      return;
    }
  std::string known;
  for (const std::string& other : isas()) known += (known.empty() ? "" : ", ") + other;
  throw std::invalid_argument("unknown instruction set '" + name + "'; this machine has: " + known);
}

}  // namespace zo

// The CPU ops: cut the work into chunks, share them among threads, call the kernels of the best instruction set.
// An element's result depends on its global index alone, so chunks and threads never change a bit; block_stats
// combines its chunks in order.
#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "kernels.h"

namespace zo {
namespace {

constexpr int64_t CHUNK = 1 << 16;  // elements: 128 KB or more, tens of microseconds

// torch.set_flush_denormal(True) would make subnormal weights vanish; the contract is plain IEEE 754.
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatingPoint() { std::fesetenv(&saved_); }
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;

 private:
  std::fenv_t saved_;
};

template <class Body>
void parallel_for(int64_t tasks, int threads, Body body) {
#pragma omp parallel num_threads(threads) if (tasks > 1 && threads > 1)
  {
    DefaultFloatingPoint ieee;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) body(task);
  }
}

int64_t chunks_of(int64_t numel) { return (numel + CHUNK - 1) / CHUNK; }

// The chunks of a list of blocks in order, so that one parallel loop covers a whole model.
struct Chunk {
  size_t block;
  int64_t first, count;
};

std::vector<Chunk> chunk_table(const std::vector<Block>& blocks) {
  std::vector<Chunk> table;
  for (size_t b = 0; b < blocks.size(); ++b)
    for (int64_t first = 0; first < blocks[b].numel; first += CHUNK)
      table.push_back({b, first, std::min(CHUNK, blocks[b].numel - first)});
  return table;
}

int64_t bytes_of(DType dtype) { return dtype == DType::FLOAT32 ? 4 : 2; }

const char* at(const void* data, int64_t element, DType dtype) {
  return static_cast<const char*>(data) + element * bytes_of(dtype);
}

char* at(void* data, int64_t element, DType dtype) { return static_cast<char*>(data) + element * bytes_of(dtype); }

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

}  // namespace

void words(uint32_t* out, int64_t groups, uint64_t seed, uint32_t tensor_id, uint32_t stream, uint64_t first_group,
           int threads) {
  const Kernels& kernels = *chosen.load();
  parallel_for(chunks_of(groups), threads, [&](int64_t chunk) {
    const int64_t first = chunk * CHUNK;
    kernels.words(out + 4 * first, first_group + uint64_t(first), std::min(CHUNK, groups - first), seed, tensor_id,
                  stream);
  });
}

void noise(float* out, int64_t numel, uint64_t seed, uint32_t tensor_id, uint64_t start, Dist dist, int threads) {
  const Kernels& kernels = *chosen.load();
  parallel_for(chunks_of(numel), threads, [&](int64_t chunk) {
    const int64_t first = chunk * CHUNK;
    kernels.noise(out + first, start + uint64_t(first), std::min(CHUNK, numel - first), seed, tensor_id, dist);
  });
}

void axpy(const std::vector<Block>& blocks, const uint64_t* seeds, const float* coefs, int64_t count,
          const float* scale, const float* decay, const uint64_t* rounding_seed, Dist dist, int threads) {
  const Kernels& kernels = *chosen.load();
  const DefaultFloatingPoint ieee;
  std::vector<float> steps;
  steps.reserve(blocks.size() * size_t(count));
  for (size_t b = 0; b < blocks.size(); ++b)
    for (int64_t k = 0; k < count; ++k) steps.push_back(scale ? coefs[k] * scale[b] : coefs[k]);
  const std::vector<Chunk> table = chunk_table(blocks);
  parallel_for(int64_t(table.size()), threads, [&](int64_t task) {
    const Chunk& chunk = table[size_t(task)];
    const Block& block = blocks[chunk.block];
    char* theta = at(block.data, chunk.first, block.dtype);
    kernels.axpy(theta, theta, block.offset + uint64_t(chunk.first), chunk.count,
                 {seeds, &steps[chunk.block * size_t(count)], count, decay, rounding_seed, block.tensor_id, block.dtype,
                  dist});
  });
}

void scratch(const Scratch& tensor, uint64_t seed, float coef, const float* scale, const float* nearest_above,
             Dist dist, int threads) {
  const Kernels& kernels = *chosen.load();
  const DefaultFloatingPoint ieee;
  const float step = scale ? coef * *scale : coef;
  const bool nearest = !nearest_above || std::fabs(step) >= *nearest_above;
  const Update update{&seed, &step, 1, nullptr, nearest ? nullptr : &seed, tensor.tensor_id, tensor.dtype, dist};
  const auto perturb = [&](int64_t from, int64_t to, int64_t count) {
    kernels.axpy(at(tensor.theta, from, tensor.dtype), at(tensor.out, to, tensor.dtype), uint64_t(from), count, update);
  };
  if (!tensor.rows) {
    const int64_t numel = tensor.theta_rows * tensor.width;
    parallel_for(chunks_of(numel), threads, [&](int64_t chunk) {
      perturb(chunk * CHUNK, chunk * CHUNK, std::min(CHUNK, numel - chunk * CHUNK));
    });
    return;
  }
  for (int64_t i = 0; i < tensor.out_rows; ++i)
    if (tensor.rows[i] < 0 || tensor.rows[i] >= tensor.theta_rows)
      throw std::out_of_range("rows[" + std::to_string(i) + "] is " + std::to_string(tensor.rows[i]) +
                              ", outside theta's " + std::to_string(tensor.theta_rows) + " rows");
  const int64_t together = std::max<int64_t>(1, CHUNK / std::max<int64_t>(1, tensor.width));
  parallel_for((tensor.out_rows + together - 1) / together, threads, [&](int64_t task) {
    const int64_t end = std::min(tensor.out_rows, (task + 1) * together);
    for (int64_t i = task * together; i < end; ++i)
      perturb(tensor.rows[i] * tensor.width, i * tensor.width, tensor.width);
  });
}

void block_stats(const std::vector<Block>& blocks, float* mean, float* var, int threads) {
  const Kernels& kernels = *chosen.load();
  const std::vector<Chunk> table = chunk_table(blocks);
  std::vector<Moments> parts(table.size());
  parallel_for(int64_t(table.size()), threads, [&](int64_t task) {
    const Chunk& chunk = table[size_t(task)];
    const Block& block = blocks[chunk.block];
    parts[size_t(task)] = kernels.moments(at(block.data, chunk.first, block.dtype), chunk.count, block.dtype);
  });
  const DefaultFloatingPoint ieee;
  std::vector<Moments> all(blocks.size(), Moments{0, 0, 0});
  for (size_t task = 0; task < table.size(); ++task) {
    Moments& block = all[table[task].block];
    block = combined(block, parts[task]);
  }
  for (size_t b = 0; b < blocks.size(); ++b) {
    mean[b] = blocks[b].numel > 0 ? float(all[b].mean) : std::numeric_limits<float>::quiet_NaN();
    var[b] = blocks[b].numel > 1 ? float(all[b].m2 / (all[b].count - 1)) : 0.0f;
  }
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

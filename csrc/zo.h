// The native interface: raw pointers in, nothing out.  One function per op of zo_kernels/ops.py, the names of
// zo_kernels/backends/reference.py.  No torch header anywhere, so that one binary serves every torch version.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace zo {

enum class DType : int { FLOAT32, BFLOAT16, FLOAT16 };
enum class Dist : int { NORMAL, RADEMACHER };

// A contiguous tensor; `offset` is the global index of its first element (a shard of a larger tensor).
struct Block {
  void* data;
  int64_t numel;
  uint64_t offset;
  uint32_t tensor_id;
  DType dtype;
};

// A list of blocks and the chunks that they are cut into: one parallel loop over `chunks` covers a whole model.
struct Table {
  struct Chunk {
    size_t block;
    int64_t first, count;
  };

  explicit Table(std::vector<Block> list);

  std::vector<Block> blocks;
  std::vector<Chunk> chunks;  // in order
};

// theta_b = round(decay * theta_b + sum_k coefs[k] * scale_kb * z_kb)
struct Update {
  const uint64_t* seeds;
  const float* coefs;
  int64_t count;
  const float* scale;             // (blocks), with per_direction (count, blocks); null: 1
  bool per_direction;
  const float* decay;             // null: 1
  const uint64_t* rounding_seed;  // null: to nearest
};

// out = round(theta + coef * scale * z), mirror = round(theta - coef * scale * z).
struct Probe {
  void* out;
  void* mirror;  // null: none
  uint64_t seed;
  float coef;
  const float* scale;          // null: 1
  const float* nearest_above;  // null: always to nearest
};

// Row i of a probe's `out` is row index[i] of theta, which has `of` rows of `width` elements.
struct Rows {
  const int64_t* index;
  int64_t count, of, width;
};

// Where a pass leaves the statistics of every block; the same bits for every number of threads and instruction set.
struct Stats {
  float *mean, *var, *norm;
  int64_t* nonfinite;
};

void words(uint32_t* out, int64_t groups, uint64_t seed, uint32_t tensor_id, uint32_t stream, uint64_t first_group,
           int threads);

void noise(float* out, int64_t numel, uint64_t seed, uint32_t tensor_id, uint32_t stream, uint64_t start, Dist dist,
           int threads);

// stats, which may be null, here and below: of the stored result.
void axpy(const Table& table, const Update& update, Dist dist, const Stats* stats, int threads);

// stats: of theta.
void scratch(const Block& theta, const Probe& probe, Dist dist, const Stats* stats, int threads);

// Throws std::out_of_range for a bad row, before anything is written.
void scratch_rows(const Block& theta, const Rows& rows, const Probe& probe, Dist dist, int threads);

// axpy of one tensor and scratch of what it stored, from one read.
void update_scratch(const Block& theta, const Update& update, const Probe& probe, Dist dist, const Stats* stats,
                    int threads);

// out[k * blocks + b] = <x_b, z_kb>, summed in fp64; stats: of x.
void dot_noise(const Table& table, const uint64_t* seeds, int64_t count, float* out, Dist dist, const Stats* stats,
               int threads);

void block_stats(const Table& table, const Stats& stats, int threads);

// The instruction sets compiled in that this machine has, slowest first, the last the default; all give the same bits.
std::vector<std::string> isas();
std::string isa();
void set_isa(const std::string& name);

}  // namespace zo

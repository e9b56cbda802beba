// The native interface: raw pointers in, nothing out.  One function per op of zo_kernels/ops.py, the names of
// zo_kernels/backends/reference.py.  No torch header anywhere, so that one binary serves every torch version.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace zo {

enum class DType : int { FLOAT32, BFLOAT16, FLOAT16 };
enum class Dist : int { NORMAL, RADEMACHER };
enum class FormKind : int { PLAIN, WEIGHTED, BELOW, SHIFTED };  // zo_kernels/forms.py
enum class Rule : int { MOMENTUM, ADAM, ADAMM, SIGN, SIGN_EMA, CURVATURE, SHIFTED_MEAN };  // zo_kernels/rules.py

constexpr int MOST_STATES = 3;  // of a rule

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

// What stands in place of the noise (zo_kernels/forms.py).
struct Forms {
  FormKind kind = FormKind::PLAIN;
  DType dtype = DType::FLOAT32;       // of the states
  std::vector<const void*> states{};  // h or mu of every block, element 0 of the block
  const float* value = nullptr;       // the limit of every block, or c
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
  Forms forms;
};

// Updates of the same weights one after the other: pass p is of the directions ends[p - 1] (0) to ends[p].
struct Sequence {
  std::vector<int64_t> ends;
  const float* decays;             // one of every pass; null: 1
  const uint64_t* rounding_seeds;  // one of every pass
  std::vector<bool> stochastic;    // else the pass rounds to nearest
};

// A rule that keeps state (zo_kernels/rules.py): the sum of the directions of an update is its gradient.
struct Ruled {
  Rule rule;
  std::vector<std::vector<float*>> states;  // of every state, its tensor of every block
  const float* numbers;
  const bool* keep;  // null or true: do it
};

// out = round(theta + sum_k coefs[k] * scale_k * z_k), mirror = round(theta - sum_k ...).
struct Probe {
  void* out;
  void* mirror;           // null: none
  const uint64_t* seeds;  // the first one's bits round
  const float* coefs;
  int64_t count;
  const float* scale;          // (1), with per_direction (count); null: 1
  bool per_direction;
  const float* nearest_above;  // of the first direction's step; null: always to nearest
  Forms forms;
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

void noise(float* out, int64_t numel, uint64_t seed, uint32_t tensor_id, uint64_t start, Dist dist, uint32_t stream,
           int threads);

// stats, which may be null, here and below: of the stored result.
void axpy(const Table& table, const Update& update, Dist dist, const Stats* stats, int threads);

// The bits of an axpy for every pass, in one read and one write of the weights.  update: the directions of all passes,
// without decay, rounding seed and form.
void replay(const Table& table, const Update& update, const Sequence& sequence, Dist dist, int threads);

void update_state(const Table& table, const Ruled& ruled, const Update& update, Dist dist, int threads);

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

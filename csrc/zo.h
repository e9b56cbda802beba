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

// One tensor and the rows of it to perturb: `rows` null means all of it, else row i of `out` is row rows[i] of theta.
struct Scratch {
  const void* theta;
  void* out;
  int64_t theta_rows;
  int64_t out_rows;
  int64_t width;  // elements per row
  const int64_t* rows;
  uint32_t tensor_id;
  DType dtype;
};

void words(uint32_t* out, int64_t groups, uint64_t seed, uint32_t tensor_id, uint32_t stream, uint64_t first_group,
           int threads);

void noise(float* out, int64_t numel, uint64_t seed, uint32_t tensor_id, uint64_t start, Dist dist, int threads);

// theta_b = round(decay * theta_b + sum_k coefs[k] * scale[b] * z_kb); scale, decay and rounding_seed may be null.
void axpy(const std::vector<Block>& blocks, const uint64_t* seeds, const float* coefs, int64_t count,
          const float* scale, const float* decay, const uint64_t* rounding_seed, Dist dist, int threads);

// out = round(theta + coef * scale * z); scale and nearest_above may be null.  Throws std::out_of_range for a bad row.
void scratch(const Scratch& tensor, uint64_t seed, float coef, const float* scale, const float* nearest_above,
             Dist dist, int threads);

// Mean and unbiased variance of every block, in fp64, the same bits for every number of threads.
void block_stats(const std::vector<Block>& blocks, float* mean, float* var, int threads);

// The instruction sets compiled in that this machine has, slowest first, the last the default; all give the same bits.
std::vector<std::string> isas();
std::string isa();
void set_isa(const std::string& name);

}  // namespace zo

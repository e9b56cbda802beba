// zo_kernels._C: the functions of zo.h for Python.  Tensors come as data_ptr() integers, 0 for None; what they point to
// (sizes, dtypes, contiguity) has been checked in zo_kernels/ops.py.  The GIL is released during the work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "zo.h"

namespace py = pybind11;

namespace {

using Pointer = uintptr_t;
// (data, numel, offset, tensor id, dtype) of one block; dtype 0 float32, 1 bfloat16, 2 float16.
using BlockTuple = std::tuple<Pointer, int64_t, uint64_t, uint32_t, int>;

template <class T>
T* to(Pointer address) {
  return reinterpret_cast<T*>(address);
}

std::vector<zo::Block> to_blocks(const std::vector<BlockTuple>& tuples) {
  std::vector<zo::Block> blocks;
  for (const auto& [data, numel, offset, tensor_id, dtype] : tuples)
    blocks.push_back({to<void>(data), numel, offset, tensor_id, zo::DType(dtype)});
  return blocks;
}

void words(Pointer out, int64_t groups, Pointer seed, uint32_t tensor_id, uint32_t stream, uint64_t first_group,
           int threads) {
  zo::words(to<uint32_t>(out), groups, *to<uint64_t>(seed), tensor_id, stream, first_group, threads);
}

void noise(Pointer out, int64_t numel, Pointer seed, uint32_t tensor_id, uint64_t start, int dist, int threads) {
  zo::noise(to<float>(out), numel, *to<uint64_t>(seed), tensor_id, start, zo::Dist(dist), threads);
}

void axpy(const std::vector<BlockTuple>& blocks, Pointer seeds, Pointer coefs, int64_t count, Pointer scale,
          Pointer decay, Pointer rounding_seed, int dist, int threads) {
  zo::axpy(to_blocks(blocks), to<uint64_t>(seeds), to<float>(coefs), count, to<float>(scale), to<float>(decay),
           to<uint64_t>(rounding_seed), zo::Dist(dist), threads);
}

void scratch(Pointer theta, Pointer out, int64_t theta_rows, int64_t out_rows, int64_t width, Pointer rows,
             uint32_t tensor_id, int dtype, Pointer seed, Pointer coef, Pointer scale, Pointer nearest_above, int dist,
             int threads) {
  zo::scratch({to<void>(theta), to<void>(out), theta_rows, out_rows, width, to<int64_t>(rows), tensor_id,
               zo::DType(dtype)},
              *to<uint64_t>(seed), *to<float>(coef), to<float>(scale), to<float>(nearest_above), zo::Dist(dist),
              threads);
}

void block_stats(const std::vector<BlockTuple>& blocks, Pointer mean, Pointer var, int threads) {
  zo::block_stats(to_blocks(blocks), to<float>(mean), to<float>(var), threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native CPU kernels of zo_kernels; import torch first, so that both use one OpenMP runtime.";
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("words", &words, unlocked);
  m.def("noise", &noise, unlocked);
  m.def("axpy_", &axpy, unlocked);
  m.def("scratch", &scratch, unlocked);
  m.def("block_stats", &block_stats, unlocked);
  m.def("isas", &zo::isas, "Instruction sets that are compiled in and that this machine has, slowest first.");
  m.def("isa", &zo::isa, "The instruction set in use.");
  m.def("set_isa", &zo::set_isa, "Use another one of isas(), for every thread; the results are the same bits.");
}

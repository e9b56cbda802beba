// zo_kernels._C: the functions and structs of zo.h for Python.  Tensors come as data_ptr() integers, 0 for None; what
// they point to (sizes, dtypes, contiguity) has been checked in zo_kernels/ops.py.  A struct keeps nothing alive: it
// serves one call, and a Table as long as its tensors stay where they are.  The GIL is released during the work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "zo.h"

namespace py = pybind11;

namespace {

using Pointer = uintptr_t;

template <class T>
T* to(Pointer address) {
  return reinterpret_cast<T*>(address);
}

// dtype 0 float32, 1 bfloat16, 2 float16.
zo::Block block(Pointer data, int64_t numel, uint64_t offset, uint32_t tensor_id, int dtype) {
  return {to<void>(data), numel, offset, tensor_id, zo::DType(dtype)};
}

zo::Table table(const std::vector<zo::Block>& blocks) { return zo::Table(blocks); }

// kind 0 plain, 1 weighted, 2 below, 3 shifted; dtype and addresses of the states, none or one per block.
zo::Forms forms(int kind, int dtype, const std::vector<Pointer>& states, Pointer value) {
  zo::Forms made{zo::FormKind(kind), zo::DType(dtype), {}, to<float>(value)};
  for (Pointer state : states) made.states.push_back(to<void>(state));
  return made;
}

zo::Update update(Pointer seeds, Pointer coefs, int64_t count, Pointer scale, bool per_direction, Pointer decay,
                  Pointer rounding_seed, const zo::Forms* form) {
  return {to<uint64_t>(seeds), to<float>(coefs), count, to<float>(scale), per_direction, to<float>(decay),
          to<uint64_t>(rounding_seed), form ? *form : zo::Forms{}};
}

zo::Probe probe(Pointer out, Pointer mirror, Pointer seeds, Pointer coefs, int64_t count, Pointer scale,
                bool per_direction, Pointer nearest_above, const zo::Forms* form) {
  return {to<void>(out), to<void>(mirror), to<uint64_t>(seeds), to<float>(coefs), count, to<float>(scale),
          per_direction, to<float>(nearest_above), form ? *form : zo::Forms{}};
}

// rule: its place in zo_kernels/rules.py; states: for each one, its tensor of every block.
zo::Ruled ruled(int rule, const std::vector<std::vector<Pointer>>& states, Pointer numbers, Pointer keep) {
  zo::Ruled made{zo::Rule(rule), {}, to<float>(numbers), to<bool>(keep)};
  for (const std::vector<Pointer>& of_blocks : states) {
    made.states.emplace_back();
    for (Pointer state : of_blocks) made.states.back().push_back(to<float>(state));
  }
  return made;
}

zo::Sequence sequence(const std::vector<int64_t>& ends, Pointer decays, Pointer rounding_seeds,
                      const std::vector<bool>& stochastic) {
  return {ends, to<float>(decays), to<uint64_t>(rounding_seeds), stochastic};
}

zo::Rows rows(Pointer index, int64_t count, int64_t of, int64_t width) {
  return {to<int64_t>(index), count, of, width};
}

zo::Stats stats(Pointer mean, Pointer var, Pointer norm, Pointer nonfinite) {
  return {to<float>(mean), to<float>(var), to<float>(norm), to<int64_t>(nonfinite)};
}

void words(Pointer out, int64_t groups, Pointer seed, uint32_t tensor_id, uint32_t stream, uint64_t first_group,
           int threads) {
  zo::words(to<uint32_t>(out), groups, *to<uint64_t>(seed), tensor_id, stream, first_group, threads);
}

void noise(Pointer out, int64_t numel, Pointer seed, uint32_t tensor_id, uint64_t start, int dist, uint32_t stream,
           int threads) {
  zo::noise(to<float>(out), numel, *to<uint64_t>(seed), tensor_id, start, zo::Dist(dist), stream, threads);
}

void axpy(const zo::Table& table, const zo::Update& update, int dist, const zo::Stats* stats, int threads) {
  zo::axpy(table, update, zo::Dist(dist), stats, threads);
}

void replay(const zo::Table& table, const zo::Update& update, const zo::Sequence& sequence, int dist, int threads) {
  zo::replay(table, update, sequence, zo::Dist(dist), threads);
}

void update_state(const zo::Table& table, const zo::Ruled& ruled, const zo::Update& update, int dist, int threads) {
  zo::update_state(table, ruled, update, zo::Dist(dist), threads);
}

void scratch(const zo::Block& theta, const zo::Probe& probe, int dist, const zo::Stats* stats, int threads) {
  zo::scratch(theta, probe, zo::Dist(dist), stats, threads);
}

void scratch_rows(const zo::Block& theta, const zo::Rows& rows, const zo::Probe& probe, int dist, int threads) {
  zo::scratch_rows(theta, rows, probe, zo::Dist(dist), threads);
}

void update_scratch(const zo::Block& theta, const zo::Update& update, const zo::Probe& probe, int dist,
                    const zo::Stats* stats, int threads) {
  zo::update_scratch(theta, update, probe, zo::Dist(dist), stats, threads);
}

void dot_noise(const zo::Table& table, Pointer seeds, int64_t count, Pointer out, int dist, const zo::Stats* stats,
               int threads) {
  zo::dot_noise(table, to<uint64_t>(seeds), count, to<float>(out), zo::Dist(dist), stats, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native CPU kernels of zo_kernels; import torch first, so that both use one OpenMP runtime.";
  const auto local = py::module_local();  // another module of this package may bind structs of these names
  py::class_<zo::Block>(m, "Block", local).def(py::init(&block));
  py::class_<zo::Table>(m, "Table", local).def(py::init(&table));
  py::class_<zo::Forms>(m, "Forms", local).def(py::init(&forms));
  py::class_<zo::Ruled>(m, "Ruled", local).def(py::init(&ruled));
  py::class_<zo::Update>(m, "Update", local).def(py::init(&update));
  py::class_<zo::Probe>(m, "Probe", local).def(py::init(&probe));
  py::class_<zo::Sequence>(m, "Sequence", local).def(py::init(&sequence));
  py::class_<zo::Rows>(m, "Rows", local).def(py::init(&rows));
  py::class_<zo::Stats>(m, "Stats", local).def(py::init(&stats));

  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("words", &words, unlocked);
  m.def("noise", &noise, unlocked);
  m.def("axpy_", &axpy, unlocked);
  m.def("replay_", &replay, unlocked);
  m.def("update_state_", &update_state, unlocked);
  m.def("scratch", &scratch, unlocked);
  m.def("scratch_rows", &scratch_rows, unlocked);
  m.def("update_scratch_", &update_scratch, unlocked);
  m.def("dot_noise", &dot_noise, unlocked);
  m.def("block_stats", &zo::block_stats, unlocked);
  m.def("isas", &zo::isas, "Instruction sets that are compiled in and that this machine has, slowest first.");
  m.def("isa", &zo::isa, "The instruction set in use.");
  m.def("set_isa", &zo::set_isa, "Use another one of isas(), for every thread; the results are the same bits.");
}

// zo_kernels._cuda: block_stats.h for Python, with device pointers and the stream handle as integers.  A module of its
// own, with the CUDA runtime linked in, so that machines without CUDA never load it and any torch version can use it.
#include <pybind11/pybind11.h>

#include "block_stats.h"

namespace py = pybind11;

namespace {

using Pointer = uintptr_t;

template <class T>
T* to(Pointer address) {
  return reinterpret_cast<T*>(address);
}

void block_stats(int device, Pointer stream, Pointer chunks, int64_t chunk_count, Pointer spans, int64_t block_count,
                 Pointer moments, Pointer mean, Pointer var, Pointer norm, Pointer nonfinite) {
  zo::block_stats(device, to<void>(stream), to<void>(chunks), chunk_count, to<void>(spans), block_count,
                  to<void>(moments), to<float>(mean), to<float>(var), to<float>(norm), to<int64_t>(nonfinite));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA kernels of zo_kernels.  CUDA's errors are RuntimeErrors.";
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("load_kernels", &zo::load_kernels, unlocked);
  m.def("block_stats", &block_stats, unlocked);
  m.attr("CHUNK") = zo::chunk_elements();
  m.attr("MOMENTS_BYTES") = zo::moments_bytes();
}

// The CUDA interface: raw device pointers and a stream handle in, nothing out.  No torch header, no CUDA header.
#pragma once
#include <cstdint>

namespace zo {

// Puts the kernels on the device, which a launch under CUDA graph capture could not.
void load_kernels(int device);

// Of all blocks: mean, unbiased variance, norm (fp32) and the number of non-finite elements (int64).
//   chunks: Chunk[chunk_count], spans: Span[block_count] (statistics.h), in device memory; moments: moments_bytes() for
//   every chunk, written by the first kernel and read by the second.
// Both launches go to `stream`; nothing is allocated and nothing waits.  Throws std::runtime_error with CUDA's message.
void block_stats(int device, void* stream, const void* chunks, int64_t chunk_count, const void* spans,
                 int64_t block_count, void* moments, float* mean, float* var, float* norm, int64_t* nonfinite);

int chunk_elements();
int moments_bytes();

}  // namespace zo

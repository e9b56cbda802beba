// The arithmetic of block_stats, thread by thread, for the GPU and (in tests) the host: the same order, the same bits.
//   moments of n elements: sum = sum of d, squares = sum of d^2, d = x - shift, shift one of the n elements
//   mean = shift + sum / n,  M2 = sum (x - mean)^2 = squares - sum^2 / n,  var = M2 / (n - 1),  norm^2 = n mean^2 + M2
//   union with n', shift', sum', squares' (Chan, Golub & LeVeque 1979, without their divisions), s = shift' - shift:
//     sum + sum' + n' s,  squares + squares' + s (2 sum' + n' s)
// A thread sums its elements of a chunk, 256 of a whole one, in fp32 about its first element; all that follows is fp64.
// The shift is itself summed, so (shift - mean)^2 <= M2 and squares <= (2 + 2 n) M2: whatever the data, 514 M2 in a
// thread, where its first element is an outlier, and about 2 M2 otherwise; a shift common to the chunk might give
// 131,074 M2.  Where all elements are equal every d is 0, and so is var.
#pragma once
#include <cmath>

#include "dtype.h"

namespace zo {

constexpr int THREADS = 256;
constexpr int CHUNK = 1 << 16;  // elements: 458,000 chunks for 30B parameters, a table of 7.3 MB, 18 MB of moments
constexpr int FLIGHT = 4;       // 16-byte loads in flight a thread: 98 KB a processor of 6 blocks; an H200 needs 29

// A row of the chunk table: contiguous elements of one tensor, all CHUNK of them but in its last chunk.
struct Chunk {
  uint64_t address;
  int32_t numel;
  int32_t dtype;  // place in zo_kernels.blocks.DTYPES: 0 float32, 1 bfloat16, 2 float16
};

// A row of the block table: its chunks follow each other.
struct Span {
  int64_t first_chunk;
  int64_t chunks;
};

struct Moments {
  int64_t n, nonfinite;
  double shift, sum, squares;
};

struct Result {
  float mean, var, norm;
  int64_t nonfinite;
};

// fp16 in one instruction on the device; dtype.h takes seven and 16-bit elements have a budget of fifteen.
struct HardwareFloat16 : Float16 {
  ZO_INLINE float load(uint16_t bits) {
#if defined(__CUDA_ARCH__)
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#else
    return Float16::load(bits);
#endif
  }
};

template <class T>
ZO_INLINE T read(const T* place) {
#if defined(__CUDA_ARCH__)
  return __ldg(place);
#else
  return *place;
#endif
}

// 16 bytes of elements.
struct alignas(16) Vector {
  uint32_t words[4];
};

template <class Storage>
ZO_INLINE void put(Vector* vector, int j, Storage bits) {
  if constexpr (sizeof(Storage) == 4)
    vector->words[j] = bits_of(bits);
  else
    vector->words[j / 2] |= uint32_t(bits) << 16 * (j & 1);
}

template <class T>
ZO_INLINE float element(const Vector& vector, int j) {
  if constexpr (sizeof(typename T::Storage) == 4)
    return T::load(float_of(vector.words[j]));
  else
    return T::load(uint16_t(vector.words[j / 2] >> 16 * (j & 1)));
}

template <bool ALIGNED, class Storage>
ZO_INLINE Vector read_vector(const Storage* place) {
  Vector vector{};
  if constexpr (ALIGNED) {
#if defined(__CUDA_ARCH__)
    const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(place));
    vector = {{loaded.x, loaded.y, loaded.z, loaded.w}};
#else
    memcpy(&vector, place, sizeof vector);
#endif
  } else {
    for (int j = 0; j < int(16 / sizeof(Storage)); ++j) put(&vector, j, read(place + j));
  }
  return vector;
}

// The sums of one vector go to the totals as two numbers: chains of 8 + 32 roundings instead of 256.
template <class T>
ZO_INLINE void add(const Vector& vector, float shift, float* sum, float* squares) {
  float partial = element<T>(vector, 0) - shift, square = partial * partial;
  for (int j = 1; j < int(16 / sizeof(typename T::Storage)); ++j) {
    const float d = element<T>(vector, j) - shift;
    partial += d;
    square = fma(d, d, square);
  }
  *sum += partial;
  *squares += square;
}

// The same elements in fp64, counting those that are not finite.
template <class T>
ZO_INLINE Moments exact_moments(const typename T::Storage* data, int numel, int thread) {
  constexpr int WIDTH = 16 / sizeof(typename T::Storage);
  const double shift = T::load(read(data + thread * WIDTH));
  Moments m{0, 0, shift, 0, 0};
  for (int first = thread * WIDTH; first < numel; first += THREADS * WIDTH)
    for (int i = first; i < first + WIDTH && i < numel; ++i) {
      const float x = T::load(read(data + i));
      const double d = x - shift;
      m.n += 1;
      m.nonfinite += (bits_of(x) & 0x7F800000u) == 0x7F800000u;
      m.sum += d;
      m.squares += d * d;
    }
  return m;
}

// One thread's part of a chunk: vectors thread, thread + THREADS, ... and where it is its turn the incomplete last one.
template <class T, bool ALIGNED>
ZO_INLINE Moments moments(const typename T::Storage* data, int numel, int thread) {
  constexpr int WIDTH = 16 / sizeof(typename T::Storage);
  if (thread * WIDTH >= numel) return {};
  const auto first = read(data + thread * WIDTH);
  const float shift = T::load(first);
  const int vectors = numel / WIDTH;
  float sum = 0, squares = 0;
  int v = thread;
  for (; v + (FLIGHT - 1) * THREADS < vectors; v += FLIGHT * THREADS) {
    Vector flight[FLIGHT];
    for (int i = 0; i < FLIGHT; ++i) flight[i] = read_vector<ALIGNED>(data + (v + i * THREADS) * WIDTH);
    for (int i = 0; i < FLIGHT; ++i) add<T>(flight[i], shift, &sum, &squares);
  }
  for (; v < vectors; v += THREADS) add<T>(read_vector<ALIGNED>(data + v * WIDTH), shift, &sum, &squares);
  int n = (v - thread) / THREADS * WIDTH;
  if (v == vectors && v * WIDTH < numel) {
    Vector vector{};
    for (int j = 0; j < WIDTH; ++j) put(&vector, j, v * WIDTH + j < numel ? read(data + v * WIDTH + j) : first);
    add<T>(vector, shift, &sum, &squares);
    n += numel - v * WIDTH;
  }
  // Infinity or NaN: a non-finite element, or squares beyond fp32.  Below 2^-118 they lose bits to underflow (256 times
  // 2^-150): weights around 1e-20, or all equal.  Either way once more, mostly from the L2 cache.
  if (!(squares >= 0x1p-118f && squares <= 0x1.fffffep127f)) return exact_moments<T>(data, numel, thread);
  return {n, 0, shift, sum, squares};
}

template <class T>
ZO_INLINE Moments moments(const Chunk& chunk, int thread) {
  const auto* data = reinterpret_cast<const typename T::Storage*>(chunk.address);
  return chunk.address % 16 == 0 ? moments<T, true>(data, chunk.numel, thread)
                                 : moments<T, false>(data, chunk.numel, thread);
}

ZO_INLINE Moments thread_moments(const Chunk& chunk, int thread) {
  if (chunk.dtype == 0) return moments<Float32>(chunk, thread);
  if (chunk.dtype == 1) return moments<BFloat16>(chunk, thread);
  return moments<HardwareFloat16>(chunk, thread);
}

ZO_INLINE Moments merged(const Moments& a, const Moments& b) {
  if (a.n == 0) return b;
  if (b.n == 0) return a;
  const double s = b.shift - a.shift, moved = double(b.n) * s;
  return {a.n + b.n, a.nonfinite + b.nonfinite, a.shift, a.sum + (b.sum + moved),
          a.squares + (b.squares + s * (2 * b.sum + moved))};
}

// One thread's part of a block in the second stage.
ZO_INLINE Moments thread_merged(const Moments* chunks, const Span& span, int thread) {
  Moments m{};
  for (int64_t c = thread; c < span.chunks; c += THREADS) m = merged(m, chunks[span.first_chunk + c]);
  return m;
}

// A round of the tree over the THREADS parts: widths THREADS / 2, ..., 2, 1; the result is parts[0].
ZO_INLINE void fold(Moments* parts, int thread, int width) {
  if (thread < width) parts[thread] = merged(parts[thread], parts[thread + width]);
}

ZO_INLINE Result result(const Moments& m) {
  const float nan = float_of(0x7FC00000u);
  if (m.nonfinite) return {nan, nan, nan, m.nonfinite};
  if (m.n == 0) return {nan, 0, 0, 0};
  const double n = double(m.n), offset = m.sum / n, mean = m.shift + offset, about_mean = m.squares - m.sum * offset;
  const double square = about_mean > 0 ? about_mean : 0;
  return {float(mean), float(m.n > 1 ? square / (n - 1) : 0), float(sqrt(n * mean * mean + square)), 0};
}

}  // namespace zo

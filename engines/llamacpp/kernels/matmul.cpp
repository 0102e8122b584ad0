// Products of quantized weights and activations, for processors with AVX-512 VNNI.
//
// ggml asks `llamafile_sgemm` for every product of a weight matrix with what flows through the model, each of its
// threads for its share (ggml-cpu.c, ggml_compute_forward_mul_mat). This library has a function of that name; loaded
// first, it is the one that gets asked. Types that it does not know go to llama.cpp's own.
//
// ggml's kernels keep the 32 values of a block side by side in a register: each product is followed by a sum over
// lanes, by scales for 8 lanes only, and the processor's wide registers stay half empty. Here 16 rows lie side by side
// (weights.h), once for all columns, so a lane sums up its own row: 512 products take 8 instructions, and 3 more to be
// scaled.
//
// A column's result does not depend on which other columns it is computed with.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "weights.h"

struct ggml_threadpool;

namespace headwater {

constexpr int    kColumns    = 12;           // sums that are kept in registers: as many as 32 registers have room for
constexpr size_t kPanelBytes = 1024 * 1024;  // of activations, which are read once for each tile: half of a core's L2
constexpr size_t kChunkBytes = 64 * 1024;    // of weights, which a thread takes at a time: some microseconds of work

// Memory that is kept from call to call. One for each of ggml's threads.
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch &) = delete;
    Scratch & operator=(const Scratch &) = delete;

    ~Scratch() { std::free(data_); }

    template <typename T> T * reserve(size_t count) {
        const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        if (bytes > size_) {
            std::free(data_);
            size_ = 0;
            data_ = std::aligned_alloc(64, bytes);
            if (!data_) {
                throw std::bad_alloc();  // ends the process, as ggml's own failures do: nobody above could go on
            }
            size_ = bytes;
        }
        return static_cast<T *>(data_);
    }

  private:
    void * data_ = nullptr;
    size_t size_ = 0;
};

// What a thread computes with, whatever the types.
struct Buffers {
    Scratch values, scales, starts, sums, tile_values, tile_scales, tile_minima;
};

static Buffers & buffers() {
    static thread_local Buffers buffers;
    return buffers;
}

// Some columns of activations: signed bytes, and of each group of values its scale and its sum.
struct Panel {
    int8_t *  values;  // (columns, stride)
    float *   scales;  // (groups, width)
    int32_t * starts;  // (groups, width): what a sum of products begins with, to take the weights' zero out
    float *   sums;    // (groups, width): scale * sum, which the weights' minima are multiplied with
    int64_t   stride;  // the depth and a cache line more: a power of two would put all columns into the same cache sets
    int64_t   groups, width;
};

inline int32_t sum_of_bytes(const int8_t * values, int count) {
    const __m256i bytes = count == 32 ? _mm256_loadu_si256(reinterpret_cast<const __m256i *>(values)) :
                                        _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(values)));
    const __m256i eight = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), bytes);
    __m128i       four  = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four                = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

// Read `count` columns of activations, `stride` bytes apart, into a panel.
template <class W>
void read_activations(const Panel & panel, const uint8_t * columns, size_t stride, int64_t count) {
    constexpr bool is_small     = W::kActivation == kQ8_0;
    constexpr int  block_values = is_small ? 32 : 256, header = is_small ? 2 : 4;
    constexpr int  groups       = block_values / W::kGroup;
    for (int64_t column = 0; column < count; column++) {
        const uint8_t * block = columns + column * stride;
        int8_t *        values = panel.values + column * panel.stride;
        for (int64_t at = column; at < panel.groups * panel.width; block += activation_bytes(W::kActivation)) {
            float scale;
            if constexpr (is_small) {
                uint16_t half;
                std::memcpy(&half, block, sizeof half);
                scale = _cvtsh_ss(half);
            } else {
                std::memcpy(&scale, block, sizeof scale);
            }
            std::memcpy(values, block + header, block_values);
            for (int i = 0; i < groups; i++, at += panel.width, values += W::kGroup) {
                const int32_t sum = sum_of_bytes(values, W::kGroup);
                panel.scales[at]  = scale;
                panel.starts[at]  = -W::kZero * sum;
                panel.sums[at]    = scale * static_cast<float>(sum);
            }
        }
    }
}

// Some blocks of 16 rows of weights, unpacked.
struct Tile {
    __m512i * values;  // (blocks, W::kValues / 4)
    __m512 *  scales;  // (blocks, W::kValues / W::kGroup)
    __m512 *  minima;  // as many, where the type has any
};

// One row for each lane, one column for each register.
template <int N> struct Sums {
    __m512 of[N];

    Sums() {
#pragma GCC unroll 12
        for (int n = 0; n < N; n++) {
            of[n] = _mm512_setzero_ps();
        }
    }

    // Add `count` groups of a tile times those of `N` columns that begin at `group`.
    template <class W>
    [[gnu::always_inline]] void add(const Tile & tile, const Panel & panel, int64_t column, int64_t group, int64_t count) {
        constexpr int  words  = W::kGroup / 4;
        const int8_t * values = panel.values + column * panel.stride + group * W::kGroup;
        int64_t        at     = group * panel.width + column;
        for (int64_t i = 0; i < count; i++, at += panel.width, values += W::kGroup) {
            __m512i products[N];
#pragma GCC unroll 12
            for (int n = 0; n < N; n++) {
                products[n] = W::kZero ? _mm512_set1_epi32(panel.starts[at + n]) : _mm512_setzero_si512();
            }
#pragma GCC unroll 8
            for (int word = 0; word < words; word++) {
                const __m512i weights = tile.values[i * words + word];
#pragma GCC unroll 12
                for (int n = 0; n < N; n++) {
                    int32_t four;
                    std::memcpy(&four, values + n * panel.stride + 4 * word, sizeof four);
                    products[n] = _mm512_dpbusd_epi32(products[n], weights, _mm512_set1_epi32(four));
                }
            }
#pragma GCC unroll 12
            for (int n = 0; n < N; n++) {
                const __m512 scale = _mm512_mul_ps(tile.scales[i], _mm512_set1_ps(panel.scales[at + n]));
                of[n]              = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[n]), scale, of[n]);
                if constexpr (W::kHasMinima) {
                    of[n] = _mm512_fmadd_ps(tile.minima[i], _mm512_set1_ps(panel.sums[at + n]), of[n]);
                }
            }
        }
    }

    void store(float * out, int64_t stride, __mmask16 rows) const {
#pragma GCC unroll 12
        for (int n = 0; n < N; n++) {
            _mm512_mask_storeu_ps(out + n * stride, rows, of[n]);
        }
    }
};

// ggml_threadpool_chunk_add: the next chunk of the product that a pool's threads are computing.
using TakeChunk = int (*)(ggml_threadpool *, int);

static TakeChunk take_chunk = nullptr;

// What ggml asks for: out[n][m] = weights[m] . activations[n]. Strides are in bytes, that of `out` in floats.
struct Product {
    int               thread, num_threads;
    ggml_threadpool * threadpool;  // counts the chunks that are taken; null where each thread takes its share
    int64_t           rows, columns, depth;
    const uint8_t *   weights;
    size_t            weights_stride;
    const uint8_t *   activations;
    size_t            activations_stride;
    float *           out;
    int64_t           out_stride;
};

// One thread's share of a product, for one type of weights.
template <class W> class Share {
  public:
    explicit Share(const Product & product) : p_(product) {
        Buffers &     memory = buffers();
        const int64_t groups = p_.depth / W::kGroup, stride = p_.depth + 64;
        const int64_t fitting = static_cast<int64_t>(kPanelBytes) / (stride + 12 * groups) / kColumns * kColumns;
        const int64_t width   = std::min(p_.columns, std::max<int64_t>(fitting, kColumns));
        panel_ = { memory.values.reserve<int8_t>(width * stride), memory.scales.reserve<float>(width * groups),
                   memory.starts.reserve<int32_t>(width * groups), memory.sums.reserve<float>(width * groups),
                   stride, groups, width };
        tile_  = { memory.tile_values.reserve<__m512i>(p_.depth / 4), memory.tile_scales.reserve<__m512>(groups),
                   memory.tile_minima.reserve<__m512>(groups) };
    }

    // Chunks of rows, panel by panel. They are taken one by one, so a thread that loses its core for a while holds up
    // the others by one chunk at most; one is taken ahead, for its first rows to be brought from memory.
    void compute() {
        const int64_t tiles       = (p_.rows + kRows - 1) / kRows;
        const int64_t panels      = (p_.columns + panel_.width - 1) / panel_.width;
        const int64_t chunk_tiles = std::max<int64_t>(1, std::min(tiles_at_once(), tiles * panels / fair_parts()));
        const int64_t chunk_rows  = chunk_tiles * kRows;
        const int64_t chunks      = (tiles + chunk_tiles - 1) / chunk_tiles;
        int64_t       read        = -1;
        for (int64_t chunk = p_.thread, next; chunk < chunks * panels; chunk = next) {
            next                 = take_after(chunk);
            const int64_t column = chunk / chunks * panel_.width, width = std::min(panel_.width, p_.columns - column);
            if (read != column) {
                read_activations<W>(panel_, p_.activations + column * p_.activations_stride, p_.activations_stride, width);
                read = column;
            }
            const int64_t first = chunk % chunks * chunk_rows, end = std::min(first + chunk_rows, p_.rows);
            for (int64_t row = first; row < end; row += kRows) {
                const int64_t following = row + kRows < end ? row + kRows : next % chunks * chunk_rows;
                multiply(row, following, column, width);
            }
        }
    }

  private:
    static constexpr int kBlockGroups = W::kValues / W::kGroup;

    int64_t tiles_at_once() const { return kChunkBytes / (kRows * p_.depth / W::kValues * W::kBytes); }

    // Few chunks would leave threads without any. Taken one by one, there should be some for each to even out delays.
    int64_t fair_parts() const { return p_.threadpool ? 4 * p_.num_threads : p_.num_threads; }

    int64_t take_after(int64_t chunk) const {
        return p_.threadpool ? take_chunk(p_.threadpool, 1) : chunk + p_.num_threads;
    }

    // One tile times the panel, while the one at `following` comes from memory.
    void multiply(int64_t row, int64_t following, int64_t column, int64_t width) {
        following_ = p_.weights + following * p_.weights_stride;
        const int       count = static_cast<int>(std::min<int64_t>(kRows, p_.rows - row));
        const Rows      rows(p_.weights + row * p_.weights_stride, p_.weights_stride, count);
        const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
        float *         out  = p_.out + column * p_.out_stride + row;
        if (width <= kColumns) {
            multiply_as_read<kColumns>(width, rows, out, mask);
            return;
        }
        for (int64_t block = 0; block < p_.depth / W::kValues; block++) {
            unpack(rows, block, { tile_.values + block * W::kValues / 4, tile_.scales + block * kBlockGroups,
                                  tile_.minima + block * kBlockGroups });
        }
        int64_t done = 0;
        for (; done + kColumns <= width; done += kColumns) {
            multiply_unpacked<kColumns>(kColumns, done, out, mask);
        }
        multiply_unpacked<kColumns - 1>(width - done, done, out, mask);
    }

    // Few columns: every block is multiplied as soon as it is unpacked, and stays in the nearest cache.
    template <int N> void multiply_as_read(int64_t width, const Rows & rows, float * out, __mmask16 mask) {
        if (width == N) {
            Sums<N> sums;
            for (int64_t block = 0; block < p_.depth / W::kValues; block++) {
                unpack(rows, block, tile_);
                sums.template add<W>(tile_, panel_, 0, block * kBlockGroups, kBlockGroups);
            }
            sums.store(out, p_.out_stride, mask);
        } else if constexpr (N > 1) {
            multiply_as_read<N - 1>(width, rows, out, mask);
        }
    }

    // `count` columns of many, no more than `N`.
    template <int N> void multiply_unpacked(int64_t count, int64_t column, float * out, __mmask16 mask) {
        if (count == N) {
            Sums<N> sums;
            sums.template add<W>(tile_, panel_, column, 0, panel_.groups);
            sums.store(out + column * p_.out_stride, p_.out_stride, mask);
        } else if constexpr (N > 1) {
            multiply_unpacked<N - 1>(count, column, out, mask);
        }
    }

    void unpack(const Rows & rows, int64_t block, const Tile & tile) {
        const uint8_t * next = following_ + block * kRows * W::kBytes;
        for (int line = 0; line < kRows * W::kBytes; line += 64) {
            _mm_prefetch(reinterpret_cast<const char *>(next + line), _MM_HINT_T0);
        }
        W::unpack(rows, block * W::kBytes, tile.values, tile.scales, tile.minima);
    }

    const Product & p_;
    Panel           panel_;
    Tile            tile_;
    const uint8_t * following_ = nullptr;
};

}  // namespace headwater

extern "C" {

// ggml-cpu-impl.h
struct ggml_compute_params {
    int               ith, nth;
    size_t            wsize;
    void *            wdata;
    ggml_threadpool * threadpool;
};

using Sgemm = bool (*)(const ggml_compute_params *, int64_t, int64_t, int64_t, const void *, int64_t, const void *,
                       int64_t, void *, int64_t, int, int, int);

static Sgemm llama_cpp_sgemm = nullptr;

// Name llama.cpp's functions: its own for all other types, and the counter of chunks.
[[gnu::visibility("default")]]
void headwater_kernels_bind(Sgemm sgemm, headwater::TakeChunk take_chunk) {
    llama_cpp_sgemm       = sgemm;
    headwater::take_chunk = take_chunk;
}

// See llamafile/sgemm.cpp: m rows of A times n columns of B, k blocks each; lda, ldb and ldc are blocks, blocks and
// floats from one to the next. False means that ggml has to compute it another way.
[[gnu::visibility("default")]]
bool llamafile_sgemm(const ggml_compute_params * params, int64_t m, int64_t n, int64_t k, const void * A, int64_t lda,
                     const void * B, int64_t ldb, void * C, int64_t ldc, int Atype, int Btype, int Ctype) noexcept {
    using namespace headwater;
    const auto ours = [&]<class W>(W) {
        if (Btype != W::kActivation || Ctype != 0 || m < 1 || n < 1 || k < 1) {
            return false;  // ggml asks first for activations as they are, then for quantized ones
        }
        // ggml has set the counter for the first matrix of activations that it has quantized itself, and for no other.
        const bool    counts = headwater::take_chunk && params->threadpool && B == params->wdata;
        const Product product{ params->ith,
                               params->nth,
                               counts ? params->threadpool : nullptr,
                               m,
                               n,
                               k * W::kValues,
                               static_cast<const uint8_t *>(A),
                               lda * size_t{ W::kBytes },
                               static_cast<const uint8_t *>(B),
                               ldb * size_t{ activation_bytes(W::kActivation) },
                               static_cast<float *>(C),
                               ldc };
        Share<W>(product).compute();
        return true;
    };
    switch (Atype) {  // ggml.h ggml_type
        case 2: return ours(Q4_0{});
        case 8: return ours(Q8_0{});
        case 12: return ours(Q4_K{});
        case 13: return ours(Q5_K{});
        case 14: return ours(Q6_K{});
        default: break;
    }
    return llama_cpp_sgemm && llama_cpp_sgemm(params, m, n, k, A, lda, B, ldb, C, ldc, Atype, Btype, Ctype);
}

}  // extern "C"

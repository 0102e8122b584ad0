// How the rows of each weight type are laid out in a tile: 16 rows side by side, one in each 32-bit lane of a register.
//
// A tile holds unsigned bytes, so that the processor's product of unsigned and signed bytes fits; what was added to
// make them so is the type's `zero`. Layouts of the blocks: ggml-common.h of llama.cpp. Values of a block are in order
// here: register q of a tile has the values 4q to 4q+3 of all rows.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace headwater {

constexpr int kRows = 16;

// 16 rows of weights. Where a matrix ends within a tile, its last row stands for those that are missing.
struct Rows {
    const uint8_t * row[kRows];
    __m512i         offset;  // of each row from the first, in bytes

    Rows(const uint8_t * first, size_t stride, int count) {
        alignas(64) int32_t offsets[kRows];
        for (int i = 0; i < kRows; i++) {
            offsets[i] = static_cast<int32_t>(stride * (i < count ? i : count - 1));
            row[i]     = first + offsets[i];
        }
        offset = _mm512_load_si512(offsets);
    }

    // The 4 bytes at `at` of each row.
    __m512i word(size_t at) const { return _mm512_i32gather_epi32(offset, row[0] + at, 1); }

    // The half-precision number at `at` of each row.
    __m512 half(size_t at) const { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(word(at))); }

    // The 16 bytes at `at` of each row, as 4 registers.
    void words4(size_t at, __m512i * out) const {
        __m512i pairs[4];
        for (int i = 0; i < 4; i++) {
            const __m256i low  = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes16(i, at)), bytes16(i + 4, at), 1);
            const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes16(i + 8, at)), bytes16(i + 12, at), 1);
            pairs[i]           = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
        }
        transpose4(pairs, out);
    }

    // The 32 bytes at `at` of each row, as 8 registers.
    void words8(size_t at, __m512i * out) const {
        static constexpr int kOrder[8] = { 0, 1, 2, 3, 8, 9, 10, 11 };  // so that lanes come out in the order of the rows
        __m512i              halves[8], quarters[8];
        for (int i = 0; i < 8; i++) {
            halves[i] = _mm512_inserti64x4(_mm512_castsi256_si512(bytes32(kOrder[i], at)), bytes32(kOrder[i] + 4, at), 1);
        }
        transpose4(halves, quarters);
        transpose4(halves + 4, quarters + 4);
        for (int q = 0; q < 4; q++) {
            out[q]     = _mm512_shuffle_i32x4(quarters[q], quarters[q + 4], 0x88);
            out[q + 4] = _mm512_shuffle_i32x4(quarters[q], quarters[q + 4], 0xdd);
        }
    }

  private:
    __m128i bytes16(int i, size_t at) const { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(row[i] + at)); }

    __m256i bytes32(int i, size_t at) const { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(row[i] + at)); }

    // 4 by 4 words, in each 128-bit lane.
    static void transpose4(const __m512i * in, __m512i * out) {
        const __m512i a = _mm512_unpacklo_epi32(in[0], in[1]), b = _mm512_unpackhi_epi32(in[0], in[1]);
        const __m512i c = _mm512_unpacklo_epi32(in[2], in[3]), d = _mm512_unpackhi_epi32(in[2], in[3]);
        out[0]          = _mm512_unpacklo_epi64(a, c);
        out[1]          = _mm512_unpackhi_epi64(a, c);
        out[2]          = _mm512_unpacklo_epi64(b, d);
        out[3]          = _mm512_unpackhi_epi64(b, d);
    }
};

inline __m512i bits(__m512i words, int shift, int mask) {
    return _mm512_and_si512(_mm512_srli_epi32(words, shift), _mm512_set1_epi8(static_cast<char>(mask)));
}

// Byte i of every word, as a number.
inline __m512 unsigned_byte(__m512i words, int i) {
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(words, 8 * i), _mm512_set1_epi32(0xff)));
}

inline __m512 signed_byte(__m512i words, int i) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 24 - 8 * i), 24));
}

// What follows are the weight types. Of each:
//   kValues     values of a block            kBytes       bytes of a block
//   kGroup      values that share a scale    kZero        what was added to every value
//   kHasMinima  the value is scale * byte + minimum       kActivation  the type of what it is multiplied with
//   unpack      one block of 16 rows: kValues / 4 registers of values, kValues / kGroup of scales, and of minima if any

enum Activation : int { kQ8_0 = 8, kQ8_K = 15 };  // ggml.h ggml_type

// Q8_0: a half-precision scale and 32 values. Q8_K: a float, 256 values, and sums of them.
constexpr int activation_bytes(Activation kind) { return kind == kQ8_0 ? 34 : 292; }

struct Q8_0 {
    static constexpr int        kValues = 32, kBytes = 34, kGroup = 32, kZero = 128;
    static constexpr bool       kHasMinima  = false;
    static constexpr Activation kActivation = kQ8_0;

    static void unpack(const Rows & rows, size_t at, __m512i * values, __m512 * scales, __m512 *) {
        scales[0] = rows.half(at);
        rows.words8(at + 2, values);
        for (int q = 0; q < 8; q++) {
            values[q] = _mm512_xor_si512(values[q], _mm512_set1_epi8(static_cast<char>(kZero)));
        }
    }
};

struct Q4_0 {
    static constexpr int        kValues = 32, kBytes = 18, kGroup = 32, kZero = 8;
    static constexpr bool       kHasMinima  = false;
    static constexpr Activation kActivation = kQ8_0;

    static void unpack(const Rows & rows, size_t at, __m512i * values, __m512 * scales, __m512 *) {
        __m512i packed[4];
        scales[0] = rows.half(at);
        rows.words4(at + 2, packed);
        for (int q = 0; q < 4; q++) {
            values[q]     = bits(packed[q], 0, 0x0f);
            values[q + 4] = bits(packed[q], 4, 0x0f);
        }
    }
};

// The 6-bit scales and minima of Q4_K and Q5_K, as bytes: those of groups 0 to 3 and 4 to 7.
struct SixBits {
    __m512i scales[2], minima[2];

    SixBits(const Rows & rows, size_t at) {
        const __m512i a = rows.word(at), b = rows.word(at + 4), c = rows.word(at + 8);
        scales[0]       = bits(a, 0, 0x3f);
        minima[0]       = bits(b, 0, 0x3f);
        scales[1]       = _mm512_or_si512(bits(c, 0, 0x0f), bits(a, 2, 0x30));
        minima[1]       = _mm512_or_si512(bits(c, 4, 0x0f), bits(b, 2, 0x30));
    }

    void unpack(const Rows & rows, size_t at, __m512 * out_scales, __m512 * out_minima) const {
        const __m512 scale = rows.half(at), minimum = _mm512_sub_ps(_mm512_setzero_ps(), rows.half(at + 2));
        for (int group = 0; group < 8; group++) {
            out_scales[group] = _mm512_mul_ps(scale, unsigned_byte(scales[group / 4], group % 4));
            out_minima[group] = _mm512_mul_ps(minimum, unsigned_byte(minima[group / 4], group % 4));
        }
    }
};

struct Q4_K {
    static constexpr int        kValues = 256, kBytes = 144, kGroup = 32, kZero = 0;
    static constexpr bool       kHasMinima  = true;
    static constexpr Activation kActivation = kQ8_K;

    static void unpack(const Rows & rows, size_t at, __m512i * values, __m512 * scales, __m512 * minima) {
        SixBits(rows, at + 4).unpack(rows, at, scales, minima);
        for (int pair = 0; pair < 4; pair++, values += 16) {
            __m512i packed[8];
            rows.words8(at + 16 + 32 * pair, packed);
            for (int q = 0; q < 8; q++) {
                values[q]     = bits(packed[q], 0, 0x0f);
                values[q + 8] = bits(packed[q], 4, 0x0f);
            }
        }
    }
};

struct Q5_K {
    static constexpr int        kValues = 256, kBytes = 176, kGroup = 32, kZero = 0;
    static constexpr bool       kHasMinima  = true;
    static constexpr Activation kActivation = kQ8_K;

    static void unpack(const Rows & rows, size_t at, __m512i * values, __m512 * scales, __m512 * minima) {
        SixBits(rows, at + 4).unpack(rows, at, scales, minima);
        __m512i fifth[8];
        rows.words8(at + 16, fifth);
        for (int pair = 0; pair < 4; pair++, values += 16) {
            __m512i packed[8];
            rows.words8(at + 48 + 32 * pair, packed);
            for (int q = 0; q < 8; q++) {
                const __m512i low = bits(fifth[q], 2 * pair, 0x01), high = bits(fifth[q], 2 * pair + 1, 0x01);
                values[q]     = _mm512_or_si512(bits(packed[q], 0, 0x0f), _mm512_slli_epi32(low, 4));
                values[q + 8] = _mm512_or_si512(bits(packed[q], 4, 0x0f), _mm512_slli_epi32(high, 4));
            }
        }
    }
};

struct Q6_K {
    static constexpr int        kValues = 256, kBytes = 210, kGroup = 16, kZero = 32;
    static constexpr bool       kHasMinima  = false;
    static constexpr Activation kActivation = kQ8_K;

    static void unpack(const Rows & rows, size_t at, __m512i * values, __m512 * scales, __m512 *) {
        // The scale is the block's last 2 bytes: read with those before it, as behind the last block nothing may be
        // read.
        const __m512 scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(rows.word(at + 206), 16)));
        for (int word = 0; word < 4; word++, scales += 4) {
            const __m512i factors = rows.word(at + 192 + 4 * word);
            for (int i = 0; i < 4; i++) {
                scales[i] = _mm512_mul_ps(scale, signed_byte(factors, i));
            }
        }
        for (int half = 0; half < 2; half++, values += 32) {
            __m512i low[16], high[8];
            rows.words8(at + 64 * half, low);
            rows.words8(at + 64 * half + 32, low + 8);
            rows.words8(at + 128 + 32 * half, high);
            for (int q = 0; q < 8; q++) {
                values[q]      = _mm512_or_si512(bits(low[q], 0, 0x0f), _mm512_slli_epi32(bits(high[q], 0, 0x03), 4));
                values[q + 8]  = _mm512_or_si512(bits(low[q + 8], 0, 0x0f), _mm512_slli_epi32(bits(high[q], 2, 0x03), 4));
                values[q + 16] = _mm512_or_si512(bits(low[q], 4, 0x0f), _mm512_slli_epi32(bits(high[q], 4, 0x03), 4));
                values[q + 24] = _mm512_or_si512(bits(low[q + 8], 4, 0x0f), _mm512_slli_epi32(bits(high[q], 6, 0x03), 4));
            }
        }
    }
};

}  // namespace headwater

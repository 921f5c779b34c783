// Products with matrices of 8 or 4 bits, and tokens in 8 bits: sums of whole numbers, which are exact in any order,
// scaled and added group by group from the first to the last.
//
// A weight is scale * (code - ZERO), a code unsigned, with a scale (bfloat16) for each output and group of inputs. Four
// inputs of 16 outputs are a vector of AVX-512: (k / 4, 16, 4) bytes. Of 4 bits, a byte holds the input k in its lower
// half and k + 4 in its upper one: (k / 8, 16, 4) bytes. Tokens are scaled by group, too, to -127 ... 127.

#pragma once

#include "products.h"

template <int BITS> struct Kind {
    static const index_t GROUP = BITS == 8 ? 64 : 32; // inputs that share a scale
    static const int32_t ZERO = BITS == 8 ? 128 : 8;
    static const index_t BYTES = BITS == 8 ? 4 : 2; // of 16 outputs times 4 inputs, by 16
};

// Tokens in 8 bits: codes (T, k), scales and sums of codes (T, groups).
struct Codes {
    int8_t *at;
    float *scales;
    int32_t *sums;
    index_t sk, sg; // between tokens
};

template <typename E> static inline void to_codes(const Codes &to, index_t t, const E *x, index_t n, index_t group) {
    const index_t groups = up(n, group) / group;
    int8_t *codes = to.at + t * to.sk;
    for (index_t g = 0; g < groups; g++) {
        const index_t count = std::min(group, n - g * group);
        const E *from = x + g * group;
        lanes most = {};
        each_vector(count, [&](index_t j, auto part) {
            const lanes v = load(from + j, part);
            most = larger(most, larger(v, -v));
        });
        const float scale = largest(most) / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
        int32_t total = 0;
        for (index_t j = 0; j < group; j++) {
            const float v = j < count ? load_one(from[j]) * inverse : 0.0f;
            const int32_t code = (int32_t)std::nearbyint(v);
            codes[g * group + j] = (int8_t)code;
            total += code;
        }
        to.scales[t * to.sg + g] = scale;
        to.sums[t * to.sg + g] = total;
    }
}

typedef int32_t ints __attribute__((vector_size(64)));
typedef float floats __attribute__((vector_size(64)));

static inline floats wide_scale(const uint16_t *from) { // 16 of bfloat16
    typedef uint16_t sixteen __attribute__((vector_size(32)));
    typedef uint32_t wider __attribute__((vector_size(64)));
    sixteen bits;
    memcpy(&bits, from, sizeof bits);
    return (floats)(__builtin_convertvector(bits, wider) << 16);
}

// total[output] += the products of four inputs, of 16 outputs: w unsigned, x signed.
static inline ints add_products(ints total, ints w, int32_t x) {
#ifdef __AVX512VNNI__
    return (ints)_mm512_dpbusd_epi32((__m512i)total, (__m512i)w, _mm512_set1_epi32(x));
#else
    for (int i = 0; i < 4; i++) total += (w >> 8 * i & 0xff) * (int32_t)(int8_t)(x >> 8 * i);
    return total;
#endif
}

template <int BITS, int M>
static inline void rows_of_codes(float *c, const Codes &x, index_t row, const uint8_t *left, const uint8_t *right,
                                 const uint16_t *left_scales, const uint16_t *right_scales, index_t k) {
    constexpr index_t GROUP = Kind<BITS>::GROUP;
    floats totals[M][2] = {};
    for (index_t g = 0; g < k / GROUP; g++) {
        ints sums[M][2];
        for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = ints{} - Kind<BITS>::ZERO * x.sums[(row + m) * x.sg + g];
        const int8_t *codes = x.at + row * x.sk + g * GROUP;
#pragma GCC unroll 16
        for (index_t i = 0; i < GROUP; i += BITS == 8 ? 4 : 8, left += 64, right += 64) {
            if (M == 1) {
                __builtin_prefetch(left + 4096);
                __builtin_prefetch(right + 4096);
            }
            ints w[2];
            memcpy(&w[0], left, 64);
            memcpy(&w[1], right, 64);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                int32_t four;
                memcpy(&four, codes + m * x.sk + i, 4);
#pragma GCC unroll 2
                for (int b = 0; b < 2; b++)
                    sums[m][b] = add_products(sums[m][b], BITS == 8 ? w[b] : w[b] & 0x0f0f0f0f, four);
                if (BITS == 4) {
                    memcpy(&four, codes + m * x.sk + i + 4, 4);
#pragma GCC unroll 2
                    for (int b = 0; b < 2; b++) sums[m][b] = add_products(sums[m][b], w[b] >> 4 & 0x0f0f0f0f, four);
                }
            }
        }
        const floats scales[2] = {wide_scale(left_scales + g * BLOCK), wide_scale(right_scales + g * BLOCK)};
        for (int m = 0; m < M; m++)
            for (int b = 0; b < 2; b++)
                totals[m][b] += __builtin_convertvector(sums[m][b], floats) * (scales[b] * x.scales[(row + m) * x.sg + g]);
    }
    for (int m = 0; m < M; m++) memcpy(c + (row + m) * PAIR, totals[m], sizeof totals[m]);
}
template <int BITS, int M = 4, typename... Rest>
static inline void last_rows_of_codes(index_t rows, float *c, const Codes &x, index_t row, Rest... rest) {
    if constexpr (M > 1)
        if (rows < M) return last_rows_of_codes<BITS, M - 1>(rows, c, x, row, rest...);
    rows_of_codes<BITS, M>(c, x, row, rest...);
}

// c (rows, 32) of tokens from `first` on and a pair of blocks.
template <int BITS>
static inline void pair_of_codes(float *c, Codes x, index_t first, index_t rows, const uint8_t *at,
                                 const uint16_t *scales, index_t k) {
    x.at += first * x.sk, x.scales += first * x.sg, x.sums += first * x.sg;
    const index_t size = k / 4 * BLOCK * Kind<BITS>::BYTES, groups = k / Kind<BITS>::GROUP;
    for (index_t row = 0; row < rows; row += 4)
        last_rows_of_codes<BITS>(std::min<index_t>(4, rows - row), c, x, row, at, at + size, scales,
                                 scales + groups * BLOCK, k);
}

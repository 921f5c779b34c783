// Products with matrices of 8 or 4 bits, and tokens in 8 bits: sums of whole numbers, which are exact in any order,
// scaled and added group by group from the first to the last.
//
// A weight is scale * code, with a scale (bfloat16) for each output and group of inputs. Four inputs of 16 outputs are a
// vector of AVX-512, and a row of the tile that AMX multiplies with: (k / 4, 16, 4) bytes. Of 4 bits, a byte holds the
// input k in its lower half and k + 4 in its upper one: (k / 8, 16, 4) bytes, each half 8 above its code. Tokens are
// scaled by group, too, to -127 ... 127.
//
// AMX multiplies a group of many rows in one instruction, after which its sums are scaled; that takes most of the time,
// and is done for some groups while the next ones are multiplied.

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

static inline void store_codes(int8_t *to, integers codes) {
#ifdef __AVX512F__
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)codes));
#else
    for (index_t j = 0; j < W; j++) to[j] = (int8_t)codes[j];
#endif
}
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
        integers total = {};
        for (index_t j = 0; j < group; j += W) {
            const lanes v = j < count ? load(from + j, count - j) * inverse : lanes{};
            const integers code = __builtin_convertvector(nearest(v), integers);
            store_codes(codes + g * group + j, code);
            total += code;
        }
        int32_t sum = 0;
        for (index_t j = 0; j < W; j++) sum += total[j];
        to.scales[t * to.sg + g] = scale;
        to.sums[t * to.sg + g] = sum;
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

// A group's exact sums, scaled and added.
static inline floats add_scaled(floats total, ints sums, floats scale, float x_scale) {
    return total + __builtin_convertvector(sums, floats) * (scale * x_scale);
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
    const index_t ahead = row ? 2 * (right - left) : 4096;  // the first rows read, the others fetch the next pair
    floats totals[M][2] = {};
    for (index_t g = 0; g < k / GROUP; g++) {
        ints sums[M][2];
        for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = ints{} - Kind<BITS>::ZERO * x.sums[(row + m) * x.sg + g];
        const int8_t *codes = x.at + row * x.sk + g * GROUP;
#pragma GCC unroll 16
        for (index_t i = 0; i < GROUP; i += BITS == 8 ? 4 : 8, left += 64, right += 64) {
            __builtin_prefetch(left + ahead);
            __builtin_prefetch(right + ahead);
            ints w[2];
            memcpy(&w[0], left, 64);
            memcpy(&w[1], right, 64);
            if (BITS == 8) w[0] ^= 0x80808080, w[1] ^= 0x80808080;  // unsigned ones
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
                totals[m][b] = add_scaled(totals[m][b], sums[m][b], scales[b], x.scales[(row + m) * x.sg + g]);
    }
    for (int m = 0; m < M; m++) memcpy(c + (row + m) * PAIR, totals[m], sizeof totals[m]);
}
template <int BITS, int M = 4, typename... Rest>
static inline void last_rows_of_codes(index_t rows, float *c, const Codes &x, index_t row, Rest... rest) {
    if constexpr (M > 1)
        if (rows < M) return last_rows_of_codes<BITS, M - 1>(rows, c, x, row, rest...);
    rows_of_codes<BITS, M>(c, x, row, rest...);
}

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
static const int SEVERAL = 2; // groups between whose products others are scaled

// Two blocks of codes of 4 bits, as the tiles want them.
static inline void unpack(uint8_t *to, const uint8_t *from, index_t bytes) {
    const __m512i four = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
    for (index_t i = 0; i < bytes; i += 64, to += 128) {
        __builtin_prefetch(from + i + 4096);
        const __m512i both = _mm512_loadu_si512(from + i);
        const __m512i low = _mm512_and_si512(both, four), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), four);
        _mm512_storeu_si512(to, _mm512_sub_epi8(low, eight));
        _mm512_storeu_si512(to + 64, _mm512_sub_epi8(high, eight));
    }
}
// Sums of one group, of 16 or 32 rows of x and 32 outputs: (2, 2, 16, 16), rows first.
template <bool tall>
static inline void multiply_group(ints *to, const int8_t *x, index_t sk, const uint8_t *left, const uint8_t *right) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(4, x, sk);
    _tile_loadd(6, left, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, right, 64);
    _tile_dpbssd(1, 4, 7);
    if (tall) {
        _tile_zero(2);
        _tile_zero(3);
        _tile_loadd(5, x + BLOCK * sk, sk);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
        _tile_stored(2, to + 32, 64);
        _tile_stored(3, to + 48, 64);
    }
    _tile_stored(0, to, 64);
    _tile_stored(1, to + 16, 64);
}
// Adds `count` groups from g on to rows [row, last) of c.
static inline void scale_groups(floats *c, const ints *sums, const Codes &x, index_t row, index_t last,
                                const uint16_t *left, const uint16_t *right, index_t g, int count) {
    floats scales[SEVERAL][2];
    for (int i = 0; i < count; i++)
        scales[i][0] = wide_scale(left + (g + i) * BLOCK), scales[i][1] = wide_scale(right + (g + i) * BLOCK);
    for (; row < last; row++) {
        floats first = c[2 * row], second = c[2 * row + 1];
        const ints *own = sums + row / BLOCK * 32 + row % BLOCK;
#pragma GCC unroll 2
        for (int i = 0; i < count; i++, own += 64) {
            const float scale = x.scales[row * x.sg + g + i];
            first = add_scaled(first, own[0], scales[i][0], scale);
            second = add_scaled(second, own[16], scales[i][1], scale);
        }
        c[2 * row] = first, c[2 * row + 1] = second;
    }
}
template <int BITS, bool tall>
static inline void tiles_of_codes(float *to, const Codes &x, index_t rows, const uint8_t *left, const uint8_t *right,
                                  const uint16_t *left_scales, const uint16_t *right_scales, index_t k, Soon soon) {
    constexpr index_t GROUP = Kind<BITS>::GROUP, size = GROUP * BLOCK;
    alignas(64) ints sums[2][SEVERAL][64];
    floats *c = (floats *)to;
    memset(to, 0, (size_t)(rows * PAIR) * sizeof(float));
    const index_t groups = k / GROUP;
    const auto part = [&](index_t i) { return rows * i / SEVERAL; };
    int before = 0;
    for (index_t g = 0, turn = 0; g < groups || before; g += SEVERAL, turn ^= 1) {
        const int count = (int)std::max<index_t>(0, std::min<index_t>(SEVERAL, groups - g));
#pragma GCC unroll 2
        for (int i = 0; i < SEVERAL; i++) {
            if (i < count) {
                const index_t at = (g + i) * size;
                if (soon.lines) fetch_soon(soon);
                else
                    for (index_t line = 0; line < size; line += 64)
                        __builtin_prefetch(left + at + line + AHEAD), __builtin_prefetch(right + at + line + AHEAD);
                multiply_group<tall>(sums[turn][i], x.at + (g + i) * GROUP, x.sk, left + at, right + at);
            }
            if (before == SEVERAL)
                scale_groups(c, sums[turn ^ 1][0], x, part(i), part(i + 1), left_scales, right_scales, g - SEVERAL, SEVERAL);
            else if (before)
                scale_groups(c, sums[turn ^ 1][0], x, part(i), part(i + 1), left_scales, right_scales, g - SEVERAL, before);
        }
        before = count;
    }
}
static const index_t FEW = 4; // rows that are multiplied without tiles
#else
static inline void unpack(uint8_t *, const uint8_t *, index_t) {}
static const index_t FEW = TALL;
#endif

// A pair of blocks of a matrix of codes.
template <int BITS> struct PairOfCodes {
    const uint8_t *at, *unpacked;  // as it is, and as the tiles want it
    const uint16_t *scales;
    index_t k;
    PairOfCodes(const void *codes, const uint16_t *all_scales, index_t pair, index_t k, uint8_t *memory, bool many)
        : at((const uint8_t *)codes + pair * PAIR * k * BITS / 8), unpacked(BITS == 4 ? memory : at),
          scales(all_scales + pair * PAIR * (k / Kind<BITS>::GROUP)), k(k) {
        if (BITS == 4 && many) unpack(memory, at, PAIR * k / 2);
    }
    // c (rows, 32) of tokens from `first` on.
    void product(float *c, Codes x, index_t first, index_t rows, Soon soon) const {
        const index_t size = k / 4 * BLOCK * Kind<BITS>::BYTES;
        const uint16_t *right_scales = scales + k / Kind<BITS>::GROUP * BLOCK;
        x.at += first * x.sk, x.scales += first * x.sg, x.sums += first * x.sg;
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
        if (rows > FEW) {
            const uint8_t *right = unpacked + BLOCK * k;
            if (rows > BLOCK) tiles_of_codes<BITS, true>(c, x, rows, unpacked, right, scales, right_scales, k, soon);
            else tiles_of_codes<BITS, false>(c, x, rows, unpacked, right, scales, right_scales, k, soon);
            return;
        }
#endif
        for (index_t row = 0; row < rows; row += 4)
            last_rows_of_codes<BITS>(std::min<index_t>(4, rows - row), c, x, row, at, at + size, scales, right_scales, k);
    }
};

// Small matrix products from numbers in the cache, for attention.
//
// A word is what one multiplication of a lane takes: a float, or two neighbours of bfloat16 along the dimension that is
// summed over. A product is C (m, n) = A (m, k) B (k, n), with A read word by word and B a vector of words at a time.

#pragma once

#include <utility>

#include "numbers.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

template <typename E> static constexpr index_t per_word = 4 / (index_t)sizeof(E);

static inline index_t up(index_t x, index_t to) { return (x + to - 1) / to * to; }

// Words of two rows, for E of half a word; of the first alone otherwise. As in `multiply_add`, which alone reads them,
// the instructions for bfloat16 take what is too small for a normal float for 0.
static inline words paired(lanes first, lanes, float) { return (words)first; }
static inline words paired(lanes first, lanes second, bf16) {
#ifdef __AVX512BF16__
    const __m512i turns = (__m512i)((words)first_lanes() * 0x10001 + (16 << 16));  // of 16 bits: 0, 16, 1, 17, ...
    return (words)_mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
    return rounded(first, bf16{}) >> 16 | (rounded(second, bf16{}) & 0xffff0000u);
#endif
}
template <typename Count> static inline words paired_rows(const float *first, const float *, Count count) {
    return (words)load(first, count);
}
template <typename Count> static inline words paired_rows(const bf16 *first, const bf16 *second, Count count) {
    return (words)load(first, count) >> 16 | (words)load(second, count);
}
// A row for `multiply_add`, with the same instructions.
template <typename E> static inline void store_row(E *to, lanes x) { store(to, x); }
#ifdef __AVX512BF16__
static inline void store_row(bf16 *to, lanes x) {
    const __m256bh bits = _mm512_cvtneps_pbh((__m512)x);
    memcpy(to, &bits, sizeof bits);
}
#endif

static inline lanes multiply_add(lanes total, uint32_t a, lanes b, float) {
    float x;
    memcpy(&x, &a, sizeof x);
    return total + x * b;
}
static inline lanes multiply_add(lanes total, uint32_t a, lanes b, bf16) {
#ifdef __AVX512BF16__
    return (lanes)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
    const uint32_t low = a << 16, high = a & 0xffff0000u;
    float x, y;
    memcpy(&x, &low, sizeof x);
    memcpy(&y, &high, sizeof y);
    return total + x * (lanes)((words)b << 16) + y * (lanes)((words)b & 0xffff0000u);
#endif
}

struct Left {  // A: between rows, and between the words of a row
    const uint32_t *at;
    index_t row, word;
};
struct Right {  // B: between rows
    const uint32_t *at;
    index_t row;
};

// As many rows of C by as many vectors as fill the registers: each word of A and each vector of B is loaded once.
static const int ROWS = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
static const int VECTORS = 4;
#else
static const int VECTORS = 2;
#endif

template <typename E, bool add, int M, int N>
static inline void tile(float *c, index_t sc, const Left &a, const Right &b, index_t k) {
    lanes totals[M][N];
#pragma GCC unroll 12
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) totals[i][j] = add ? load(c + i * sc + j * W) : lanes{};
    for (index_t p = 0; p < k; p++) {
        lanes right[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) right[j] = load((const float *)b.at + p * b.row + j * W);
#pragma GCC unroll 12
        for (int i = 0; i < M; i++)
#pragma GCC unroll 4
            for (int j = 0; j < N; j++)
                totals[i][j] = multiply_add(totals[i][j], a.at[i * a.row + p * a.word], right[j], E{});
    }
#pragma GCC unroll 12
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) store(c + i * sc + j * W, totals[i][j]);
}

// N vectors at most, `n` of them.
template <typename E, bool add, int M, int N = VECTORS>
static inline void some_vectors(float *c, index_t sc, const Left &a, const Right &b, index_t n, index_t k) {
    if constexpr (N > 1)
        if (n < N) return some_vectors<E, add, M, N - 1>(c, sc, a, b, n, k);
    tile<E, add, M, N>(c, sc, a, b, k);
}

// M rows at most, `m` of them; n is a multiple of W.
template <typename E, bool add, int M = ROWS>
static inline void product(float *c, index_t sc, const Left &a, Right b, index_t m, index_t n, index_t k) {
    if constexpr (M > 1)
        if (m < M) return product<E, add, M - 1>(c, sc, a, b, m, n, k);
    for (index_t left = n / W, count; left; left -= count, c += count * W, b.at += count * W) {
        count = left >= 2 * VECTORS ? VECTORS : left > VECTORS ? (left + 1) / 2 : left;  // the last two about alike
        some_vectors<E, add, M>(c, sc, a, b, count, k);
    }
}

// ---- how numbers are laid out for it

// Two rows of words become two that hold them in turns.
template <size_t... J>
static inline void interleave(words &low, words &high, words x, words y, std::index_sequence<J...>) {
#if __has_builtin(__builtin_shufflevector)
    low = __builtin_shufflevector(x, y, (J / 2 + J % 2 * W)...);
    high = __builtin_shufflevector(x, y, (W / 2 + J / 2 + J % 2 * W)...);
#else
    low = __builtin_shuffle(x, y, words{(uint32_t)(J / 2 + J % 2 * W)...});
    high = __builtin_shuffle(x, y, words{(uint32_t)(W / 2 + J / 2 + J % 2 * W)...});
#endif
}

// A square of W by W words, with its sides exchanged: each round turns the bits of row and lane together by one.
static inline void transpose(uint32_t *to, index_t st, const uint32_t *from, index_t sf) {
    words x[W], y[W];
#pragma GCC unroll 16
    for (index_t i = 0; i < W; i++) x[i] = (words)load((const float *)from + i * sf);
#pragma GCC unroll 4
    for (index_t round = 0; round < (W == 16 ? 4 : W == 8 ? 3 : 2); round++) {
#pragma GCC unroll 8
        for (index_t i = 0; i < W / 2; i++)
            interleave(y[2 * i], y[2 * i + 1], x[i], x[i + W / 2], std::make_index_sequence<W>{});
#pragma GCC unroll 16
        for (index_t i = 0; i < W; i++) x[i] = y[i];
    }
#pragma GCC unroll 16
    for (index_t i = 0; i < W; i++) store((float *)to + i * st, x[i]);
}

// Rows of x (rows, D), as words along D: (D / per word, stride). Their number is a multiple of W.
template <typename E> static void across(uint32_t *to, index_t stride, const E *x, index_t rows, index_t D) {
    const index_t deep = D / per_word<E>;
    const uint32_t *from = (const uint32_t *)x;
    for (index_t i = 0; i < rows; i += W, from += W * deep, to += W) {
        index_t p = 0;
        for (; p + W <= deep; p += W) transpose(to + p * stride, stride, from + p, deep);
        for (; p < deep; p++)
            for (index_t j = 0; j < W; j++) to[p * stride + j] = from[j * deep + p];
    }
}

// Rows of x (count, D), as words along the rows: (count / per word, wide); what is missing is zero.
template <typename E>
static void along(uint32_t *to, index_t wide, const E *x, index_t sx, index_t count, index_t D) {
    const index_t step = per_word<E>;
    for (index_t i = 0; i < count; i += step, to += wide) {
        const E *first = x + i * sx, *second = first + sx;
        const bool both = step == 2 && i + 1 < count;
        each_vector(D, [&](index_t d, auto part) {
            store(to + d, paired(load(first + d, part), both ? load(second + d, part) : lanes{}, E{}));
        });
    }
}

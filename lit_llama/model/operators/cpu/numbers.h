// Numbers as the kernels compute with them: W floats at a time, as many as a register holds, whatever is stored. Vector
// extensions of GCC and Clang, so that one source serves every processor.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef int64_t index_t;
struct bf16 { uint16_t bits; };

#if defined(__AVX512F__)
static const index_t W = 16;
#elif defined(__AVX__)
static const index_t W = 8;
#else
static const index_t W = 4;
#endif
typedef float lanes __attribute__((vector_size(4 * W)));
typedef int32_t integers __attribute__((vector_size(4 * W)));
typedef uint32_t words __attribute__((vector_size(4 * W)));
typedef uint16_t halves __attribute__((vector_size(2 * W)));

static inline lanes all(float x) { return lanes{} + x; }

static inline integers first_lanes() {  // 0, 1, 2, ...
    integers x;
    for (index_t j = 0; j < W; j++) x[j] = (int32_t)j;
    return x;
}

static inline lanes load(const float *x) {
    lanes y;
    memcpy(&y, x, sizeof y);
    return y;
}
static inline lanes load(const bf16 *x) {
    halves bits;
    memcpy(&bits, x, sizeof bits);
#if defined(__AVX512F__)  // one instruction, which GCC 12 does not find
    const words wide = (words)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(__AVX2__)
    const words wide = (words)_mm256_cvtepu16_epi32((__m128i)bits);
#else
    const words wide = __builtin_convertvector(bits, words);
#endif
    return (lanes)(wide << 16);
}

// The bits of E, in the upper part of each word: to nearest, ties to even; what is no number stays none.
static inline words rounded(lanes x, float) { return (words)x; }
static inline words rounded(lanes x, bf16) {
    const words bits = (words)x;
    return x == x ? bits + 0x7fff + ((bits >> 16) & 1) : words{} + 0x7fc00000;
}
static inline void store(uint32_t *to, words bits) { memcpy(to, &bits, sizeof bits); }
static inline void store(float *to, words bits) { memcpy(to, &bits, sizeof bits); }
static inline void store(bf16 *to, words bits) {
    const halves upper = __builtin_convertvector(bits >> 16, halves);
    memcpy(to, &upper, sizeof upper);
}
template <typename E> static inline void store(E *to, lanes x) { store(to, rounded(x, E{})); }

// The first `count` lanes, where a row ends, and all of them before; those beyond it are what is given.
template <typename E> static inline lanes load(const E *x, index_t count, float beyond = 0.0f) {
    if (count >= W) return load(x);
    E part[W];
    store(part, all(beyond));
    memcpy(part, x, (size_t)count * sizeof(E));
    return load(part);
}
template <typename E> static inline void store(E *to, lanes x, index_t count) {
    if (count >= W) return store(to, x);
    E part[W];
    store(part, x);
    memcpy(to, part, (size_t)count * sizeof(E));
}
static inline float load_one(float x) { return x; }
static inline float load_one(bf16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

// Calls body(j, count) for every vector of a row of n: `count` is its lanes, a constant wherever that is all W. Several
// at once, as each alone would mostly wait for its own results.
template <typename Body> static inline void each_vector(index_t n, Body body) {
    constexpr std::integral_constant<index_t, W> whole;
    index_t j = 0;
#pragma GCC unroll 4
    for (; j + W <= n; j += W) body(j, whole);
    if (j < n) body(j, n - j);
}

// What AVX-512 does in one instruction each, and compilers do not find: the larger and smaller of two (x where one is
// no number), the nearest whole number, and 2^n x.
#ifdef __AVX512F__
static inline lanes larger(lanes y, lanes x) { return (lanes)_mm512_max_ps((__m512)y, (__m512)x); }
static inline lanes smaller(lanes y, lanes x) { return (lanes)_mm512_min_ps((__m512)y, (__m512)x); }
static inline lanes nearest(lanes x) { return (lanes)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
static inline lanes scaled(lanes x, lanes n) { return (lanes)_mm512_scalef_ps((__m512)x, (__m512)n); }
#else
static inline lanes larger(lanes y, lanes x) { return y > x ? y : x; }
static inline lanes smaller(lanes y, lanes x) { return y < x ? y : x; }
static inline lanes nearest(lanes x) {  // of those above -256
    return __builtin_convertvector(__builtin_convertvector(x + 256.5f, integers) - 256, lanes);
}
static inline lanes scaled(lanes x, lanes n) {  // none below the smallest power
    const integers power = __builtin_convertvector(n, integers) + 127;
    return x * (lanes)((power > 0 ? power : integers{}) << 23);
}
#endif

// Of the lanes, by halves.
template <index_t N> struct Floats {
    typedef float type __attribute__((vector_size(4 * N)));
};
template <index_t N, typename Fold> static inline float folded(typename Floats<N>::type x, Fold fold) {
    if constexpr (N == 2) {
        return fold(x[0], x[1]);
    } else {
        typename Floats<N / 2>::type half[2];
        memcpy(half, &x, sizeof half);
        return folded<N / 2>(fold(half[0], half[1]), fold);
    }
}
static inline float sum(lanes x) {
    return folded<W>(x, [](auto a, auto b) { return a + b; });
}
static inline float largest(lanes x) {
    return folded<W>(x, [](auto a, auto b) { return a > b ? a : b; });
}

// Of part(j, count) over a row, in several totals that do not wait for each other.
template <typename Part> static inline float sum_of(index_t n, Part part) {
    constexpr std::integral_constant<index_t, W> whole;
    lanes totals[4] = {};
    index_t j = 0;
    for (; j + 4 * W <= n; j += 4 * W)
#pragma GCC unroll 4
        for (index_t i = 0; i < 4; i++) totals[i] += part(j + i * W, whole);
    for (; j + W <= n; j += W) totals[0] += part(j, whole);
    if (j < n) totals[1] += part(j, n - j);
    return sum(totals[0] + totals[1] + (totals[2] + totals[3]));
}
// e^x within 2e-7 of its value, 0 for what is below all floats: 2^n e^r with r below half of ln 2 and a polynomial
// (Cephes, expf).
static inline lanes exponential(lanes x) {
    x = larger(all(-104.0f), smaller(all(88.3f), x));
    const lanes n = nearest(x * 1.44269504088896341f);
    const lanes r = x - n * 0.69314718055994531f, square = r * r;
    const lanes fifth = 1.9875691500e-4f * r + 1.3981999507e-3f;
    const lanes third = 8.3334519073e-3f * r + 4.1665795894e-2f;
    const lanes first = 1.6666665459e-1f * r + 5.0000001201e-1f;
    const lanes p = (fifth * square + third) * square + first;
    return scaled(p * square + (r + 1.0f), n);
}

// Has rows brought into the cache that are wanted soon.
template <typename E> static inline void prefetch(const E *x, index_t sx, index_t rows, index_t columns) {
    for (index_t i = 0; i < rows; i++)
        for (index_t j = 0; j < columns; j += 64 / (index_t)sizeof(E)) __builtin_prefetch(x + i * sx + j);
}

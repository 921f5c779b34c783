// The narrow products of low-rank updates on a CPU: one side has a few columns, so that what counts is to read the
// other side once. kernels.py compiles and calls it; what it computes is in narrow.py.
//
// Letters: T rows (tokens), n columns of the wide side, R of the narrow one; s* strides between rows, in elements.

#include <algorithm>

#include "exported.h"
#include "memory.h"
#include "numbers.h"
#include "tiles.h"

static const index_t MOST = 64;  // columns of the narrow side, see narrow.py

// ---- u (T, R) = x (T, n) times what has R columns, laid out as words along n: `right` (n / per word, wide)

static const int TALL = 2 * ROWS;  // rows at a time: where R is one vector, fewer would wait for their own results

template <typename E>
static void project_onto(E *u, index_t su, const E *x, index_t sx, const uint32_t *right, index_t T, index_t n,
                         index_t R) {
    const index_t wide = up(R, W), step = per_word<E>;
#pragma omp parallel for schedule(static)
    for (index_t t = 0; t < T; t += TALL) {
        const index_t rows = std::min<index_t>(TALL, T - t);
        float found[TALL * MOST];
        const Left left{(const uint32_t *)(x + t * sx), sx / step, 1};
        if (rows == TALL && wide == W) {
            tile<E, false, TALL, 1>(found, wide, left, {right, wide}, n / step);
        } else {
            for (index_t i = 0; i < rows; i += ROWS)
                product<E, false>(found + i * wide, wide, {left.at + i * left.row, left.row, 1}, {right, wide},
                                  std::min<index_t>(ROWS, rows - i), wide, n / step);
        }
        for (index_t i = 0; i < rows; i++)
            each_vector(R, [&](index_t r, auto count) {
                store(u + (t + i) * su + r, load(found + i * wide + r), count);
            });
    }
}

// ... times a' of a (R, n).
template <typename E>
static void project(E *u, index_t su, const E *x, index_t sx, const E *a, index_t sa, index_t T, index_t n, index_t R) {
    const index_t wide = up(R, W);
    const Memory rows(1, wide * n), right(1, wide * n);
    E *copy = (E *)rows[0];
    for (index_t r = 0; r < wide; r++)
        if (r < R) memcpy(copy + r * n, a + r * sa, (size_t)n * sizeof(E));
        else memset(copy + r * n, 0, (size_t)n * sizeof(E));
    across((uint32_t *)right[0], wide, copy, wide, n);
    project_onto(u, su, x, sx, (const uint32_t *)right[0], T, n, R);
}

// ... times b (n, R).
template <typename E>
static void project_back(E *u, index_t su, const E *x, index_t sx, const E *b, index_t sb, index_t T, index_t n,
                         index_t R) {
    const index_t wide = up(R, W);
    const Memory right(1, wide * n);
    along((uint32_t *)right[0], wide, b, sb, n, R);
    project_onto(u, su, x, sx, (const uint32_t *)right[0], T, n, R);
}

// ---- sums (R, n) = u' x of u (T, R) and x (T, n), in float32

static const index_t TOKENS = 64;  // whose columns stay in the cache while all of u passes over them
static const int NARROW = 8;       // columns of u at a time

// Of some tokens, M columns of u and N vectors of x, added to.
template <typename E, int M, int N, typename Count>
static inline void add_tile(float *sums, index_t ss, const Left &u, const E *x, index_t sx, index_t T, Count count) {
    lanes totals[M][N];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 2
        for (int j = 0; j < N; j++) totals[i][j] = load(sums + i * ss + j * W, count - j * W);
    for (index_t t = 0, p = 0; t < T; t += per_word<E>, p++) {
        lanes right[N];
        const E *first = x + t * sx, *second = t + 1 < T ? first + sx : first;  // of which u has 0 where there is none
#pragma GCC unroll 2
        for (int j = 0; j < N; j++) right[j] = (lanes)paired_rows(first + j * W, second + j * W, count - j * W);
#pragma GCC unroll 8
        for (int i = 0; i < M; i++)
#pragma GCC unroll 2
            for (int j = 0; j < N; j++)
                totals[i][j] = multiply_add(totals[i][j], u.at[i * u.row + p * u.word], right[j], E{});
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 2
        for (int j = 0; j < N; j++) store(sums + i * ss + j * W, totals[i][j], count - j * W);
}

template <typename E, int M = NARROW>
static inline void add_columns(float *sums, index_t ss, const Left &u, const E *x, index_t sx, index_t T, index_t n,
                               index_t R) {
    if constexpr (M > 1)
        if (R < M) return add_columns<E, M - 1>(sums, ss, u, x, sx, T, n, R);
    constexpr std::integral_constant<index_t, 2 * W> whole;
    index_t j = 0;
    for (; j + whole <= n; j += whole) add_tile<E, M, 2>(sums + j, ss, u, x + j, sx, T, whole);
    for (; j < n; j += W) add_tile<E, M, 1>(sums + j, ss, u, x + j, sx, T, std::min(W, n - j));
}

template <typename E>
static void outer(float *sums, index_t ss, const E *u, index_t su, const E *x, index_t sx, index_t T, index_t n,
                  index_t R) {
    const index_t wide = up(R, W), step = per_word<E>, groups = up(n, 2 * W) / (2 * W);
    const Memory left(1, up(T, step) * wide);
    uint32_t *words = (uint32_t *)left[0];
    along(words, wide, u, su, T, R);
#pragma omp parallel
    {
        // Neighbours to one thread; what it sums up does not depend on how many there are.
        const index_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        const index_t low = groups * thread / threads * 2 * W, high = std::min(groups * (thread + 1) / threads * 2 * W, n);
        for (index_t r = 0; r < R; r++) std::fill(sums + r * ss + low, sums + r * ss + std::max(low, high), 0.0f);
        for (index_t t = 0; t < T && low < high; t += TOKENS)
            for (index_t r = 0; r < R; r += NARROW)
                add_columns<E>(sums + r * ss + low, ss, {words + t / step * wide + r, 1, wide}, x + t * sx + low, sx,
                               std::min(TOKENS, T - t), high - low, std::min<index_t>(NARROW, R - r));
    }
}

EXPORT(project)
EXPORT(project_back)
EXPORT(outer)

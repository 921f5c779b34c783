// What lies between the matrix products of a decoder layer, on a CPU: each function is a few passes over rows that
// stay in the cache, computed in float32 whatever is stored. kernels.py compiles and calls it; the plain twin of each
// function, and what it computes, is in pointwise.py and attention.py.
//
// Letters: T rows (tokens), n columns; s* strides between rows, in elements.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef int64_t index_t;
struct bf16 { uint16_t bits; };

static inline float load(float x) { return x; }
static inline float load(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
static inline void store(float *to, float x) { *to = x; }
static inline void store(bf16 *to, float x) {  // to nearest, ties to even; what is no number stays none
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to->bits = x == x ? (uint16_t)rounded : 0x7fc0;
}

// Compilers make vectors of loops over numbers of one size, and of loops that only convert; not always of both at once.
static const index_t TILE = 128;
template <typename E> static inline void widen(float *__restrict to, const E *__restrict from, index_t n) {
    for (index_t j = 0; j < n; j++) to[j] = load(from[j]);
}
template <typename E> static inline void narrow(E *__restrict to, const float *__restrict from, index_t n) {
    for (index_t j = 0; j < n; j++) store(to + j, from[j]);
}
static inline index_t tile_of(index_t left) { return left < TILE ? left : TILE; }

// e^x within 2e-7 of its value, 0 below 1e-38: 2^n e^r with r below half of ln 2 and a polynomial (Cephes, expf).
static inline float exponential(float x) {
    const float given = x;
    x = x > 88.3f ? 88.3f : x;
    x = x < -87.3f ? -87.3f : x;
    float n = __builtin_nearbyintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    float y = p * r * r + r + 1.0f;
    int32_t power = ((int32_t)n + 127) * (1 << 23);
    float scale;
    memcpy(&scale, &power, 4);
    return given < -87.3f ? 0.0f : y * scale;
}

template <typename E>
static inline float largest(const E *x, index_t n) {  // lane by lane, as compilers do not reorder comparisons
    const index_t lanes = 32;
    float tops[lanes], values[lanes], top = load(x[0]);
    for (index_t j = 0; j < lanes; j++) tops[j] = top;
    index_t at = 0;
    for (; at + lanes <= n; at += lanes) {
        widen(values, x + at, lanes);
        for (index_t j = 0; j < lanes; j++) tops[j] = values[j] > tops[j] ? values[j] : tops[j];
    }
    for (; at < n; at++) top = load(x[at]) > top ? load(x[at]) : top;
    for (index_t j = 0; j < lanes; j++) top = tops[j] > top ? tops[j] : top;
    return top;
}

// ---- norms

template <typename E>
static float inverse_rms(const E *x, index_t n, float eps) {
    float squares = 0;
    for (index_t j = 0; j < n; j++) squares += load(x[j]) * load(x[j]);
    return 1.0f / __builtin_sqrtf(squares / (float)n + eps);
}

template <typename E>
static void norm(E *out, index_t so, const E *x, index_t sx, const E *weight, index_t T, index_t n, float eps) {
#pragma omp parallel for schedule(static)
    for (index_t t = 0; t < T; t++) {
        const E *row = x + t * sx;
        E *to = out + t * so;
        float r = inverse_rms(row, n, eps);
        for (index_t j = 0; j < n; j++) store(to + j, load(row[j]) * r * load(weight[j]));
    }
}

template <typename E>
static void norm_backward(E *dx, index_t sdx, E *out, index_t so, const E *dy, index_t sdy, const E *x, index_t sx,
                          const E *weight, const E *residual, index_t sr, index_t T, index_t n, float eps) {
#pragma omp parallel for schedule(static)
    for (index_t t = 0; t < T; t++) {
        const E *row = x + t * sx, *gradient = dy + t * sdy, *rest = residual + t * sr;
        E *to = dx + t * sdx, *again = out + t * so;
        float r = inverse_rms(row, n, eps), dot = 0;
        for (index_t j = 0; j < n; j++) dot += load(gradient[j]) * load(weight[j]) * load(row[j]);
        float c = dot * r * r * r / (float)n;
        for (index_t j = 0; j < n; j++) {
            float value = load(row[j]), w = load(weight[j]);
            store(again + j, value * r * w);
            store(to + j, load(rest[j]) + load(gradient[j]) * w * r - value * c);
        }
    }
}

// ---- rotary positions; out may be x

template <typename E>
static void rotate(E *out, index_t so, const E *x, index_t sx, const E *cosine, const E *sine, index_t T, index_t heads, index_t half,
                   float sign) {
#pragma omp parallel for schedule(static)
    for (index_t t = 0; t < T; t++) {
        const E *c = cosine + t * half, *s = sine + t * half;
        for (index_t h = 0; h < heads; h++) {
            const E *left = x + t * sx + h * 2 * half, *right = left + half;
            E *to = out + t * so + h * 2 * half;
            for (index_t at = 0; at < half; at += TILE) {
                const index_t m = tile_of(half - at);
                float a[TILE], b[TILE], cj[TILE], sj[TILE];
                widen(a, left + at, m), widen(b, right + at, m), widen(cj, c + at, m), widen(sj, s + at, m);
                for (index_t j = 0; j < m; j++) {
                    const float turned = a[j] * cj[j] - sign * b[j] * sj[j];
                    b[j] = b[j] * cj[j] + sign * a[j] * sj[j];
                    a[j] = turned;
                }
                narrow(to + at, a, m), narrow(to + half + at, b, m);
            }
        }
    }
}

// ---- the gate of the MLP

template <typename E>
static void swiglu(E *out, index_t so, const E *gate_up, index_t sg, index_t T, index_t n) {
#pragma omp parallel for schedule(static)
    for (index_t t = 0; t < T; t++) {
        const E *gate = gate_up + t * sg, *up = gate + n;
        E *to = out + t * so;
        for (index_t j = 0; j < n; j++) {
            float g = load(gate[j]);
            store(to + j, g / (1.0f + exponential(-g)) * load(up[j]));
        }
    }
}

template <typename E>
static void swiglu_backward(E *d_gate_up, index_t sd, E *out, index_t so, const E *gate_up, index_t sg, index_t T,
                            index_t n) {
#pragma omp parallel for schedule(static)
    for (index_t t = 0; t < T; t++) {
        const E *gate = gate_up + t * sg, *up = gate + n;
        E *d_gate = d_gate_up + t * sd, *d_up = d_gate + n, *io = out + t * so;
        for (index_t at = 0; at < n; at += TILE) {
            const index_t m = tile_of(n - at);
            float g[TILE], u[TILE], d[TILE], silu[TILE];
            widen(g, gate + at, m), widen(u, up + at, m), widen(d, io + at, m);
            for (index_t j = 0; j < m; j++) {
                const float sigmoid = 1.0f / (1.0f + exponential(-g[j]));
                silu[j] = g[j] * sigmoid;
                g[j] = d[j] * u[j] * sigmoid * (1.0f + g[j] * (1.0f - sigmoid));
                d[j] *= silu[j];
                u[j] *= silu[j];
            }
            narrow(d_gate + at, g, m), narrow(d_up + at, d, m), narrow(io + at, u, m);
        }
    }
}

// ---- cross entropy: logits become `factor` times their gradient

template <typename E>
static void cross_entropy(float *loss, E *logits, index_t sl, const index_t *targets, index_t T, index_t n,
                          float factor) {
#pragma omp parallel for schedule(static)
    for (index_t t = 0; t < T; t++) {
        E *row = logits + t * sl;
        const float top = largest(row, n), right = load(row[targets[t]]);
        float sum = 0;
        float e[TILE];
        for (index_t at = 0; at < n; at += TILE) {
            const index_t m = tile_of(n - at);
            widen(e, row + at, m);
            for (index_t j = 0; j < m; j++) sum += exponential(e[j] - top);
        }
        loss[t] = __builtin_logf(sum) + top - right;
        if (factor == 0) continue;
        const float scale = factor / sum;
        for (index_t at = 0; at < n; at += TILE) {
            const index_t m = tile_of(n - at);
            widen(e, row + at, m);
            for (index_t j = 0; j < m; j++) e[j] = exponential(e[j] - top) * scale;
            narrow(row + at, e, m);
        }
        store(row + targets[t], exponential(right - top) * scale - factor);
    }
}

// ---- attention
//
// A word is what one multiplication of a lane takes: a float, or two neighbours of bfloat16 along the dimension that
// is summed over. Products are C (m, n) = A (m, k) B (k, n) with A read word by word and B a row of words a time.

typedef float lanes __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
static const index_t W = 16;  // lanes

static inline lanes multiply_add(lanes sum, uint32_t a, const uint32_t *b, float) {
    lanes x;
    float y;
    memcpy(&x, b, 64);
    memcpy(&y, &a, 4);
    return sum + y * x;
}
static inline lanes multiply_add(lanes sum, uint32_t a, const uint32_t *b, bf16) {
#ifdef __AVX512BF16__
    return (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)_mm512_loadu_si512(b));
#else
    words x;
    memcpy(&x, b, 64);
    uint32_t low = a << 16, high = a & 0xffff0000u;
    float l, h;
    memcpy(&l, &low, 4);
    memcpy(&h, &high, 4);
    return sum + l * (lanes)(x << 16) + h * (lanes)(x & 0xffff0000u);
#endif
}

// A tile of M rows and N vectors of C, set or added to.
template <typename E, int M, int N>
static inline void tile(float *c, index_t sc, const uint32_t *a, index_t am, index_t ak, const uint32_t *b, index_t sb,
                        index_t k, bool add) {
    lanes sum[M][N];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            if (add) memcpy(&sum[i][j], c + i * sc + j * W, 64);
            else sum[i][j] = lanes{};
        }
    for (index_t p = 0; p < k; p++)
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) sum[i][j] = multiply_add(sum[i][j], a[i * am + p * ak], b + p * sb + j * W, E{});
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) memcpy(c + i * sc + j * W, &sum[i][j], 64);
}

template <typename E, int M>
static inline void stripe(float *c, index_t sc, const uint32_t *a, index_t am, index_t ak, const uint32_t *b,
                          index_t sb, index_t n, index_t k, bool add) {
    index_t j = 0;
    for (; j + 4 * W <= n; j += 4 * W) tile<E, M, 4>(c + j, sc, a, am, ak, b + j, sb, k, add);
    for (; j + 2 * W <= n; j += 2 * W) tile<E, M, 2>(c + j, sc, a, am, ak, b + j, sb, k, add);
    for (; j < n; j += W) tile<E, M, 1>(c + j, sc, a, am, ak, b + j, sb, k, add);
}

// n is a multiple of W.
template <typename E>
static void product(float *c, index_t sc, const uint32_t *a, index_t am, index_t ak, const uint32_t *b, index_t sb,
                    index_t m, index_t n, index_t k, bool add) {
    index_t i = 0;
    for (; i + 4 <= m; i += 4) stripe<E, 4>(c + i * sc, sc, a + i * am, am, ak, b, sb, n, k, add);
    for (; i < m; i++) stripe<E, 1>(c + i * sc, sc, a + i * am, am, ak, b, sb, n, k, add);
}

static inline index_t up(index_t x, index_t to) { return (x + to - 1) / to * to; }
template <typename E> static inline index_t per_word() { return 4 / (index_t)sizeof(E); }

static inline uint32_t word(float x, float) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
static inline uint32_t word(bf16 x, bf16 y) { return (uint32_t)x.bits | (uint32_t)y.bits << 16; }

// Rows of x (count, D), as words along D: (D / per word, count), columns up to `width` zero.
template <typename E>
static void across(uint32_t *to, index_t width, const E *x, index_t sx, index_t count, index_t D) {
    index_t deep = D / per_word<E>();
    for (index_t p = 0; p < deep; p++) {
        for (index_t j = 0; j < count; j++) memcpy(to + p * width + j, x + j * sx + p * per_word<E>(), 4);
        for (index_t j = count; j < width; j++) to[p * width + j] = 0;
    }
}

// Rows of x (count, D), as words along the rows: (count / per word, wide); what is missing is zero.
template <typename E>
static void along(uint32_t *to, index_t wide, const E *x, index_t sx, index_t count, index_t D) {
    const E zero = {};
    const index_t step = per_word<E>();
    for (index_t p = 0; p * step < count; p++) {
        const E *__restrict first = x + p * step * sx, *__restrict second = first + sx;
        uint32_t *__restrict row = to + p * wide;
        if (step == 2 && p * step + 1 < count)
            for (index_t d = 0; d < D; d++) row[d] = word(first[d], second[d]);
        else
            for (index_t d = 0; d < D; d++) row[d] = word(first[d], zero);
        for (index_t d = D; d < wide; d++) row[d] = 0;
    }
}

template <typename E>
struct Heads {  // of one packed batch
    const E *q, *k, *v;
    index_t sq, sk, sv;  // between tokens
    index_t H, G, D;
    float scale;
    index_t window;  // keys that a query sees
};

struct Samples {  // a sample may go on from another one, its parent, whose tokens it sees before its own
    const index_t *offsets, *parents;
    index_t count;
    index_t first(index_t s) const { return offsets[s]; }
    index_t length(index_t s) const { return offsets[s + 1] - offsets[s]; }
    index_t before(index_t s) const { return parents[s] < 0 ? 0 : length(parents[s]); }
};

// Rows of one head of a sample (before + length, D), its parent's first.
template <typename E>
static void gather(E *to, const E *x, index_t sx, Samples samples, index_t s, index_t D) {
    const index_t before = samples.before(s), length = samples.length(s);
    for (index_t i = 0; i < before; i++) memcpy(to + i * D, x + (samples.first(samples.parents[s]) + i) * sx, D * sizeof(E));
    for (index_t i = 0; i < length; i++) memcpy(to + (before + i) * D, x + (samples.first(s) + i) * sx, D * sizeof(E));
}

static const index_t QUERIES = 64;

// Scores of some queries against keys [low, low + width), masked: what is not seen becomes -inf.
template <typename E>
static void scores(float *s, index_t width, const E *q, index_t sq, const uint32_t *keys, index_t keys_width, index_t D,
                   index_t at, index_t count, index_t low, float scale, index_t window) {
    const index_t deep = D / per_word<E>();
    product<E>(s, width, (const uint32_t *)q, sq / per_word<E>(), 1, keys + low, keys_width, count, width, deep, false);
    const float never = -__builtin_inff();
    for (index_t i = 0; i < count; i++) {
        float *row = s + i * width;
        const index_t last = at + i - low, before = last - window;  // seen are those between
        for (index_t j = 0; j < width; j++) row[j] *= scale;
        for (index_t j = last + 1; j < width; j++) row[j] = never;
        for (index_t j = 0; j <= before; j++) row[j] = never;
    }
}

struct Block {  // queries of a sample, from the place `at` among the keys on, and the keys that they see
    index_t at, count, low, width;
};
static inline Block block(index_t start, index_t L, index_t before, index_t window) {
    const index_t count = L - start < QUERIES ? L - start : QUERIES, at = before + start;
    index_t low = at - window + 1;
    low = low > 0 ? low / W * W : 0;
    return {at, count, low, up(at + count - low, W)};
}

static inline float *scratch(index_t floats) { return (float *)aligned_alloc(64, (size_t)up(floats * 4, 64)); }

template <typename E>
static void attend(E *y, index_t sy, float *lse, Heads<E> x, Samples samples) {
    const index_t R = x.H / x.G, D = x.D, wide = up(D, W), step = per_word<E>();
#pragma omp parallel for schedule(dynamic)
    for (index_t task = 0; task < samples.count * x.G; task++) {
        const index_t sample = task / x.G, g = task % x.G;
        const index_t first = samples.first(sample), L = samples.length(sample), before = samples.before(sample);
        const index_t width = up(before + L, W);
        float *s = scratch(QUERIES * width), *o = scratch(QUERIES * wide);
        uint32_t *keys = (uint32_t *)scratch(D * width), *values = (uint32_t *)scratch(width * wide);
        E *p = (E *)scratch(QUERIES * width), *rows = (E *)scratch(width * D);
        gather(rows, x.k + g * D, x.sk, samples, sample, D);
        across<E>(keys, width, rows, D, before + L, D);
        gather(rows, x.v + g * D, x.sv, samples, sample, D);
        along<E>(values, wide, rows, D, before + L, D);
        for (index_t h = g * R; h < (g + 1) * R; h++)
            for (index_t start = 0; start < L; start += QUERIES) {
                const Block b = block(start, L, before, x.window);
                const E *q = x.q + (first + start) * x.sq + h * D;
                scores<E>(s, b.width, q, x.sq, keys, width, D, b.at, b.count, b.low, x.scale, x.window);
                for (index_t i = 0; i < b.count; i++) {
                    float *__restrict row = s + i * b.width, sum = 0;
                    const float top = largest(row, b.width);
                    for (index_t j = 0; j < b.width; j++) row[j] = exponential(row[j] - top);
                    for (index_t j = 0; j < b.width; j++) sum += row[j];
                    narrow(p + i * b.width, row, b.width);
                    lse[(first + start + i) * x.H + h] = __builtin_logf(sum) + top;
                    row[0] = 1.0f / sum;
                }
                // Keys beyond the sample have no value; an odd last one has its partner in a word of its own.
                const index_t deep = up(b.at + b.count - b.low, step) / step;
                product<E>(o, wide, (const uint32_t *)p, b.width / step, 1, values + b.low / step * wide, wide, b.count,
                           wide, deep, false);
                for (index_t i = 0; i < b.count; i++)
                    for (index_t d = 0; d < D; d++)
                        store(y + (first + start + i) * sy + h * D + d, o[i * wide + d] * s[i * b.width]);
            }
        free(s), free(o), free(keys), free(values), free(p), free(rows);
    }
}

// Gradients of keys and values that samples share: each has left its part in a room of (before, 2, D) float32, and the
// parent its own; they are added up in the order of the samples.
template <typename E>
static void sum_shared(E *dk, index_t sdk, E *dv, index_t sdv, float *const *rooms, Heads<E> x, Samples samples) {
    const index_t D = x.D;
#pragma omp parallel for schedule(static)
    for (index_t task = 0; task < samples.count * x.G; task++) {
        const index_t parent = task / x.G, g = task % x.G;
        if (!rooms[task] || samples.parents[parent] >= 0) continue;
        float *total = rooms[task];
        for (index_t s = 0; s < samples.count; s++)
            if (samples.parents[s] == parent)
                for (index_t j = 0; j < samples.length(parent) * 2 * D; j++) total[j] += rooms[s * x.G + g][j];
        for (index_t i = 0; i < samples.length(parent); i++) {
            narrow(dk + (samples.first(parent) + i) * sdk + g * D, total + i * 2 * D, D);
            narrow(dv + (samples.first(parent) + i) * sdv + g * D, total + (i * 2 + 1) * D, D);
        }
    }
}

template <typename E>
static void attend_backward(E *dq, index_t sdq, E *dk, index_t sdk, E *dv, index_t sdv, const E *dy, index_t sdy,
                            const E *y, index_t sy, const float *lse, Heads<E> x, Samples samples) {
    const index_t R = x.H / x.G, D = x.D, wide = up(D, W), step = per_word<E>();
    float **rooms = (float **)calloc((size_t)(samples.count * x.G), sizeof(float *));
    for (index_t s = 0; s < samples.count; s++)
        for (index_t g = 0; g < x.G && samples.parents[s] >= 0; g++) {
            const index_t shared = samples.before(s) * 2 * D, parent = samples.parents[s] * x.G + g;
            rooms[s * x.G + g] = scratch(shared);
            if (!rooms[parent]) rooms[parent] = scratch(shared);
        }
#pragma omp parallel for schedule(dynamic)
    for (index_t task = 0; task < samples.count * x.G; task++) {
        const index_t sample = task / x.G, g = task % x.G;
        const index_t first = samples.first(sample), L = samples.length(sample), before = samples.before(sample);
        const index_t all = before + L, width = up(all, W);
        float *s = scratch(QUERIES * width), *ds = scratch(QUERIES * width), *o = scratch(QUERIES * wide);
        float *sum_k = scratch(width * wide), *sum_v = scratch(width * wide);
        uint32_t *keys = (uint32_t *)scratch(D * width), *values = (uint32_t *)scratch(D * width);
        uint32_t *key_rows = (uint32_t *)scratch(width * wide);
        uint32_t *q_rows = (uint32_t *)scratch(QUERIES * wide), *dy_rows = (uint32_t *)scratch(QUERIES * wide);
        E *rounded = (E *)scratch(QUERIES * width), *rows = (E *)scratch(width * D);
        uint32_t *p_rows = (uint32_t *)scratch(QUERIES * width), *ds_rows = (uint32_t *)scratch(QUERIES * width);
        gather(rows, x.v + g * D, x.sv, samples, sample, D);
        across<E>(values, width, rows, D, all, D);
        gather(rows, x.k + g * D, x.sk, samples, sample, D);
        across<E>(keys, width, rows, D, all, D);
        along<E>(key_rows, wide, rows, D, all, D);
        memset(sum_k, 0, (size_t)(width * wide) * 4);
        memset(sum_v, 0, (size_t)(width * wide) * 4);
        for (index_t h = g * R; h < (g + 1) * R; h++)
            for (index_t start = 0; start < L; start += QUERIES) {
                const Block b = block(start, L, before, x.window);
                const E *q = x.q + (first + start) * x.sq + h * D, *gradient = dy + (first + start) * sdy + h * D;
                const E *result = y + (first + start) * sy + h * D;
                scores<E>(s, b.width, q, x.sq, keys, width, D, b.at, b.count, b.low, x.scale, x.window);
                product<E>(ds, b.width, (const uint32_t *)gradient, sdy / step, 1, values + b.low, width, b.count,
                           b.width, D / step, false);
                for (index_t i = 0; i < b.count; i++) {
                    float *__restrict p = s + i * b.width, *__restrict d = ds + i * b.width, delta = 0;
                    for (index_t j = 0; j < D; j++) delta += load(gradient[i * sdy + j]) * load(result[i * sy + j]);
                    const float top = lse[(first + start + i) * x.H + h];
                    for (index_t j = 0; j < b.width; j++) p[j] = exponential(p[j] - top);
                    for (index_t j = 0; j < b.width; j++) d[j] = p[j] * (d[j] - delta);
                    narrow(rounded + i * b.width, d, b.width);
                }
                const index_t seen = b.at + b.count - b.low, deep = up(seen, step) / step;
                product<E>(o, wide, (const uint32_t *)rounded, b.width / step, 1, key_rows + b.low / step * wide, wide,
                           b.count, wide, deep, false);
                for (index_t i = 0; i < b.count; i++)
                    for (index_t d = 0; d < D; d++)
                        store(dq + (first + start + i) * sdq + h * D + d, o[i * wide + d] * x.scale);
                along<E>(ds_rows, b.width, rounded, b.width, b.count, b.width);
                narrow(rounded, s, b.count * b.width);
                along<E>(p_rows, b.width, rounded, b.width, b.count, b.width);
                along<E>(q_rows, wide, q, x.sq, b.count, D);
                along<E>(dy_rows, wide, gradient, sdy, b.count, D);
                const index_t pairs = up(b.count, step) / step;
                product<E>(sum_k + b.low * wide, wide, ds_rows, 1, b.width, q_rows, wide, seen, wide, pairs, true);
                product<E>(sum_v + b.low * wide, wide, p_rows, 1, b.width, dy_rows, wide, seen, wide, pairs, true);
            }
        for (index_t i = 0; i < width * wide; i++) sum_k[i] *= x.scale;
        const index_t shared = before ? before : rooms[task] ? L : 0;
        for (index_t i = 0; i < shared; i++) {
            memcpy(rooms[task] + i * 2 * D, sum_k + i * wide, (size_t)D * 4);
            memcpy(rooms[task] + (i * 2 + 1) * D, sum_v + i * wide, (size_t)D * 4);
        }
        for (index_t i = shared; i < all; i++) {
            narrow(dk + (first + i - before) * sdk + g * D, sum_k + i * wide, D);
            narrow(dv + (first + i - before) * sdv + g * D, sum_v + i * wide, D);
        }
        free(s), free(ds), free(o), free(sum_k), free(sum_v), free(keys), free(values), free(key_rows);
        free(q_rows), free(dy_rows), free(rounded), free(rows), free(p_rows), free(ds_rows);
    }
    sum_shared(dk, sdk, dv, sdv, rooms, x, samples);
    for (index_t task = 0; task < samples.count * x.G; task++) free(rooms[task]);
    free(rooms);
}

// ---- what is called: the same functions for float32 and bfloat16

#define FUNCTIONS(E, NAME)                                                                                             \
    extern "C" void norm_##NAME(E *out, index_t so, const E *x, index_t sx, const E *w, index_t T, index_t n,           \
                                float eps) {                                                                           \
        norm<E>(out, so, x, sx, w, T, n, eps);                                                                         \
    }                                                                                                                  \
    extern "C" void norm_backward_##NAME(E *dx, index_t sdx, E *out, index_t so, const E *dy, index_t sdy, const E *x, \
                                         index_t sx, const E *w, const E *r, index_t sr, index_t T, index_t n,         \
                                         float eps) {                                                                  \
        norm_backward<E>(dx, sdx, out, so, dy, sdy, x, sx, w, r, sr, T, n, eps);                                       \
    }                                                                                                                  \
    extern "C" void rotate_##NAME(E *out, index_t so, const E *x, index_t sx, const E *c, const E *s, index_t T,       \
                                  index_t heads, index_t half, float sign) {                                           \
        rotate<E>(out, so, x, sx, c, s, T, heads, half, sign);                                                         \
    }                                                                                                                  \
    extern "C" void swiglu_##NAME(E *out, index_t so, const E *gate_up, index_t sg, index_t T, index_t n) {            \
        swiglu<E>(out, so, gate_up, sg, T, n);                                                                         \
    }                                                                                                                  \
    extern "C" void swiglu_backward_##NAME(E *d, index_t sd, E *out, index_t so, const E *gate_up, index_t sg,         \
                                           index_t T, index_t n) {                                                     \
        swiglu_backward<E>(d, sd, out, so, gate_up, sg, T, n);                                                         \
    }                                                                                                                  \
    extern "C" void cross_entropy_##NAME(float *loss, E *logits, index_t sl, const index_t *targets, index_t T,        \
                                         index_t n, float factor) {                                                    \
        cross_entropy<E>(loss, logits, sl, targets, T, n, factor);                                                   \
    }                                                                                                                  \
    extern "C" void attend_##NAME(E *y, index_t sy, float *lse, const E *q, index_t sq, const E *k, index_t sk,        \
                                  const E *v, index_t sv, index_t H, index_t G, index_t D, float scale,                \
                                  index_t window, const index_t *offsets, const index_t *parents, index_t samples) {   \
        attend<E>(y, sy, lse, {q, k, v, sq, sk, sv, H, G, D, scale, window}, {offsets, parents, samples});             \
    }                                                                                                                  \
    extern "C" void attend_backward_##NAME(                                                                            \
        E *dq, index_t sdq, E *dk, index_t sdk, E *dv, index_t sdv, const E *dy, index_t sdy, const E *y, index_t sy,  \
        const float *lse, const E *q, index_t sq, const E *k, index_t sk, const E *v, index_t sv, index_t H,           \
        index_t G, index_t D, float scale, index_t window, const index_t *offsets, const index_t *parents,             \
        index_t samples) {                                                                                             \
        attend_backward<E>(dq, sdq, dk, sdk, dv, sdv, dy, sdy, y, sy, lse,                                             \
                           {q, k, v, sq, sk, sv, H, G, D, scale, window}, {offsets, parents, samples});                \
    }

FUNCTIONS(float, float32)
FUNCTIONS(bf16, bfloat16)

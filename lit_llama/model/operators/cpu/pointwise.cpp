// What lies between the matrix products of a decoder layer, on a CPU: each function is a few passes over rows that
// stay in the cache, computed in float32 whatever is stored. kernels.py compiles and calls it; the plain twin of each
// function, and what it computes, is in pointwise.py.
//
// Letters: T rows (tokens), n columns; s* strides between rows, in elements.

#include "exported.h"
#include "numbers.h"

// ---- norms

template <typename E> static float inverse_rms(const E *x, index_t n, float eps) {
    const float squares = sum_of(n, [&](index_t j, auto count) {
        const lanes value = load(x + j, count);
        return value * value;
    });
    return 1.0f / __builtin_sqrtf(squares / (float)n + eps);
}

template <typename E>
static void norm(E *out, index_t so, const E *x, index_t sx, const E *weight, index_t T, index_t n, float eps) {
#pragma omp parallel for schedule(static)
    for (index_t t = 0; t < T; t++) {
        const E *row = x + t * sx;
        E *to = out + t * so;
        const float r = inverse_rms(row, n, eps);
        each_vector(n, [&](index_t j, auto count) {
            store(to + j, load(row + j, count) * r * load(weight + j, count), count);
        });
    }
}

template <typename E>
static void norm_backward(E *dx, index_t sdx, E *out, index_t so, const E *dy, index_t sdy, const E *x, index_t sx,
                          const E *weight, const E *residual, index_t sr, index_t T, index_t n, float eps) {
#pragma omp parallel for schedule(static)
    for (index_t t = 0; t < T; t++) {
        const E *row = x + t * sx, *gradient = dy + t * sdy, *rest = residual + t * sr;
        E *to = dx + t * sdx, *again = out + t * so;
        const float r = inverse_rms(row, n, eps);
        const float dot = sum_of(n, [&](index_t j, auto count) {
            return load(gradient + j, count) * load(weight + j, count) * load(row + j, count);
        });
        const float c = dot * r * r * r / (float)n;
        each_vector(n, [&](index_t j, auto count) {
            const lanes value = load(row + j, count), w = load(weight + j, count);
            const lanes change = load(gradient + j, count) * w * r - value * c;
            store(again + j, value * r * w, count);
            store(to + j, load(rest + j, count) + change, count);
        });
    }
}

// ---- dropout; out may be x

// A number for each place of a row, as if drawn: two rounds of a hash (Wellons 2018, lowbias32), with a key of the row
// before each. Which values are dropped follows from the seed and the place alone, whatever thread computes it.
template <typename Word> static inline Word hashed(Word x, uint32_t first, uint32_t second) {
    x ^= first;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= second;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

template <typename E>
static void drop(E *out, index_t so, const E *x, index_t sx, index_t T, index_t n, index_t seed, float p, index_t add) {
    const uint32_t low = (uint32_t)seed, high = (uint32_t)(seed >> 32), below = (uint32_t)(p * 4294967296.0);
    const float scale = 1.0f / (1.0f - p);
#pragma omp parallel for schedule(static)
    for (index_t t = 0; t < T; t++) {
        const E *row = x + t * sx;
        E *to = out + t * so;
        const uint32_t first = hashed((uint32_t)t, low, high), second = hashed((uint32_t)t, high, ~low);
        each_vector(n, [&](index_t j, auto count) {
            const words drawn = hashed((words)(first_lanes() + (int32_t)j), first, second);
            const lanes kept = drawn >= below ? load(row + j, count) * scale : lanes{};
            store(to + j, add ? load(to + j, count) + kept : kept, count);
        });
    }
}

// ---- rotary positions; out may be x

template <typename E>
static void rotate(E *out, index_t so, const E *x, index_t sx, const E *cosine, const E *sine, index_t T,
                   index_t heads, index_t half, float sign) {
#pragma omp parallel for schedule(static)
    for (index_t t = 0; t < T; t++)
        each_vector(half, [&](index_t j, auto count) {
            const lanes c = load(cosine + t * half + j, count), s = load(sine + t * half + j, count) * sign;
            for (index_t h = 0; h < heads; h++) {
                const E *from = x + t * sx + h * 2 * half + j;
                E *to = out + t * so + h * 2 * half + j;
                const lanes left = load(from, count), right = load(from + half, count);
                store(to, left * c - right * s, count);
                store(to + half, right * c + left * s, count);
            }
        });
}

// ---- the gate of the MLP

template <typename E>
static void swiglu(E *out, index_t so, const E *gate_up, index_t sg, index_t T, index_t n) {
#pragma omp parallel for schedule(static)
    for (index_t t = 0; t < T; t++) {
        const E *gate = gate_up + t * sg, *up = gate + n;
        E *to = out + t * so;
        each_vector(n, [&](index_t j, auto count) {
            const lanes g = load(gate + j, count), u = load(up + j, count);
            store(to + j, g / (1.0f + exponential(-g)) * u, count);
        });
    }
}

template <typename E>
static void swiglu_backward(E *d_gate_up, index_t sd, E *out, index_t so, const E *gate_up, index_t sg, index_t T,
                            index_t n) {
#pragma omp parallel for schedule(static)
    for (index_t t = 0; t < T; t++) {
        const E *gate = gate_up + t * sg, *up = gate + n;
        E *d_gate = d_gate_up + t * sd, *d_up = d_gate + n, *io = out + t * so;
        each_vector(n, [&](index_t j, auto count) {
            const lanes g = load(gate + j, count), u = load(up + j, count), d = load(io + j, count);
            const lanes sigmoid = 1.0f / (1.0f + exponential(-g)), silu = g * sigmoid;
            store(d_gate + j, d * u * sigmoid * (1.0f + g * (1.0f - sigmoid)), count);
            store(d_up + j, d * silu, count);
            store(io + j, u * silu, count);
        });
    }
}

// ---- cross entropy: logits become `factor` times their gradient

static const index_t CHUNK = 4096;  // of what is summed up: one total of a whole vocabulary would round too often

template <typename E>
static void cross_entropy(float *loss, E *logits, index_t sl, const index_t *targets, index_t T, index_t n,
                          float factor) {
#pragma omp parallel for schedule(static)
    for (index_t t = 0; t < T; t++) {
        E *row = logits + t * sl;
        const float never = -__builtin_inff(), right = load_one(row[targets[t]]);
        lanes tops = all(never);
        each_vector(n, [&](index_t j, auto count) { tops = larger(load(row + j, count, never), tops); });
        const float top = largest(tops);
        float total = 0;
        for (index_t at = 0; at < n; at += CHUNK)
            total += sum_of(n - at < CHUNK ? n - at : CHUNK, [&](index_t j, auto count) {
                return exponential(load(row + at + j, count, never) - top);
            });
        loss[t] = __builtin_logf(total) + top - right;
        if (factor == 0) continue;
        const float scale = factor / total;
        each_vector(n, [&](index_t j, auto count) {
            store(row + j, exponential(load(row + j, count) - top) * scale, count);
        });
        const lanes hit = exponential(all(right - top)) * scale - factor;
        store(row + targets[t], hit, 1);
    }
}

EXPORT(norm)
EXPORT(norm_backward)
EXPORT(drop)
EXPORT(rotate)
EXPORT(swiglu)
EXPORT(swiglu_backward)
EXPORT(cross_entropy)

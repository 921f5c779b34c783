// Attention over the blocks of the cache, a chunk of keys after another: each has its own largest score and its own
// sums, which are joined from the first chunk to the last. Chunks begin at multiples of CHUNK keys, so that the bits
// depend neither on what is computed beside a token nor on which thread computes a chunk.

#pragma once

#include "step.h"

// Keys and values of one layer: for each block and key/value head those of its tokens, as E or, in the same order, as
// codes of 8 bits; behind codes, the scales of its keys and of its values.
template <typename E> struct Cache {
    char *start;
    index_t G, D;
    bool coded;
    static index_t bytes(index_t D, bool coded) { return 2 * KEYS * (coded ? D + 4 : D * (index_t)sizeof(E)); }
    char *at(index_t block, index_t g) const { return start + (block * G + g) * bytes(D, coded); }
    E *keys(index_t block, index_t g) const { return (E *)at(block, g); }
    E *values(index_t block, index_t g) const { return keys(block, g) + KEYS * D; }
    int8_t *key_codes(index_t block, index_t g) const { return (int8_t *)at(block, g); }
    int8_t *value_codes(index_t block, index_t g) const { return key_codes(block, g) + KEYS * D; }
    float *key_scales(index_t block, index_t g) const { return (float *)(key_codes(block, g) + 2 * KEYS * D); }
    float *value_scales(index_t block, index_t g) const { return key_scales(block, g) + KEYS; }
};

// A row in codes, of which the largest is 127 steps from zero; gives the scale, which is no number where one of the row
// is not finite, so that it is not lost.
static inline float code_row(int8_t *to, const float *x, index_t n) {
    lanes most = {}, none = {};
    each_vector(n, [&](index_t j, auto part) {
        const lanes v = load(x + j, part);
        most = larger(most, larger(v, -v)), none += v * 0.0f;
    });
    const float scale = largest(most) / 127.0f + sum(none), inverse = scale > 0 ? 1.0f / scale : 0.0f;
    each_vector(n, [&](index_t j, auto part) {
        store_codes(to + j, __builtin_convertvector(nearest(load(x + j, part) * inverse), integers));
    });
    return scale;
}
// Codes as numbers, all of which E has.
template <typename E> static inline void widen(E *to, const int8_t *from, index_t n) {
    for (index_t j = 0; j < n; j += W) {
#if defined(__AVX512F__)
        const integers codes = (integers)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(from + j)));
#else
        integers codes;
        for (index_t i = 0; i < W; i++) codes[i] = from[j + i];
#endif
        store(to + j, (words)__builtin_convertvector(codes, lanes));
    }
}

// Norm of a head, and its rotation: component i against i + D/2.
static inline void turn(float *head, const float *norm, const float *cos, const float *sin, index_t D, float eps) {
    if (norm) norm_row(head, head, norm, D, eps);
    const index_t half = D / 2;
    each_vector(half, [&](index_t i, auto count) {
        const lanes x = load(head + i, count), y = load(head + half + i, count);
        const lanes c = load(cos + i, count), s = load(sin + i, count);
        store(head + i, x * c - y * s, count);
        store(head + half + i, y * c + x * s, count);
    });
}
template <typename E> static inline void store_row_of(E *to, const float *from, index_t n) {
    each_vector(n, [&](index_t j, auto count) { store(to + j, load(from + j, count), count); });
    fill_up(to, n);
}

// Queries, keys and values of a token and a key/value head: rotated and put where attention reads them.
template <typename E>
static void place(const Model &m, const Layer &l, const Step &s, const Buffers<E> &b, const Cache<E> &cache, index_t t,
                  index_t g) {
    const index_t D = m.head_dim, P = cache.D, share = m.heads / m.groups, n = per_word<E>;
    const float *cos = s.cos + t * D / 2, *sin = s.sin + t * D / 2;
    for (index_t h = g * share; h < (g + 1) * share; h++) {
        float *head = b.wide + t * b.s_wide + h * D;
        turn(head, l.q_norm, cos, sin, D, (float)m.eps);
        store_row_of(b.queries + (t * m.heads + h) * P, head, D);
    }
    const index_t position = s.positions[t], j = position % KEYS;
    const index_t block = s.table[s.sequence[t] * s.table_stride + position / KEYS];
    float *key = b.wide + t * b.s_wide + (m.heads + g) * D;
    const float *value = key + m.groups * D;
    turn(key, l.k_norm, cos, sin, D, (float)m.eps);
    const index_t key_place = (j / BLOCK * BLOCK * (P / n) + j % BLOCK) * n, value_place = j / n * BLOCK * n + j % n;
    if (cache.coded) {
        alignas(64) int8_t row[256 + W] = {};
        cache.key_scales(block, g)[j] = code_row(row, key, D);
        int8_t *keys = cache.key_codes(block, g) + key_place;
        for (index_t d = 0; d < D; d++) keys[d / n * BLOCK * n + d % n] = row[d];
        cache.value_scales(block, g)[j] = code_row(row, value, D);
        int8_t *values = cache.value_codes(block, g) + value_place;
        for (index_t d = 0; d < D; d++) values[d / BLOCK * BLOCK * KEYS + d % BLOCK * n] = row[d];
        return;
    }
    alignas(64) E row[256];
    store_row_of(row, key, D);
    E *keys = cache.keys(block, g) + key_place;
    for (index_t d = 0; d < P; d += n) memcpy(keys + d * BLOCK, row + d, sizeof(uint32_t));
    store_row_of(row, value, D);
    E *values = cache.values(block, g) + value_place;
    for (index_t d = 0; d < P; d++) values[d / BLOCK * BLOCK * KEYS + d % BLOCK * n] = row[d];
}

// Some tokens of a sequence, [low, high), with all query heads of one key/value head.
template <typename E> struct Attending {
    const Model &m;
    const Layer &l;
    const Step &s;
    const Buffers<E> &b;
    const Cache<E> &cache;
    index_t low, high, g;
    index_t share() const { return m.heads / m.groups; }
    index_t rows() const { return (high - low) * share(); }
    const int32_t *table() const { return s.table + s.sequence[low] * s.table_stride; }
    index_t begin() const { return std::max<index_t>(s.positions[low] - l.window + 1, 0) / KEYS; }  // in blocks
    index_t end() const { return s.positions[high - 1] / KEYS + 1; }
    index_t first_chunk() const { return begin() / (CHUNK / KEYS); }
    index_t last_chunk() const { return (end() - 1) / (CHUNK / KEYS); }
};

// Largest score, sum of the exponentials and values weighted by them, of each row; the largest is -inf without any key.
struct Part {
    float peak[TALL], total[TALL];
    alignas(64) float y[TALL * 256];  // (rows, P)
};

static const index_t SCORES = CHUNK + 16;  // between rows: an odd number of lines, as even ones meet in the cache
template <typename E> static constexpr index_t CHANCES = CHUNK + 64 / (index_t)sizeof(E);

// Exponentials of one row of scores, of which [from, to) are seen; what is kept of them for the sum over values takes
// the scales of those along, where there are any.
template <typename E>
static inline void weights_of_row(E *chances, float *row, index_t from, index_t to, index_t wide, float scale,
                                  const float *scales, float &row_peak, float &row_total) {
    std::fill(row, row + from, -__builtin_inff());
    std::fill(row + to, row + wide, -__builtin_inff());
    lanes most[2] = {load(row), load(row + W)};
    for (index_t j = 2 * W; j < wide; j += 2 * W)
        most[0] = larger(most[0], load(row + j)), most[1] = larger(most[1], load(row + j + W));
    const float peak = largest(larger(most[0], most[1])) * scale;
    lanes total = {};
#pragma GCC unroll 4
    for (index_t j = 0; j < wide; j += W) {
        const lanes p = exponential(load(row + j) * scale - peak);
        total += p;
        store_row(chances + j, scales ? p * load(scales + j) : p);
    }
    row_peak = peak, row_total = sum(total);
}
template <typename E>
static inline void weights_of(const Attending<E> &a, Part &part, float *scores, E *chances, index_t first, index_t wide,
                              const float *scales) {
    const float scale = 1.0f / std::sqrt((float)a.m.head_dim);
    const index_t share = a.share();
    for (index_t t = a.low, r = 0; t < a.high; t++) {
        const index_t position = a.s.positions[t];
        const index_t from = std::min(std::max<index_t>(position - a.l.window + 1 - first, 0), wide);
        const index_t to = std::min(std::max<index_t>(position + 1 - first, 0), wide);
        for (index_t i = 0; i < share; i++, r++) {
            E *own = chances + r * CHANCES<E>;
            part.peak[r] = -__builtin_inff(), part.total[r] = 0;
            if (from < to)
                weights_of_row(own, scores + r * SCORES, from, to, wide, scale, scales, part.peak[r], part.total[r]);
            else
                std::fill(own, own + wide, E{});
        }
    }
}

// One chunk of keys.
template <typename E> static void attend_chunk(const Attending<E> &a, const E *q, Part &part, index_t chunk) {
    const index_t P = a.cache.D, rows = a.rows(), end = a.end();
    const index_t from = std::max(chunk * (CHUNK / KEYS), a.begin());
    const index_t count = std::min((chunk + 1) * (CHUNK / KEYS), end) - from;
    const int32_t *table = a.table();
    alignas(64) float scores[TALL * SCORES];
    alignas(64) E chances[TALL * CHANCES<E>];
    alignas(64) E widened[KEYS * 256];  // keys of a block, or of each block of values as many columns as are multiplied
    float scales[CHUNK];
    const bool coded = a.cache.coded;
    for (index_t i = 0; i < count; i++) {
        const index_t block = table[from + i];
        if (rows <= BLOCK && from + i + 1 < end)
            prefetch(a.cache.at(table[from + i + 1], a.g), 0, 1, a.cache.bytes(P, coded));
        if (coded) widen(widened, a.cache.key_codes(block, a.g), KEYS * P);
        const Term<E> term{q, P, coded ? widened : a.cache.keys(block, a.g), BLOCK * P, P};
        pair_product(scores + i * KEYS, SCORES, &term, 1, rows, NOTHING);
        if (!coded) continue;
        const float *key_scales = a.cache.key_scales(block, a.g);
        for (index_t r = 0; r < rows; r++)
            for (index_t j = 0; j < KEYS; j += W) {
                float *score = scores + r * SCORES + i * KEYS + j;
                store(score, load(score) * load(key_scales + j));
            }
        memcpy(scales + i * KEYS, a.cache.value_scales(block, a.g), KEYS * sizeof(float));
    }
    weights_of(a, part, scores, chances, from * KEYS, count * KEYS, coded ? scales : nullptr);
    Term<E> terms[CHUNK / KEYS];
    for (index_t column = 0; column < P; column += PAIR) {
        for (index_t i = 0; i < count; i++) {
            E *own = widened + i * KEYS * PAIR;
            if (coded) widen(own, a.cache.value_codes(table[from + i], a.g) + column * KEYS, KEYS * PAIR);
            else own = a.cache.values(table[from + i], a.g) + column * KEYS;
            terms[i] = {chances + i * KEYS, CHANCES<E>, own, BLOCK * KEYS, KEYS};
        }
        pair_product(part.y + column, P, terms, count, rows, NOTHING);
    }
}
static_assert(CHUNK * PAIR <= KEYS * 256, "the values of a chunk's columns have to fit");

static inline float power_of(float x) { return exponential(all(x))[0]; }

// Joins a later chunk to a sum.
static inline void join(float &peak, float &total, float *y, float more_peak, float more_total, const float *more,
                        index_t P) {
    if (more_peak == -__builtin_inff()) return;
    if (peak == -__builtin_inff()) {
        peak = more_peak, total = more_total;
        memcpy(y, more, (size_t)P * sizeof(float));
    } else if (more_peak <= peak) {
        const float factor = power_of(more_peak - peak);
        total += factor * more_total;
        for (index_t j = 0; j < P; j += W) store(y + j, load(y + j) + factor * load(more + j));
    } else {
        const float factor = power_of(peak - more_peak);
        total = factor * total + more_total, peak = more_peak;
        for (index_t j = 0; j < P; j += W) store(y + j, factor * load(y + j) + load(more + j));
    }
}
template <typename E> static inline void queries_of(const Attending<E> &a, E *q) {
    const index_t P = a.cache.D, share = a.share();
    for (index_t t = a.low; t < a.high; t++)
        memcpy(q + (t - a.low) * share * P, a.b.queries + (t * a.m.heads + a.g * share) * P,
               (size_t)(share * P) * sizeof(E));
}
template <typename E>
static inline void attended_row(const Attending<E> &a, index_t r, float total, const float *y) {
    const index_t D = a.m.head_dim, t = a.low + r / a.share(), head = a.g * a.share() + r % a.share();
    const float inverse = 1.0f / total;
    E *to = a.b.attended + t * a.b.s_attended + head * D;
    each_vector(D, [&](index_t j, auto n) { store(to + j, load(y + j, n) * inverse, n); });
}

// All chunks, one after another.
template <typename E> static void attend(const Attending<E> &a) {
    const index_t P = a.cache.D, first = a.first_chunk(), last = a.last_chunk();
    alignas(64) E q[TALL * 256];
    Part whole, part;
    queries_of(a, q);
    attend_chunk(a, q, whole, first);
    for (index_t chunk = first + 1; chunk <= last; chunk++) {
        attend_chunk(a, q, part, chunk);
        for (index_t r = 0; r < a.rows(); r++)
            join(whole.peak[r], whole.total[r], whole.y + r * P, part.peak[r], part.total[r], part.y + r * P, P);
    }
    for (index_t r = 0; r < a.rows(); r++) attended_row(a, r, whole.total[r], whole.y + r * P);
}

// One of the chunks, kept for `join_chunks`: of each row and chunk (P) values, their largest score and their sum.
template <typename E> static void attend_part(const Attending<E> &a, index_t chunk) {
    const index_t P = a.cache.D, head = a.g * a.share();
    alignas(64) E q[TALL * 256];
    Part part;
    queries_of(a, q);
    attend_chunk(a, q, part, chunk);
    for (index_t r = 0; r < a.rows(); r++) {
        float *to = a.b.part_of(a.low + r / a.share(), head + r % a.share(), chunk);
        memcpy(to, part.y + r * P, (size_t)P * sizeof(float));
        to[P] = part.peak[r], to[P + 1] = part.total[r];
    }
}
template <typename E> static void join_chunks(const Attending<E> &a) {
    const index_t P = a.cache.D;
    for (index_t r = 0; r < a.rows(); r++) {
        const index_t t = a.low + r / a.share(), head = a.g * a.share() + r % a.share();
        float peak = -__builtin_inff(), total = 0;
        alignas(64) float y[256];
        for (index_t chunk = a.first_chunk(); chunk <= a.last_chunk(); chunk++) {
            const float *part = a.b.part_of(t, head, chunk);
            join(peak, total, y, part[P], part[P + 1], part, P);
        }
        attended_row(a, r, total, y);
    }
}

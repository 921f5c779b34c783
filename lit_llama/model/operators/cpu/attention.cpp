// Attention of packed samples on a CPU, forward and backward. kernels.py compiles and calls it; what it computes is in
// attention.py.
//
// A few queries at a time, as many as a tile has rows, meet all keys that they see: their scores stay in the first
// level of the cache, and keys that come later cost nothing. Keys and values are laid out once for all query heads that
// share them.
//
// Letters: H query heads, G key/value heads, D head size; s* strides between rows, in elements.

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "exported.h"
#include "numbers.h"
#include "packed.h"
#include "tiles.h"

// Rows of columns of sums, scaled, where they belong.
template <typename E>
static void write(E *to, index_t st, const float *sums, index_t ss, index_t rows, index_t D, float scale) {
    for (index_t i = 0; i < rows; i++)
        each_vector(D, [&](index_t d, auto part) {
            store(to + i * st + d, load(sums + i * ss + d, part) * scale, part);
        });
}

template <typename E> static const uint32_t *as_words(const E *x) { return (const uint32_t *)x; }

// ---- forward

template <typename E> struct Forward {
    E *y;
    index_t sy;
    float *lse;
    float *scores, *found;  // of ROWS queries, and their sums of values
    E *p, *rows;
    uint32_t *keys, *values;

    index_t reserve(const Part<E> &part, float *start) {
        Scratch scratch{start};
        scratch.take(scores, ROWS * part.stride), scratch.take(found, ROWS * part.wide);
        scratch.take(p, ROWS * part.stride), scratch.take(rows, part.keys * part.x.D);
        scratch.take(keys, part.x.D / per_word<E> * part.stride);
        scratch.take(values, part.keys / per_word<E> * part.wide);
        return scratch.taken;
    }

    void run(const Part<E> &part) {
        const Heads<E> &x = part.x;
        part.gather(rows, x.k, x.sk);
        across(keys, part.stride, rows, part.keys, x.D);
        part.gather(rows, x.v, x.sv);
        along(values, part.wide, rows, x.D, part.keys, x.D);
        for (index_t h = part.g * part.heads; h < (part.g + 1) * part.heads; h++)
            for (index_t start = 0; start < part.length; start += ROWS)
                attend(part, h, start, std::min<index_t>(ROWS, part.length - start));
    }

    void attend(const Part<E> &part, index_t h, index_t start, index_t count) {
        const Heads<E> &x = part.x;
        const index_t token = part.first + start, stride = part.stride, wide = part.wide, step = per_word<E>;
        const Keys seen = part.seen_by(start, count), span = seen.vectors();
        const E *q = x.q + token * x.sq + h * x.D;
        product<E, false>(scores, stride, {as_words(q), x.sq / step, 1}, {keys + span.low, stride}, count, span.count(),
                          x.D / step);
        prefetch(q + ROWS * x.sq, x.sq, ROWS, x.D);
        // Row after row in each loop, so that none waits for the end of the one before.
        float tops[ROWS], totals[ROWS];
        for (index_t i = 0; i < count; i++)
            tops[i] = x.scale * largest_of(scores + i * stride, span, part.seen_by(start + i, 1));
        for (index_t i = 0; i < count; i++)
            totals[i] = exponentials(p + i * stride, scores + i * stride, span, part.seen_by(start + i, 1), x.scale,
                                     tops[i]);
        for (index_t i = 0; i < count; i++) lse[(token + i) * x.H + h] = __builtin_logf(totals[i]) + tops[i];
        product<E, false>(found, wide, {as_words(p), stride / step, 1}, {values + span.low / step * wide, wide}, count,
                          wide, up(seen.high - span.low, step) / step);
        for (index_t i = 0; i < count; i++)
            write(y + (token + i) * sy + h * x.D, sy, found + i * wide, wide, 1, x.D, 1.0f / totals[i]);
    }

    static float largest_of(const float *scores, Keys span, Keys seen) {
        lanes tops = all(-__builtin_inff());
        for (index_t j = span.low; j < span.high; j += W)
            tops = larger(seen.only(load(scores + j - span.low), j), tops);
        return largest(tops);
    }

    // e^(scale s - top) of the keys seen, 0 of others; gives their sum.
    static float exponentials(E *to, const float *scores, Keys span, Keys seen, float scale, float top) {
        lanes total = {};
        for (index_t j = span.low; j < span.high; j += W) {
            const lanes e = exponential(seen.only(load(scores + j - span.low), j) * scale - top);
            total += e;
            store_row(to + j - span.low, e);
        }
        return sum(total);
    }
};

template <typename E>
static void attend(E *y, index_t sy, float *lse, const E *q, index_t sq, const E *k, index_t sk, const E *v, index_t sv,
                   index_t H, index_t G, index_t D, float scale, index_t window, const index_t *offsets,
                   const index_t *parents, index_t count) {
    const Heads<E> x{q, k, v, sq, sk, sv, H, G, D, scale, window};
    each_part(x, {offsets, parents, count}, Forward<E>{y, sy, lse});
}

// ---- backward

// A block of queries at a time, which gradients of keys and values sum over. A multiple of ROWS and of those in a word.
static const index_t QUERIES = 16 * ROWS;

// Gradients of keys and values that samples share, float32: each sample leaves its part, and the parent its own.
class Shared {
    std::vector<index_t> starts;  // of each sample, in tokens
    index_t G, D;
    std::unique_ptr<Memory> memory;

  public:
    Shared(const Samples &samples, index_t G, index_t D) : starts((size_t)samples.count + 1), G(G), D(D) {
        const auto tokens_after = [&](index_t s) -> index_t & { return starts[(size_t)s + 1]; };
        for (index_t s = 0; s < samples.count; s++)
            if (samples.parents[s] >= 0) tokens_after(s) = tokens_after(samples.parents[s]) = samples.before(s);
        std::partial_sum(starts.begin(), starts.end(), starts.begin());
        memory = std::make_unique<Memory>(1, starts.back() * G * 2 * D);
    }
    index_t tokens(index_t s) const { return starts[(size_t)s + 1] - starts[(size_t)s]; }
    index_t size(index_t s) const { return 2 * tokens(s) * D; }
    float *keys(index_t s, index_t g) const { return (*memory)[0] + starts[(size_t)s] * G * 2 * D + g * size(s); }
    float *values(index_t s, index_t g) const { return keys(s, g) + tokens(s) * D; }
};

template <typename E> struct Gradients {
    E *q, *k, *v;
    index_t sq, sk, sv;
};

template <typename E> struct Backward {
    Gradients<E> d;
    const E *dy, *y;
    index_t sdy, sy;
    const float *lse;
    const Shared &shared;
    float *scores, *changes, *found;  // of ROWS queries: with keys, of dy with values, and dq
    float *deltas;                    // dy y of each query of a block
    float *sum_k, *sum_v;
    E *ds, *rows;
    uint32_t *keys, *values, *key_rows;
    uint32_t *q_rows, *dy_rows, *p_rows, *ds_rows;  // of a block

    index_t reserve(const Part<E> &part, float *start) {
        Scratch scratch{start};
        const index_t stride = part.stride, wide = part.wide;
        const index_t deep = part.x.D / per_word<E>, block = QUERIES / per_word<E>;
        scratch.take(scores, ROWS * stride), scratch.take(changes, ROWS * stride), scratch.take(found, ROWS * wide);
        scratch.take(deltas, QUERIES), scratch.take(sum_k, part.keys * wide), scratch.take(sum_v, part.keys * wide);
        scratch.take(ds, ROWS * stride), scratch.take(rows, part.keys * part.x.D);
        scratch.take(keys, deep * stride), scratch.take(values, deep * stride);
        scratch.take(key_rows, part.keys / per_word<E> * wide);
        scratch.take(q_rows, block * wide), scratch.take(dy_rows, block * wide);
        scratch.take(p_rows, block * stride), scratch.take(ds_rows, block * stride);
        return scratch.taken;
    }

    void run(const Part<E> &part) {
        const Heads<E> &x = part.x;
        part.gather(rows, x.v, x.sv);
        across(values, part.stride, rows, part.keys, x.D);
        part.gather(rows, x.k, x.sk);
        across(keys, part.stride, rows, part.keys, x.D);
        along(key_rows, part.wide, rows, x.D, part.keys, x.D);
        std::fill_n(sum_k, part.keys * part.wide, 0.0f), std::fill_n(sum_v, part.keys * part.wide, 0.0f);
        for (index_t h = part.g * part.heads; h < (part.g + 1) * part.heads; h++)
            for (index_t block = 0; block < part.length; block += QUERIES) {
                const index_t count = std::min(QUERIES, part.length - block);
                lay_out_block(part, h, block, count);
                for (index_t i = 0; i < count; i += ROWS) {
                    const index_t some = std::min<index_t>(ROWS, count - i);
                    change(part, h, block, i, some, part.seen_by(block, count).vectors());
                    change_queries(part, h, block + i, some);
                }
                change_keys(part, block, count);
            }
        finish(part);
    }

    void lay_out_block(const Part<E> &part, index_t h, index_t block, index_t count) {
        const index_t D = part.x.D, token = part.first + block;
        along(q_rows, part.wide, part.x.q + token * part.x.sq + h * D, part.x.sq, count, D);
        along(dy_rows, part.wide, dy + token * sdy + h * D, sdy, count, D);
        for (index_t i = 0; i < count; i++) {
            const E *gradient = dy + (token + i) * sdy + h * D, *result = y + (token + i) * sy + h * D;
            deltas[i] = sum_of(D, [&](index_t d, auto some) {
                return load(gradient + d, some) * load(result + d, some);
            });
        }
    }

    // Probabilities and the gradients of scores, of `count` queries from place i of the block on.
    void change(const Part<E> &part, index_t h, index_t block, index_t i, index_t count, Keys block_span) {
        const Heads<E> &x = part.x;
        const index_t token = part.first + block + i, stride = part.stride, step = per_word<E>;
        const Keys span = part.seen_by(block + i, count).vectors();
        const E *q = x.q + token * x.sq + h * x.D, *gradient = dy + token * sdy + h * x.D;
        product<E, false>(scores, stride, {as_words(q), x.sq / step, 1}, {keys + span.low, stride}, count, span.count(),
                          x.D / step);
        product<E, false>(changes, stride, {as_words(gradient), sdy / step, 1}, {values + span.low, stride}, count,
                          span.count(), x.D / step);
        for (index_t row = 0; row < count; row += step) {
            const index_t rows = std::min(step, count - row), place = i + row;
            uint32_t *p_words = p_rows + place / step * stride, *ds_words = ds_rows + place / step * stride;
            const auto clear = [&](index_t j) { store(p_words + j, words{}), store(ds_words + j, words{}); };
            Keys seen[2];
            float total[2], delta[2];
            for (index_t n = 0; n < rows; n++) {
                seen[n] = part.seen_by(block + place + n, 1);
                total[n] = lse[(token + row + n) * x.H + h], delta[n] = deltas[place + n];
            }
            for (index_t j = block_span.low; j < span.low; j += W) clear(j);
            for (index_t j = span.low; j < span.high; j += W) {
                lanes p[2] = {}, change[2] = {};
#pragma GCC unroll 2
                for (index_t n = 0; n < step; n++) {
                    if (n == rows) break;
                    const index_t at = (row + n) * stride + j - span.low;
                    p[n] = exponential(seen[n].only(load(scores + at), j) * x.scale - total[n]);
                    change[n] = p[n] * (load(changes + at) - delta[n]);
                    store_row(ds + at, change[n]);
                }
                store(p_words + j, paired(p[0], p[1], E{})), store(ds_words + j, paired(change[0], change[1], E{}));
            }
            if (span.high < block_span.high) clear(span.high);  // as far as a tile of keys reaches
        }
    }

    void change_queries(const Part<E> &part, index_t h, index_t start, index_t count) {
        const index_t wide = part.wide, step = per_word<E>;
        const Keys seen = part.seen_by(start, count), span = seen.vectors();
        product<E, false>(found, wide, {as_words(ds), part.stride / step, 1}, {key_rows + span.low / step * wide, wide},
                          count, wide, up(seen.high - span.low, step) / step);
        write(d.q + (part.first + start) * d.sq + h * part.x.D, d.sq, found, wide, count, part.x.D, part.x.scale);
    }

    void change_keys(const Part<E> &part, index_t block, index_t count) {
        const index_t wide = part.wide, stride = part.stride, step = per_word<E>, words = up(count, step) / step;
        const Keys seen = part.seen_by(block, count);
        for (index_t key = seen.vectors().low; key < seen.high; key += ROWS) {
            const index_t some = std::min<index_t>(ROWS, seen.high - key);
            // Of the block, from the first query on that sees the first of these keys.
            const index_t from = std::max<index_t>(key - part.before - block, 0) / step, deep = words - from;
            product<E, true>(sum_k + key * wide, wide, {ds_rows + from * stride + key, 1, stride},
                             {q_rows + from * wide, wide}, some, wide, deep);
            product<E, true>(sum_v + key * wide, wide, {p_rows + from * stride + key, 1, stride},
                             {dy_rows + from * wide, wide}, some, wide, deep);
        }
    }

    void finish(const Part<E> &part) {
        const index_t D = part.x.D, g = part.g, wide = part.wide, others = shared.tokens(part.sample);
        const float scale = part.x.scale;
        write(shared.keys(part.sample, g), D, sum_k, wide, others, D, scale);
        write(shared.values(part.sample, g), D, sum_v, wide, others, D, 1.0f);
        const index_t token = part.first + others - part.before, own = part.before + part.length - others;
        write(d.k + token * d.sk + g * D, d.sk, sum_k + others * wide, wide, own, D, scale);
        write(d.v + token * d.sv + g * D, d.sv, sum_v + others * wide, wide, own, D, 1.0f);
    }
};

// What all samples left for their parent, added up in their order.
template <typename E>
static void finish_shared(Gradients<E> d, const Shared &shared, const Samples &samples, index_t G, index_t D) {
#pragma omp parallel for schedule(static)
    for (index_t task = 0; task < samples.count * G; task++) {
        const index_t parent = task / G, g = task % G, token = samples.first(parent), tokens = shared.tokens(parent);
        if (!tokens || samples.parents[parent] >= 0) continue;
        float *total = shared.keys(parent, g);
        for (index_t s = 0; s < samples.count; s++)
            if (samples.parents[s] == parent)
                for (index_t j = 0; j < shared.size(s); j++) total[j] += shared.keys(s, g)[j];
        write(d.k + token * d.sk + g * D, d.sk, total, D, tokens, D, 1.0f);
        write(d.v + token * d.sv + g * D, d.sv, shared.values(parent, g), D, tokens, D, 1.0f);
    }
}

template <typename E>
static void attend_backward(E *dq, index_t sdq, E *dk, index_t sdk, E *dv, index_t sdv, const E *dy, index_t sdy,
                            const E *y, index_t sy, const float *lse, const E *q, index_t sq, const E *k, index_t sk,
                            const E *v, index_t sv, index_t H, index_t G, index_t D, float scale, index_t window,
                            const index_t *offsets, const index_t *parents, index_t count) {
    const Heads<E> x{q, k, v, sq, sk, sv, H, G, D, scale, window};
    const Samples samples{offsets, parents, count};
    const Gradients<E> d{dq, dk, dv, sdq, sdk, sdv};
    const Shared shared(samples, G, D);
    each_part(x, samples, Backward<E>{d, dy, y, sdy, sy, lse, shared});
    finish_shared(d, shared, samples, G, D);
}

EXPORT(attend)
EXPORT(attend_backward)

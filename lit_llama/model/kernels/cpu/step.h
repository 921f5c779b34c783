// What decode.py lays out for a step, the memory that a step needs, and the norm of a row.
//
// Letters: T tokens of all sequences, S sequences, C hidden, I intermediate, H query heads, G key/value heads, D head
// size, V vocabulary. Activations are E between layers' products and float within the residual stream.

#pragma once

#include <algorithm>
#include <cmath>

#include "quantized.h"

struct Matrix {  // packed, see products.h
    const void *at;
    const uint16_t *scales;    // of codes, (pairs of blocks, groups, 16) in bfloat16, see quantized.h
    const float *bias;         // of the outputs, or null
    index_t outputs, k, bits;  // k filled up
    index_t pairs() const { return (outputs + PAIR - 1) / PAIR; }
};
struct Update {  // of low rank, for the products of one adapter: B (A x), each packed; B's second factor has k = rank
    Matrix a, b;
};
struct Layer {
    const float *input_norm, *post_norm, *q_norm, *k_norm;  // the last two may be null
    Matrix qkv, o, gate_up, down;                            // gate and up in turns, a block of each
    index_t window;                                          // keys that a query sees
};
struct Model {
    index_t layers, hidden, intermediate, heads, groups, head_dim, vocab;
    double eps;
    const Layer *layer;
    const float *norm;
    const void *embedding;
    index_t embedding_packed;  // whether it is the head
    Matrix head;
};
struct Step {
    index_t tokens, sequences, tiles, selected, threads;
    const index_t *ids, *positions;          // (T)
    const float *cos, *sin;                  // (T, D/2)
    const index_t *sequence;                 // (T) of each token
    const index_t *starts;                   // (S + 1) first token of each sequence
    const int32_t *table;                    // (S, blocks) of the cache
    index_t table_stride;
    void *cache;                             // (layers, blocks, G, ...), see attention.h
    index_t cache_blocks, cache_coded;
    const index_t *tile_start;               // (tiles + 1) first token of each tile, at most TALL apart
    const Update *const *tile_updates;       // (tiles) of the adapter: 4 a layer, or null
    const index_t *select;                   // tokens whose logits are wanted
    float *logits;                           // (selected, V)
    float *memory;
    index_t longest;                         // keys of the longest sequence
    index_t rank;                            // columns of the widest update, filled up
};

static inline index_t deep(index_t D) { return up(D, DEPTH); }
static const index_t MOST_THREADS = 256;  // as in decode.py
static const index_t KEYS = 32;    // tokens of a block of the cache
static const index_t CHUNK = 128;  // keys whose weights are computed together

// Parts of the memory, which begin at lines of the cache. Without any, it is found how much is needed.
struct Parts {
    char *start;
    index_t taken = 0;
    template <typename T> T *take(index_t count) {
        T *part = (T *)(start + taken);
        taken += up(count * (index_t)sizeof(T), 64);
        return part;
    }
};

// Numbers between rows of n: an odd number of lines of the cache, as the rows of a tile would share few sets otherwise.
template <typename E> static inline index_t spaced(index_t n) {
    const index_t line = 64 / (index_t)sizeof(E);
    return (up(n, line) / line | 1) * line;
}

template <typename E> struct Buffers {
    float *x, *wide;       // residual stream (T, C); queries, keys and values (T, ...)
    E *normed, *queries, *attended, *inner, *low;
    index_t s_normed, s_attended, s_inner, s_wide, s_low;
    Codes codes;
    uint8_t *unpacked[MOST_THREADS];  // codes of 4 bits, of a pair of blocks
    bool split;                       // whether threads share the keys of a query
    float *parts;                     // (T, H, chunks, P + 2) then
    index_t chunks, heads, deep_head, bytes;

    Buffers(const Model &m, const Step &s) {
        Parts memory{(char *)s.memory};
        const index_t T = std::max(s.tokens, s.selected) + TALL;  // a tile reads as many rows, whatever they hold
        s_normed = spaced<E>(up(m.hidden, DEPTH)), s_attended = spaced<E>(up(m.heads * m.head_dim, DEPTH));
        s_inner = spaced<E>(up(m.intermediate, DEPTH)), s_wide = up((m.heads + 2 * m.groups) * m.head_dim, PAIR);
        s_low = std::max<index_t>(s.rank, DEPTH);
        x = memory.take<float>(T * m.hidden);
        wide = memory.take<float>(T * s_wide);
        normed = memory.take<E>(T * s_normed);
        queries = memory.take<E>(T * m.heads * deep(m.head_dim));
        attended = memory.take<E>(T * s_attended);
        inner = memory.take<E>(T * s_inner);
        low = memory.take<E>(T * s_low);
        take_codes(memory, m, s, T);
        heads = m.heads, deep_head = deep(m.head_dim), chunks = (s.longest + CHUNK - 1) / CHUNK;
        split = chunks > 1 && s.tokens * m.groups < 4 * s.threads;
        parts = split ? memory.take<float>(s.tokens * heads * chunks * (deep_head + 2)) : nullptr;
        bytes = memory.taken;
    }
    float *part_of(index_t t, index_t head, index_t chunk) const {
        return parts + ((t * heads + head) * chunks + chunk) * (deep_head + 2);
    }

   private:
    void take_codes(Parts &memory, const Model &m, const Step &s, index_t T) {
        bool any = m.head.bits <= 8, small = m.head.bits == 4;
        for (const Matrix *w : {&m.layer->qkv, &m.layer->o, &m.layer->gate_up, &m.layer->down})
            any = any || w->bits <= 8, small = small || w->bits == 4;
        if (!any) return;
        const index_t widest = up(std::max({m.hidden, m.heads * m.head_dim, m.intermediate}), 64);
        codes.sk = spaced<int8_t>(widest), codes.sg = widest / 32;
        codes.at = memory.take<int8_t>(T * codes.sk);
        codes.scales = memory.take<float>(T * codes.sg);
        codes.sums = memory.take<int32_t>(T * codes.sg);
        for (index_t i = 0; small && AMX && i < s.threads; i++) unpacked[i] = memory.take<uint8_t>(PAIR * widest);
    }
};

template <typename E> static inline void norm_row(E *to, const float *x, const float *weight, index_t n, float eps) {
    const float square = sum_of(n, [&](index_t j, auto count) {
        const lanes v = load(x + j, count);
        return v * v;
    });
    const float scale = 1.0f / std::sqrt(square / (float)n + eps);
    each_vector(n, [&](index_t j, auto count) {
        store(to + j, load(x + j, count) * scale * load(weight + j, count), count);
    });
}
template <typename E> static inline void fill_up(E *row, index_t n) {
    for (index_t j = n; j < up(n, DEPTH); j++) row[j] = E{};
}


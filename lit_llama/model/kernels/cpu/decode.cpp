// A step of generation on a CPU: the new tokens of any sequences through all layers, with keys and values in blocks.
// decode.py lays out what it reads; llama.py says the same in torch.
//
// Letters: T tokens of all sequences, S sequences, C hidden, I intermediate, H query heads, G key/value heads, D head
// size, V vocabulary. Activations are E between layers' products and float within the residual stream.

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "../../fused/exported.h"
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
    void *cache;                             // (layers, blocks, G, 2, 32, deep)
    index_t cache_blocks;
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
static const index_t KEYS = 32;  // tokens of a block of the cache

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

template <typename E> struct Buffers {
    float *x, *wide;       // residual stream (T, C); queries, keys and values (T, ...)
    E *normed, *queries, *attended, *inner, *low;
    index_t s_normed, s_attended, s_inner, s_wide, s_low;
    Codes codes;
    float *scores[MOST_THREADS];
    E *chances[MOST_THREADS];
    index_t bytes;

    Buffers(const Model &m, const Step &s) {
        Parts parts{(char *)s.memory};
        const index_t T = std::max(s.tokens, s.selected) + TALL;  // a tile reads as many rows, whatever they hold
        s_normed = up(m.hidden, DEPTH), s_attended = up(m.heads * m.head_dim, DEPTH);
        s_inner = up(m.intermediate, DEPTH), s_wide = up((m.heads + 2 * m.groups) * m.head_dim, PAIR);
        s_low = std::max<index_t>(s.rank, DEPTH);
        x = parts.take<float>(T * m.hidden);
        wide = parts.take<float>(T * s_wide);
        normed = parts.take<E>(T * s_normed);
        queries = parts.take<E>(T * m.heads * deep(m.head_dim));
        attended = parts.take<E>(T * s_attended);
        inner = parts.take<E>(T * s_inner);
        low = parts.take<E>(T * s_low);
        codes.sk = up(std::max({m.hidden, m.heads * m.head_dim, m.intermediate}), 64), codes.sg = codes.sk / 32;
        codes.at = parts.take<int8_t>(T * codes.sk);
        codes.scales = parts.take<float>(T * codes.sg);
        codes.sums = parts.take<int32_t>(T * codes.sg);
        for (index_t i = 0; i < s.threads; i++) {
            scores[i] = parts.take<float>(TALL * up(s.longest, KEYS));
            chances[i] = parts.take<E>(TALL * up(s.longest, KEYS));
        }
        bytes = parts.taken;
    }
};

// ---- what lies between the products

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

template <typename E>
static void embed(float *x, const Model &m, index_t id) {
    if (!m.embedding_packed) {
        const E *row = (const E *)m.embedding + id * m.hidden;
        for (index_t j = 0; j < m.hidden; j++) x[j] = load_one(row[j]);
        return;
    }
    const index_t n = per_word<E>;
    const E *from = (const E *)m.head.at + id / BLOCK * m.head.k * BLOCK + id % BLOCK * n;
    for (index_t j = 0; j < m.hidden; j++) x[j] = load_one(from[j / n * BLOCK * n + j % n]);
}

static inline lanes silu(lanes x) { return x / (1.0f + exponential(-x)); }

// ---- products

// Tokens in 8 bits, where a matrix wants them so; all threads do it together.
template <typename E>
static void encode(const Matrix &w, const E *x, index_t sx, index_t n, index_t T, const Codes &codes) {
    if (w.bits > 8) return;
#pragma omp for schedule(static)
    for (index_t t = 0; t < T; t++) to_codes(codes, t, x + t * sx, n, w.bits == 8 ? Kind<8>::GROUP : Kind<4>::GROUP);
}

// c (count, 32) of a pair of blocks and tokens from `first` on, whose updates are added.
template <typename E>
static inline void product_of(float *c, const Matrix &w, index_t pair, const Term<E> &update, const E *x, index_t sx,
                              const Codes &codes, index_t first, index_t count) {
    const index_t size = w.k * BLOCK;
    if (w.bits > 8) {
        const Term<E> terms[2] = {{x + first * sx, sx, (const E *)w.at + pair * 2 * size, size, w.k}, update};
        return pair_product(c, terms, update.k ? 2 : 1, count);
    }
    const uint8_t *at = (const uint8_t *)w.at + pair * 2 * size * w.bits / 8;
    if (w.bits == 8) pair_of_codes<8>(c, codes, first, count, at, w.scales + pair * PAIR * (w.k / 64), w.k);
    else pair_of_codes<4>(c, codes, first, count, at, w.scales + pair * PAIR * (w.k / 32), w.k);
    if (update.k) {
        alignas(64) float more[TALL * PAIR];
        pair_product(more, &update, 1, count);
        for (index_t j = 0; j < count * PAIR; j++) c[j] += more[j];
    }
}

// Outputs of all tokens, a pair of blocks and a tile of tokens at a time: sink(first token, count, pair, c (count, 32)).
template <typename E, typename Sink>
static void multiply(const Matrix &w, int target, index_t layer, const E *x, index_t sx, const Buffers<E> &b,
                     const Step &s, index_t thread, Sink sink) {
    alignas(64) float c[TALL * PAIR];
    const index_t pairs = w.pairs(), last = first_of(pairs, thread + 1, s.threads);
    for (index_t pair = first_of(pairs, thread, s.threads); pair < last; pair++) {
        for (index_t tile = 0; tile < s.tiles; tile++) {
            const index_t first = s.tile_start[tile], count = s.tile_start[tile + 1] - first;
            Term<E> update{};
            if (const Update *updates = s.tile_updates[tile]) {
                const Matrix &second = updates[layer * 4 + target].b;
                if (second.at)
                    update = {b.low + first * b.s_low, b.s_low,
                                      (const E *)second.at + pair * 2 * second.k * BLOCK, second.k * BLOCK, second.k};
            }
            product_of(c, w, pair, update, x, sx, b.codes, first, count);
            sink(first, count, pair, c);
        }
    }
}

// The first factors of the updates of a product, for all tokens that have an adapter.
template <typename E>
static void project(int target, index_t layer, const E *x, index_t sx, const Buffers<E> &b, const Step &s,
                    index_t thread) {
    alignas(64) float c[TALL * PAIR];
    for (index_t tile = 0; tile < s.tiles; tile++) {
        if (!s.tile_updates[tile]) continue;
        const Matrix &a = s.tile_updates[tile][layer * 4 + target].a;
        if (!a.at) continue;
        const index_t first = s.tile_start[tile], count = s.tile_start[tile + 1] - first, size = a.k * BLOCK;
        const index_t last = first_of(a.pairs(), thread + 1, s.threads);
        for (index_t pair = first_of(a.pairs(), thread, s.threads); pair < last; pair++) {
            const Term<E> term{x + first * sx, sx, (const E *)a.at + pair * 2 * size, size, a.k};
            pair_product(c, &term, 1, count);
            for (index_t t = 0; t < count; t++)
                each_vector(PAIR, [&](index_t j, auto n) {
                    store(b.low + (first + t) * b.s_low + pair * PAIR + j, load(c + t * PAIR + j, n), n);
                });
        }
    }
}

// ---- attention

template <typename E> struct Cache {  // of one layer
    E *start;
    index_t blocks, G, D;
    E *keys(index_t block, index_t g) const { return start + ((block * G + g) * 2) * KEYS * D; }
    E *values(index_t block, index_t g) const { return keys(block, g) + KEYS * D; }
};

template <typename E> static inline void store_one(E *to, float x);
template <> inline void store_one(float *to, float x) { *to = x; }
template <> inline void store_one(bf16 *to, float x) { to->bits = (uint16_t)(rounded(all(x), bf16{})[0] >> 16); }

// Norm of a head, and its rotation: component i against i + D/2.
static inline void turn(float *head, const float *norm, const float *cos, const float *sin, index_t D, float eps) {
    if (norm) norm_row(head, head, norm, D, eps);
    const index_t half = D / 2;
    for (index_t i = 0; i < half; i++) {
        const float x = head[i], y = head[half + i];
        head[i] = x * cos[i] - y * sin[i];
        head[half + i] = y * cos[i] + x * sin[i];
    }
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
        E *to = b.queries + (t * m.heads + h) * P;
        each_vector(D, [&](index_t j, auto count) { store(to + j, load(head + j, count), count); });
        fill_up(to, D);
    }
    const index_t position = s.positions[t], j = position % KEYS;
    const index_t block = s.table[s.sequence[t] * s.table_stride + position / KEYS];
    float *key = b.wide + t * b.s_wide + (m.heads + g) * D, *value = key + m.groups * D;
    turn(key, l.k_norm, cos, sin, D, (float)m.eps);
    E *keys = cache.keys(block, g) + j / BLOCK * BLOCK * P + j % BLOCK * n;
    for (index_t d = 0; d < P; d++) store_one(keys + d / n * BLOCK * n + d % n, d < D ? key[d] : 0.0f);
    E *values = cache.values(block, g) + j / n * BLOCK * n + j % n;
    for (index_t d = 0; d < P; d++)
        store_one(values + d / BLOCK * BLOCK * KEYS + d % BLOCK * n, d < D ? value[d] : 0.0f);
}

// Some tokens of a sequence, [low, high), with the query heads [head, head + heads) of one key/value head.
template <typename E>
static void attend(const Model &m, const Layer &l, const Step &s, const Buffers<E> &b, const Cache<E> &cache,
                   index_t low, index_t high, index_t head, index_t heads, index_t thread) {
    const index_t D = m.head_dim, P = cache.D, rows = (high - low) * heads, g = head / (m.heads / m.groups);
    const int32_t *table = s.table + s.sequence[low] * s.table_stride;
    const index_t begin = std::max<index_t>(s.positions[low] - l.window + 1, 0) / KEYS;
    const index_t blocks = s.positions[high - 1] / KEYS + 1 - begin, wide = blocks * KEYS;
    float *scores = b.scores[thread];
    E *chances = b.chances[thread];
    alignas(64) E q[TALL * 256];
    alignas(64) float c[TALL * PAIR];
    for (index_t r = 0; r < rows; r++)
        memcpy(q + r * P, b.queries + ((low + r / heads) * m.heads + head + r % heads) * P, (size_t)P * sizeof(E));
    for (index_t i = 0; i < blocks; i++) {
        const Term<E> term{q, P, cache.keys(table[begin + i], g), BLOCK * P, P};
        pair_product(c, &term, 1, rows);
        for (index_t r = 0; r < rows; r++) memcpy(scores + r * wide + i * KEYS, c + r * PAIR, KEYS * sizeof(float));
    }
    const float scale = 1.0f / std::sqrt((float)D);
    float inverse[TALL];
    for (index_t r = 0; r < rows; r++) {
        const index_t position = s.positions[low + r / heads], first = begin * KEYS;
        const index_t from = std::max<index_t>(position - l.window + 1, 0) - first, to = position + 1 - first;
        float *row = scores + r * wide;
        std::fill(row, row + from, -__builtin_inff());
        std::fill(row + to, row + wide, -__builtin_inff());
        lanes most = all(-__builtin_inff());
        for (index_t j = 0; j < wide; j += W) most = larger(most, load(row + j));
        const float peak = largest(most) * scale;
        lanes total = {};
        for (index_t j = 0; j < wide; j += W) {
            const lanes p = exponential(load(row + j) * scale - peak);
            total += p;
            store(chances + r * wide + j, p);
        }
        inverse[r] = 1.0f / sum(total);
    }
    Term<E> terms[64];
    for (index_t pair = 0; pair < P / PAIR; pair++) {
        alignas(64) float y[TALL * PAIR] = {};
        for (index_t i = 0, count; i < blocks; i += count) {
            count = std::min<index_t>(64 - (begin + i) % 64, blocks - i);  // the same parts wherever it begins
            for (index_t j = 0; j < count; j++)
                terms[j] = {chances + (i + j) * KEYS, wide, cache.values(table[begin + i + j], g) + pair * PAIR * KEYS,
                            BLOCK * KEYS, KEYS};
            pair_product(c, terms, count, rows);
            for (index_t r = 0; r < rows * PAIR; r++) y[r] += c[r];
        }
        const index_t columns = std::min(PAIR, D - pair * PAIR);
        for (index_t r = 0; r < rows; r++) {
            E *to = b.attended + (low + r / heads) * b.s_attended + (head + r % heads) * D + pair * PAIR;
            each_vector(columns, [&](index_t j, auto n) { store(to + j, load(y + r * PAIR + j, n) * inverse[r], n); });
        }
    }
}

// ---- the step

template <typename E> static void layer_step(const Model &m, index_t index, const Step &s, const Buffers<E> &b, index_t thread) {
    const Layer &l = m.layer[index];
    const index_t D = m.head_dim, P = deep(D), T = s.tokens;
    const Cache<E> cache{(E *)s.cache + index * s.cache_blocks * m.groups * 2 * KEYS * P, s.cache_blocks, m.groups, P};
    const auto to_stream = [&](index_t first, index_t count, index_t pair, const float *c, const float *bias) {
        const index_t n = std::min(PAIR, m.hidden - pair * PAIR);
        for (index_t t = 0; t < count; t++) {
            float *x = b.x + (first + t) * m.hidden + pair * PAIR;
            for (index_t j = 0; j < n; j++) x[j] += c[t * PAIR + j] + (bias ? bias[pair * PAIR + j] : 0.0f);
        }
    };
#pragma omp for schedule(static)
    for (index_t t = 0; t < T; t++) {
        norm_row(b.normed + t * b.s_normed, b.x + t * m.hidden, l.input_norm, m.hidden, (float)m.eps);
        fill_up(b.normed + t * b.s_normed, m.hidden);
    }
    if (s.rank) {
        project(0, index, b.normed, b.s_normed, b, s, thread);
#pragma omp barrier
    }
    encode(l.qkv, b.normed, b.s_normed, m.hidden, T, b.codes);
    multiply(l.qkv, 0, index, b.normed, b.s_normed, b, s, thread, [&](index_t first, index_t count, index_t pair, const float *c) {
        for (index_t t = 0; t < count; t++)
            each_vector(PAIR, [&](index_t j, auto n) {
                const lanes y = load(c + t * PAIR + j, n);
                store(b.wide + (first + t) * b.s_wide + pair * PAIR + j,
                      l.qkv.bias ? y + load(l.qkv.bias + pair * PAIR + j, n) : y, n);
            });
    });
#pragma omp barrier
#pragma omp for schedule(static)
    for (index_t i = 0; i < T * m.groups; i++) place(m, l, s, b, cache, i / m.groups, i % m.groups);
    // Few tokens: a head at a time, so that threads have about alike.
    const index_t share = m.heads / m.groups, heads = T * m.groups < 4 * s.threads ? 1 : std::min(share, TALL);
    const index_t step = TALL / heads, per_token = m.groups * ((share + heads - 1) / heads);
    index_t tasks = 0;
    for (index_t q = 0; q < s.sequences; q++) tasks += (s.starts[q + 1] - s.starts[q] + step - 1) / step * per_token;
#pragma omp for schedule(dynamic)
    for (index_t task = 0; task < tasks; task++) {
        index_t q = 0, rest = task, here;
        while (rest >= (here = (s.starts[q + 1] - s.starts[q] + step - 1) / step * per_token)) rest -= here, q++;
        const index_t low = s.starts[q] + rest / per_token * step, part = rest % per_token, parts = per_token / m.groups;
        const index_t head = part / parts * share + part % parts * heads;
        attend(m, l, s, b, cache, low, std::min(low + step, s.starts[q + 1]), head,
               std::min(heads, (part / parts + 1) * share - head), thread);
    }
    if (s.rank) {
        project(1, index, b.attended, b.s_attended, b, s, thread);
#pragma omp barrier
    }
    encode(l.o, b.attended, b.s_attended, m.heads * m.head_dim, T, b.codes);
    multiply(l.o, 1, index, b.attended, b.s_attended, b, s, thread, [&](index_t first, index_t count, index_t pair, const float *c) {
        to_stream(first, count, pair, c, l.o.bias);
    });
#pragma omp barrier
#pragma omp for schedule(static)
    for (index_t t = 0; t < T; t++) norm_row(b.normed + t * b.s_normed, b.x + t * m.hidden, l.post_norm, m.hidden, (float)m.eps);
    if (s.rank) {
        project(2, index, b.normed, b.s_normed, b, s, thread);
#pragma omp barrier
    }
    encode(l.gate_up, b.normed, b.s_normed, m.hidden, T, b.codes);
    multiply(l.gate_up, 2, index, b.normed, b.s_normed, b, s, thread, [&](index_t first, index_t count, index_t pair, const float *c) {
        const index_t n = std::min(BLOCK, m.intermediate - pair * BLOCK);
        for (index_t t = 0; t < count; t++)
            each_vector(n, [&](index_t j, auto part) {
                lanes gate = load(c + t * PAIR + j, part), rise = load(c + t * PAIR + BLOCK + j, part);
                if (const float *bias = l.gate_up.bias) {
                    gate += load(bias + pair * PAIR + j, part);
                    rise += load(bias + pair * PAIR + BLOCK + j, part);
                }
                store(b.inner + (first + t) * b.s_inner + pair * BLOCK + j, silu(gate) * rise, part);
            });
    });
#pragma omp barrier
    if (s.rank) {
        project(3, index, b.inner, b.s_inner, b, s, thread);
#pragma omp barrier
    }
    encode(l.down, b.inner, b.s_inner, m.intermediate, T, b.codes);
    multiply(l.down, 3, index, b.inner, b.s_inner, b, s, thread, [&](index_t first, index_t count, index_t pair, const float *c) {
        to_stream(first, count, pair, c, l.down.bias);
    });
#pragma omp barrier
}

template <typename E> static void decode(const Model *model, const Step *step) {
    const Model &m = *model;
    const Buffers<E> b(m, *step);
    const index_t width = up(m.hidden, DEPTH);
#pragma omp parallel num_threads((int)step->threads)
    {
        Step s = *step;
        s.threads = omp_get_num_threads();  // which may be fewer than were asked for
        const index_t thread = omp_get_thread_num();
        configure_tiles();
#pragma omp for schedule(static)
        for (index_t t = 0; t < s.tokens; t++) {
            embed<E>(b.x + t * m.hidden, m, s.ids[t]);
            fill_up(b.inner + t * b.s_inner, m.intermediate);
            fill_up(b.attended + t * b.s_attended, m.heads * m.head_dim);
        }
        for (index_t layer = 0; layer < m.layers; layer++) layer_step(m, layer, s, b, thread);
#pragma omp for schedule(static)
        for (index_t i = 0; i < s.selected; i++) {
            norm_row(b.normed + i * width, b.x + s.select[i] * m.hidden, m.norm, m.hidden, (float)m.eps);
            fill_up(b.normed + i * width, m.hidden);
        }
        encode(m.head, b.normed, width, m.hidden, s.selected, b.codes);
        alignas(64) float c[TALL * PAIR];
        const index_t pairs = m.head.pairs();
        for (index_t pair = first_of(pairs, thread, s.threads); pair < first_of(pairs, thread + 1, s.threads); pair++)
            for (index_t first = 0; first < s.selected; first += TALL) {
                const index_t count = std::min(TALL, s.selected - first), n = std::min(PAIR, m.vocab - pair * PAIR);
                product_of(c, m.head, pair, Term<E>{}, b.normed, width, b.codes, first, count);
                for (index_t t = 0; t < count; t++)
                    memcpy(s.logits + (first + t) * m.vocab + pair * PAIR, c + t * PAIR, (size_t)n * sizeof(float));
            }
        release_tiles();
    }
}

template <typename E> static void decode_memory(const Model *model, const Step *step, index_t *bytes) {
    *bytes = Buffers<E>(*model, *step).bytes;
}

// Whether the kernel of the system lets this process use what the code was compiled for; asked before the first step.
template <typename E> static void decode_allowed(index_t *allowed) { *allowed = tiles_allowed(); }

EXPORT(decode)
EXPORT(decode_allowed)
EXPORT(decode_memory)

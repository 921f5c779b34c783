// A step of generation on a CPU: the new tokens of any sequences through all layers, with keys and values in blocks.
// decode.py lays out what it reads; llama.py says the same in torch.

#include <omp.h>

#include <vector>

#include "../../operators/cpu/exported.h"
#include "attention.h"

// ---- what lies between the products

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

// Products of one pair of blocks after another, each with tiles of tokens: made(first token, count, pair, c (count, 32)).
// `update_of(tile, pair)` is added. Tiles begin at edges[0], edges[1], ...
template <typename E, typename UpdateOf, typename Made>
static void products(const Matrix &w, const E *x, index_t sx, const Buffers<E> &b, const index_t *edges, index_t tiles,
                     index_t thread, index_t threads, UpdateOf update_of, Made made) {
    if (!tiles) return;  // a step within a prompt wants no logits
    alignas(64) float c[TALL * PAIR];
    const index_t last = first_of(w.pairs(), thread + 1, threads), bytes = PAIR * w.k * w.bits / 8;
    bool many = false;
    for (index_t tile = 0; tile < tiles; tile++) many = many || edges[tile + 1] - edges[tile] > FEW;
    const auto pass = [&](auto of_pair) {
        for (index_t pair = first_of(w.pairs(), thread, threads); pair < last; pair++) {
            const auto product = of_pair(pair);
            // The next pair is fetched meanwhile, some of it with each tile.
            const index_t steps = tiles * (w.k / (w.bits == 8 ? 64 : 32));
            Soon soon{(const char *)w.at + (pair + 1) * bytes, (bytes / 64 + steps - 1) / steps};
            if (pair + 1 == last) soon = NOTHING;
            if (tiles == 1) soon = {};
            for (index_t tile = 0; tile < tiles; tile++) {
                const index_t first = edges[tile], count = edges[tile + 1] - first;
                product(c, first, count, update_of(tile, pair), soon);
                made(first, count, pair, (const float *)c);
                if (soon.at) soon.at += soon.lines * 64 * (steps / tiles);
            }
        }
    };
    if (w.bits > 8) {
        const index_t size = w.k * BLOCK;
        pass([&](index_t pair) {
            return [&, pair](float *c, index_t first, index_t count, const Term<E> &update, Soon soon) {
                const Term<E> terms[2] = {{x + first * sx, sx, (const E *)w.at + pair * 2 * size, size, w.k}, update};
                pair_product(c, PAIR, terms, update.k ? 2 : 1, count, soon);
            };
        });
        return;
    }
    const auto of_codes = [&](auto bits) {
        pass([&](index_t pair) {
            const PairOfCodes<bits> own(w.at, w.scales, pair, w.k, b.unpacked[thread], many);
            return [&, own](float *c, index_t first, index_t count, const Term<E> &update, Soon soon) {
                if (bits == 4 && many) configure_tiles(true), soon = NOTHING;
                own.product(c, b.codes, first, count, soon);
                if (bits == 4 && many) configure_tiles();
                if (!update.k) return;
                alignas(64) float more[TALL * PAIR];
                pair_product(more, PAIR, &update, 1, count, NOTHING);
                for (index_t j = 0; j < count * PAIR; j++) c[j] += more[j];
            };
        });
    };
    if (w.bits == 8) of_codes(std::integral_constant<int, 8>{});
    else of_codes(std::integral_constant<int, 4>{});
}

// Outputs of all tokens of a step.
template <typename E, typename Made>
static void multiply(const Matrix &w, int target, index_t layer, const E *x, index_t sx, const Buffers<E> &b,
                     const Step &s, index_t thread, Made made) {
    const auto update_of = [&](index_t tile, index_t pair) {
        const Update *updates = s.tile_updates[tile];
        if (!updates || !updates[layer * 4 + target].b.at) return Term<E>{};
        const Matrix &second = updates[layer * 4 + target].b;
        const index_t size = second.k * BLOCK;
        return Term<E>{b.low + s.tile_start[tile] * b.s_low, b.s_low, (const E *)second.at + pair * 2 * size, size, second.k};
    };
    products(w, x, sx, b, s.tile_start, s.tiles, thread, s.threads, update_of, made);
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
            pair_product(c, PAIR, &term, 1, count);
            for (index_t t = 0; t < count; t++)
                each_vector(PAIR, [&](index_t j, auto n) {
                    store(b.low + (first + t) * b.s_low + pair * PAIR + j, load(c + t * PAIR + j, n), n);
                });
        }
    }
}

// ---- the step

// Attention of all tokens, by all threads together.
template <typename E>
static void attend_all(const Model &m, const Layer &l, const Step &s, const Buffers<E> &b, const Cache<E> &cache) {
    const index_t step = TALL / (m.heads / m.groups);  // tokens at a time
    index_t tasks = 0;
    const auto of_sequence = [&](index_t q) { return (s.starts[q + 1] - s.starts[q] + step - 1) / step * m.groups; };
    for (index_t q = 0; q < s.sequences; q++) tasks += of_sequence(q);
    const auto task_of = [&](index_t rest) {
        index_t q = 0;
        while (rest >= of_sequence(q)) rest -= of_sequence(q), q++;
        const index_t low = s.starts[q] + rest / m.groups * step;
        return Attending<E>{m, l, s, b, cache, low, std::min(low + step, s.starts[q + 1]), rest % m.groups};
    };
    if (!b.split) {
#pragma omp for schedule(dynamic)
        for (index_t task = 0; task < tasks; task++) attend(task_of(task));
        return;
    }
#pragma omp for schedule(dynamic)
    for (index_t part = 0; part < tasks * b.chunks; part++) {
        const Attending<E> task = task_of(part % tasks);
        const index_t chunk = part / tasks;
        if (chunk >= task.first_chunk() && chunk <= task.last_chunk()) attend_part(task, chunk);
    }
#pragma omp for schedule(static)
    for (index_t task = 0; task < tasks; task++) join_chunks(task_of(task));
}

template <typename E> static void layer_step(const Model &m, index_t index, const Step &s, const Buffers<E> &b, index_t thread) {
    const Layer &l = m.layer[index];
    const index_t D = m.head_dim, P = deep(D), T = s.tokens;
    const bool coded = s.cache_coded;
    const index_t layer_bytes = s.cache_blocks * m.groups * Cache<E>::bytes(P, coded);
    const Cache<E> cache{(char *)s.cache + index * layer_bytes, m.groups, P, coded};
    const auto to_stream = [&](index_t first, index_t count, index_t pair, const float *c, const float *bias) {
        const index_t n = std::min(PAIR, m.hidden - pair * PAIR);
        for (index_t t = 0; t < count; t++) {
            float *x = b.x + (first + t) * m.hidden + pair * PAIR;
            each_vector(n, [&](index_t j, auto part) {
                const lanes y = load(c + t * PAIR + j, part);
                store(x + j, load(x + j, part) + (bias ? y + load(bias + pair * PAIR + j, part) : y), part);
            });
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
    attend_all(m, l, s, b, cache);
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
    std::vector<index_t> edges;  // of tiles of the tokens whose logits are wanted
    for (index_t first = 0; first < step->selected; first += TALL) edges.push_back(first);
    edges.push_back(step->selected);
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
            norm_row(b.normed + i * b.s_normed, b.x + s.select[i] * m.hidden, m.norm, m.hidden, (float)m.eps);
            fill_up(b.normed + i * b.s_normed, m.hidden);
        }
        encode(m.head, b.normed, b.s_normed, m.hidden, s.selected, b.codes);
        const auto none = [](index_t, index_t) { return Term<E>{}; };
        products(m.head, b.normed, b.s_normed, b, edges.data(), (index_t)edges.size() - 1, thread, s.threads, none,
                 [&](index_t first, index_t count, index_t pair, const float *c) {
                     const index_t n = std::min(PAIR, m.vocab - pair * PAIR);
                     for (index_t t = 0; t < count; t++)
                         memcpy(s.logits + (first + t) * m.vocab + pair * PAIR, c + t * PAIR, (size_t)n * sizeof(float));
                 });
        release_tiles();
    }
}

template <typename E> static void decode_memory(const Model *model, const Step *step, index_t *bytes) {
    *bytes = Buffers<E>(*model, *step).bytes;
}

// Whether the kernel of the system lets this process use what the code was compiled for; asked before the first step.
template <typename E> static void decode_allowed(index_t *allowed) { *allowed = tiles_allowed(); }

// A weight of whole blocks of 16 rows, as words of four bytes: (N/16, 16, K) -> (N/16, K, 16), every `step`th block of `to`.
template <typename E> static void pack_words(const int32_t *from, int32_t *to, index_t blocks, index_t words, index_t step) {
#pragma omp parallel for schedule(static)
    for (index_t block = 0; block < blocks; block++) {
        const int32_t *rows = from + block * BLOCK * words;
        int32_t *out = to + block * step * BLOCK * words;
        for (index_t word = 0; word < words; word++)
            for (index_t row = 0; row < BLOCK; row++) out[word * BLOCK + row] = rows[row * words + word];
    }
}

EXPORT(decode)
EXPORT(decode_allowed)
EXPORT(decode_memory)
EXPORT(pack_words)

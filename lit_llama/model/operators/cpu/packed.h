// What a kernel for packed samples works on: the samples, their heads, and the parts that threads take, each with
// memory that was there before they started.
//
// Letters: H query heads, G key/value heads, D head size; s* strides between tokens, in elements.

#pragma once

#include <omp.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "memory.h"
#include "numbers.h"
#include "tiles.h"

struct Samples {  // a sample may go on from another one, its parent, whose tokens it sees before its own
    const index_t *offsets, *parents;
    index_t count;
    index_t first(index_t s) const { return offsets[s]; }
    index_t length(index_t s) const { return offsets[s + 1] - offsets[s]; }
    index_t before(index_t s) const { return parents[s] < 0 ? 0 : length(parents[s]); }
    index_t seen(index_t s) const { return before(s) + length(s); }
    std::vector<index_t> longest_first() const {
        std::vector<index_t> order((size_t)count);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](index_t a, index_t b) { return seen(a) > seen(b); });
        return order;
    }
};

template <typename E> struct Heads {  // of one packed batch
    const E *q, *k, *v;
    index_t sq, sk, sv;  // between tokens
    index_t H, G, D;
    float scale;
    index_t window;  // keys that a query sees
};

struct Keys {  // [low, high)
    index_t low, high;
    index_t count() const { return high - low; }
    Keys vectors() const { return {low / W * W, up(high, W)}; }
    lanes only(lanes x, index_t j) const {  // -inf where a lane, j and on, is none of them
        if (low <= j && j + W <= high) return x;
        const integers place = first_lanes() + (int32_t)j;
        return (place >= (int32_t)low) & (place < (int32_t)high) ? x : all(-__builtin_inff());
    }
};

// Deals out a part of the memory. Without one, it finds how much is needed.
struct Scratch {
    float *start;
    index_t taken = 0;  // floats
    template <typename T> void take(T *&to, index_t count) {
        to = start ? (T *)(start + taken) : nullptr;
        taken += up(count * (index_t)sizeof(T), 4 * W) / 4;
    }
};

// A sample and a key/value head, with the queries of all heads that share it.
template <typename E> struct Part {
    const Heads<E> &x;
    const Samples &samples;
    index_t sample, g;
    index_t first = samples.first(sample), length = samples.length(sample), before = samples.before(sample);
    index_t keys = up(before + length, W);  // filled up with zeros
    index_t stride = keys | W;  // of what has a column for each key: an odd number of vectors, as rows a power of two
                                // apart share few places in the cache
    index_t wide = up(x.D, W), heads = x.H / x.G;

    Part(const Heads<E> &x, const Samples &samples, index_t sample, index_t g)
        : x(x), samples(samples), sample(sample), g(g) {}

    Keys seen_by(index_t query, index_t count) const {  // queries from this one on
        return {std::max<index_t>(before + query - x.window + 1, 0), before + query + count};
    }
    // Rows of keys or values, those of the parent first.
    void gather(E *to, const E *from, index_t stride) const {
        const index_t D = x.D, parent = before ? samples.first(samples.parents[sample]) : 0;
        for (index_t i = 0; i < before + length; i++) {
            const index_t token = i < before ? parent + i : first + i - before;
            memcpy(to + i * D, from + token * stride + g * D, (size_t)D * sizeof(E));
        }
        memset(to + (before + length) * D, 0, (size_t)((keys - before - length) * D) * sizeof(E));
    }
};

// Does the work of all parts, the longest first, so that threads end at about the same time: `reserve` gives the floats
// that it needs for a part and takes them from where it is told, `run` does it.
template <typename Work, typename E> static void each_part(const Heads<E> &x, const Samples &samples, Work work) {
    const std::vector<index_t> order = samples.longest_first();
    if (order.empty()) return;
    const Memory memory(omp_get_max_threads(), work.reserve(Part<E>(x, samples, order[0], 0), nullptr));
#pragma omp parallel for schedule(dynamic)
    for (index_t task = 0; task < samples.count * x.G; task++) {
        const Part<E> part(x, samples, order[(size_t)(task / x.G)], task % x.G);
        Work own = work;
        own.reserve(part, memory[omp_get_thread_num()]);
        own.run(part);
    }
}

// Choosing tokens: the likeliest of each row, or one that is drawn among those that top_k, top_p and min_p keep; and
// penalties. choice.py calls it, and candidates.py of the engine says the same in torch.
//
// Tokens are kept that have at least some probability. It is found without sorting: probabilities are counted and summed
// up by their upper bits, and those of the bucket in which it lies by the next ones, until a bucket is one number. Sums
// are in double, in which those of floats between 2^-29 and 1 are exact in any order.
//
// Letters: N rows, V tokens.

#include <algorithm>
#include <cmath>
#include <omp.h>
#include <vector>

#include "../../operators/cpu/exported.h"
#include "../../operators/cpu/numbers.h"

static const index_t BUCKETS = 1024, COPIES = 4;  // a copy would mostly wait for the last sum of its own bucket
static const index_t BLOCK = 256;                 // tokens that are summed up first, as in candidates.py

typedef double doubles __attribute__((vector_size(8 * W)));

struct Histogram {
    uint32_t counts[COPIES][BUCKETS];
    double sums[COPIES][BUCKETS];
    void add(const float *x, index_t n, int shift) {
        memset(this, 0, sizeof *this);
        for (index_t i = 0; i < n; i++) {
            const index_t bucket = bucket_of(x[i], shift);
            counts[i % COPIES][bucket]++;
            sums[i % COPIES][bucket] += (double)x[i];
        }
    }
    index_t count(index_t bucket) const {
        return (index_t)counts[0][bucket] + counts[1][bucket] + counts[2][bucket] + counts[3][bucket];
    }
    double sum(index_t bucket) const {
        return sums[0][bucket] + sums[1][bucket] + (sums[2][bucket] + sums[3][bucket]);
    }
    static index_t bucket_of(float x, int shift) {  // of 0 and more, the order of floats is that of their bits
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        return bits >> shift & (BUCKETS - 1);
    }
};

struct Memory {  // of a thread
    Histogram histogram;
    std::vector<float> some;     // (V)
    std::vector<double> blocks;  // (V / BLOCK)
    explicit Memory(index_t V) : some((size_t)V), blocks((size_t)((V + BLOCK - 1) / BLOCK)) {}
};

struct Found {
    float value;
    double total;  // of all that are as large or larger
};
// The largest number for which it is enough(how many are as large or larger, their sum); the smallest if none is.
template <typename Enough> static Found descend(const float *x, index_t n, Memory &memory, Enough enough) {
    Histogram &h = memory.histogram;
    index_t above = 0;
    double total = 0;
    for (int shift : {20, 10, 0}) {
        h.add(x, n, shift);
        index_t bucket = -1;
        for (index_t b = BUCKETS - 1; b >= 0; b--) {
            if (!h.count(b)) continue;
            if (bucket >= 0) above += h.count(bucket), total += h.sum(bucket);
            bucket = b;
            if (enough(above + h.count(b), total + h.sum(b))) break;
        }
        index_t kept = 0;
        for (index_t i = 0; i < n; i++) {
            const float value = x[i];
            memory.some[kept] = value;
            kept += Histogram::bucket_of(value, shift) == bucket;
        }
        x = memory.some.data(), n = kept;
        if (shift == 0) total += h.sum(bucket);
    }
    return {x[0], total};
}

static float peak_of(const float *x, index_t n) {
    lanes most[4] = {};
    index_t j = 0;
    for (; j + 4 * W <= n; j += 4 * W)
        for (index_t i = 0; i < 4; i++) most[i] = larger(most[i], load(x + j + i * W));
    for (; j < n; j += W) most[0] = larger(most[0], load(x + j, n - j));
    return largest(larger(larger(most[0], most[1]), larger(most[2], most[3])));
}

// Those of x that are at least as large, in their order; how many they are.
static index_t at_least(float bound, const float *x, index_t n, float *to) {
    index_t kept = 0;
    for (index_t i = 0; i < n; i++) {
        const float value = x[i];
        to[kept] = value;
        kept += value >= bound;
    }
    return kept;
}
// The k-th largest, and the sum of all that are as large or larger. The k-th of the largest of parts is no larger: what
// is smaller than that is left out first.
static Found largest_of(const float *x, index_t V, index_t k, Memory &memory) {
    const auto enough = [&](index_t count, double) { return count >= k; };
    float *some = memory.some.data();
    index_t parts = 0;
    for (index_t first = 0; first + BLOCK <= V; first += BLOCK, parts += W) {
        lanes most = load(x + first);
        for (index_t j = first + W; j < first + BLOCK; j += W) most = larger(most, load(x + j));
        store(some + parts, most);
    }
    const float bound = k <= parts ? descend(some, parts, memory, enough).value : 0.0f;
    return descend(some, at_least(bound, x, V, some), memory, enough);
}

// The smallest probability that is kept.
static float least_of(const float *x, index_t V, index_t top_k, double top_p, float min_p, Memory &memory) {
    float least = min_p > 0 ? min_p * peak_of(x, V) : 0.0f, bound = 0;
    double total = 1;
    if (top_k < V) {
        const Found found = largest_of(x, V, top_k, memory);
        least = std::max(least, bound = found.value), total = found.total;
    } else if (top_p < 0.999) {  // all that are smaller have half of what may be left out together, at most
        bound = (float)((1 - top_p) / (2 * (double)V));
    }
    if (top_p < 1) {
        const double wanted = top_p * total;
        const index_t n = at_least(bound, x, V, memory.some.data());
        const auto enough = [&](index_t, double sum) { return sum >= wanted; };
        least = std::max(least, descend(memory.some.data(), n, memory, enough).value);
    }
    return least;
}

// The first place whose sum exceeds the target, one with a probability; rounding does not reach beyond either end.
static index_t hit(const double *sums, index_t n, double target) {
    target = std::min(std::max(target, 0.0), std::nextafter(sums[n - 1], 0.0));
    return std::min<index_t>(std::upper_bound(sums, sums + n, target) - sums, n - 1);
}

static index_t drawn(const float *x, index_t V, float least, double number, std::vector<double> &blocks) {
    const auto kept = [&](index_t j, index_t count) {
        const lanes v = load(x + j, count);
        return v >= least ? v : lanes{};
    };
    double before = 0;
    for (index_t block = 0; block * BLOCK < V; block++) {
        const index_t first = block * BLOCK, end = std::min(first + BLOCK, V);
        doubles sums = {};
        for (index_t j = first; j < end; j += W) sums += __builtin_convertvector(kept(j, end - j), doubles);
        double sum = 0;
        for (index_t j = 0; j < W; j++) sum += sums[j];
        blocks[block] = before += sum;
    }
    const index_t count = (V + BLOCK - 1) / BLOCK;
    const double target = number * before;
    const index_t block = hit(blocks.data(), count, target), first = block * BLOCK, n = std::min(BLOCK, V - first);
    double inside[BLOCK], sum = 0;
    for (index_t j = 0; j < n; j++) inside[j] = sum += x[first + j] >= least ? (double)x[first + j] : 0.0;
    return first + hit(inside, n, target - (block ? blocks[block - 1] : 0.0));
}

// Draws by numbers in [0, 1): probabilities (N, V) -> ids (N); -1 where they are none. V stands for no top_k.
static void draw_rows(const float *chances, index_t N, index_t V, const index_t *top_k, const double *top_p,
                      const float *min_p, const double *numbers, index_t *ids) {
    const index_t threads = std::min<index_t>({N, N * V >> 14, omp_get_max_threads()});  // few numbers, one thread
    std::vector<Memory> memory((size_t)std::max<index_t>(threads, 1), Memory(V));
#pragma omp parallel for schedule(dynamic) num_threads((int)memory.size())
    for (index_t i = 0; i < N; i++) {
        Memory &own = memory[(size_t)omp_get_thread_num()];
        const float *x = chances + i * V;
        if (std::isnan(x[0])) {  // then all are
            ids[i] = -1;
            continue;
        }
        ids[i] = drawn(x, V, least_of(x, V, top_k[i], top_p[i], min_p[i], own), numbers[i], own.blocks);
    }
}

// The first of the largest numbers in each of some rows, `stride` apart: -1 where there is none, or it is not finite.
template <typename E>
static void peak_rows(const E *scores, index_t stride, index_t V, const index_t *rows, index_t N, index_t *ids) {
#pragma omp parallel for schedule(static) if (N > 1)
    for (index_t i = 0; i < N; i++) {
        const E *x = scores + rows[i] * stride;
        const float low = -__builtin_inff();
        lanes most[4] = {all(low), all(low), all(low), all(low)};
        integers none = {};
        const auto look = [&](lanes &own, lanes v) { own = larger(own, v), none |= v != v; };
        index_t j = 0;
        for (; j + 4 * W <= V; j += 4 * W)
#pragma GCC unroll 4
            for (index_t k = 0; k < 4; k++) look(most[k], load(x + j + k * W));
        for (; j < V; j += W) look(most[0], load(x + j, V - j, low));
        const float peak = largest(larger(larger(most[0], most[1]), larger(most[2], most[3])));
        bool whole = std::isfinite(peak);
        for (index_t k = 0; k < W; k++) whole = whole && !none[k];
        ids[i] = -1;
        for (index_t k = 0; whole && k < V; k++)
            if (load_one(x[k]) == peak) {
                ids[i] = k;
                break;
            }
    }
}

// A product that is rounded before it is added to.
static inline float product(float x, float y) {
    float z = x * y;
    asm("" : "+m"(z));
    return z;
}
// Repetition, presence and frequency penalties on rows of scores (., V), of tokens in `places` of counts and seen (., V).
static void penalise_rows(float *scores, index_t V, const index_t *rows, const index_t *places, index_t N,
                          const int32_t *counts, const uint8_t *seen, const float *repetition, const float *presence,
                          const float *frequency) {
#pragma omp parallel for schedule(static) if (N > 1)
    for (index_t i = 0; i < N; i++) {
        float *x = scores + rows[i] * V;
        const int32_t *own = counts + places[i] * V;
        const uint8_t *there = seen + places[i] * V;
        const auto change = [&](index_t j) {
            if (!there[j]) return;
            const float changed = x[j] > 0 ? x[j] / repetition[i] : product(x[j], repetition[i]);
            x[j] = changed - product(frequency[i], (float)own[j]) - (own[j] > 0 ? presence[i] : 0.0f);
        };
        index_t j = 0;
        for (uint64_t eight; j + 8 <= V; j += 8) {
            memcpy(&eight, there + j, sizeof eight);
            if (eight)
                for (index_t k = j; k < j + 8; k++) change(k);
        }
        for (; j < V; j++) change(j);
    }
}

extern "C" {
auto draw_rows_float32 = guarded<draw_rows>(draw_rows);
auto penalise_rows_float32 = guarded<penalise_rows>(penalise_rows);
}
EXPORT(peak_rows)

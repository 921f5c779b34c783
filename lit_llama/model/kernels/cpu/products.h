// Products of a few tokens with matrices that are packed for it, each sum in one order whatever the number of tokens.
//
// A packed matrix is cut into blocks of 16 outputs; a block holds, for each word of inputs (a float, or two neighbours
// of bfloat16), the words of its 16 outputs: (k / per word, 16, per word). That is a vector of AVX-512, two of AVX2, and
// row by row the tile that AMX multiplies with. Blocks come in pairs, and k is a multiple of 32.
//
// A sum runs over k from the first input to the last, in one accumulator, so that its bits depend on nothing but its
// own row and column: a token gives the same logits alone, among others, and however its prompt is cut.

#pragma once

#include "../../operators/cpu/tiles.h"
#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

static const index_t BLOCK = 16;       // outputs of a block
static const index_t PAIR = 2 * BLOCK; // of a pair of them
static const index_t DEPTH = 32;       // k is a multiple of it
static const index_t TALL = 32;        // tokens of a tile, at most

// A part of a sum over k: rows of x, and a pair of blocks, the second of which begins `next` after the first.
template <typename E> struct Term {
    const E *x;
    index_t sx;
    const E *w;
    index_t next, k;
};

// Lines that are wanted after this product, of which some are fetched at each step of k; without any, it fetches ahead
// of its own weights.
struct Soon {
    const char *at = nullptr;
    index_t lines = 0;
};
static const Soon NOTHING{nullptr, -1};

#ifdef __AMX_BF16__
static const bool AMX = true;
// Whether the kernel lets this process use the tiles; it has to be asked once.
static inline bool tiles_allowed() {
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
    return allowed;
}
// All tiles of a thread: 16 rows of 64 bytes; of codes of 4 bits, whose groups are 32 long, half of it on the way in.
static inline void configure_tiles(bool half = false) {
    struct __attribute__((packed)) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    if (half) shape.bytes[4] = shape.bytes[5] = 32, shape.rows[6] = shape.rows[7] = 8;
    _tile_loadconfig(&shape);
}
static inline void release_tiles() { _tile_release(); }

static const index_t AHEAD = 4096; // bytes of a block that are fetched before they are wanted

static inline void fetch_tile(const char *at) {
#pragma GCC unroll 16
    for (int line = 0; line < 16; line++) __builtin_prefetch(at + AHEAD + 64 * line);
}
static inline void fetch_soon(Soon &soon) {
    for (index_t line = 0; line < soon.lines; line++, soon.at += 64) __builtin_prefetch(soon.at, 0, 2);
}
// c (rows, 32), `sc` between rows, of up to 32 rows; all 32, or 16 of them, are read and written, whatever they hold.
static inline void pair_product(float *c, index_t sc, const Term<bf16> *terms, index_t count, index_t rows, Soon soon = {}) {
    const bool tall = rows > BLOCK;
    _tile_zero(0);
    _tile_zero(1);
    if (!tall) {
        for (index_t i = 0; i < count; i++) {
            const Term<bf16> &term = terms[i];
            const char *left = (const char *)term.w, *right = (const char *)(term.w + term.next);
            for (index_t k = 0; k < term.k; k += DEPTH, left += 1024, right += 1024) {
                if (soon.lines) fetch_soon(soon);
                else fetch_tile(left), fetch_tile(right);
                _tile_loadd(4, term.x + k, term.sx * 2);
                _tile_loadd(6, left, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, right, 64);
                _tile_dpbf16ps(1, 4, 7);
            }
        }
    } else {
        _tile_zero(2);
        _tile_zero(3);
        for (index_t i = 0; i < count; i++) {
            const Term<bf16> &term = terms[i];
            const char *left = (const char *)term.w, *right = (const char *)(term.w + term.next);
            for (index_t k = 0; k < term.k; k += DEPTH, left += 1024, right += 1024) {
                if (soon.lines) fetch_soon(soon);
                else fetch_tile(left), fetch_tile(right);
                _tile_loadd(4, term.x + k, term.sx * 2);
                _tile_loadd(6, left, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, right, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, term.x + BLOCK * term.sx + k, term.sx * 2);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(2, c + BLOCK * sc, sc * 4);
        _tile_stored(3, c + BLOCK * sc + BLOCK, sc * 4);
    }
    _tile_stored(0, c, sc * 4);
    _tile_stored(1, c + BLOCK, sc * 4);
}
#else
static const bool AMX = false;
static inline bool tiles_allowed() { return true; }
static inline void configure_tiles(bool = false) {}
static inline void release_tiles() {}
#endif

static const int VECS = (int)(PAIR / W);
static const int MANY = VECS == 2 ? 8 : 3; // rows at a time, as the registers allow

// The first rows, which read the weights, fetch ahead; the others, which find them in the cache, fetch the next pair.
template <typename E, int M, bool first>
static inline void rows_product(float *c, index_t sc, const Term<E> *terms, index_t count, index_t row) {
    lanes totals[M][VECS] = {};
    for (index_t i = 0; i < count; i++) {
        const Term<E> &term = terms[i];
        const uint32_t *left = (const uint32_t *)term.w, *right = (const uint32_t *)(term.w + term.next);
        const uint32_t *x = (const uint32_t *)(term.x + row * term.sx);
        const index_t words = term.k / per_word<E>, sx = term.sx / per_word<E>, pair = 2 * term.next / per_word<E>;
        for (index_t k = 0; k < words; k++, left += BLOCK, right += BLOCK) {
            __builtin_prefetch(left + (first ? 1024 : pair), 0, first ? 3 : 2);
            __builtin_prefetch(right + (first ? 1024 : pair), 0, first ? 3 : 2);
            lanes b[VECS];
#pragma GCC unroll 8
            for (int j = 0; j < VECS; j++)
                b[j] = load((const float *)(j * W < BLOCK ? left + j * W : right + j * W - BLOCK));
#pragma GCC unroll 8
            for (int m = 0; m < M; m++)
#pragma GCC unroll 8
                for (int j = 0; j < VECS; j++) totals[m][j] = multiply_add(totals[m][j], x[m * sx + k], b[j], E{});
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int j = 0; j < VECS; j++) store(c + (row + m) * sc + j * W, totals[m][j]);
}
template <typename E, bool first, int M = MANY>
static inline void some_rows(float *c, index_t sc, const Term<E> *terms, index_t count, index_t row, index_t rows) {
    if constexpr (M > 1)
        if (rows < M) return some_rows<E, first, M - 1>(c, sc, terms, count, row, rows);
    rows_product<E, M, first>(c, sc, terms, count, row);
}
template <typename E>
static inline void pair_product(float *c, index_t sc, const Term<E> *terms, index_t count, index_t rows, Soon = {}) {
    some_rows<E, true>(c, sc, terms, count, 0, std::min<index_t>(MANY, rows));
    for (index_t row = MANY; row < rows; row += MANY)
        some_rows<E, false>(c, sc, terms, count, row, std::min<index_t>(MANY, rows - row));
}

static inline index_t first_of(index_t parts, index_t thread, index_t threads) { return parts * thread / threads; }

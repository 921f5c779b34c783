// Memory for all threads, taken before they start.

#pragma once

#include <omp.h>

#include <memory>
#include <new>

#include "numbers.h"
#include "tiles.h"

// Room for `parts` times as many floats as are asked for, or std::bad_alloc.
class Memory {
    static constexpr std::align_val_t line{64};  // of the cache, of which no two parts have a share
    struct Free {
        void operator()(float *x) const { operator delete(x, line); }
    };
    index_t part;
    std::unique_ptr<float, Free> start;

  public:
    Memory(index_t parts, index_t floats)
        : part(up(floats, 16)), start((float *)operator new((size_t)(parts * part) * sizeof(float), line)) {}
    float *operator[](index_t i) const { return start.get() + i * part; }
};

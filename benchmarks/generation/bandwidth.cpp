// A pass over memory that only reads, in the order in which threads read weights.

#include <omp.h>

#include <cstdint>
#include <cstring>

typedef uint64_t words __attribute__((vector_size(64)));

extern "C" uint64_t read_all(const char *at, int64_t bytes, int threads) {
    uint64_t found = 0;
#pragma omp parallel num_threads(threads) reduction(^ : found)
    {
        const int64_t part = bytes / omp_get_num_threads() / 256 * 256;
        const char *from = at + part * omp_get_thread_num();
        words sums[4] = {};
        for (int64_t i = 0; i < part; i += 256)
            for (int j = 0; j < 4; j++) {
                words next;
                __builtin_prefetch(from + i + 64 * j + 4096);
                memcpy(&next, from + i + 64 * j, 64);
                sums[j] ^= next;
            }
        const words all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
        for (int j = 0; j < 8; j++) found ^= all[j];
    }
    return found;
}

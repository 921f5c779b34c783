// What kernels.py calls: each kernel for float32 and bfloat16, as a pointer under its name. A function gives 0, or 1
// where memory ended.

#pragma once

#include <new>

template <auto kernel, typename... Arguments> static auto guarded(void (*)(Arguments...)) {
    return +[](Arguments... arguments) -> int {
        try {
            kernel(arguments...);
            return 0;
        } catch (const std::bad_alloc &) {
            return 1;
        }
    };
}

#define EXPORT(KERNEL)                                                                \
    extern "C" {                                                                      \
    auto KERNEL##_float32 = guarded<KERNEL<float>>(KERNEL<float>);                    \
    auto KERNEL##_bfloat16 = guarded<KERNEL<bf16>>(KERNEL<bf16>);                     \
    }

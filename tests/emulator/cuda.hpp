// What CUDA C++ offers a kernel, for g++: qualifiers, indices, collectives, atomics and arithmetic on the CPU.
//
// The launcher includes it before a kernel's source, so that the very text which NVRTC compiles for the GPU runs in
// the ordinary test suite. Every thread of a block is a coroutine of runtime.cpp, switched only where CUDA lets threads
// meet; one that waits for something that never comes is reported with the file and line of its call.
//
// Harsh where CUDA promises nothing: shared memory is filled with 0xFF before every block, a shuffle from an absent
// lane gives 0xFF, and __activemask() names the caller alone. Not here: dynamic shared memory, cooperative groups,
// textures, and what needs more than sm_75 (__reduce_*_sync). A __device__ variable is one per kernel, not per module.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// A section of its own, so that the runtime can fill it between blocks; they run one after another.
#define __shared__ __attribute__((section("moeflow_shared"))) static

#define VECTOR(T, N, SIZE) \
    struct __align__(SIZE * 2) N##2 { T x, y; }; \
    struct N##3 { T x, y, z; }; \
    struct __align__(SIZE * 4) N##4 { T x, y, z, w; }; \
    inline N##2 make_##N##2(T x, T y) { return {x, y}; } \
    inline N##3 make_##N##3(T x, T y, T z) { return {x, y, z}; } \
    inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTOR(signed char, char, 1)
VECTOR(unsigned char, uchar, 1)
VECTOR(short, short, 2)
VECTOR(unsigned short, ushort, 2)
VECTOR(int, int, 4)
VECTOR(unsigned, uint, 4)
VECTOR(float, float, 4)
#undef VECTOR

extern uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {

using Word = unsigned long long;
enum Operation { SYNC, SHUFFLE, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR, BALLOT, ANY, ALL };

Word collective(Operation operation, unsigned mask, Word value, int argument, int width, const char* file, int line);
void barrier(const char* file, int line);
void preempt();   // another thread may run here, if the order is random
void spin();      // the caller may be waiting for another thread
long long steps();
void use_stacks(char** pool);   // room for as many pointers as a block may have threads
[[noreturn]] void fail(const char* format, ...);
const char* run(void (*kernel)(void**), void** arguments, const int* grid, int block, int order, Word seed);

template <class T> Word bits_of(T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
    Word word = 0;
    __builtin_memcpy(&word, &value, sizeof(T));
    return word;
}
template <class T> T from_bits(Word word) {
    T value;
    __builtin_memcpy(&value, &word, sizeof(T));
    return value;
}

template <class T> struct Same { using type = T; };
template <class T> using same = typename Same<T>::type;   // of a parameter from which T is not deduced

template <class T> struct Code {
    static_assert(sizeof(T) == 0, "a kernel's parameters are pointers, long long or float");
};
template <class T> struct Code<T*> { static constexpr char value = 'p'; };
template <> struct Code<long long> { static constexpr char value = 'i'; };
template <> struct Code<float> { static constexpr char value = 'f'; };

// A kernel's parameters, a letter each.
template <class... P> const char* parameters(void (*)(P...)) {
    static const char codes[] = {Code<P>::value..., 0};
    return codes;
}
template <int...> struct Indices {};
template <int N, int... I> struct Count : Count<N - 1, N - 1, I...> {};
template <int... I> struct Count<0, I...> { using type = Indices<I...>; };
template <class... P, int... I> void call(void (*kernel)(P...), void** a, Indices<I...>) { kernel(*(P*)a[I]...); }
template <class... P> void call(void (*kernel)(P...), void** a) {
    call(kernel, a, typename Count<sizeof...(P)>::type());
}

}  // namespace emulator

// The launcher ends a translation unit with the kernel that it wants. The declaration fails for one not extern "C".
#define MOEFLOW_KERNEL(name) \
    extern "C" decltype(name) name; \
    extern "C" void moeflow_use_stacks(char** pool) { emulator::use_stacks(pool); } \
    extern "C" const char* moeflow_parameters() { return emulator::parameters(name); } \
    extern "C" const char* moeflow_run(void** arguments, const int* grid, int block, int order, emulator::Word seed) { \
        return emulator::run([](void** a) { emulator::call(name, a); }, arguments, grid, block, order, seed); \
    }

#include "collectives.hpp"
#include "arithmetic.hpp"
#include "primitives.hpp"

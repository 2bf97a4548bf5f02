// How threads meet: barriers, shuffles, votes, atomics, fences and loads with cache hints. Part of cuda.hpp.
//
// The last two parameters of a collective are the place of the call, for the report of a deadlock.
#pragma once
#include <time.h>

#define PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(PLACE) { emulator::barrier(file, line); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, PLACE) {
    emulator::collective(emulator::SYNC, mask, 0, 0, 32, file, line);
}

#define SHUFFLE_OF(name, operation, Argument) \
    template <class T> T name(unsigned mask, T value, Argument argument, int width = 32, PLACE) { \
        using namespace emulator; \
        return from_bits<T>(collective(operation, mask, bits_of(value), (int)argument, width, file, line)); \
    }
SHUFFLE_OF(__shfl_sync, SHUFFLE, int)
SHUFFLE_OF(__shfl_up_sync, SHUFFLE_UP, unsigned)
SHUFFLE_OF(__shfl_down_sync, SHUFFLE_DOWN, unsigned)
SHUFFLE_OF(__shfl_xor_sync, SHUFFLE_XOR, int)
#undef SHUFFLE_OF

inline unsigned __ballot_sync(unsigned mask, int vote, PLACE) {
    return (unsigned)emulator::collective(emulator::BALLOT, mask, vote != 0, 0, 32, file, line);
}
inline int __any_sync(unsigned mask, int vote, PLACE) {
    return (int)emulator::collective(emulator::ANY, mask, vote != 0, 0, 32, file, line);
}
inline int __all_sync(unsigned mask, int vote, PLACE) {
    return (int)emulator::collective(emulator::ALL, mask, vote != 0, 0, 32, file, line);
}
inline unsigned __activemask() { return 1u << (threadIdx.x & 31); }
#undef PLACE

// Nothing else runs between reading and writing, so a plain exchange is atomic; before it, in random order, anyone may.
#define ATOMIC(name, result) \
    template <class T> T name(T* address, emulator::same<T> value) { \
        static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics are of 4 or 8 bytes"); \
        emulator::preempt(); \
        const T old = *address; \
        *address = result; \
        return old; \
    }
ATOMIC(atomicAdd, (T)(old + value))
ATOMIC(atomicSub, (T)(old - value))
ATOMIC(atomicMax, old < value ? value : old)
ATOMIC(atomicMin, value < old ? value : old)
ATOMIC(atomicAnd, old & value)
ATOMIC(atomicOr, old | value)
ATOMIC(atomicExch, value)
#undef ATOMIC
template <class T> T atomicCAS(T* address, emulator::same<T> expected, emulator::same<T> value) {
    emulator::spin();   // compare-and-swap loops wait for each other
    const T old = *address;
    if (old == expected) *address = value;
    return old;
}

inline void __threadfence() { emulator::preempt(); }
inline void __threadfence_block() { emulator::preempt(); }
inline void __threadfence_system() { emulator::preempt(); }
inline void __nanosleep(unsigned nanoseconds) {   // truly: the host's threads may be what is waited for
    const timespec duration = {0, (long)nanoseconds};
    nanosleep(&duration, nullptr);
    emulator::spin();
}
inline long long clock64() { return emulator::steps(); }

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldca(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcv(const T* p) { return *p; }
template <class T> void __stcg(T* p, emulator::same<T> value) { *p = value; }
template <class T> void __stcs(T* p, emulator::same<T> value) { *p = value; }
template <class T> void __stwt(T* p, emulator::same<T> value) { *p = value; }

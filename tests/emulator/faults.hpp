// What the processor and the compiler's sanitizers find in a kernel, as errors of the launch instead of a crash.
// Part of runtime.cpp.
//
// The sanitizers' own library is not linked: kernels are compiled with -fsanitize, and the functions that it calls are
// these.
#pragma once
#include "cuda.hpp"
#include <signal.h>
#include <stdint.h>

namespace emulator {

// Takes over the signals of a faulty instruction as long as it lives. They are handled on a stack of its own, since the
// thread's may be what overflowed.
class Faults {
    static constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE};
    struct sigaction before_[3];
    stack_t stack_before_;

    static void handle(int signal, siginfo_t* info, void*) {
        if (signal == SIGFPE) fail("integer division by zero");
        fail("no memory at %p (a wild pointer, or a stack overflow)", info->si_addr);
    }

public:
    Faults() {
        static char stack[64 << 10];
        stack_t own = {};
        own.ss_sp = stack;
        own.ss_size = sizeof stack;
        sigaltstack(&own, &stack_before_);
        struct sigaction action = {};
        action.sa_sigaction = handle;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;   // NODEFER: the handler never returns
        for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &action, &before_[i]);
    }
    ~Faults() {
        for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &before_[i], nullptr);
        sigaltstack(&stack_before_, nullptr);
    }
};

}  // namespace emulator

struct Place { const char* file; unsigned line, column; };   // every sanitizer's data begins with it
struct Access { Place place; const void* type; unsigned char log_alignment, kind; };

#define FOUND(what, ...) emulator::fail("%s:%u: " what, place->file, place->line, ##__VA_ARGS__)
extern "C" {
void __ubsan_handle_type_mismatch_v1(Access* access, uintptr_t address) {
    const Place* place = &access->place;
    if (!address) FOUND("access through a null pointer");
    FOUND("address %#lx is not aligned to %d bytes", (unsigned long)address, 1 << access->log_alignment);
}
void __ubsan_handle_out_of_bounds(Place* place, uintptr_t index) {
    FOUND("index %ld is out of the array", (long)index);
}
void __ubsan_handle_shift_out_of_bounds(Place* place, uintptr_t, uintptr_t by) {
    FOUND("shift by %ld bits", (long)by);
}
void __ubsan_handle_divrem_overflow(Place* place, uintptr_t, uintptr_t) {
    FOUND("integer division by zero, or too large");
}
}
#undef FOUND

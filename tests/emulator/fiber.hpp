// Coroutines: a stack each, and a switch between two of them. Not a scheduler; that is runtime.cpp.
//
// On x86-64 the switch is fifteen instructions. ucontext, used elsewhere, calls the operating system each time, for the
// signal mask, which is many times slower.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

constexpr size_t STACK = 128 << 10, GUARD = 4 << 10;   // bytes

// A stack with a page below it that nobody may touch; never given back, since the next block needs it again.
inline char* new_stack() {
    void* memory = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, GUARD, PROT_NONE) != 0) __builtin_abort();
    return (char*)memory;
}

#ifdef __x86_64__

struct Fiber { void* stack_pointer; };

extern "C" void moeflow_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.hidden moeflow_switch
.globl moeflow_switch
.type moeflow_switch, @function
moeflow_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size moeflow_switch, .-moeflow_switch
.section .note.GNU-stack,"",@progbits
.text
)");

inline void prepare(Fiber& fiber, char* stack, void (*entry)()) {
    void** top = (void**)(stack + STACK);
    *--top = nullptr;         // where `entry` would return to; it also aligns the stack as after a call
    *--top = (void*)entry;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.stack_pointer = top;
}
inline void switch_fiber(Fiber& from, Fiber& to) { moeflow_switch(&from.stack_pointer, to.stack_pointer); }

#else

struct Fiber { ucontext_t context; };

inline void prepare(Fiber& fiber, char* stack, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack + GUARD;
    fiber.context.uc_stack.ss_size = STACK - GUARD;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}
inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

// Runs a grid: block after block, the threads of a block as coroutines that switch where CUDA lets them meet.
//
// A thread runs until it waits (a barrier, a warp's collective) or ends; then the next one that may run does: upwards,
// downwards or at random. A collective is carried out by the last lane to arrive, for all of them at once. When nobody
// may run and somebody has not ended, the block is stuck, and the report says who waits where. What faults.hpp finds
// (misaligned, null or wild pointers, indices out of an array) ends the launch as an error as well.
#include "cuda.hpp"
#include "faults.hpp"
#include "fiber.hpp"
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

uint3 threadIdx, blockIdx, blockDim, gridDim;
extern "C" char __start_moeflow_shared[], __stop_moeflow_shared[];
__shared__ char somewhere[16] __attribute__((used));   // so that the section exists

namespace emulator {
namespace {

constexpr int MOST = 1024, WORDS = MOST / 64;
constexpr long long PATIENCE = 1 << 22;   // so many reads of flags, without anything else happening, count as stuck
constexpr const char* NAMES[] = {"__syncwarp",      "__shfl_sync",   "__shfl_up_sync", "__shfl_down_sync",
                                 "__shfl_xor_sync", "__ballot_sync", "__any_sync",     "__all_sync"};

enum State { READY, IN_WARP, IN_BLOCK, ENDED };
struct Thread {
    Fiber fiber;
    State state;
    Operation operation;
    unsigned mask;
    int argument, width, line;
    const char* file;
    Word value, result;
};
struct Warp { unsigned alive, waiting; };

Thread threads[MOST];
char** stacks;   // [MOST], shared by all kernels of the process: a mapping each, of which Linux allows 65,530
Warp warps[MOST / 32];
Word ready[WORDS];
Fiber outside;
int count, alive, at_barrier, current, order;
long long switches, spins;
Word random_state;
void (*body)(void**);
void** body_arguments;
char message[2048];

Word next_random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

void set_ready(int t) {
    threads[t].state = READY;
    ready[t >> 6] |= 1ull << (t & 63);
}

// The first ready thread from `start` on upwards, or downwards, around the block; -1: none.
int scan(int start, bool down) {
    const int words = (count + 63) / 64, first = start >> 6, bit = start & 63;
    const Word near = down ? ~0ull >> (63 - bit) : ~0ull << bit;
    for (int i = 0; i <= words; i++) {
        const int w = down ? (first - i + 2 * words) % words : (first + i) % words;
        Word set = ready[w];
        if (i == 0) set &= near;
        if (set) return w * 64 + (down ? 63 - __builtin_clzll(set) : __builtin_ctzll(set));
    }
    return -1;
}

int next_thread() {
    if (order == 0) return scan(current + 1 < count ? current + 1 : 0, false);
    if (order == 1) return scan(current > 0 ? current - 1 : count - 1, true);
    return scan((int)(next_random() % count), false);
}

void leave() {   // to whom; the caller waits, has ended, or lets others go first
    const int from = current, to = next_thread();
    if (to == from) return;
    switches++;
    if (to >= 0) {
        current = to;
        threadIdx.x = to;
        switch_fiber(threads[from].fiber, threads[to].fiber);
    } else {
        switch_fiber(threads[from].fiber, outside);
    }
}

void wait(State state) {
    threads[current].state = state;
    ready[current >> 6] &= ~(1ull << (current & 63));
}

int source_lane(const Thread& t, int lane) {
    const int own = t.width - 1, first = lane & ~own, a = t.argument;
    switch (t.operation) {
        case SHUFFLE: return first + (a & own);
        case SHUFFLE_UP: return (unsigned)a > (unsigned)(lane - first) ? lane : lane - a;
        case SHUFFLE_DOWN: return (unsigned)a > (unsigned)(own - (lane & own)) ? lane : lane + a;
        case SHUFFLE_XOR: return (lane ^ (a & 31)) > first + own ? lane : lane ^ (a & 31);
        default: return lane;
    }
}

void carry_out(int w, unsigned lanes) {
    Thread* const warp = threads + 32 * w;
    unsigned votes = 0;
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        votes |= (unsigned)(warp[lane].value & 1) << lane;
    }
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        Thread& t = warp[lane];
        if (t.operation == BALLOT) t.result = votes;
        else if (t.operation == ANY) t.result = votes != 0;
        else if (t.operation == ALL) t.result = votes == lanes;
        else {
            const int source = source_lane(t, lane);
            t.result = lanes >> source & 1 ? warp[source].value : ~0ull;   // undefined on the device
        }
        set_ready(32 * w + lane);
    }
    warps[w].waiting &= ~lanes;
    spins = 0;
}

// Carries out the collective that thread `i` waits in, if all lanes that it names, and that have not ended, are there.
void try_warp(int i) {
    const int w = i >> 5;
    const unsigned lanes = threads[i].mask & warps[w].alive;
    if (lanes & ~warps[w].waiting) return;
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
        const Thread& other = threads[32 * w + __builtin_ctz(rest)];
        if (other.operation != threads[i].operation || other.mask != threads[i].mask) return;
    }
    carry_out(w, lanes);
}

void try_barrier() {
    if (at_barrier == 0 || at_barrier < alive) return;
    const Thread* first = nullptr;
    for (int t = 0; t < count; t++) {
        if (threads[t].state != IN_BLOCK) continue;
        if (!first) first = &threads[t];
        else if (threads[t].line != first->line || strcmp(threads[t].file, first->file))
            fail("thread %d is at __syncthreads in line %d, thread %d at the one in line %d", (int)(first - threads),
                 first->line, t, threads[t].line);
    }
    for (int t = 0; t < count; t++) if (threads[t].state == IN_BLOCK) set_ready(t);
    at_barrier = 0;
    spins = 0;
}

void thread_main() {
    body(body_arguments);
    const int w = current >> 5;
    wait(ENDED);
    alive--;
    warps[w].alive &= ~(1u << (current & 31));
    spins = 0;
    for (unsigned rest = warps[w].waiting; rest; rest &= warps[w].waiting & (rest - 1))
        try_warp(32 * w + __builtin_ctz(rest));
    try_barrier();
    leave();
    __builtin_abort();   // nobody wakes a thread that has ended
}

const char* base_name(const char* file) {
    const char* slash = strrchr(file, '/');
    return slash ? slash + 1 : file;
}

bool alike(const Thread& a, const Thread& b) {
    if (a.state != b.state || a.state == ENDED) return a.state == b.state;
    if (a.line != b.line || strcmp(a.file, b.file)) return false;
    return a.state == IN_BLOCK || (a.mask == b.mask && a.operation == b.operation);
}

void report_stuck() {
    size_t used = strlen(message);
    const auto say = [&](const char* format, auto... values) {
        if (used < sizeof(message)) used += (size_t)snprintf(message + used, sizeof(message) - used, format, values...);
    };
    say("block (%u, %u, %u) is stuck:", blockIdx.x, blockIdx.y, blockIdx.z);
    for (int t = 0, groups = 0; t < count; groups++) {
        int end = t + 1;
        while (end < count && alike(threads[t], threads[end])) end++;
        if (groups == 12) return say("\n  ...");
        say(end == t + 1 ? "\n  thread %d" : "\n  threads %d to %d", t, end - 1);
        const Thread& who = threads[t];
        if (who.state == ENDED) say(" ended");
        else {
            const char* name = who.state == IN_BLOCK ? "__syncthreads" : NAMES[who.operation];
            say(" at %s, %s:%d", name, base_name(who.file), who.line);
        }
        if (who.state == IN_WARP) say(", mask 0x%08x", who.mask);
        t = end;
    }
}

void run_block() {
    memset(__start_moeflow_shared, 0xFF, (size_t)(__stop_moeflow_shared - __start_moeflow_shared));
    memset(ready, 0, sizeof ready);
    alive = count;
    at_barrier = 0;
    spins = 0;
    for (int w = 0; w < (count + 31) / 32; w++) {
        const int lanes = count - 32 * w;
        warps[w] = {lanes >= 32 ? ~0u : (1u << lanes) - 1u, 0};
    }
    for (int t = 0; t < count; t++) {
        prepare(threads[t].fiber, stacks[t], thread_main);
        set_ready(t);
    }
    current = order == 1 ? 0 : count - 1;
    current = next_thread();
    threadIdx = {(unsigned)current, 0, 0};
    switch_fiber(outside, threads[current].fiber);
    if (alive && !message[0]) report_stuck();
}

// How far apart blocks run one after another: any number without a common divisor meets each block once.
long long stride(long long blocks) {
    if (order != 2 || blocks < 3) return 1;
    for (;;) {
        const long long step = 1 + (long long)(next_random() % (Word)(blocks - 1));
        long long a = blocks, b = step;
        while (b) { const long long rest = a % b; a = b; b = rest; }
        if (a == 1) return step;
    }
}

}  // namespace

void fail(const char* format, ...) {
    int used = snprintf(message, sizeof(message), "block (%u, %u, %u), thread %u: ", blockIdx.x, blockIdx.y, blockIdx.z,
                        threadIdx.x);
    va_list values;
    va_start(values, format);
    vsnprintf(message + used, sizeof(message) - (size_t)used, format, values);
    va_end(values);
    switch_fiber(threads[current].fiber, outside);   // for good
    __builtin_abort();
}

Word collective(Operation operation, unsigned mask, Word value, int argument, int width, const char* file, int line) {
    Thread& t = threads[current];
    Warp& warp = warps[current >> 5];
    const unsigned own = 1u << (current & 31);
    const char *name = NAMES[operation], *place = base_name(file);
    if (!(mask & own)) fail("%s:%d: %s with mask 0x%08x, which leaves the caller out", place, line, name, mask);
    if (width < 1 || width > 32 || width & (width - 1)) fail("%s:%d: %s of width %d", place, line, name, width);
    wait(IN_WARP);
    t.operation = operation;
    t.mask = mask;
    t.value = value;
    t.argument = argument;
    t.width = width;
    t.file = file;
    t.line = line;
    warp.waiting |= own;
    try_warp(current);
    leave();
    return t.result;
}

void barrier(const char* file, int line) {
    wait(IN_BLOCK);
    threads[current].file = file;
    threads[current].line = line;
    at_barrier++;
    try_barrier();
    leave();
}

void preempt() { if (order == 2) leave(); }

void spin() {
    if (++spins > PATIENCE) fail("waits for a flag that nobody raises (blocks run one after another)");
    leave();
}

long long steps() { return switches; }

void use_stacks(char** pool) { stacks = pool; }

const char* run(void (*kernel)(void**), void** arguments, const int* grid, int block, int how, Word seed) {
    message[0] = 0;
    if (block < 1 || block > MOST) {
        snprintf(message, sizeof(message), "%d threads a block; 1 to %d are possible", block, MOST);
        return message;
    }
    for (int t = 0; t < block; t++) if (!stacks[t]) stacks[t] = new_stack();
    body = kernel;
    body_arguments = arguments;
    count = block;
    order = how;
    random_state = seed * 0x9E3779B97F4A7C15ull | 1u;
    switches = 0;
    gridDim = {(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]};
    blockDim = {(unsigned)block, 1, 1};
    const long long blocks = (long long)grid[0] * grid[1] * grid[2];
    const long long start = order == 2 ? (long long)(next_random() % (Word)blocks) : 0, step = stride(blocks);
    Faults faults;
    for (long long i = 0; i < blocks && !message[0]; i++) {
        const long long b = order == 1 ? blocks - 1 - i : (start + i * step) % blocks;
        blockIdx = {(unsigned)(b % grid[0]), (unsigned)(b / grid[0] % grid[1]), (unsigned)(b / grid[0] / grid[1])};
        run_block();
    }
    return message[0] ? message : nullptr;
}

}  // namespace emulator

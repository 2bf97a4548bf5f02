// The crew. One thread leads: it takes a request, cuts its rows into blocks, and publishes them; all claim blocks by adding
// to one word. The word holds the request's number beside the next block, so that whoever comes late finds either a block of
// the request under way or none: a request cannot be replaced before its last block is done.
//
// No thread holds a lock while it computes, and none waits for another in particular: a thread that the system stops delays
// its own block, no more. Between requests threads first wait awake (a device's next request is some hundred microseconds
// off), then sleep.
#include "crew.hpp"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() ((void)0)
#endif

namespace moeflow {
namespace {

constexpr int MOST_JOBS = 512, MOST_THREADS = 1024;
// A block costs 2.2 us besides its bytes (a claim, and rows that nobody has asked the memory for yet): with 15 threads blocks of
// 32 KiB read 72 GB/s, of 64 KiB 86, of 128 KiB 97. So most rows go in large blocks, as many for each thread, and the last in
// small ones, so that all end together.
constexpr int64_t LARGE_BYTES = 256 << 10, SMALL_BYTES = 40 << 10;
constexpr int64_t SMALL_SHARE = 8;          // of all rows, one in so many
constexpr int64_t ALONE_BYTES = 256 << 10;  // what one thread has done before others are awake
constexpr int64_t AWAKE = 20000;            // nanoseconds that threads wait awake for the host's next request
constexpr int NUMBER = 24, TOTAL = 20, NEXT = 20;   // bits of the claim: request, blocks, next block

int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

void futex(std::atomic<int32_t>* word, int operation, int32_t value, const timespec* timeout) {
    syscall(SYS_futex, reinterpret_cast<int32_t*>(word), operation | FUTEX_PRIVATE_FLAG, value, timeout, nullptr, 0);
}

struct Task {
    Job job;
    Multiply multiply;
    int64_t block;   // rows
    int32_t first;   // of its blocks, among all
};

int64_t row_bytes(const Matrix& m) { return m.columns * m.bits / 8 + (m.group ? m.columns / m.group * 4 : 4); }

}   // namespace

struct Crew;
struct Member {
    Crew* crew;
    pthread_t handle;
};

struct alignas(64) Crew {
    std::atomic<uint64_t> claim{0};
    alignas(64) std::atomic<int32_t> done{0};
    alignas(64) std::atomic<int32_t> finished{0};      // number of the last request whose blocks are all done
    alignas(64) std::atomic<int32_t> alarm{0};         // sleepers wait for it to change
    std::atomic<int32_t> asleep{0};
    alignas(64) std::atomic<bool> closing{false}, paused{false};
    std::atomic<int64_t> active{0};                    // when somebody was last asked for something
    Level level;
    int32_t number = 0;                                // of the request under way
    Task tasks[2 * MOST_JOBS];
    int32_t count = 0;
    volatile int32_t* announce = nullptr;              // where the end of a device's request is written, and what
    int32_t announced = 0;
    std::atomic<int32_t> threads{0};                   // besides a host's own
    Member members[MOST_THREADS];                      // the first leads
    const Service* service = nullptr;
    Service own;
    int32_t seen = 0;                                  // the letter's last turn that was taken
    Job jobs[MOST_JOBS];
    Vectors vectors[MOST_JOBS];
};

namespace {

// Computes blocks until none is left.
void work(Crew& crew) {
    for (;;) {
        const uint64_t claim = crew.claim.fetch_add(1, std::memory_order_acq_rel);
        const int32_t next = claim & ((1u << NEXT) - 1), total = claim >> NEXT & ((1u << TOTAL) - 1);
        if (next >= total) return;
        const Task* task = crew.tasks;
        while (task + 1 < crew.tasks + crew.count && task[1].first <= next) task++;
        Job job = task->job;
        job.begin += (next - task->first) * task->block;
        if (job.begin + task->block < job.end) job.end = job.begin + task->block;
        const int32_t number = crew.number;
        volatile int32_t* announce = crew.announce;
        const int32_t announced = crew.announced;
        task->multiply(job);
        if (crew.done.fetch_add(1, std::memory_order_acq_rel) + 1 == total) {
            if (announce) {
#if defined(__x86_64__)
                _mm_sfence();
#endif
                std::atomic_thread_fence(std::memory_order_release);
                *announce = announced;
            }
            crew.finished.store(number, std::memory_order_release);
        }
    }
}

void wake(Crew& crew) {
    crew.active.store(now(), std::memory_order_relaxed);
    if (crew.asleep.load(std::memory_order_seq_cst) == 0) return;
    crew.alarm.fetch_add(1, std::memory_order_seq_cst);
    futex(&crew.alarm, FUTEX_WAKE, 0x7FFFFFFF, nullptr);
}

// Cuts jobs into blocks and lets everybody at them; only when the request before is finished. False: a format has no kernel.
bool publish(Crew& crew, const Job* jobs, int count, volatile int32_t* announce, int32_t announced) {
    const int64_t workers = crew.threads + (announce ? 0 : 1);
    int64_t bytes = 0;
    for (int i = 0; i < count; i++) bytes += (jobs[i].end - jobs[i].begin) * row_bytes(*jobs[i].matrix);
    const int64_t each = (bytes - bytes / SMALL_SHARE) / workers;   // of a thread, in large blocks
    const int64_t large = each / ((each + LARGE_BYTES - 1) / LARGE_BYTES + (each == 0)), small = large < SMALL_BYTES ? large : SMALL_BYTES;
    int32_t total = 0, tasks = 0;
    for (int last = 0; last < 2; last++)
        for (int i = 0; i < count; i++) {
            const int64_t rows = jobs[i].end - jobs[i].begin, few = rows / SMALL_SHARE;
            Task& task = crew.tasks[tasks++];
            task.job = jobs[i];
            (last ? task.job.begin : task.job.end) = jobs[i].end - few;
            task.multiply = multiply_for(*jobs[i].matrix, jobs[i].vectors->planes, crew.level);
            if (!task.multiply) return false;
            const int64_t block = ((last ? small : large) / row_bytes(*jobs[i].matrix) + 1) / 2 * 2;   // kernels take two rows
            task.block = block < 2 ? 2 : block;
            task.first = total;
            total += (task.job.end - task.job.begin + task.block - 1) / task.block;
        }
    if (total >= 1 << TOTAL) return false;
    crew.count = tasks;
    crew.number = (crew.number + 1) & ((1 << NUMBER) - 1);
    crew.announce = announce;
    crew.announced = announced;
    crew.done.store(0, std::memory_order_relaxed);
    crew.claim.store((uint64_t)crew.number << (NEXT + TOTAL) | (uint64_t)total << NEXT, std::memory_order_seq_cst);
    return true;
}

bool idle(const Crew& crew) { return crew.finished.load(std::memory_order_acquire) == crew.number; }

// Takes what the device asks for, if it does; its leader's business. A request that cannot be carried out stays unanswered,
// and the device helps itself.
bool take_letter(Crew& crew) {
    const Service& s = *crew.service;
    const int32_t turn = s.letter[LETTER_TURN];
    if (turn == crew.seen || crew.paused.load(std::memory_order_relaxed) || !idle(crew)) return false;
    std::atomic_thread_fence(std::memory_order_acquire);
    crew.seen = turn;
    const int32_t layer = s.letter[LETTER_LAYER], half = s.letter[LETTER_HALF], count = s.letter[LETTER_COUNT];
    if (turn == 0 || count <= 0 || count > s.most || layer < 0 || layer >= s.layers || half < 0 || half > 1) return false;
    const Half& what = s.halves[2 * layer + half];
    for (int i = 0; i < count; i++) {
        const volatile int32_t* job = s.letter + LETTER_JOBS + i * LETTER_JOB;
        const int32_t expert = job[0], begin = job[1], vector = job[2], row = job[3];
        crew.vectors[i] = Vectors{s.numbers[half] + vector * s.strides[half], s.scales[half] + vector * s.scale_strides[half],
                                  s.sums[half] + vector * s.sum_strides[half], s.strides[half], 1, 2};
        crew.jobs[i] = Job{&what.matrix, what.blobs + expert * what.nbytes, &crew.vectors[i],
                           s.results[half] + row * s.result_strides[half], begin, what.matrix.rows};
    }
    crew.active.store(now(), std::memory_order_relaxed);
    if (!publish(crew, crew.jobs, count, s.arrived + 16 * half, turn)) return false;
    if (crew.asleep.load(std::memory_order_seq_cst)) wake(crew);
    return true;
}

void* live(void* argument) {
    Crew& c = *static_cast<Member*>(argument)->crew;
    const bool leader = argument == c.members;
    while (!c.closing.load(std::memory_order_acquire)) {
        for (int spins = 0;; spins++) {
            if (leader && c.service) take_letter(c);
            const uint64_t claim = c.claim.load(std::memory_order_acquire);
            const int32_t next = claim & ((1u << NEXT) - 1), total = claim >> NEXT & ((1u << TOTAL) - 1);
            if (next < total) {
                work(c);
                spins = 0;
                continue;
            }
            if (c.closing.load(std::memory_order_relaxed)) return nullptr;
            if (spins % 64 == 63) {
                const int64_t awake = c.service ? c.service->linger : AWAKE;
                if (now() - c.active.load(std::memory_order_relaxed) > awake) break;
            }
            PAUSE();
        }
        const int32_t alarm = c.alarm.load(std::memory_order_seq_cst);
        c.asleep.fetch_add(1, std::memory_order_seq_cst);
        const uint64_t claim = c.claim.load(std::memory_order_seq_cst);
        const bool quiet = (claim & ((1u << NEXT) - 1)) >= (claim >> NEXT & ((1u << TOTAL) - 1));
        const timespec most = {0, 100000000};   // whatever was missed is seen after a tenth of a second
        if (quiet && !c.closing.load(std::memory_order_seq_cst)) futex(&c.alarm, FUTEX_WAIT, alarm, &most);
        c.asleep.fetch_sub(1, std::memory_order_seq_cst);
    }
    return nullptr;
}

}   // namespace

#pragma GCC visibility push(default)
extern "C" {

// A crew of `threads` besides a caller of `moeflow_crew_run`, each on its CPU of `cpus` if that is given. With a service it
// answers a device. Null where there is no memory; fewer threads where the system refuses more.
Crew* moeflow_crew_new(int32_t threads, const int32_t* cpus, int32_t level, const Service* service) {
    if (threads < 0 || threads > MOST_THREADS) return nullptr;
    Crew* crew = new (std::nothrow) Crew;
    if (!crew) return nullptr;
    crew->level = (Level)level;
    crew->active.store(now());
    if (service) {
        crew->own = *service;
        crew->service = &crew->own;
        crew->seen = service->letter[LETTER_TURN];
    }
    for (int i = 0; i < threads; i++) {
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        if (cpus) {
            cpu_set_t set;
            CPU_ZERO(&set);
            CPU_SET(cpus[i], &set);
            pthread_attr_setaffinity_np(&attributes, sizeof set, &set);
        }
        crew->members[i].crew = crew;
        const bool started = pthread_create(&crew->members[i].handle, &attributes, live, &crew->members[i]) == 0;
        pthread_attr_destroy(&attributes);
        if (!started) break;
        crew->threads++;
    }
    return crew;
}

// So many threads were started.
int32_t moeflow_crew_threads(const Crew* crew) { return crew->threads; }

// Computes all jobs, with the caller's help; 0, or -1 where a format has no kernel. Not for a crew that serves a device.
int32_t moeflow_crew_run(Crew* crew, const Job* jobs, int32_t count) {
    int64_t bytes = 0;
    for (int i = 0; i < count; i++) bytes += (jobs[i].end - jobs[i].begin) * row_bytes(*jobs[i].matrix);
    if (bytes <= ALONE_BYTES || crew->threads == 0 || count > MOST_JOBS) {
        for (int i = 0; i < count; i++) {
            const Multiply multiply = multiply_for(*jobs[i].matrix, jobs[i].vectors->planes, crew->level);
            if (!multiply) return -1;
            multiply(jobs[i]);
        }
        return 0;
    }
    if (!publish(*crew, jobs, count, nullptr, 0)) return -1;
    wake(*crew);
    work(*crew);
    while (!idle(*crew)) PAUSE();
    return 0;
}

// A pass begins, in which the device may ask for something.
void moeflow_crew_wake(Crew* crew) { wake(*crew); }

// Whether requests are left unanswered.
void moeflow_crew_pause(Crew* crew, int32_t paused) { crew->paused.store(paused != 0); }

// Waits until no request is under way, at most so many nanoseconds; 1 if so.
int32_t moeflow_crew_settle(Crew* crew, int64_t patience) {
    const int64_t begin = now();
    while (!idle(*crew)) {
        if (now() - begin > patience) return 0;
        sched_yield();
    }
    return 1;
}

// Ends the threads; what is under way is finished first. 0, or 1 where a thread did not end in time and all stays as it is.
int32_t moeflow_crew_free(Crew* crew, int64_t patience) {
    crew->closing.store(true);
    crew->alarm.fetch_add(1);
    futex(&crew->alarm, FUTEX_WAKE, 0x7FFFFFFF, nullptr);
    const int64_t until = now() + patience;
    for (int i = 0; i < crew->threads; i++) {
        timespec limit;
        clock_gettime(CLOCK_REALTIME, &limit);
        const int64_t left = until - now();
        const int64_t wait = left > 0 ? left : 0;
        limit.tv_sec += wait / 1000000000LL;
        limit.tv_nsec += wait % 1000000000LL;
        if (limit.tv_nsec >= 1000000000L) {
            limit.tv_sec++;
            limit.tv_nsec -= 1000000000L;
        }
        if (pthread_timedjoin_np(crew->members[i].handle, nullptr, &limit)) return 1;
    }
    delete crew;
    return 0;
}

}   // extern "C"
#pragma GCC visibility pop
}   // namespace moeflow

// Blobs from page-locked host memory to buffers on the device, read by the GPU itself through unified addresses: the
// addresses are decided on the device, which the copy engine could not follow inside a graph.
//
// Every warp moves pieces of 4 KiB, eight 16-byte loads a lane in flight; a few blocks are enough for any link. A copy on
// a guess watches a flag and gives way within half a piece; how far each warp came is noted, so that a right guess is
// completed and not repeated.
//
// WARPS: of the whole grid, the same in every launch. FOLLOWS: 1 for a launch right behind one for other pieces of the same
// jobs: it may begin while that one's last pieces are on their way, so that the link does not run dry in between.
#include "desk.cuh"
#include "primitives.cuh"

constexpr int ENDING = 2;   // pieces of a warp: a few microseconds on any link

enum { MOVED, GUESSED_BYTES, USED_BYTES };   // counters of bytes

template <int LOADS>   // of a lane in flight, 16 bytes each
__device__ __forceinline__ void move(const char* source, char* target, int lane) {
    const uint4* from = (const uint4*)source + lane;
    uint4* to = (uint4*)target + lane;
    uint4 v[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++) v[i] = load_host(from + 32 * i);
#pragma unroll
    for (int i = 0; i < LOADS; i++) to[32 * i] = v[i];
}

// Whether what the copy engine was to bring is here. Where it is not after `patience` nanoseconds, the kernels take it back,
// and all that would be handed over from now on: a thread that was stopped must not stop the device.
__device__ bool arrived(int half, int handed, int* desk, int* post, long long patience) {
    const long long begin = nanoseconds();
    while (load_volatile(desk + ARRIVED + half) - handed < 0) {
        if (load_volatile(desk + ALONE)) return false;
        if (nanoseconds() - begin > patience) {
            store_volatile(desk + ALONE, 1);
            store_volatile(post + TAKEN_BACK, handed);
            __threadfence_system();
            return false;
        }
        __nanosleep(200);
    }
    return true;
}

// The pieces [first, last) of every job's blob. source: of the layer's expert 0; nbytes: of a blob; jobs as `lookup` left
// them; progress [GUESSES, WARPS]: pieces of each guess that a warp has moved. shares, desk, post: what `hand_over` gave to
// the copy engine, which is waited for; null where there is none.
// Two blocks a multiprocessor: unrolled, the loop took 108 registers a thread, and a block waited for one without others.
extern "C" __global__ void __launch_bounds__(512, 2)
copy(const char* source, char* pool, long long nbytes, const int* jobs, const int* job_count, const int* progress,
     long long first, long long last, long long* counters, const int* shares, int* desk, int* post, long long patience) {
    const int lane = threadIdx.x & 31;
    const int warp = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    const int count = *job_count;
    long long moved = 0, spared = 0;
    int turn = 0;
    for (int j = 0; j < count; j++) {
        const int guess = jobs[3 * j + 2];
        const char* from = source + jobs[3 * j] * nbytes;
        char* to = pool + jobs[3 * j + 1] * nbytes;
        const int done = guess < 0 ? 0 : progress[guess * WARPS + warp];
        const long long end = shares ? min(last, (long long)shares[j]) : last;
        long long p = warp + (long long)done * WARPS;
        if (first == 0) spared += done;
        if (p < first) p += (first - p + WARPS - 1) / WARPS * WARPS;
        if (guess < 0) {   // the first warp is the one after the last job's last: small blobs are uneven rounds
            p = first + (warp + WARPS - turn) % WARPS;
            if (end > first) turn = (turn + (int)(end - first)) % WARPS;
        }
#pragma unroll 1
        for (; p < end; p += WARPS, moved++) {
            if (j == count - 1 && p + ENDING * WARPS >= last) let_next_begin();
            move<PIECE / 512>(from + p * PIECE, to + p * PIECE, lane);
        }
    }
    if (lane == 0) {
        if (moved) atomicAdd((unsigned long long*)counters + MOVED, (unsigned long long)(moved * PIECE));
        if (spared) atomicAdd((unsigned long long*)counters + USED_BYTES, (unsigned long long)(spared * PIECE));
    }
    if (!desk || !desk[HANDED]) return;
    const bool here = lane || arrived(first != 0, desk[HANDED], desk, post, patience);
    if (__all_sync(0xFFFFFFFFu, here)) return;
    for (int j = 0; j < count; j++) {
        const long long begin = max(first, (long long)shares[j]);
#pragma unroll 1
        for (long long p = begin + (warp + WARPS - begin % WARPS) % WARPS; p < last; p += WARPS)
            move<PIECE / 512>(source + jobs[3 * j] * nbytes + p * PIECE, pool + jobs[3 * j + 1] * nbytes + p * PIECE, lane);
    }
}

// As `copy`, of jobs whose last rows somebody else computes: of job j the first cuts[j] rows of one half, which `rows` has, and
// other_cuts[j] of other_rows of the other half. parts [part_count, 2]: where each array of the half begins in a blob, and bytes of
// a row.
extern "C" __global__ void __launch_bounds__(512, 2)
copy_rows(const char* source, char* pool, long long nbytes, const int* jobs, const int* job_count, const int* progress,
          long long first, long long last, long long* counters, const int* cuts, const int* other_cuts, long long rows,
          long long other_rows, const long long* parts, long long part_count) {
    const int lane = threadIdx.x & 31;
    const int warp = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    const int count = *job_count;
    long long moved = 0, spared = 0, turn = 0;   // turn: pieces of the jobs so far, which warps take in turns
    for (int j = 0; j < count; j++) {
        const int guess = jobs[3 * j + 2];
        const char* from = source + jobs[3 * j] * nbytes;
        char* to = pool + jobs[3 * j + 1] * nbytes;
        // No piece before it is asked for. A half's first rows may lie in a piece that the half before ends in, which that one
        // has copied only if both are brought whole.
        const bool all = cuts[j] == rows && other_cuts[j] == other_rows;
        long long begin = all ? first : 0;
        const int done = guess < 0 ? 0 : progress[guess * WARPS + warp];
        if (first == 0) spared += done;
        for (int s = 0; s < (all ? 1 : (int)part_count); s++) {
            long long end = last, p;
            if (!all) {
                begin = max(begin, parts[2 * s] / PIECE);
                end = cuts[j] ? min((parts[2 * s] + cuts[j] * parts[2 * s + 1] + PIECE - 1) / PIECE, last) : begin;
            }
            if (guess >= 0) {   // the warp goes on where it came to, with every WARPS-th piece
                p = warp + (long long)done * WARPS;
                if (p < begin) p += (begin - p + WARPS - 1) / WARPS * WARPS;
            } else {
                p = begin + (warp + WARPS - turn % WARPS) % WARPS;
                turn += max(end - begin, 0ll);
            }
#pragma unroll 1
            for (; p < end; p += WARPS, moved++) {
                if (j == count - 1 && (all || s == part_count - 1) && p + ENDING * WARPS >= end) let_next_begin();
                move<PIECE / 512>(from + p * PIECE, to + p * PIECE, lane);
            }
            begin = max(begin, end);
        }
    }
    if (lane != 0) return;
    if (moved) atomicAdd((unsigned long long*)counters + MOVED, (unsigned long long)(moved * PIECE));
    if (spared) atomicAdd((unsigned long long*)counters + USED_BYTES, (unsigned long long)(spared * PIECE));
}

// The blobs of the layer's guesses, until `stop` is raised.
extern "C" __global__ void __launch_bounds__(512, 2)
copy_guesses(const char* source, char* pool, long long nbytes, const int* guesses, int* progress, const int* stop,
             long long limit, long long* counters) {
    const int lane = threadIdx.x & 31;
    const int warp = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    long long moved = 0;
    bool halt = false;
    for (int g = 0; g < GUESSES && !halt; g++) {
        // One reading for the warp: `lookup` may be clearing the entry. The copy then fills a buffer that nobody reads.
        const int expert = __shfl_sync(0xFFFFFFFFu, guesses[2 * g], 0);
        const int buffer = __shfl_sync(0xFFFFFFFFu, guesses[2 * g + 1], 0);
        if (expert < 0) continue;
        const char* from = source + expert * nbytes;
        char* to = pool + buffer * nbytes;
        int done = 0;
#pragma unroll 1
        for (long long p = warp; p * PIECE < nbytes && p < limit; p += WARPS) {
            // Half a piece at a time: what is in flight when the flag is raised delays the copies that somebody needs.
#pragma unroll 1
            for (int half = 0; half < 2 && !halt; half++) {
                halt = __shfl_sync(0xFFFFFFFFu, load_volatile(stop), 0) != 0;
                const long long at = p * PIECE + half * (PIECE / 2);
                if (!halt) move<PIECE / 1024>(from + at, to + at, lane);
            }
            if (halt) break;
            done++;
        }
        if (lane == 0) progress[g * WARPS + warp] = done;
        moved += done;
    }
    if (lane == 0 && moved) atomicAdd((unsigned long long*)counters + GUESSED_BYTES, (unsigned long long)(moved * PIECE));
}

// Decides which pieces of a layer's copies the copy engine brings instead of a kernel, and tells the thread that feeds it.
//
// A kernel's reads of host memory end at 0.92 of what the copy engine moves, but the engine begins ten microseconds later:
// so a kernel brings the first pieces, and those between what a guess has left half done, and the engine all others.
//
// WARPS: of the copy kernels.
#include "desk.cuh"
#include "primitives.cuh"

// jobs, job_count, progress: as `copy` takes them. buffers [EXPERTS]: of the layer's cached experts; what is not kept is not
// handed over either, because its buffer may be another's before a copy that comes late. split, pieces: of a blob, until where
// gate and up reach, and all. layer: its number; ends: 1 for the last of a pass. head: pieces that a kernel brings first;
// least: pieces that are worth the thread's attention. shares [jobs]: the first piece of each that is handed over. opened:
// the lock's value when it is open.
extern "C" __global__ void __launch_bounds__(32)
hand_over(const int* jobs, const int* job_count, const int* progress, const int* buffers, long long split,
          long long pieces, long long layer, long long ends, long long head, long long least, int* desk, int* shares,
          int* post, long long opened, long long* missed) {
    const int lane = threadIdx.x;
    const int count = *job_count;
    long long handed = 0;
    bool first = true;
    for (int j = 0; j < count; j++) {
        const int guess = jobs[3 * j + 2];
        int front = 0;   // no warp has moved a piece from here on
        if (guess >= 0)
            for (int w = lane; w < WARPS; w += 32) front = max(front, progress[guess * WARPS + w]);
#pragma unroll
        for (int o = 16; o; o >>= 1) front = max(front, __shfl_xor_sync(0xFFFFFFFFu, front, o));
        long long begin = pieces;
        if (buffers[jobs[3 * j]] == jobs[3 * j + 1]) {
            begin = (long long)front * WARPS;
            if (first && begin < split) {
                begin += head;
                first = false;
            }
            begin = min(begin, pieces);
        }
        if (lane == 0) shares[j] = (int)begin;
        handed += pieces - begin;
    }
    if (lane != 0) return;
    const bool alone = load_volatile(desk + ALONE) != 0;
    if (alone || handed < least) {
        for (int j = 0; j < count; j++) shares[j] = (int)pieces;
        handed = 0;
    }
    const bool posts = !alone && (handed || ends);
    desk[HANDED] = 0;
    if (!posts) return;
    const int turn = desk[TURN] + 1, ended = desk[ENDED] + (int)ends;
    desk[TURN] = desk[HANDED] = turn;
    desk[ENDED] = ended;
    *missed += handed * PIECE;
    post[POST_TURN] = turn;
    post[POST_LAYER] = (int)layer;
    post[POST_COUNT] = handed ? count : 0;
    post[POST_ENDED] = ended;
    for (int j = 0; handed && j < count; j++) {
        post[POST_JOBS + 3 * j] = jobs[3 * j];
        post[POST_JOBS + 3 * j + 1] = jobs[3 * j + 1];
        post[POST_JOBS + 3 * j + 2] = shares[j];
    }
    __threadfence_system();
    store_volatile(post + LOCK, (int)opened);
}

// The expert cache's decisions, taken on the device: who is cached, who leaves, which buffer a copy lands in.
//
// The rules are those of the host's cache. Every copy lands in a free buffer, which becomes a slot when its expert is
// used; the buffer of whoever the policy evicts becomes free. Free buffers form a ring, taken at its head and given back
// at its tail: with as many as one step needs and guesses, a buffer that this step's products still read is never taken
// again in the same step, however few slots a layer has. One warp a launch; the tables of the layer lie in shared memory.
//
// SHARED: 1 where the CPU computes a part of what is missing (sharing.cuh). Then the link brings some experts whole, which are
// admitted, the rows of one more as far as they go, and nothing of the others: neither of these two is kept.
//
// EXPERTS: of a layer. GUESSES: at most so many copies on a guess per layer. WARPS: of the copy kernels. The policy: LFU, 1 for
// the least frequently used with ageing every PERIOD uses; MIX, 1 for the least sum of uses weighed by age; STATIC, 1 for a
// fixed set; LEARNED, 1 for the least of scores that come from outside and half the share of late uses; none of them for the
// least recently used.
#include "primitives.cuh"
#include "sharing.cuh"

#ifndef SHARED
#define SHARED 0
#endif
#ifndef LFU
#define LFU 0
#endif
#ifndef MIX
#define MIX 0
#endif
#ifndef STATIC
#define STATIC 0
#endif
#ifndef LEARNED
#define LEARNED 0
#endif
#define SCORED (LFU || MIX || LEARNED)
#ifndef PERIOD
#define PERIOD 64
#endif

// Of a layer: how many are kept, how many may be, a clock that counts uses, uses since ageing began; of the guesses made
// lately, how many were right; guesses left out since the last one.
enum { KEPT, QUOTA, CLOCK, USES, LATELY, RIGHT, SKIPPED, STATE = 8 };
// Of a layer, counted since the start.
enum { HITS, MISSES, GUESSED, USED };

__shared__ int buffer_of[EXPERTS];   // of cached experts, else -1
__shared__ int stamp[EXPERTS];
__shared__ double count[EXPERTS];
#if MIX
constexpr double RESCALE = 4294967296.;
#endif
#if MIX || LEARNED
__shared__ double weight, growth;    // of the next use; by which weights grow with each, or shares fade with each step
#endif
#if LEARNED
constexpr double SHARE = 0.5;
__shared__ double worth[EXPERTS];    // scores
#endif
__shared__ int needed[EXPERTS];
__shared__ int guess_of[EXPERTS];    // index of the guess that brought it, else -1
__shared__ int place[EXPERTS];       // buffer in this step
#if SHARED
constexpr double BEGUN = 1e15;       // beyond what policies give
__shared__ int here[2][EXPERTS];     // rows of either half that the device computes
__shared__ int early[2][EXPERTS];    // of these, rows that are there already
#endif

struct Ring { int* buffers; int* state; int capacity; };   // state: head, size

__device__ __forceinline__ int take(const Ring& ring) {     // by one lane
    const int head = ring.state[0];
    ring.state[0] = head + 1 == ring.capacity ? 0 : head + 1;
    ring.state[1] -= 1;
    return ring.buffers[head];
}

__device__ __forceinline__ void give(const Ring& ring, int buffer) {
    int tail = ring.state[0] + ring.state[1];
    if (tail >= ring.capacity) tail -= ring.capacity;
    ring.buffers[tail] = buffer;
    ring.state[1] += 1;
}

// Notes a use. All lanes call it with the same expert. A mix's sums and products are the host policy's, each rounded by itself.
__device__ __forceinline__ void note(int expert, int* layer, int lane) {
#if STATIC
    return;
#endif
    if (lane == 0) {
        layer[CLOCK] += 1;
        stamp[expert] = layer[CLOCK];
#if LFU
        count[expert] += 1.;
        layer[USES] += 1;
#endif
#if MIX || LEARNED
        count[expert] = __dadd_rn(count[expert], weight);
#endif
#if MIX
        weight = __dmul_rn(weight, growth);
#endif
    }
    __syncwarp(0xFFFFFFFFu);
#if LFU
    if (layer[USES] % PERIOD == 0) {
        for (int e = lane; e < EXPERTS; e += 32) count[e] *= 0.5;
        __syncwarp(0xFFFFFFFFu);
    }
#endif
#if MIX
    const bool rescale = weight >= RESCALE;
    __syncwarp(0xFFFFFFFFu);
    if (rescale) {
        for (int e = lane; e < EXPERTS; e += 32) count[e] *= 1. / RESCALE;
        if (lane == 0) weight *= 1. / RESCALE;
        __syncwarp(0xFFFFFFFFu);
    }
#endif
}

// What an expert is kept for.
__device__ __forceinline__ double value(int expert) {
#if LEARNED
    return __dadd_rn(worth[expert], SHARE * count[expert]);
#else
    return SCORED ? count[expert] : 0.;
#endif
}

// Who leaves: the least stamp, or the least count or score and among equals the least stamp; of scores that come from
// outside, the lower expert.
__device__ __forceinline__ int victim(int lane) {
    double least = 1e300;
    int oldest = 0x7FFFFFFF, who = -1;
    for (int e = lane; e < EXPERTS; e += 32) {
        if (buffer_of[e] < 0) continue;
        const double c = value(e);
        const int age = LEARNED ? e : stamp[e];
        if (c < least || (c == least && age < oldest)) { least = c; oldest = age; who = e; }
    }
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        const double c = __shfl_xor_sync(0xFFFFFFFFu, least, o);
        const int s = __shfl_xor_sync(0xFFFFFFFFu, oldest, o), w = __shfl_xor_sync(0xFFFFFFFFu, who, o);
        if (c < least || (c == least && s < oldest)) { least = c; oldest = s; who = w; }
    }
    return who;
}

// Keeps an expert whose copy lands in `buffer`. The order is the host policy's: a use is counted before the victim is
// chosen, and the newcomer is no candidate.
__device__ void admit(int expert, int buffer, int* layer, const Ring& ring, int lane) {
    note(expert, layer, lane);
    if (lane == 0) place[expert] = buffer;
#if STATIC
    // The set's stamps are 1, all others 0, and it is never greater than the quota: who is of it has room.
    if (lane == 0) {
        if (stamp[expert]) {
            layer[KEPT] += 1;
            buffer_of[expert] = buffer;
        } else give(ring, buffer);
    }
    __syncwarp(0xFFFFFFFFu);
    return;
#endif
    const int quota = layer[QUOTA];
    if (quota == 0) {
        if (lane == 0) give(ring, buffer);
        return;
    }
    const bool full = layer[KEPT] == quota;
    const int leaves = full ? victim(lane) : -1;
    __syncwarp(0xFFFFFFFFu);
#if LEARNED
    if (full && (value(expert) < value(leaves) || (value(expert) == value(leaves) && expert < leaves))) {
        if (lane == 0) give(ring, buffer);   // nobody kept scores less than the newcomer
        __syncwarp(0xFFFFFFFFu);
        return;
    }
#endif
    if (lane == 0) {
        if (full) {
            give(ring, buffer_of[leaves]);
            buffer_of[leaves] = -1;
        } else layer[KEPT] += 1;
        buffer_of[expert] = buffer;
    }
    __syncwarp(0xFFFFFFFFu);
}

#if SHARED
// Which of the missing experts is most worth being brought: those first that a guess has begun with, then by what the policy
// keeps it for, then the lower one.
__device__ __forceinline__ int most_wanted(int lane) {
    double most = -1e300;
    int who = 0x7FFFFFFF;
    for (int e = lane; e < EXPERTS; e += 32) {
        if (!needed[e] || place[e] >= 0) continue;
        const double v = guess_of[e] >= 0 ? BEGUN - guess_of[e] : STATIC ? (double)stamp[e] : value(e);
        if (v > most) { most = v; who = e; }
    }
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        const double v = __shfl_xor_sync(0xFFFFFFFFu, most, o);
        const int w = __shfl_xor_sync(0xFFFFFFFFu, who, o);
        if (v > most || (v == most && w < who)) { most = v; who = w; }
    }
    return who;
}

// What the link brings of so many missing experts: some whole, and of one more a part of either half, in ONE-ths.
struct Split { int least, whole, rest[2]; };   // least: whole but for rounding

__device__ __forceinline__ Split split(const int* ratio, int missing) {
    const int share[2] = {ratio[0] * missing, ratio[1] * missing};
    const int mean = (2 * share[0] + share[1]) / 3;   // gate and up are two thirds of an expert
    Split s = {min(mean / ONE, missing - 1), mean / ONE, {0, 0}};
    const int rest = mean - s.whole * ONE;
    if (rest >= NEARLY) s.whole++;
    else if (rest >= HARDLY)
        for (int h = 0; h < 2; h++) s.rest[h] = min(max(share[h] - s.whole * ONE, 0), ONE);
    s.whole = min(s.whole, missing);
    return s;
}
#endif

#if SHARED
// Deals out what is missing, begun or not. Gives the number of jobs; `used`: how many of them complete a guess; `computed`: how
// many experts the CPU has all of.
__device__ int share_out(int* desk, int* shares, int* jobs, int n, long long rows0, long long rows1, const int* guessed,
                         int* layer, const Ring& ring, int lane, int* used, int* computed) {
    int missing = 0, begun = 0;
    for (int base = 0; base < EXPERTS; base += 32) {
        const int e = base + lane;
        const bool mine = e < EXPERTS && needed[e] && place[e] < 0;
        missing += __popc(__ballot_sync(0xFFFFFFFFu, mine));
        begun |= __ballot_sync(0xFFFFFFFFu, mine && guess_of[e] >= 0) != 0;
    }
    const int kind = min(missing, CLASSES / 2) - 1 + (begun ? CLASSES / 2 : 0);
    int* ratio = desk + RATIO + 2 * kind;
    Split s = {missing, missing, {0, 0}};
    const bool alone = load_volatile(desk + ALONE) != 0;
    if (missing && !alone) {
        s = split(ratio, missing);
        __syncwarp(0xFFFFFFFFu);
        if (lane == 0) {
            desk[CLASS] = kind;
            desk[MISSING] = missing;
            desk[WHOLE] = s.least;
            // Where the link brings all, nobody learns whether the CPU would have been faster: it is tried again in time.
            if (s.whole == missing && desk[STEP])
                for (int h = 0; h < 2; h++) ratio[h] = max(ratio[h] - 1, 0);
        }
    }
    int made = 0;
    for (int i = 0; i < missing; i++) {
        const int expert = most_wanted(lane), guess = guess_of[expert];
        const bool all = i < s.whole;
        int cut[2] = {(int)rows0, (int)rows1};
        if (!all)
            for (int h = 0; h < 2; h++)
                cut[h] = i == s.whole ? (int)((long long)cut[h] * s.rest[h] / ONE / ROW_STEP) * ROW_STEP : 0;
        const bool copied = cut[0] || cut[1];
        int buffer = 0;
        if (lane == 0 && (copied || guess >= 0)) buffer = guess >= 0 ? guessed[2 * guess + 1] : take(ring);
        buffer = __shfl_sync(0xFFFFFFFFu, buffer, 0);
        if (copied) {
            if (lane == 0) {
                jobs[3 * made] = expert;
                jobs[3 * made + 1] = buffer;
                jobs[3 * made + 2] = guess;
                for (int h = 0; h < 2; h++) shares[(CUTS + h) * n + made] = cut[h];
            }
            made++;
            *used += guess >= 0;
        } else (*computed)++;
        if (all) admit(expert, buffer, layer, ring, lane);
        else {
            note(expert, layer, lane);
            if (lane == 0) {
                place[expert] = buffer;
                for (int h = 0; h < 2; h++) here[h][expert] = cut[h];
                if (copied || guess >= 0) give(ring, buffer);
            }
        }
        __syncwarp(0xFFFFFFFFu);
    }
    return made;
}
#endif

// Lists the choices of each distinct expert, experts ascending and choices in their order.
__device__ void group(const long long* chosen, int n, int* found, int* starts, int* lists, int lane) {
    for (int i = lane; i < n; i += 32) {
        int rank = 0;
        for (int j = 0; j < n; j++) rank += chosen[j] < chosen[i] || (chosen[j] == chosen[i] && j < i);
        lists[rank] = i;
    }
    int distinct = 0;
    for (int base = 0; base < EXPERTS; base += 32) {
        const int e = base + lane;
        const bool mine = e < EXPERTS && needed[e];
        const unsigned present = __ballot_sync(0xFFFFFFFFu, mine);
        if (mine) {
            const int index = distinct + __popc(present & ((1u << lane) - 1u));
            int before = 0;
            for (int j = 0; j < n; j++) before += chosen[j] < e;
            found[index] = place[e];
            starts[index] = before;
        }
        distinct += __popc(present);
    }
    for (int i = distinct + lane; i <= n; i += 32) starts[i] = n;   // the others have none
}

// Looks up what the router chose for one layer. Of LEARNED, `scores` [EXPERTS] say how soon each will be used again, counts are
// shares of late uses, and behind them lie what a use weighs and by what shares fade with each lookup.
//   chosen [n]: expert ids, token by token
//   buffers, stamps [EXPERTS], layer [STATE], counters [4]: the layer's tables
//   counts [EXPERTS + 2]: counts or scores; of a mix, also the weight of the next use, and the factor by which it grows
//   ring, ring_state, ring_capacity: free buffers of the layer's blob size
//   guesses [GUESSES, 2]: expert and buffer of each guess that was started for this layer, -1 where none; cleared
//   stop [1]: raised, so that a guess still being copied gives way
//   jobs [n, 3], job_count [1]: the copies to make or to complete: expert, buffer, index of its guess or -1
//   places [n]: the buffer of each choice
//   found, starts [n + 1], lists [n]: each distinct expert's buffer, and which choices it serves; null for one token
//   desk, shares, experts: of SHARED, as sharing.cuh has them, for one token; desk null: the link brings all. rows0, rows1: of
//   an expert's halves
extern "C" __global__ void __launch_bounds__(32)
lookup(const long long* chosen, long long n_, int* buffers, int* stamps, double* counts, int* layer_, long long* counters,
       int* ring_buffers, int* ring_state, long long ring_capacity, int* guesses, int* stop, int* jobs, int* job_count,
       int* places, int* found, int* starts, int* lists, const float* scores, int* desk, int* shares, int* experts,
       long long rows0, long long rows1) {
    let_next_begin();
    wait_for_previous();
    const int lane = threadIdx.x, n = (int)n_;
    __shared__ int layer[STATE], ends[2], guessed[2 * GUESSES];
    const Ring ring = {ring_buffers, ends, (int)ring_capacity};
    // All that is read comes at once: one wait for memory instead of five.
    const int first = lane < n ? (int)chosen[lane] : -1;
    if (lane < STATE) layer[lane] = layer_[lane];
    if (lane < 2) ends[lane] = ring_state[lane];
    for (int i = lane; i < 2 * GUESSES; i += 32) guessed[i] = guesses[i];
    for (int e = lane; e < EXPERTS; e += 32) {
        buffer_of[e] = buffers[e];
        stamp[e] = stamps[e];
        if (SCORED) count[e] = counts[e];
#if LEARNED
        count[e] = __dmul_rn(count[e], counts[EXPERTS + 1]);
        worth[e] = scores ? (double)scores[e] : 0.;
#endif
        needed[e] = 0;
        guess_of[e] = -1;
        place[e] = -1;
#if SHARED
        for (int h = 0; h < 2; h++) {
            here[h][e] = (int)(h ? rows1 : rows0);
            early[h][e] = 0;
        }
#endif
    }
#if MIX || LEARNED
    if (lane == 0) {
        weight = counts[EXPERTS];
        growth = counts[EXPERTS + 1];
    }
#endif
    __syncwarp(0xFFFFFFFFu);
    if (first >= 0) needed[first] = 1;
    for (int i = lane + 32; i < n; i += 32) needed[chosen[i]] = 1;
    __syncwarp(0xFFFFFFFFu);
    if (lane == 0)
        for (int g = 0; g < GUESSES; g++) {
            const int expert = guessed[2 * g];
            if (expert < 0) continue;
            if (needed[expert]) guess_of[expert] = g;
            else give(ring, guessed[2 * g + 1]);
        }
    __syncwarp(0xFFFFFFFFu);

    int hits = 0, used = 0, total = 0, computed = 0;   // computed: by the CPU, wholly
    for (int pass = 0; pass < 3; pass++) {   // cached experts first, then arrived guesses, then what is missing
        // Guesses go on until here: giving way takes them 4 us, and choosing victims and writing the tables as long.
        if (pass == 2 && lane == 0) store_volatile(stop, 1);
#if SHARED
        if (pass == 1 && desk) continue;
        if (pass == 2 && desk) {
            total = share_out(desk, shares, jobs, n, rows0, rows1, guessed, layer, ring, lane, &used, &computed);
            break;
        }
#endif
        for (int base = 0; base < EXPERTS; base += 32) {
            const int e = base + lane;
            bool mine = e < EXPERTS && needed[e] && place[e] < 0;
            if (mine) mine = pass == 0 ? buffer_of[e] >= 0 : pass == 1 ? guess_of[e] >= 0 : true;
            unsigned todo = __ballot_sync(0xFFFFFFFFu, mine);
            for (; todo; todo &= todo - 1) {
                const int expert = base + __ffs((int)todo) - 1;
                if (pass == 0) {
                    note(expert, layer, lane);
                    if (lane == 0) {
                        place[expert] = buffer_of[expert];
#if SHARED
                        early[0][expert] = (int)rows0;
                        early[1][expert] = (int)rows1;
#endif
                    }
                    hits++;
                } else {
                    const int g = guess_of[expert];
                    int buffer = 0;
                    if (lane == 0) {
                        buffer = pass == 1 ? guessed[2 * g + 1] : take(ring);
                        jobs[3 * total] = expert;
                        jobs[3 * total + 1] = buffer;
                        jobs[3 * total + 2] = g;
                    }
                    buffer = __shfl_sync(0xFFFFFFFFu, buffer, 0);
                    admit(expert, buffer, layer, ring, lane);
                    used += pass == 1;
                    total++;
                }
                __syncwarp(0xFFFFFFFFu);
            }
        }
    }

    for (int e = lane; e < EXPERTS; e += 32) {
        buffers[e] = buffer_of[e];
        stamps[e] = stamp[e];
        if (SCORED) counts[e] = count[e];
    }
#if MIX
    if (lane == 0) counts[EXPERTS] = weight;
#endif
    for (int i = lane; i < n; i += 32) {
        const int e = i == lane ? first : (int)chosen[i];
        places[i] = place[e];
#if SHARED
        if (desk) {
            experts[i] = e;
            for (int h = 0; h < 2; h++) {
                shares[(EARLY + h) * n + i] = early[h][e];
                shares[(HERE + h) * n + i] = here[h][e];
            }
        }
#endif
    }
    for (int g = lane; g < GUESSES; g += 32) guesses[2 * g] = -1;
    if (lane == 0) layer[RIGHT] += used;
    __syncwarp(0xFFFFFFFFu);
    if (lane < STATE) layer_[lane] = layer[lane];
    if (lane < 2) ring_state[lane] = ends[lane];
    if (lane == 0) {
        *job_count = total;
        counters[HITS] += hits;
        counters[USED] += used;
        counters[MISSES] += total - used + computed;
    }
    if (found) group(chosen, n, found, starts, lists, lane);
}

// Chooses buffers for copies on a guess: `ids` [n], likeliest first, for a layer whose turn comes next. Experts that are
// cached are skipped. Clears `stop` and the progress of the layer's guesses.
//
// A guess never delays a need, but a wrong one spends power and the link of whoever shares it: where fewer than one in
// WORTH was right lately, only every RARELY-th is tried.
constexpr int WORTH = 8, RARELY = 16, WINDOW = 256;

extern "C" __global__ void __launch_bounds__(32)
guess(const long long* ids, long long n_, const int* buffers, int* layer, long long* counters, int* ring_buffers,
      int* ring_state, long long ring_capacity, int* guesses, int* stop, int* progress) {
    let_next_begin();
    wait_for_previous();
    const int lane = threadIdx.x, n = (int)n_;
    const Ring ring = {ring_buffers, ring_state, (int)ring_capacity};
    for (int i = lane; i < GUESSES * WARPS; i += 32) progress[i] = 0;
    if (lane != 0) return;
    bool worth = layer[LATELY] < WINDOW / 8 || layer[RIGHT] * WORTH >= layer[LATELY];
    if (!worth && ++layer[SKIPPED] == RARELY) {
        layer[SKIPPED] = 0;
        worth = true;
    }
    int started = 0;
    for (int i = 0; worth && i < n && started < GUESSES; i++) {
        const int expert = (int)ids[i];
        bool known = buffers[expert] >= 0;
        for (int g = 0; g < started; g++) known |= guesses[2 * g] == expert;
        if (known) continue;
        guesses[2 * started] = expert;
        guesses[2 * started + 1] = take(ring);
        started++;
    }
    counters[GUESSED] += started;
    layer[LATELY] += started;
    if (layer[LATELY] >= WINDOW) {
        layer[LATELY] /= 2;
        layer[RIGHT] /= 2;
    }
    for (int g = started; g < GUESSES; g++) guesses[2 * g] = -1;
    store_volatile(stop, 0);
}

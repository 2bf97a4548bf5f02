// Attention of a few query tokens over a static cache, reading only what is valid (split keys and values, as in
// flash-decoding). blockIdx.x is a share of the positions, y a key/value head, z eight (four) of its query rows.
//
//   WIDTH, VALUES  numbers of a key and of a value: multiples of 8, up to 256
//   ROWS           query rows (heads of the group times tokens) that share each reading of a key
//   TOKENS         of the query
//   FRESH          1: the tokens' own keys and values come from the projections, and queries and keys are rotated here:
//                  one launch in place of three, each of which would wait for the one before
//
// A warp has positions of its own, and its own largest score, until the end: nobody waits within the loop. A share takes
// the same number of tiles as every other at a given length, so that the result depends on nothing else; shares beyond the
// length end at once, and up to LEAST tiles there is one share, since adding up shares takes as long as a tile. The last
// share of a head to finish adds up all of them, in their order.
//
// The code is kept short: a step runs it once per layer, after other kernels, and fetching it costs more than running it.
#include "collectives.cuh"
#include "elements.cuh"

#ifndef FRESH
#define FRESH 0
#endif

constexpr int TILE = 64, MOST_SPLITS = 64, LEAST = 2;
constexpr int lanes_of(int width) {   // threads that hold a row, eight numbers each
    int lanes = 1;
    while (lanes * 8 < width) lanes *= 2;
    return lanes;
}
constexpr int TEAM = lanes_of(WIDTH > VALUES ? WIDTH : VALUES);
constexpr int TEAMS = 32 / TEAM;                             // of a warp, a position each
constexpr int EACH = TEAMS < 8 ? 8 / TEAMS : 1;              // positions of a team in a tile
constexpr int OWN = EACH * TEAMS, WARPS = TILE / OWN, THREADS = 32 * WARPS;   // the same in attention.py
constexpr float LOG2_E = 1.4426950408889634f;

// What is subtracted before the exponential, so that a row without any position gives zeros.
__device__ __forceinline__ float shift_of(float largest) { return largest == negative_infinity() ? 0.f : largest; }
struct Shared {
    float query[ROWS][WIDTH];                  // turned and scaled
#if FRESH
    uint4 fresh[TOKENS * WIDTH * SIZE / 16];   // the tokens' own keys, turned
#endif
    float gathered[WARPS][ROWS][VALUES];
    float largest[WARPS][ROWS], sum[WARPS][ROWS];
    float weights[ROWS][MOST_SPLITS];
    int last, length;
};

// The logarithm (base 2) of what a head adds to its denominator without a value; -infinity where there is none.
__device__ __forceinline__ float sink_of(const void* sinks, int head) {
    return sinks ? load_one(sinks, head) * LOG2_E : negative_infinity();
}

#if FRESH
// Eight numbers of a row from `own` on, turned by the token's angles, as dense.cu's `rotate` does. table: numbers of a
// row of cosine and sine: WIDTH, or half of it for both halves.
__device__ __forceinline__ Raw turned(const void* row, long long at, const void* cosine, const void* sine, int token,
                                      int table, int own) {
    constexpr int MIDDLE = WIDTH / 2;
    const bool second = own >= MIDDLE;
    float x[8], other[8], c[8], s[8], out[8];
    unpack_eight(load_eight(row, at + own), x);
    unpack_eight(load_eight(row, at + (second ? own - MIDDLE : own + MIDDLE)), other);
    const long long angle = (long long)token * table + (table == WIDTH || !second ? own : own - MIDDLE);
    unpack_eight(load_eight(cosine, angle), c);
    unpack_eight(load_eight(sine, angle), s);
#pragma unroll
    for (int i = 0; i < 8; i++)
        out[i] = add_rn(rounded(mul_rn(x[i], c[i])), rounded(mul_rn(second ? other[i] : -other[i], s[i])));
    return pack_eight(out);
}
#endif

__device__ __forceinline__ Raw key_of(const Shared& s, const void* k, bool fresh, long long at, int own) {
#if FRESH
    return load_eight(fresh ? (const void*)s.fresh : k, fresh ? own : at);
#else
    return load_eight(k, at);
#endif
}

__device__ __forceinline__ void add(float4& sum, float factor, const float4& more) {
    sum.x = fmaf(factor, more.x, sum.x);
    sum.y = fmaf(factor, more.y, sum.y);
    sum.z = fmaf(factor, more.z, sum.z);
    sum.w = fmaf(factor, more.w, sum.w);
}

// Four columns of query row `row`: a head of the group and a token.
__device__ __forceinline__ void write(void* out, const float4& all, float factor, int row, int kv, int group, int column) {
    const int head = kv * group + row / TOKENS, heads = gridDim.y * group;
    const long long to = ((long long)(row % TOKENS) * heads + head) * VALUES + column;
    store_one(out, to, all.x * factor);
    store_one(out, to + 1, all.y * factor);
    store_one(out, to + 2, all.z * factor);
    store_one(out, to + 3, all.w * factor);
}

// length: tokens in k and v, the query's own included; FRESH: without them, and moved on when every block has begun.
// finished [heads * chunks + 1] is zero between launches.
extern "C" __global__ void __launch_bounds__(THREADS)
attend(const void* q, void* k, void* v, void* out, float* partial, float* stats, int* finished, long long* length_,
       const void* sinks, long long q_head, long long q_token, long long k_head, long long k_token, long long v_head,
       long long v_token, long long group_, long long window, float scale, const void* new_k,
       const void* new_v, const void* cosine, const void* sine, long long table, long long new_k_head,
       long long new_k_token, long long new_v_head, long long new_v_token, long long capacity) {
    let_next_begin();
    wait_for_previous();
    __shared__ Shared s;
    const int group = (int)group_, thread = threadIdx.x;
    const int kv = blockIdx.y, lane = thread & 31, warp = thread >> 5, own = thread % TEAM * 8, team = thread / TEAM;
    if (thread == 0) s.length = (int)*length_ + (FRESH ? TOKENS : 0);
    // Row r of this block: a query head of the group and one of its tokens. A team a row; own keys follow the queries.
#pragma unroll 1
    for (int job = team; job < ROWS + FRESH * TOKENS && own < WIDTH; job += THREADS / TEAM) {
        const int row = blockIdx.z * ROWS + job, head = kv * group + row / TOKENS;
        const bool query = job < ROWS;
        const int token = query ? row % TOKENS : job - ROWS;
        if (query && row >= group * TOKENS) {
#pragma unroll
            for (int i = 0; i < 8; i++) s.query[job][own + i] = 0.f;
            continue;
        }
#if FRESH
        const long long at = query ? head * q_head + token * q_token : kv * new_k_head + token * new_k_token;
        const Raw raw = turned(query ? q : new_k, at, cosine, sine, token, (int)table, own);
        if (!query) {
            store_eight(s.fresh, token * WIDTH + own, raw);
            continue;
        }
#else
        const Raw raw = load_eight(q, head * q_head + token * q_token + own);
#endif
        float numbers[8];
        unpack_eight(raw, numbers);
#pragma unroll
        for (int i = 0; i < 8; i++) s.query[job][own + i] = numbers[i] * (scale * LOG2_E);
    }
    __syncthreads();
#if FRESH
    const int heads = gridDim.y * gridDim.z;
    if (thread == THREADS - 1 && atomicAdd(finished + heads, 1) == (int)(gridDim.x * heads) - 1) {
        finished[heads] = 0;
        *length_ = s.length;   // all blocks have read it
    }
#endif

    const int length = s.length, start = length - TOKENS;   // of the query's tokens
    const int lowest = window > 0 ? start + 1 - (int)window : 0, first = lowest > 0 ? lowest : 0;
    const int tiles = (length - first + TILE - 1) / TILE, splits = gridDim.x, split = blockIdx.x;
    if (tiles <= 0) return;
    const int share = tiles <= LEAST ? tiles : (tiles + splits - 1) / splits;
    const int active = (tiles + share - 1) / share;
    if (split >= active) return;
    const int begin = split * share, end = begin + share < tiles ? begin + share : tiles;

#if FRESH
    if (blockIdx.z == 0)   // whose share they lie in writes them down
#pragma unroll 1
        for (int token = team; token < TOKENS; token += THREADS / TEAM) {
            const int at = start + token;
            if (at < first + begin * TILE || at >= first + end * TILE || at >= (int)capacity) continue;
            if (own < WIDTH) store_eight(k, kv * k_head + at * k_token + own, load_eight(s.fresh, token * WIDTH + own));
            if (own < VALUES)
                store_eight(v, kv * v_head + at * v_token + own, load_eight(new_v, kv * new_v_head + token * new_v_token + own));
        }
#endif

    float query[ROWS][8], sums[ROWS][8], largest[ROWS], sum[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        largest[r] = negative_infinity();
        sum[r] = 0.f;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            query[r][i] = own < WIDTH ? s.query[r][own + i] : 0.f;
            sums[r][i] = 0.f;
        }
    }
    Raw keys[EACH], values[EACH];   // of the next tile, on their way while the present one is computed
    const int offset = first + warp * OWN + lane / TEAM;   // of the lane's first position in a tile
#pragma unroll 1
    for (int tile = begin; tile <= end; tile++) {   // loads `tile`, computes the one before
        const int next = offset + tile * TILE, at0 = next - TILE;
        const bool computes = tile > begin, loads = tile < end;
        float score[EACH][ROWS];
        if (computes) {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                float key[8];
                unpack_eight(keys[i], key);
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    float dot = 0.f;
#pragma unroll
                    for (int j = 0; j < 8; j++) dot = fmaf(query[r][j], key[j], dot);
#pragma unroll
                    for (int o = TEAM / 2; o; o >>= 1) dot += __shfl_xor_sync(0xFFFFFFFFu, dot, o);
                    const int at = at0 + i * TEAMS, position = start + (blockIdx.z * ROWS + r) % TOKENS;
                    score[i][r] = at <= position && (window <= 0 || at > position - (int)window) ? dot : negative_infinity();
                }
            }
        }
        if (loads)
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int at = next + i * TEAMS;
                const bool fresh = FRESH && at >= start;
                keys[i] = at < length && own < WIDTH ? key_of(s, k, fresh, kv * k_head + at * k_token + own, (at - start) * WIDTH + own)
                                                     : no_numbers();
            }
        if (computes)
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float most = largest[r];
#pragma unroll
                for (int i = 0; i < EACH; i++) most = fmaxf(most, score[i][r]);
#pragma unroll
                for (int o = TEAM; o < 32; o <<= 1) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, o));
                const float shift = shift_of(most), factor = exp2f(largest[r] - shift);
                largest[r] = most;
                sum[r] *= factor;
#pragma unroll
                for (int j = 0; j < 8; j++) sums[r][j] *= factor;
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    score[i][r] = exp2f(score[i][r] - shift);
                    sum[r] += score[i][r];
                }
            }
        if (computes)
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                float value[8];
                unpack_eight(values[i], value);
#pragma unroll
                for (int r = 0; r < ROWS; r++)
#pragma unroll
                    for (int j = 0; j < 8; j++) sums[r][j] = fmaf(score[i][r], value[j], sums[r][j]);
            }
        if (loads)
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int at = next + i * TEAMS;
                const bool fresh = FRESH && at >= start;
                values[i] = at < length && own < VALUES
                    ? load_eight(fresh ? new_v : v, fresh ? kv * new_v_head + (at - start) * new_v_token + own
                                                          : kv * v_head + at * v_token + own)
                    : no_numbers();
            }
    }

    // The teams' sums, then the warps', each with its own largest score.
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int o = TEAM; o < 32; o <<= 1) {
            sum[r] += __shfl_xor_sync(0xFFFFFFFFu, sum[r], o);
#pragma unroll
            for (int j = 0; j < 8; j++) sums[r][j] += __shfl_xor_sync(0xFFFFFFFFu, sums[r][j], o);
        }
        if (lane < TEAM && own < VALUES)
#pragma unroll
            for (int j = 0; j < 8; j++) s.gathered[warp][r][own + j] = sums[r][j];
        if (lane == 0) {
            s.largest[warp][r] = largest[r];
            s.sum[warp][r] = sum[r];
        }
    }
    __syncthreads();
    if (thread < ROWS) {   // what each warp's sums are to be multiplied by, in place of its largest score
        float most = negative_infinity(), total = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, s.largest[w][thread]);
        const float shift = shift_of(most);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float factor = exp2f(s.largest[w][thread] - shift);
            s.largest[w][thread] = factor;
            total = fmaf(factor, s.sum[w][thread], total);
        }
        s.weights[thread][0] = most;
        s.weights[thread][1] = total;
    }
    __syncthreads();

    const long long block = (long long)blockIdx.y * gridDim.z + blockIdx.z;
    const long long place = block * splits + split;
    if (active > 1 && thread < ROWS) {
        stats[(place * ROWS + thread) * 2] = s.weights[thread][0];
        stats[(place * ROWS + thread) * 2 + 1] = s.weights[thread][1];
    }
    // Four columns a thread.
#pragma unroll 1
    for (int i = 4 * thread; i < ROWS * VALUES; i += 4 * THREADS) {
        const int r = i / VALUES, column = i % VALUES, row = blockIdx.z * ROWS + r;
        float4 all = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int w = 0; w < WARPS; w++) add(all, s.largest[w][r], *(const float4*)&s.gathered[w][r][column]);
        if (active > 1) {
            *(float4*)(partial + place * ROWS * VALUES + i) = all;
            continue;
        }
        if (row >= group * TOKENS) break;
        const float sink = sink_of(sinks, kv * group + row / TOKENS);
        const float most = fmaxf(sink, s.weights[r][0]), shift = shift_of(most);
        const float here = exp2f(s.weights[r][0] - shift);
        const float total = here * s.weights[r][1] + exp2f(sink - shift);
        write(out, all, here / total, row, kv, group, column);
    }
    if (active == 1) return;
    __syncthreads();
    if (thread == 0) {
        __threadfence();   // the whole block's numbers, as the barrier ordered them before this
        s.last = atomicAdd(finished + block, 1) == active - 1;
        __threadfence();
    }
    __syncthreads();
    if (!s.last) return;
    if (thread == 0) finished[block] = 0;   // for the next launch
#pragma unroll 1
    for (int r = warp; r < ROWS; r += WARPS) {
        const int row = blockIdx.z * ROWS + r;
        const float sink = row < group * TOKENS ? sink_of(sinks, kv * group + row / TOKENS) : negative_infinity();
        float most[2], total[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int other = lane + 32 * i;
            const float2* stat = (const float2*)stats + (block * splits + other) * ROWS + r;
            const float2 found = other < active ? __ldcg(stat) : make_float2(negative_infinity(), 0.f);
            most[i] = found.x;
            total[i] = found.y;
        }
        const float shift = shift_of(fmaxf(sink, warp_max(fmaxf(most[0], most[1]))));
        const float a = exp2f(most[0] - shift), b = exp2f(most[1] - shift);
        const float sum_of_all = warp_sum(a * total[0] + b * total[1]) + exp2f(sink - shift);
        s.weights[r][lane] = a / sum_of_all;
        s.weights[r][lane + 32] = b / sum_of_all;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 4 * thread; i < ROWS * VALUES; i += 4 * THREADS) {
        const int r = i / VALUES, row = blockIdx.z * ROWS + r;
        if (row >= group * TOKENS) break;
        float4 all = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
        for (int p = 0; p < active; p++)
            add(all, s.weights[r][p], __ldcg((const float4*)(partial + (block * splits + p) * ROWS * VALUES + i)));
        write(out, all, 1.f, row, kv, group, i % VALUES);
    }
}

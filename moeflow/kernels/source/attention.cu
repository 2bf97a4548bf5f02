// Attention of a few query tokens over a static cache, reading only what is valid (split keys and values, as in
// flash-decoding). blockIdx.x is a share of the positions, y a key/value head, z eight (four) of its query rows.
//
//   WIDTH, VALUES  numbers of a key and of a value: multiples of 8, up to 256
//   ROWS           query rows (heads of the group times tokens) that share each reading of a key
//   FRESH          1: the tokens' own keys and values come from the projections, and queries and keys are rotated here:
//                  one launch in place of three, each of which would wait for the one before
//
// A share takes the same number of tiles as every other at a given length, so that the result depends on nothing else;
// shares beyond the length end at once. It takes LEAST tiles before there is a second one: adding up shares costs as much
// time as a few tiles. The last share of a head to finish adds up all of them, in their order.
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
constexpr int TEAM = lanes_of(WIDTH), TEAM_V = lanes_of(VALUES);
constexpr int WIDER = TEAM > TEAM_V ? TEAM : TEAM_V, NARROWER = TEAM < TEAM_V ? TEAM : TEAM_V;
constexpr int WANTED = WIDER > 16 ? 256 : WIDER * 16 < 32 ? 32 : WIDER * 16;
constexpr int THREADS = WANTED < NARROWER * TILE ? WANTED : NARROWER * TILE;   // the same in attention.py
constexpr int WARPS = THREADS / 32;
constexpr int EACH = TILE / (THREADS / TEAM), EACH_V = TILE / (THREADS / TEAM_V);   // rows of a tile that a team reads
constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float nothing() { return __uint_as_float(0xFF800000u); }   // -infinity
// What is subtracted before the exponential, so that a row without any position gives zeros.
__device__ __forceinline__ float shift_of(float largest) { return largest == nothing() ? 0.f : largest; }
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int o = 16; o; o >>= 1) value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, o));
    return value;
}
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int o = 16; o; o >>= 1) value += __shfl_xor_sync(0xFFFFFFFFu, value, o);
    return value;
}

struct Shared {
    float scores[ROWS][TILE];          // then their exponentials
    float largest[ROWS], sum[ROWS], factor[ROWS];
    float gathered[WARPS][ROWS][VALUES];
    float weights[ROWS][MOST_SPLITS];
    int last, length;
};

// Turns a tile's scores into exponentials, and says by what earlier results are to be multiplied.
__device__ __forceinline__ void normalize(Shared& s) {
    const int lane = threadIdx.x & 31;
    for (int r = threadIdx.x >> 5; r < ROWS; r += WARPS) {
        const float a = s.scores[r][lane], b = s.scores[r][lane + 32], before = s.largest[r];
        const float largest = fmaxf(before, warp_max(fmaxf(a, b))), shift = shift_of(largest);
        const float ea = exp2f(a - shift), eb = exp2f(b - shift);
        const float sum = warp_sum(ea + eb);
        s.scores[r][lane] = ea;
        s.scores[r][lane + 32] = eb;
        __syncwarp();
        if (lane == 0) {
            s.factor[r] = exp2f(before - shift);
            s.sum[r] = fmaf(s.sum[r], s.factor[r], sum);
            s.largest[r] = largest;
        }
    }
}

// The logarithm (base 2) of what a head adds to its denominator without a value; -infinity where there is none.
__device__ __forceinline__ float sink_of(const void* sinks, int head) {
    return sinks ? load_one(sinks, head) * LOG2_E : nothing();
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

// length: tokens in k and v, the query's own included; FRESH: without them, and moved on when every block has begun.
// finished [heads * chunks + 1] is zero between launches.
extern "C" __global__ void __launch_bounds__(THREADS)
attend(const void* q, void* k, void* v, void* out, float* partial, float* stats, int* finished, long long* length_,
       const void* sinks, long long q_head, long long q_token, long long k_head, long long k_token, long long v_head,
       long long v_token, long long group_, long long tokens_, long long window, float scale, const void* new_k,
       const void* new_v, const void* cosine, const void* sine, long long table, long long new_k_head,
       long long new_k_token, long long new_v_head, long long new_v_token, long long capacity) {
    __shared__ Shared s;
    const int group = (int)group_, tokens = (int)tokens_, thread = threadIdx.x;
    const int kv = blockIdx.y, lane = thread & 31, own = thread % TEAM * 8, own_v = thread % TEAM_V * 8;
    const int team = thread / TEAM, team_v = thread / TEAM_V;
    const int heads = gridDim.y * gridDim.z;
    if (thread == 0) {
        const long long before = *length_;
#if FRESH
        s.length = (int)before + tokens;
        if (before >= 0 && atomicAdd(finished + heads, 1) == (int)(gridDim.x * heads) - 1) {
            finished[heads] = 0;
            *length_ = before + tokens;   // all blocks have read it
        }
#else
        s.length = (int)before;
#endif
    }
    // Row r of this block: a query head of the group and a token, which sees positions from `from[r]` to `to[r]`.
    float query[ROWS][8], sums[ROWS][8];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int row = blockIdx.z * ROWS + r, head = kv * group + row / tokens, token = row % tokens;
        const bool there = row < group * tokens && own < WIDTH;
#if FRESH
        unpack_eight(there ? turned(q, head * q_head + token * q_token, cosine, sine, token, (int)table, own) : no_numbers(), query[r]);
#else
        unpack_eight(there ? load_eight(q, head * q_head + token * q_token + own) : no_numbers(), query[r]);
#endif
#pragma unroll
        for (int i = 0; i < 8; i++) { query[r][i] *= scale * LOG2_E; sums[r][i] = 0.f; }
    }
    if (thread < ROWS) { s.largest[thread] = nothing(); s.sum[thread] = 0.f; }
    __syncthreads();

    const int length = s.length, start = length - tokens;   // of the query's tokens
    const int lowest = window > 0 ? start + 1 - (int)window : 0, first = lowest > 0 ? lowest : 0;
    const int tiles = (length - first + TILE - 1) / TILE, splits = gridDim.x, split = blockIdx.x;
    if (tiles <= 0) return;
    const int least = tiles < LEAST ? tiles : LEAST;
    const int share = (tiles + splits - 1) / splits > least ? (tiles + splits - 1) / splits : least;
    const int active = (tiles + share - 1) / share;
    if (split >= active) return;

    const int end = (split + 1) * share < tiles ? (split + 1) * share : tiles;
    Raw keys[EACH], values[EACH_V];   // of the next tile, on their way while the present one is computed
    const auto load_keys = [&](int tile) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int at = first + tile * TILE + i * (THREADS / TEAM) + team;
            const bool there = at < length && own < WIDTH;
#if FRESH
            if (there && at >= start) {
                keys[i] = turned(new_k, kv * new_k_head + (at - start) * new_k_token, cosine, sine, at - start, (int)table, own);
                if (blockIdx.z == 0 && at < (int)capacity) store_eight(k, kv * k_head + at * k_token + own, keys[i]);
                continue;
            }
#endif
            keys[i] = there ? load_eight(k, kv * k_head + at * k_token + own) : no_numbers();
        }
    };
    const auto load_values = [&](int tile) {
#pragma unroll
        for (int i = 0; i < EACH_V; i++) {
            const int at = first + tile * TILE + i * (THREADS / TEAM_V) + team_v;
            const bool there = at < length && own_v < VALUES;
#if FRESH
            if (there && at >= start) {
                values[i] = load_eight(new_v, kv * new_v_head + (at - start) * new_v_token + own_v);
                if (blockIdx.z == 0 && at < (int)capacity) store_eight(v, kv * v_head + at * v_token + own_v, values[i]);
                continue;
            }
#endif
            values[i] = there ? load_eight(v, kv * v_head + at * v_token + own_v) : no_numbers();
        }
    };
    load_keys(split * share);
    load_values(split * share);
    for (int tile = split * share; tile < end; tile++) {
        const int base = first + tile * TILE;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int local = i * (THREADS / TEAM) + team, at = base + local;
            float key[8];
            unpack_eight(keys[i], key);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float dot = 0.f;
#pragma unroll
                for (int j = 0; j < 8; j++) dot = fmaf(query[r][j], key[j], dot);
#pragma unroll
                for (int o = TEAM / 2; o; o >>= 1) dot += __shfl_xor_sync(0xFFFFFFFFu, dot, o);
                const int position = start + (blockIdx.z * ROWS + r) % tokens;
                const bool seen = at <= position && (window <= 0 || at > position - (int)window);
                if (own == 0) s.scores[r][local] = seen ? dot : nothing();
            }
        }
        if (tile + 1 < end) load_keys(tile + 1);
        __syncthreads();
        normalize(s);
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int j = 0; j < 8; j++) sums[r][j] *= s.factor[r];
#pragma unroll
        for (int i = 0; i < EACH_V; i++) {
            float value[8];
            unpack_eight(values[i], value);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float weight = s.scores[r][i * (THREADS / TEAM_V) + team_v];
#pragma unroll
                for (int j = 0; j < 8; j++) sums[r][j] = fmaf(weight, value[j], sums[r][j]);
            }
        }
        if (tile + 1 < end) load_values(tile + 1);
        __syncthreads();
    }

    // The teams' sums, first those within a warp.
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
            for (int o = TEAM_V; o < 32; o <<= 1) sums[r][j] += __shfl_xor_sync(0xFFFFFFFFu, sums[r][j], o);
            if (lane < TEAM_V && own_v < VALUES) s.gathered[thread >> 5][r][own_v + j] = sums[r][j];
        }
    __syncthreads();

    const long long block = (long long)blockIdx.y * gridDim.z + blockIdx.z;
    if (active > 1) {
        const long long place = block * splits + split;
        for (int i = thread; i < ROWS * VALUES; i += THREADS) {
            float sum = 0.f;
            for (int w = 0; w < WARPS; w++) sum += s.gathered[w][i / VALUES][i % VALUES];
            partial[place * ROWS * VALUES + i] = sum;
        }
        if (thread < ROWS) {
            stats[(place * ROWS + thread) * 2] = s.largest[thread];
            stats[(place * ROWS + thread) * 2 + 1] = s.sum[thread];
        }
        __syncthreads();
        if (thread == 0) {
            __threadfence();   // the whole block's numbers, as the barrier ordered them before this
            s.last = atomicAdd(finished + block, 1) == active - 1;
            __threadfence();
        }
        __syncthreads();
        if (!s.last) return;
        if (thread == 0) finished[block] = 0;   // for the next launch
    }
    for (int r = thread >> 5; r < ROWS; r += WARPS) {
        const int row = blockIdx.z * ROWS + r;
        const float sink = row < group * tokens ? sink_of(sinks, kv * group + row / tokens) : nothing();
        float largest[2], sum[2];
        for (int i = 0; i < 2; i++) {
            const int other = lane + 32 * i;
            const float* stat = stats + ((block * splits + other) * ROWS + r) * 2;
            largest[i] = other >= active ? nothing() : active > 1 ? __ldcg(stat) : s.largest[r];
            sum[i] = other >= active ? 0.f : active > 1 ? __ldcg(stat + 1) : s.sum[r];
        }
        const float all = fmaxf(sink, warp_max(fmaxf(largest[0], largest[1]))), shift = shift_of(all);
        const float a = exp2f(largest[0] - shift), b = exp2f(largest[1] - shift);
        const float total = warp_sum(a * sum[0] + b * sum[1]) + exp2f(sink - shift);
        s.weights[r][lane] = a / total;
        s.weights[r][lane + 32] = b / total;
    }
    __syncthreads();
    // Four columns a thread, so that a pass over all shares serves the whole block.
    for (int i = 4 * thread; i < ROWS * VALUES; i += 4 * THREADS) {
        const int r = i / VALUES, row = blockIdx.z * ROWS + r;
        if (row >= group * tokens) break;
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        if (active > 1) {
#pragma unroll 4
            for (int p = 0; p < active; p++) {
                const float weight = s.weights[r][p];
                const float4 part = __ldcg((const float4*)(partial + (block * splits + p) * ROWS * VALUES + i));
                sum[0] = fmaf(weight, part.x, sum[0]);
                sum[1] = fmaf(weight, part.y, sum[1]);
                sum[2] = fmaf(weight, part.z, sum[2]);
                sum[3] = fmaf(weight, part.w, sum[3]);
            }
        } else {
            for (int w = 0; w < WARPS; w++)
#pragma unroll
                for (int j = 0; j < 4; j++) sum[j] += s.gathered[w][r][i % VALUES + j];
#pragma unroll
            for (int j = 0; j < 4; j++) sum[j] *= s.weights[r][0];
        }
        const int head = kv * group + row / tokens, all = gridDim.y * group;
        const long long to = ((long long)(row % tokens) * all + head) * VALUES + i % VALUES;
#pragma unroll
        for (int j = 0; j < 4; j++) store_one(out, to + j, sum[j]);
    }
}

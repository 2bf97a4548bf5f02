// Gives rows of missing experts to the CPU, and takes their products back: one exchange for gate and up, one for down.
//
// `post` writes the activations in the order in which the crew's kernels read them (cpp/matrix.hpp), then the request, then the
// turn; `collect` waits for the crew's answer and fetches its products. Both see who was late, and move the split for the next
// time: the link and the CPU are to finish together. What a row gives does not depend on who computes it.
#include "format.cuh"
#include "sharing.cuh"

constexpr int CHUNKS = COLUMNS / CHUNK, LANES = (CHUNKS + 15) / 16 * 16;
#if KIND == CODEBOOK
constexpr int WORDS = COLUMNS / 8, QUADS = (WORDS + 15) / 16 * 32;   // 16-byte pieces of a vector
#else
constexpr int QUADS = LANES * FIELDS * 2;
#endif

// The chunk of a lane, among all blocks' lanes.
__device__ __forceinline__ int chunk_of(int lane) { return (lane & ~15) + 4 * (lane & 3) + (lane >> 2 & 3); }

// The 16-byte piece `q` of a vector in the crew's order.
__device__ __forceinline__ uint4 quad(const uint4* pieces, const float* scales, int q) {
#if KIND == CODEBOOK
    float four[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int word = (q >> 5) * 16 + 4 * (q & 3) + j, field = q >> 2 & 7, c = word / VECTORS;
        four[j] = word < WORDS ? half_to_float(((const unsigned short*)&pieces[piece(c, word % VECTORS)])[field]) * scales[c] : 0.f;
    }
    return make_uint4(__float_as_uint(four[0]), __float_as_uint(four[1]), __float_as_uint(four[2]), __float_as_uint(four[3]));
#else
    const int k = q & 3, plane = q >> 2 & 1, field = (q >> 3) % FIELDS, word = (q >> 3) / FIELDS & 3;
    const int block = (q >> 3) / FIELDS >> 2, group = word * 2 * FIELDS + plane * FIELDS + field;
    unsigned four[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int c = 16 * block + 4 * j + k;
        four[j] = c < CHUNKS ? ((const unsigned*)&pieces[piece(c, group >> 2)])[group & 3] : 0u;
    }
    return make_uint4(four[0], four[1], four[2], four[3]);
#endif
}

#if KIND == SIGNED
// The sum of a chunk's numbers, which `prepare` does not note.
__device__ __forceinline__ float sum_of(const uint4* pieces, int c) {
    int high = 0, low = 0;
    for (int v = 0; v < VECTORS; v++) {
        const uint4 words = pieces[piece(c, v)];   // high bytes and low bytes of a word of codes in turns
        high = dp4a_ss(0x01010101, (int)words.x, dp4a_ss(0x01010101, (int)words.z, high));
        low = dp4a_ss(0x01010101, (int)words.y, dp4a_ss(0x01010101, (int)words.w, low));
    }
    return (float)(high * 256 + low);
}
#else
__device__ __forceinline__ float sum_of(const uint4*, int) { return 0.f; }
#endif

// A block for each vector of activations; `each`: whether every choice has its own. experts, begins [n]: the rows of choice i from
// begins[i] on are the CPU's. pieces, scales, sums: as `prepare` left them. letter, numbers, host_scales, host_sums: page-locked;
// strides in bytes and floats. row_bytes: of packed weights, which `computed` counts.
extern "C" __global__ void __launch_bounds__(512)
post(long long half, long long layer, long long n_, long long each, const int* experts, const int* begins, long long rows,
     long long row_bytes, const uint4* pieces, const float* scales, const float* sums, int* desk, int* letter, uint4* numbers,
     long long stride, float* host_scales, long long scale_stride, float* host_sums, long long sum_stride, long long* computed) {
    let_next_begin();
    wait_for_previous();
    const int n = (int)n_, vector = blockIdx.x;
    int given = 0;
    for (int i = 0; i < n; i++) given += begins[i] < rows;
    if (!given || load_volatile(desk + ALONE)) {
        if (vector == 0 && threadIdx.x == 0) {
            desk[HANDED] = 0;
            desk[TAKEN] = given != 0;
        }
        return;
    }
    if (!each || begins[vector] < rows) {
        constexpr int padded = (CHUNKS + 31) / 32 * 32;
        const uint4* from = pieces + (long long)vector * padded * VECTORS;
        uint4* to = (uint4*)((char*)numbers + vector * stride);
        scales += (long long)vector * CHUNKS;
        for (int q = threadIdx.x; q < QUADS; q += (int)blockDim.x) to[q] = quad(from, scales, q);
#if KIND != CODEBOOK
        sums += (long long)vector * CHUNKS * UNITS;
        for (int lane = threadIdx.x; lane < LANES; lane += (int)blockDim.x) {
            const int c = chunk_of(lane);
            const bool inside = c < CHUNKS;
            host_scales[vector * scale_stride + lane] = inside ? scales[c] : 0.f;
            for (int u = 0; u < UNITS; u++)
                host_sums[vector * sum_stride + (lane / 16 * UNITS + u) * 16 + lane % 16] =
                    !inside ? 0.f : KIND == AFFINE ? sums[c * UNITS + u] : sum_of(from, c);
        }
#endif
    }
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (gridDim.x > 1 && atomicAdd(desk + BLOCKS, 1) + 1 < (int)gridDim.x) return;
    desk[BLOCKS] = 0;
    const int turn = desk[TURN] + 1;
    desk[TURN] = desk[HANDED] = turn;
    desk[TAKEN] = 0;
    int jobs = 0;
    long long bytes = 0;
    for (int i = 0; i < n; i++) {
        if (begins[i] >= rows) continue;
        int* job = letter + LETTER_JOBS + LETTER_JOB * jobs++;
        job[0] = experts[i];
        job[1] = begins[i];
        job[2] = each ? i : 0;
        job[3] = i;
        bytes += (rows - begins[i]) * row_bytes;
    }
    letter[LETTER_LAYER] = (int)layer;
    letter[LETTER_HALF] = (int)half;
    letter[LETTER_COUNT] = jobs;
    *computed += bytes;
    __threadfence_system();
    store_volatile(letter + LETTER_TURN, turn);
}

// Whether the crew's products are here. Where they are not after `patience` nanoseconds, the device takes them back, and shares
// nothing from now on: a thread that was stopped must not stop the device.
__device__ bool answered(const int* arrived, int handed, int* desk, int* letter, long long patience) {
    const long long begin = nanoseconds();
    while (load_volatile(arrived) - handed < 0) {
        if (load_volatile(desk + ALONE) || nanoseconds() - begin > patience) {
            store_volatile(desk + ALONE, 1);
            store_volatile(desk + TAKEN, 1);
            store_volatile(letter + LETTER_TAKEN, handed);
            __threadfence_system();
            return false;
        }
        __nanosleep(100);
    }
    return true;
}

// Moves a half's ratio: up where the device had to wait for the crew. Both halves bring the same experts whole, and differ in
// the rows of one more: beyond these, and a step to get to the next, a ratio of its own means nothing.
__device__ __forceinline__ void move(int* desk, int half, bool up) {
    int* ratio = desk + RATIO + 2 * desk[CLASS] + half;
    const int step = desk[STEP], missing = desk[MISSING], whole = desk[WHOLE];
    const int low = max(whole * ONE / missing - step, 0), high = min((whole + 1) * ONE / missing + step, ONE);
    *ratio = min(max(*ratio + (up ? step : -step), low), high);
}

// Fetches the rows from begins[i] on of every choice i. results: page-locked, `stride` floats apart; out [n, rows]. A block for
// blockDim.x * 4 rows, a choice per blockIdx.y.
extern "C" __global__ void __launch_bounds__(256)
collect(long long half, const int* begins, long long rows, const int* arrived, const float* results, long long stride, float* out,
        int* desk, int* letter, long long patience) {
    let_next_begin();
    wait_for_previous();
    const int handed = desk[HANDED];
    if (!handed) return;
    __shared__ int here;
    const int begin = begins[blockIdx.y];
    const long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if ((long long)(blockIdx.x + 1) * blockDim.x * 4 <= begin) return;
    const bool asks = threadIdx.x == 0 && atomicExch(desk + ASKED, handed) != handed;
    if (asks) {   // the first block that comes asks the host's memory, the others ask it
        const bool waits = load_volatile(arrived) - handed < 0;
        here = answered(arrived, handed, desk, letter, patience);
        if (here && desk[STEP]) move(desk, (int)half, waits);
        __threadfence();
        store_volatile(desk + SEEN, here ? handed : -handed);
    } else if (threadIdx.x == 0) {
        int seen;
        while ((seen = load_volatile(desk + SEEN)) != handed && seen != -handed) __nanosleep(100);
        here = seen == handed;
        __threadfence();
    }
    __syncthreads();
    if (!here || at >= rows || at + 4 <= begin) return;
    const float* from = results + blockIdx.y * stride + at;
    float* to = out + blockIdx.y * rows + at;
    const uint4 four = load_host((const uint4*)from);   // rows of results are filled up to multiples of four
    const unsigned words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (at + i >= begin && at + i < rows) to[i] = __uint_as_float(words[i]);
}

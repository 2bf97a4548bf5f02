// Products of a packed matrix's rows with a few vectors, in terms of a level's vectors (vectors_*.hpp, included before).
//
// A block of 16 chunks has a chunk in every lane: its words are transposed, so that word `w` of all chunks is one vector,
// and a chunk's sum stays within its lane. Weights are read once: several vectors meet a block while it is in registers,
// more than four a row while it is in the nearest cache. No memory is asked for and nothing is thrown.
//
// Lane `l` of the two accumulators holds the sums of two of a warp's lanes: blocks go to them in turns.
#pragma once
#include <utility>

#include "codebook.hpp"
#include "shape.hpp"

namespace moeflow {
namespace {

template <class F, int... I> inline INLINED void each_of(F& f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}
// f(0), f(1), ... f(N - 1) with constants: shifts by them are part of an instruction.
template <int N, class F> inline INLINED void each(F f) { each_of(f, std::make_integer_sequence<int, N>{}); }

template <Kind KIND_, int BITS_, int UNITS_, int PLANES_> struct Form {
    static constexpr Kind KIND = KIND_;
    static constexpr int BITS = BITS_, UNITS = UNITS_, PLANES = PLANES_;
    static constexpr int FIELDS = 8 / code_bits(BITS), WORDS = 4 / UNITS;   // WORDS: of a unit
    static constexpr int BLOCK = KIND == CODEBOOK ? LANES / 4 : LANES;      // chunks; a codebook's lane has one word
};

constexpr int AHEAD = 12288;   // bytes of words, or more: memory answers late, and rows are too short for it to guess

inline INLINED void bring_near(const uint8_t* p, int nbytes) {
    UNROLLED for (int i = 0; i < nbytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// What all rows have in common.
struct Common {
    int64_t chunks, blocks, row_scales, row_steps;   // row_*: bytes from a row's scales to the next one's
    int64_t ahead;                                   // rows from what is multiplied to what is brought near
    int meta, ratio, block_groups;
    Spread spread;

    Common(const Matrix& m, const Shape& s)
        : chunks(s.chunks), blocks(s.blocks), row_scales(s.groups * (m.kind == CODEBOOK ? 2 : m.meta / 4)), row_steps((s.groups + 127) / 128 * 16),
          ahead(2 * (1 + AHEAD / (s.chunks * 32))), meta(m.meta), ratio(s.ratio), block_groups(LANES * s.units / s.ratio), spread(s.ratio) {}
};

struct Row {
    const uint8_t *words, *high, *scales;
    const float* steps;
};

struct Activations {
    const uint8_t* numbers;
    const float *scales, *sums;
    int64_t stride, scale_stride, sum_stride;
};

// Scale and zero of every unit of a block.
template <int UNITS, bool TAIL>
inline INLINED void scales_of(const Common& m, const Row& row, int64_t block, int chunks, int part, Floats* scale, Floats* zero) {
    const int shared = TAIL ? chunks / m.ratio : m.block_groups;   // scales, where chunks share them
    const int64_t group = block * m.block_groups;
    if (m.meta == 16) {
        const uint8_t* pairs = row.scales + 4 * group;
        if (UNITS > 1 || m.ratio == 1) half_pairs<UNITS, TAIL>(pairs, chunks, part, scale, zero);
        else spread_half_pairs(m.spread, pairs, shared, part, scale[0], zero[0]);
        return;
    }
    const float* steps = row.steps + group / 128 * 4;   // a block's groups have the same
    const uint8_t* codes = row.scales + 2 * group;
    Ints two[UNITS > 2 ? 2 : 1];                        // units, 16 bits each
    if constexpr (UNITS > 1) take<UNITS / 2, TAIL>(codes, chunks, part, two);
    else two[0] = m.ratio == 1 ? take_shorts<TAIL>(codes, chunks, part) : spread_shorts(m.spread, codes, shared, part);
    each<UNITS>([&](auto u) INLINED {
        constexpr int at = 16 * (u & 1);
        scale[u] = fused(to_floats(bits_of<at, 0xFF>(two[u / 2])), all(steps[0]), all(steps[1]));
        zero[u] = fused(to_floats(bits_of<at + 8, 0xFF>(two[u / 2])), all(steps[2]), all(steps[3]));
    });
}

// The codes of field `F` of word `W`, a code per byte.
template <class T, int W, int F> inline INLINED Ints codes_of(const Ints* words, const Ints* high) {
    if constexpr (T::KIND == SIGNED) return flip_signs(words[W]);   // code + 128: without a sign
    else if constexpr (T::BITS == 8) return words[W];
    else if constexpr (T::BITS == 4) return bits_of<4 * F, 0x0F0F0F0F>(words[W]);
    else if constexpr (T::BITS == 2) return bits_of<2 * F, 0x03030303>(words[W]);
    else return joined<2 * F, 4 * (W & 1) + F>(words[W], high[W / 2]);
}

// `add_block` for CODEBOOK: a word in every lane, eight columns of float32.
template <class T, int ROWS, int COUNT, bool TAIL>
inline INLINED void add_words(const Row (&rows)[ROWS], const Activations& x, int64_t block, int chunks, const Common& m,
                              Floats (&sums)[ROWS][COUNT][PARTS]) {
    const Table table(NF4);
    UNROLLED for (int part = 0; part < PARTS; part++)
        UNROLLED for (int r = 0; r < ROWS; r++) {
            const uint8_t *words = rows[r].words + block * (LANES * 4), *scales = rows[r].scales + block * 4;
            bring_near(words + m.ahead * m.chunks * 16, LANES * 4);
            const Ints codes = load_words<TAIL>(words, 4 * chunks, part);
            const Floats scale = half_scales(scales, TAIL ? chunks / 2 : 2, part);
            Floats products[COUNT];
            UNROLLED for (int v = 0; v < COUNT; v++) products[v] = all(0.f);
            each<8>([&](auto f) INLINED {
                const Floats weights = looked_up(table, bits_of<4 * f, -1>(codes));
                UNROLLED for (int v = 0; v < COUNT; v++) {
                    const float* numbers = (const float*)(x.numbers + v * x.stride) + (block * 8 + f) * LANES + part * WIDTH;
                    products[v] = fused(weights, load(numbers), products[v]);
                }
            });
            UNROLLED for (int v = 0; v < COUNT; v++) sums[r][v][part] = fused(products[v], scale, sums[r][v][part]);
        }
}

// Adds a block's share of the products: sums[row][vector][part].
template <class T, int ROWS, int COUNT, bool TAIL>
inline INLINED void add_block(const Common& m, const Row (&rows)[ROWS], const Activations& x, int64_t block, int chunks,
                      Floats (&sums)[ROWS][COUNT][PARTS]) {
    if constexpr (T::KIND == CODEBOOK) return add_words<T, ROWS, COUNT, TAIL>(rows, x, block, chunks, m, sums);
    else UNROLLED for (int part = 0; part < PARTS; part++) {
        Ints words[ROWS][4], high[ROWS][2];
        Floats scale[ROWS][T::UNITS], zero[ROWS][T::UNITS], products[ROWS][COUNT];
        UNROLLED for (int r = 0; r < ROWS; r++) {
            bring_near(rows[r].words + block * (LANES * 16) + m.ahead * m.chunks * 16, LANES * 16);
            if constexpr (T::BITS == 3) bring_near(rows[r].high + block * (LANES * 8) + m.ahead * m.chunks * 8, LANES * 8);
            if constexpr (T::KIND == AFFINE)
                bring_near(rows[r].scales + (block * m.block_groups * m.meta >> 2) + m.ahead * m.row_scales, T::UNITS * 64);
            take<4, TAIL>(rows[r].words + block * (LANES * 16), chunks, part, words[r]);
            if constexpr (T::BITS == 3) take<2, TAIL>(rows[r].high + block * (LANES * 8), chunks, part, high[r]);
            if constexpr (T::KIND == AFFINE) scales_of<T::UNITS, TAIL>(m, rows[r], block, chunks, part, scale[r], zero[r]);
            UNROLLED for (int v = 0; v < COUNT; v++) products[r][v] = all(0.f);
        }
        const uint8_t* numbers = x.numbers + block * (4 * T::FIELDS * T::PLANES * LANES * 4) + part * (WIDTH * 4);
        each<T::UNITS>([&](auto u) INLINED {
            Dots<T::BITS, T::PLANES> dots[ROWS][COUNT];
            UNROLLED for (int r = 0; r < ROWS; r++)
                UNROLLED for (int v = 0; v < COUNT; v++) dots[r][v].clear();
            each<T::WORDS * T::FIELDS>([&](auto i) INLINED {
                constexpr int word = u * T::WORDS + i / T::FIELDS, field = i % T::FIELDS;
                UNROLLED for (int r = 0; r < ROWS; r++) {
                    const Ints codes = codes_of<T, word, field>(words[r], high[r]);
                    UNROLLED for (int v = 0; v < COUNT; v++)
                        dots[r][v].add(codes, numbers + v * x.stride + (word * T::FIELDS + field) * (T::PLANES * LANES * 4));
                }
            });
            UNROLLED for (int v = 0; v < COUNT; v++) {
                const Floats sum = load(x.sums + v * x.sum_stride + (block * T::UNITS + u) * LANES + part * WIDTH);
                UNROLLED for (int r = 0; r < ROWS; r++) {
                    const Ints dot = dots[r][v].sum();
                    if constexpr (T::KIND == SIGNED) products[r][v] = to_floats(less_128_times(dot, sum));
                    else products[r][v] = fused(scale[r][u], fused_less(zero[r][u], sum, to_floats(dot)), products[r][v]);
                }
            }
        });
        UNROLLED for (int v = 0; v < COUNT; v++) {
            const Floats x_scale = load(x.scales + v * x.scale_stride + block * LANES + part * WIDTH);
            UNROLLED for (int r = 0; r < ROWS; r++) sums[r][v][part] = fused(products[r][v], x_scale, sums[r][v][part]);
        }
    }
}

// ROWS rows from `row` on times COUNT vectors from `first` on; beyond the job's last row that one is computed again.
template <class T, int ROWS, int COUNT> inline void some_rows(const Job& job, const Common& m, int64_t row, int first) {
    const Matrix& matrix = *job.matrix;
    const Vectors& given = *job.vectors;
    Row rows[ROWS];
    int64_t index[ROWS];
    for (int r = 0; r < ROWS; r++) {
        index[r] = row + r < job.end ? row + r : job.end - 1;
        rows[r].words = job.blob + matrix.words + index[r] * m.chunks * 16;
        rows[r].high = job.blob + matrix.high + index[r] * m.chunks * 8;
        rows[r].scales = job.blob + matrix.scales + index[r] * m.row_scales;
        rows[r].steps = (const float*)(job.blob + matrix.steps + index[r] * m.row_steps);
    }
    const int64_t lanes = m.blocks * LANES;
    const Activations x = {(const uint8_t*)given.numbers + first * given.stride, given.scales + first * lanes,
                           given.sums + first * lanes * T::UNITS, given.stride, lanes, lanes * T::UNITS};
    Floats sums[ROWS][COUNT][PARTS], others[ROWS][COUNT][PARTS];   // of this block's turn, and of the next one's
    UNROLLED for (int r = 0; r < ROWS; r++)
        UNROLLED for (int v = 0; v < COUNT; v++)
            UNROLLED for (int part = 0; part < PARTS; part++) sums[r][v][part] = others[r][v][part] = all(0.f);
    const int64_t full = m.chunks / T::BLOCK;
    const int rest = (int)(m.chunks % T::BLOCK);
    for (int64_t block = 0; block < full; block++) {
        add_block<T, ROWS, COUNT, false>(m, rows, x, block, T::BLOCK, sums);
        UNROLLED for (int r = 0; r < ROWS; r++)
            UNROLLED for (int v = 0; v < COUNT; v++)
                UNROLLED for (int part = 0; part < PARTS; part++) std::swap(sums[r][v][part], others[r][v][part]);
    }
    if (rest) add_block<T, ROWS, COUNT, true>(m, rows, x, full, rest, sums);
    UNROLLED for (int r = 0; r < ROWS; r++)
        UNROLLED for (int v = 0; v < COUNT; v++) {
            float sum = total(sums[r][v], others[r][v]);
            if constexpr (T::KIND == SIGNED) sum *= ((const float*)(job.blob + matrix.scales))[index[r]];
            if (matrix.bias >= 0) sum += ((const float*)(job.blob + matrix.bias))[index[r]];
            job.out[(first + v) * matrix.rows + index[r]] = sum;
        }
}

template <class T> void multiply(const Job& job) {
    const Common m(*job.matrix, Shape(*job.matrix));
    const int count = job.vectors->count;
    for (int64_t row = job.begin; row < job.end; row += 2) {
        int v = 0;
        if constexpr (MOST >= 4)
            for (; v + 4 <= count; v += 4) {
                some_rows<T, 1, 4>(job, m, row, v);
                if (row + 1 < job.end) some_rows<T, 1, 4>(job, m, row + 1, v);
            }
        if constexpr (MOST >= 2)
            if (v + 2 <= count) {
                some_rows<T, 2, 2>(job, m, row, v);
                v += 2;
            }
        for (; v < count; v++) some_rows<T, 2, 1>(job, m, row, v);
    }
}

template <int BITS, int PLANES> Multiply affine_of(int units) {
    constexpr int most = 8 / code_bits(BITS);   // groups of 16
    if (units == 1) return multiply<Form<AFFINE, BITS, 1, PLANES>>;
    if constexpr (most >= 2)
        if (units == 2) return multiply<Form<AFFINE, BITS, 2, PLANES>>;
    if constexpr (most >= 4)
        if (units == 4) return multiply<Form<AFFINE, BITS, 4, PLANES>>;
    return nullptr;
}

template <int PLANES> Multiply kernel_of(const Matrix& m) {
    const int units = Shape(m).units;
    if (m.kind == SIGNED) return multiply<Form<SIGNED, 8, 1, PLANES>>;
    if (m.kind == CODEBOOK) return multiply<Form<CODEBOOK, 4, 1, 2>>;   // without planes
    if (m.kind != AFFINE) return nullptr;
    if (m.bits == 2) return affine_of<2, PLANES>(units);
    if (m.bits == 3) return affine_of<3, PLANES>(units);
    if (m.bits == 4) return affine_of<4, PLANES>(units);
    if (m.bits == 8) return affine_of<8, PLANES>(units);
    return nullptr;
}

inline Multiply kernel_of(const Matrix& m, int planes) { return planes == 1 ? kernel_of<1>(m) : planes == 2 ? kernel_of<2>(m) : nullptr; }

}   // namespace
}   // namespace moeflow

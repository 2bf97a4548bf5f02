// One block of a packed matrix's rows times a few vectors, in terms of a level's vectors (vectors_*.hpp, included before).
//
// A block of 16 chunks has a chunk in every lane: its words are transposed, so that word `w` of all chunks is one vector,
// and a chunk's sum stays within its lane. Weights are read once: several vectors meet a block while it is in registers.
// A block is read as if all of its chunks were there; what lies in the place of those that are not counts for nothing.
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

constexpr int block_chunks(int kind) { return kind == CODEBOOK ? LANES / 4 : LANES; }   // a codebook's lane has one word

template <Kind KIND_, int BITS_, int UNITS_, int PLANES_> struct Form {
    static constexpr Kind KIND = KIND_;
    static constexpr int BITS = BITS_, UNITS = UNITS_, PLANES = PLANES_;
    static constexpr int FIELDS = 8 / code_bits(BITS), WORDS = 4 / UNITS;   // WORDS: of a unit
};

constexpr int AHEAD = 12288;   // bytes of words, or more: memory answers late, and rows are too short for it to guess

inline INLINED void bring_near(const uint8_t* p, int nbytes) {
    UNROLLED for (int i = 0; i < nbytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// What all rows have in common. Bytes: row_* from a row to the next one, block_scales from a block's scales to the next one's,
// ahead_* from what is multiplied to what is brought near.
struct Common {
    int64_t chunks, blocks, full;   // full: blocks all of whose chunks are there
    int64_t row_scales, row_steps;
    int64_t ahead_words, ahead_high, ahead_scales, block_scales;
    int64_t careful;                // the first row whose last block cannot be read whole: behind it the matrix ends
    int rest;                       // chunks behind the full blocks
    int meta, ratio, block_groups;
    Spread spread;

    Common(const Matrix& m, const Shape& s)
        : chunks(s.chunks), row_steps((s.groups + 127) / 128 * 16), meta(m.meta), ratio(s.ratio), spread(s.ratio) {
        const int block = block_chunks(m.kind), bytes = m.kind == CODEBOOK ? 8 : m.meta;   // of four groups' scales
        blocks = (chunks + block - 1) / block;
        full = chunks / block;
        rest = (int)(chunks % block);
        row_scales = s.groups * bytes / 4;
        const int64_t ahead = 2 * (1 + AHEAD / (chunks * 32));   // rows
        ahead_words = ahead * chunks * 16;
        ahead_high = ahead * chunks * 8;
        ahead_scales = ahead * row_scales;
        careful = rest ? m.rows - (block - rest + chunks - 1) / chunks : m.rows;
        block_groups = m.kind == CODEBOOK ? 2 : LANES * s.units / s.ratio;
        block_scales = block_groups * bytes / 4;
    }
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
template <int UNITS>
inline INLINED void scales_of(const Common& m, const Row& row, int64_t block, int64_t place, int part, Floats* scale,
                              Floats* zero) {
    const uint8_t* scales = row.scales + place * m.block_scales;
    if (m.meta == 16) {
        if (UNITS > 1 || m.ratio == 1) half_pairs<UNITS>(scales, part, scale, zero);
        else spread_half_pairs(m.spread, scales, m.block_groups, part, scale[0], zero[0]);
        return;
    }
    const int64_t group = block * (UNITS > 1 ? LANES * UNITS : m.block_groups);
    const float* steps = row.steps + (group >> 7) * 4;   // a block's groups have the same
    Ints two[UNITS > 2 ? 2 : 1];                        // units, 16 bits each
    if constexpr (UNITS > 1) take<UNITS / 2>(scales, part, two);
    else two[0] = m.ratio == 1 ? take_shorts(scales, part) : spread_shorts(m.spread, scales, m.block_groups, part);
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
template <class T, int COUNT>
inline INLINED void add_words(const Common& m, const Row (&rows)[ROWS], const Activations& x, int64_t block, int64_t place,
                              const There& there, Floats (&sums)[ROWS][COUNT][PARTS]) {
    const Table table(NF4);
    UNROLLED for (int part = 0; part < PARTS; part++)
        UNROLLED for (int r = 0; r < ROWS; r++) {
            const uint8_t* words = rows[r].words + place * (LANES * 4);
            bring_near(words + m.ahead_words, LANES * 4);
            const Ints codes = load_ints(words + part * (WIDTH * 4));
            const Floats scale = half_scales(rows[r].scales + place * 4, part);
            Floats products[COUNT];
            UNROLLED for (int v = 0; v < COUNT; v++) products[v] = all(0.f);
            each<8>([&](auto f) INLINED {
                const Floats weights = looked_up(table, bits_of<4 * f, -1>(codes));
                UNROLLED for (int v = 0; v < COUNT; v++) {
                    const float* numbers = (const float*)(x.numbers + v * x.stride) + (block * 8 + f) * LANES + part * WIDTH;
                    products[v] = fused(weights, load(numbers), products[v]);
                }
            });
            UNROLLED for (int v = 0; v < COUNT; v++)
                sums[r][v][part] = fused_there(there, part, scale, products[v], sums[r][v][part]);
        }
}

// Adds a block's share of the products: sums[row][vector][part]. `place` is the block's number in the rows' memory, which is
// not `block` where the last one has memory of its own.
template <class T, int COUNT>
inline INLINED void add_block(const Common& m, const Row (&rows)[ROWS], const Activations& x, int64_t block, int64_t place,
                              const There& there, Floats (&sums)[ROWS][COUNT][PARTS]) {
    if constexpr (T::KIND == CODEBOOK) return add_words<T, COUNT>(m, rows, x, block, place, there, sums);
    else UNROLLED for (int part = 0; part < PARTS; part++) {
        Ints words[ROWS][4], high[ROWS][2];
        Floats scale[ROWS][T::UNITS], zero[ROWS][T::UNITS], products[ROWS][COUNT];
        UNROLLED for (int r = 0; r < ROWS; r++) {
            bring_near(rows[r].words + place * (LANES * 16) + m.ahead_words, LANES * 16);
            if constexpr (T::BITS == 3) bring_near(rows[r].high + place * (LANES * 8) + m.ahead_high, LANES * 8);
            if constexpr (T::KIND == AFFINE)
                bring_near(rows[r].scales + place * m.block_scales + m.ahead_scales, T::UNITS * 64);
            take<4>(rows[r].words + place * (LANES * 16), part, words[r]);
            if constexpr (T::BITS == 3) take<2>(rows[r].high + place * (LANES * 8), part, high[r]);
            if constexpr (T::KIND == AFFINE) scales_of<T::UNITS>(m, rows[r], block, place, part, scale[r], zero[r]);
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
            UNROLLED for (int r = 0; r < ROWS; r++)
                sums[r][v][part] = fused_there(there, part, products[r][v], x_scale, sums[r][v][part]);
        }
    }
}

}   // namespace
}   // namespace moeflow

// A packed matrix, the activations that meet it, and a share of their product: what the CPU's kernels are given.
//
// The formats are those of source/format.cuh, and so is the arithmetic: activations in 16-bit fixed point with a scale per
// chunk of 16 bytes of codes, integer products summed exactly, chunks added as a warp of the GPU adds them. So AFFINE and
// SIGNED products are the GPU's to the last bit, at every level of instructions, and whoever computes a row changes no token.
#pragma once
#include <cstdint>

namespace moeflow {

enum Kind : int32_t { PLAIN = 0, AFFINE = 1, SIGNED = 2, CODEBOOK = 3 };
enum Number : int32_t { FLOAT = 0, HALF = 1, BFLOAT = 2 };   // as in kernels/gemv.py

// Instructions that a kernel may use. A machine's best is the highest that it has.
enum Level : int32_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2, VNNI = 3, LEVELS = 4 };

struct Matrix {
    int32_t kind, bits, group, meta;            // meta of PLAIN: a Number, HALF or BFLOAT
    int64_t rows, columns;
    int64_t words, high, scales, steps, bias;   // bytes from the start of the blob; bias: -1 for none
};

// Activations [vectors, columns] in the order in which the kernels read them. Numbers of a vector begin at a multiple of 64.
//
// AFFINE, SIGNED: 16 chunks make a block, the last one filled up with zeros; lane `l` of a block is its chunk
// 4 * (l % 4) + l / 4, which is the order that a transposition of four vectors of words gives. Integer ((((block * 4 +
// word) * FIELDS + field) * planes + plane) * 16 + lane holds four signed bytes, those that meet field `field` of word `word`
// of the lane's chunk. Plane 0 is the high bytes, plane 1 the low ones; where planes is 1, numbers have 8 bits.
// PLAIN: floats, in the order of columns.
// CODEBOOK: floats. 16 words of codes make a block of 128 columns: number (block * 8 + field) * 16 + word.
struct Vectors {
    const void* numbers;
    const float* scales;       // AFFINE, SIGNED: [vectors, blocks, 16 lanes]
    const float* sums;         // AFFINE, SIGNED: [vectors, blocks, units, 16 lanes], sums of a unit's numbers
    int64_t stride;            // bytes of `numbers` from one vector to the next
    int32_t count, planes;
};

// out[v * matrix.rows + r] = row r of the matrix in `blob` times vector v, for begin <= r < end and every vector.
struct Job {
    const Matrix* matrix;
    const uint8_t* blob;
    const Vectors* vectors;
    float* out;
    int64_t begin, end;
};

// Which kernel multiplies; null where the format, or this machine at `level`, has none.
using Multiply = void (*)(const Job&);
Multiply multiply_for(const Matrix& matrix, int32_t planes, Level level);
Level best_level();

// What a vector takes: bytes of numbers, and how many scales and sums.
struct Sizes { int64_t numbers, scales, sums; };
Sizes sizes_of(const Matrix& matrix, int32_t planes);

// Fills `vectors.count` vectors (its arrays are written to) from x [count, columns], `x_stride` numbers apart.
void prepare(const Matrix& matrix, Number dtype, const void* x, int64_t x_stride, const Vectors& vectors);

// Rows begin to end of the matrix as plain numbers, to out [rows of the matrix, columns]; null where this machine has not
// the level. Those above AVX2 have no other than that.
using Unpack = void (*)(const Matrix& matrix, const uint8_t* blob, Number dtype, void* out, int64_t begin, int64_t end);
Unpack unpack_for(Level level);

}   // namespace moeflow

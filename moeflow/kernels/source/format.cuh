// How a packed matrix and the activations that meet it are laid out; chosen by macros when a kernel is compiled.
//
//   KIND     AFFINE: unsigned codes, scale and zero per GROUP;  SIGNED: int8 codes, a scale per row;
//            CODEBOOK: 4-bit codes into 16 numbers, a scale per GROUP;  DENSE: plain numbers
//   BITS     AFFINE: 2, 3, 4 or 8;  DENSE: 16 or 32
//   GROUP    columns that share a scale
//   META     AFFINE: 16 or 8 bits for each scale and zero
//   DTYPE    DENSE: HALF, BFLOAT or FLOAT
//
// A lane reads CHUNK columns of a row at once, 16 bytes of words. Integer codes are multiplied with activations in
// 16-bit fixed point, one scale per chunk, each number split into a high and a low signed byte: four products an
// instruction (dp4a), summed exactly. Against half-precision multiplication that takes 13 instructions for 16
// 2-bit weights instead of 24, and leaves a relative error near 1e-5 instead of 6e-4.
#pragma once
#include "primitives.cuh"

#define AFFINE 1
#define SIGNED 2
#define CODEBOOK 3
#define DENSE 4
#define FLOAT 0
#define HALF 1
#define BFLOAT 2

#if KIND == AFFINE
#define CODE_BITS (BITS == 3 ? 2 : BITS)
#elif KIND == SIGNED
#define CODE_BITS 8
#elif KIND == CODEBOOK
#define CODE_BITS 4
#endif

#if KIND == DENSE
constexpr int CHUNK = 128 / BITS;          // columns
constexpr int VECTORS = CHUNK / 4;         // 16-byte pieces of activations per chunk: float32
#else
constexpr int CHUNK = 128 / CODE_BITS;
constexpr int FIELDS = 8 / CODE_BITS;      // codes in a byte
constexpr int COLUMNS_PER_WORD = 32 / CODE_BITS;
#if KIND == CODEBOOK
constexpr int VECTORS = CHUNK / 8;         // halves
#else
constexpr int VECTORS = CHUNK / 8;         // two bytes a number
#endif
#endif

#if KIND == AFFINE
constexpr int UNIT = GROUP < CHUNK ? GROUP : CHUNK;  // columns that share a scale within a chunk
#else
constexpr int UNIT = CHUNK;
#endif
constexpr int UNITS = CHUNK / UNIT;        // 1, 2 or 4

constexpr float FULL_SCALE = 32639.f;      // 127 * 256 + 127: the high byte of every number up to here fits
constexpr float TINY = 1e-30f;             // activations below it count as zero: their scale would not be a normal number

// Index of the 16-byte piece `v` of chunk `c` in a prepared activation row: pieces of 32 neighbouring chunks lie
// side by side, so that a warp reads 512 contiguous bytes.
__device__ __forceinline__ int piece(int c, int v) { return ((c >> 5) * VECTORS + v) * 32 + (c & 31); }

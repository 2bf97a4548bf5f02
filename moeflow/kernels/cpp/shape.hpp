// Sizes that follow from a format, in the words of source/format.cuh.
#pragma once
#include "matrix.hpp"

namespace moeflow {
namespace {   // of each unit for itself: units are compiled for different machines, and may share no function

constexpr int LANES = 16;   // chunks of a block

constexpr int code_bits(int bits) { return bits == 3 ? 2 : bits; }

struct Shape {
    int code_bits, fields, chunk, units, ratio;   // ratio: chunks that share a scale
    int64_t chunks, blocks, groups;

    explicit Shape(const Matrix& m) {
        code_bits = moeflow::code_bits(m.bits);
        fields = 8 / code_bits;
        chunk = 128 / code_bits;
        const bool affine = m.kind == AFFINE;
        units = affine && m.group < chunk ? chunk / m.group : 1;
        ratio = affine && m.group > chunk ? m.group / chunk : 1;
        chunks = m.columns / chunk;
        blocks = (chunks + LANES - 1) / LANES;
        groups = m.group > 0 ? m.columns / m.group : 1;
    }
};

}   // namespace
}   // namespace moeflow

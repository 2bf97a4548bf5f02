// Threads that share products out among themselves: those that the host asks for, or those that a device asks for.
#pragma once
#include <atomic>
#include <cstdint>

#include "matrix.hpp"

namespace moeflow {

// What the device and the crew tell each other, in page-locked memory. source/sharing.cu is the other side and has the same
// numbers. Integers of the letter: the turn has a cache line of its own, for which one thread waits; behind it the request.
// A request: layer, half, count; per job the expert, its first row, and which vector and row of results are its own.
enum Letter : int32_t {
    LETTER_TURN = 0, LETTER_LAYER = 16, LETTER_HALF, LETTER_COUNT, LETTER_JOBS = 32, LETTER_JOB = 4
};

// A matrix of one layer's experts.
struct Half {
    Matrix matrix;
    const uint8_t* blobs;      // expert 0's
    int64_t nbytes;            // from one expert's to the next
};

struct Service {
    const volatile int32_t* letter;
    volatile int32_t* arrived;     // [2], a cache line apart: the turn whose first, or second, products are there
    const Half* halves;            // [layers, 2]
    int32_t layers, most;          // jobs of a request at most
    const uint8_t* numbers[2];     // activations of each half [most, stride]
    const float* scales[2];        // [most, chunks]
    const float* sums[2];          // [most, chunks * units]
    int64_t strides[2], scale_strides[2], sum_strides[2];
    float* results[2];             // [most, rows]
    int64_t result_strides[2];
    int64_t linger;                // nanoseconds that threads wait awake for the next request
};

}   // namespace moeflow

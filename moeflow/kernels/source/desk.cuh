// What the kernels and the thread that feeds the copy engine tell each other about the copies of a layer.
//
// The desk lies in the device's memory, the post in page-locked memory of the host. `hand_over` writes the post and then
// its lock, for which the thread waits; the copy engine brings the arrivals to the desk behind the bytes that they
// announce. offload/mover.py is the other side and has the same numbers.
#pragma once

constexpr int PIECE = 4096;   // bytes that a warp moves at once; blobs are whole pieces

// turns of hand_over; the turn that was handed over, 0 when the kernels copy all; whether they do so until the host says
// otherwise; passes that have ended; the turn whose gate and up, and whose down, have arrived.
enum { TURN, HANDED, ALONE, ENDED, ARRIVED, DESK = 8 };

// The lock has a cache line of its own: the thread waits by reading it. The turn that the kernels took back; then per job
// its expert, its buffer, and the first piece that is handed over.
enum { LOCK = 0, POST_TURN = 16, POST_LAYER, POST_COUNT, POST_ENDED, TAKEN_BACK = 32, POST_JOBS = 48 };

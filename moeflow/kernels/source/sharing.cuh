// What the kernels, and the crew of threads that computes beside them, tell each other about a layer of one token.
//
// An expert that is missing may be computed where it lies: its first rows come over the link and are computed on the device,
// the others by the CPU. The desk lies in the device's memory; the letter and what comes back in page-locked memory of the
// host. cpp/crew.hpp and offload/sharing.py are the other side and have the same numbers.
#pragma once

constexpr int ONE = 4096;              // a whole, in ratios
constexpr int NEARLY = ONE * 7 / 8;    // of an expert from here on all is brought, so that it can be kept
constexpr int HARDLY = ONE / 16;       // and below nothing
constexpr int ROW_STEP = 64;           // rows are split at multiples of it: kernels/gemv.py's
constexpr int CLASSES = 6;             // one, two, or more experts are missing; the same beside experts that a guess has brought

// Turns of the letter; the turn that was given to the crew for the half under way, 0 for none; whether the device computes all
// by itself until the host says otherwise; 1 where it took this half back; blocks of `post` that are done; the class of the
// layer's split; by how much the ratios are moved, 0 where they are fixed; the turn that a block asks for,
// and whose answer it saw, negative where it took it back; experts that the layer misses, and of these, without what ratios add in
// part, those that the link brings whole. From RATIO on, per class and half: the link's share
// of what is missing.
enum { TURN, HANDED, ALONE, TAKEN, BLOCKS, CLASS, STEP, ASKED, SEEN, MISSING, WHOLE, RATIO = 16 };

// Tables [SHARES, n] that `lookup` writes, per half: of each choice, rows that the device has already, and rows that it
// computes; of each copy, rows that are brought.
enum { EARLY = 0, HERE = 2, CUTS = 4, SHARES = 6 };

// The letter: the turn has a cache line of its own, for which a thread waits; the turn that was taken back; then the request,
// and per job its expert, its first row, and which vector and row of results are its own.
enum { LETTER_TURN = 0, LETTER_LAYER = 16, LETTER_HALF, LETTER_COUNT, LETTER_TAKEN = 24, LETTER_JOBS = 32, LETTER_JOB = 4 };

// The grids of ggml's IQ types: each code of a file stands for 8 (IQ1, IQ2) or 4 (IQ3) numbers, which a word holds in
// ascending columns from its lowest byte on. Defined once (grids.cc): files with -m flags only refer to them.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace kt {

template <class Word, size_t kEntries>
struct Grid {
  Word words[kEntries];
};

extern const Grid<uint64_t, 2048> kIq1Grid;    // 8 times the number: -8, 0 or 8
extern const Grid<uint64_t, 256> kIq2XxsGrid;  // magnitudes, like all below
extern const Grid<uint64_t, 512> kIq2XsGrid;
extern const Grid<uint64_t, 1024> kIq2SGrid;
extern const Grid<uint32_t, 256> kIq3XxsGrid;
extern const Grid<uint32_t, 512> kIq3SGrid;

// Byte i is 0xFF where bit i of the index is set: eight signs. IQ2_XXS, IQ2_XS and IQ3_XXS store seven, the eighth
// makes the number of minuses even.
extern const Grid<uint64_t, 256> kSignMasks;
extern const Grid<uint64_t, 128> kEvenSignMasks;

}  // namespace kt

// Sizes of the tiles that simd/tile.h works on, in elements.
#pragma once

namespace peft_kernels {

constexpr int kTileRows = 48, kTileColumns = 96;  // 18 KiB as floats: with a weight's tile it fits the L1 cache
constexpr int kMaskColumns = 4 * kTileColumns;    // dropout masks are made for so many columns at once
constexpr int kMaxRank = 512;

}  // namespace peft_kernels

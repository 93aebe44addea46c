// Products of bf16 factors with float sums on AMX: tiles of 16 rows by 64 bytes, a 2x2 block of sums at a time.
//
// A right factor's tile holds 16 pairs of rows: (2i, 2i + 1) side by side for each of 16 columns. Packed, it is
// [vectors][depth / 32] such tiles of 1 KiB.
#pragma once

#include "matrix_product_bf16.h"

#if defined(__AMX_BF16__)

namespace pydistill {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// out (+)= left right for up to 2x2 tiles of sums. A left tile has its rows `left_row` elements apart; `left_tile` is
// from one to the next along the depth, `left_block` and `right_block` from the first of two tiles to the second.
template <int R, int C>
PYDISTILL_INLINE void amx_block(int64_t depth, const Bf16* left, int64_t left_row, int64_t left_tile,
                                int64_t left_block, const Bf16* right, int64_t right_block, Product<float> out) {
  const int64_t stride = out.row * 4;
  float* const low = out.data + 16 * out.row;
  if (out.add) {
    _tile_loadd(0, out.data, stride);
    if (C > 1) _tile_loadd(1, out.data + out.vector, stride);
    if (R > 1) _tile_loadd(2, low, stride);
    if (R > 1 && C > 1) _tile_loadd(3, low + out.vector, stride);
  } else {
    _tile_zero(0);
    if (C > 1) _tile_zero(1);
    if (R > 1) _tile_zero(2);
    if (R > 1 && C > 1) _tile_zero(3);
  }
  for (int64_t d = 0; d < depth; d += 32, left += left_tile, right += 512) {
    _tile_loadd(4, left, left_row * 2);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (C > 1) {
      _tile_loadd(7, right + right_block, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (R > 1) {
      _tile_loadd(5, left + left_block, left_row * 2);
      _tile_dpbf16ps(2, 5, 6);
      if (C > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out.data, stride);
  if (C > 1) _tile_stored(1, out.data + out.vector, stride);
  if (R > 1) _tile_stored(2, low, stride);
  if (R > 1 && C > 1) _tile_stored(3, low + out.vector, stride);
}

struct Amx : Bf16Operands {
  using Primal = Amx;
  static constexpr int64_t kChannels = 32, kTiles = 32;
  static constexpr bool kSplit = true;

  PYDISTILL_INLINE static void pack(Operand* to, int64_t d, int64_t v, int64_t depth, int64_t, Vec<float> even,
                                    Vec<float> odd) {
    _mm512_storeu_si512(to + v * depth * 16 + d * 16, pair_rows(halves(even), halves(odd)));
  }

  static void product(int64_t rows, int64_t depth, int64_t vectors, const Factors<Bf16>* factors, int terms,
                      int64_t left_row, Product<float> out) {
    for (int i = 0; i < terms; ++i, out.add = true)
      run((rows + 15) / 16, depth, vectors, factors[i].left, left_row, 32, 16 * left_row, factors[i].right, depth * 16,
          out);
  }
  static void outer(int64_t rows, int64_t depth, int64_t vectors, const Factors<Bf16>* factors, int terms,
                    int64_t left_row, int64_t right_row, Product<float> out) {
    for (int i = 0; i < terms; ++i, out.add = true)
      outer(rows, depth, vectors, factors[i].left, left_row, factors[i].right, right_row, out);
  }

 private:
  // Both factors are repacked, part of the depth, rows and columns at a time: the sum over tiles runs along rows of the
  // operands, where AMX needs adjacent elements.
  static void outer(int64_t rows, int64_t depth, int64_t vectors, const Operand* left, int64_t left_row,
                    const Operand* right, int64_t right_row, Product<float> out) {
    constexpr int64_t kDepth = 128, kRowTiles = 8, kVectors = 8;
    alignas(64) Bf16 lefts[kRowTiles * 16 * kDepth], rights[kVectors * 16 * kDepth];
    for (int64_t d = 0; d < depth; d += kDepth) {
      const int64_t deep = depth - d < kDepth ? depth - d : kDepth;
      for (int64_t v = 0; v < vectors; v += kVectors) {
        const int64_t wide = vectors - v < kVectors ? vectors - v : kVectors;
        for (int64_t i = 0; i < wide; ++i)
          for (int64_t t = 0; t < deep; t += 2) {
            const Bf16* from = right + (d + t) * right_row + (v + i) * 16;
            _mm512_store_si512(rights + (i * deep + t) * 16, pair_rows(load_half(from), load_half(from + right_row)));
          }
        for (int64_t r = 0; r < rows; r += 16 * kRowTiles) {
          const int64_t tiles = rows - r < 16 * kRowTiles ? (rows - r) / 16 : kRowTiles;
          for (int64_t i = 0; i < tiles; ++i)
            for (int64_t t = 0; t < deep; t += 32) {
              Vec<float> block[16];
              for (int64_t pair = 0; pair < 16; ++pair) {
                const Bf16* from = left + (d + t + 2 * pair) * left_row + r + 16 * i;
                block[pair] = reinterpret_cast<Vec<float>>(pair_rows(load_half(from), load_half(from + left_row)));
              }
              transpose<float>(block);
              float* to = reinterpret_cast<float*>(lefts + (i * deep + t) * 16);
              for (int64_t row = 0; row < 16; ++row) store(to + row * 16, block[row]);
            }
          Product<float> part = out;
          part.data += r * out.row + v * out.vector;
          part.add = out.add || d > 0;
          run(tiles, deep, wide, lefts, 32, 512, deep * 16, rights, deep * 16, part);
        }
      }
    }
  }

  static void run(int64_t row_tiles, int64_t depth, int64_t vectors, const Bf16* left, int64_t left_row,
                  int64_t left_tile, int64_t left_block, const Bf16* right, int64_t right_block, Product<float> out) {
    for (int64_t v = 0; v < vectors; v += 2)
      for (int64_t r = 0; r < row_tiles; r += 2) {
        Product<float> to = out;
        to.data += 16 * r * out.row + v * out.vector;
        const Bf16* a = left + r * left_block;
        const Bf16* b = right + v * right_block;
        const bool two_rows = row_tiles - r > 1, two_columns = vectors - v > 1;
        if (two_rows && two_columns)
          amx_block<2, 2>(depth, a, left_row, left_tile, left_block, b, right_block, to);
        else if (two_rows)
          amx_block<2, 1>(depth, a, left_row, left_tile, left_block, b, right_block, to);
        else if (two_columns)
          amx_block<1, 2>(depth, a, left_row, left_tile, left_block, b, right_block, to);
        else
          amx_block<1, 1>(depth, a, left_row, left_tile, left_block, b, right_block, to);
      }
  }
};

}  // namespace
}  // namespace pydistill

#endif

// Where a step's numbers are: in theta's packed forms, a tape, a slot's sums, a thread's memory. Part of
// convnet_step.inl.
#pragma once

#include "convnet_operands.h"
#include "vocabulary/winograd.h"

namespace pydistill {
namespace {

// Sizes and offsets of one layer. Offsets are in elements of the array they refer to.
struct LayerLayout {
  int64_t in, out, in_groups, out_groups;  // padded channels, panels
  int64_t H, W, OH, OW, padding;
  int64_t in_row, out_row;                // of transformed tiles: a power of two would crowd few cache sets
  int64_t rows, columns, tiles;           // of Winograd tiles
  int64_t filter, filter_t, filter_rest;  // packed [in][out] and [out][in], per point; first layer: [taps][out]
  int64_t filter_primal;                  // that of the primal forward pass if it has another class
  int64_t norm, norm_size;                // weight, bias, each [out], of layer norm [panels][positions][L]
  int64_t bias;                           // the convolution's [out], if the norm does not subtract it
  int64_t tiled_filter;                   // first layer: transformed [panels][points][in][L], in T
  int64_t sum, sum_norm, sum_bias;        // a slot's sums: [points][in][out] or [taps][out]; [2][norm_size]; [out]
  int64_t pooled, grad_pooled, conv;      // in the tape
  int64_t statistics;                     // in the tape: mean and r [2][out], in its tangent mean_t and tilt
  int64_t means, means_t, sums;           // in the exchange: [2][out], [3][out], [4][out]
  int64_t chunk;                          // images at a time
  int64_t input;                          // where its input's tiles begin in the workspace
};

template <class T, class A>
struct Layout {
  static constexpr int L = Lanes<T>::count;
  static constexpr int64_t kTiledGroup = 4;  // tiles of the first layer whose products are in progress at a time
  static constexpr int64_t kBunch = 2;       // panels of the first layer that are in progress at a time
  static constexpr int64_t kKept = 1 << 20;  // bytes that leave room for the rest in a second-level cache
  using Operand = typename A::Operand;
  static constexpr int64_t kPrimalSize = sizeof(typename A::Primal::Operand) / sizeof(Operand);

  int64_t depth, taps, used_taps, classes, features;  // padded, except used_taps: those that products run over
  LayerLayout layer[Step::kMaxDepth];
  int64_t head, head_t, head_bias;  // packed [features][classes], [classes][features], [classes], in T
  int64_t head_begin, filters;      // bytes: where T begins in a filter set, and its whole size
  int64_t sum_head, sum_head_bias, partials;
  int64_t logits_grad, tape, stored;                      // bytes of an image's tape in use, and as kept
  int64_t exchange, widest;                               // bytes of a slot's; the most channels of a layer
  int64_t tile_elements, padded_panel, positions, chunk;  // the largest over layers
  int64_t input_elements;                                 // of the input's tiles of all layers
  bool backwards, to_images;       // whether the form has a backward pass, and whether it reaches the images
  bool tiled_first, tiled_primal;  // the first convolution, or its primal pass, runs on Winograd tiles
  int64_t phase,
      tile_columns;   // of its input: a row's pixels by column modulo 4, and tiles of a row, in whole registers
  bool primal_apart;  // there is a primal forward pass in another operand class than the rest
  bool keeps_first;   // a chunk's columns and first convolutions stay in cache from the forward to the backward pass

  explicit Layout(const Step& step) {
    depth = step.depth;
    classes = round_up(step.classes, L);
    taps = round_up(9 * step.layer[0].in, larger(L, A::kChannels));
    used_taps = round_up(9 * step.layer[0].in, A::kSplit ? taps : A::kTiles);  // matrix tiles take whole ones only
    // An image of one channel is not worth the transforms unless its products would be rounded; matrix tiles take a
    // convolution's taps as they are. And if weights have gradients, the open ReLUs decide derivatives, and no later
    // sum hides that tiles round three times as much as the sum of a few taps: then only the tangent runs on tiles, if
    // the taps are not rounded.
    const bool weights = step.form == Step::Form::gradient || step.form == Step::Form::tangent;
    const bool forward_only =
        (step.form == Step::Form::logits || step.form == Step::Form::features) && step.tape_use == Step::Tape::none;
    tiled_first = !A::kSplit && (kPrimalApart<A> || (step.layer[0].in > 1 && step.form != Step::Form::gradient));
    tiled_primal = tiled_first && (kPrimalApart<A> || !weights);
    tile_columns = round_up((step.layer[0].W + 3) / 4, larger(kTiledGroup, Registers<T>::lanes));
    phase = tile_columns + Registers<T>::lanes;
    int64_t operands = 0, values = 0, sums = 0, tapes = 0, exchanged = 0;
    tile_elements = padded_panel = positions = widest = input_elements = 0;
    chunk = step.chunk;
    // Rounding moves features little, and nothing is differentiated twice.
    primal_apart = kPrimalApart<A> && step.form != Step::Form::features && step.form != Step::Form::features_backward &&
                   !(step.form == Step::Form::tangent && step.tape_use == Step::Tape::read);
    for (int64_t l = 0; l < depth; ++l) {
      const Step::Layer& from = step.layer[l];
      LayerLayout& to = layer[l];
      to.H = from.H, to.W = from.W, to.OH = from.OH, to.OW = from.OW, to.padding = from.padding;
      to.in = l == 0 ? taps : round_up(from.in, A::kChannels);
      to.out = round_up(from.out, A::kChannels);
      to.in_row = to.in + 64 / sizeof(Operand), to.out_row = to.out + 64 / sizeof(Operand);
      to.in_groups = to.in / L, to.out_groups = to.out / L;
      to.rows = (to.H + 3) / 4, to.columns = (to.W + 3) / 4, to.tiles = to.rows * to.columns;
      const int64_t points = l == 0 ? 1 : Winograd::kPoints, weights = points * to.in * to.out;
      to.filter = operands, to.filter_t = operands + weights, operands += 2 * weights;
      to.filter_rest = operands, operands += A::kSplit ? weights : 0;
      to.filter_primal = operands, operands += l > 0 && primal_apart ? weights * kPrimalSize : 0;
      to.norm_size = step.norm == Step::Norm::layer ? to.H * to.W * to.out : to.out;
      to.norm = values, values += 2 * to.norm_size;
      to.bias = values, values += step.fused() ? 0 : to.out;
      to.tiled_filter = values, values += l == 0 && tiled_first ? Winograd::kPoints * from.in * to.out : 0;
      to.sum = sums, sums += weights;
      to.sum_norm = sums, sums += 2 * to.norm_size;
      to.sum_bias = sums, sums += step.fused() ? 0 : to.out;
      const int64_t out_plane = to.OH * to.OW * to.out;
      to.pooled = tapes, tapes += out_plane;
      to.grad_pooled = tapes, tapes += forward_only ? 0 : out_plane;
      to.statistics = tapes, tapes += step.fused() ? 0 : 2 * to.out;
      to.means = exchanged, to.means_t = exchanged + 2 * to.out, to.sums = exchanged + 5 * to.out;
      exchanged += step.over_batch() ? 9 * to.out : 0;
      widest = larger(widest, to.out);
      to.conv = tapes;
      to.chunk = step.chunk;
      if (l > 0) {
        tapes += to.H * to.W * to.out;
        // If every layer is a separate pass, later ones take more images at a time: as many tiles as the second.
        const int64_t slot = (step.N + step.slots - 1) / step.slots;
        if (step.over_batch()) to.chunk = smaller(slot, larger(step.chunk, step.chunk * layer[1].tiles / to.tiles));
        chunk = larger(chunk, to.chunk);
        const int64_t tiles = round_up(to.chunk * to.tiles, A::kTiles), gap = 64 / sizeof(Operand);
        tile_elements = larger(tile_elements, Winograd::kPoints * (tiles * larger(to.in_row, to.out_row) + gap));
        // Otherwise the backward pass reuses those of the forward pass.
        const int64_t inputs = Winograd::kPoints * (tiles * to.in_row + gap);
        to.input = step.over_batch() ? 0 : input_elements;
        input_elements = larger(input_elements, to.input + round_up(inputs, 64));
        padded_panel = larger(padded_panel, (4 * to.rows + 2) * (4 * to.columns + 2));
      }
      positions = larger(positions, to.H * to.W);
    }
    backwards = step.form != Step::Form::logits && step.form != Step::Form::features;
    to_images = backwards && step.form != Step::Form::gradient;
    const int64_t planes = step.chunk * first_stride() * layer[0].out * (step.form == Step::Form::tangent ? 2 : 1);
    const bool taped = step.form == Step::Form::features_backward && step.tape_use == Step::Tape::read;
    keeps_first = !step.fused() || (backwards && !taped && planes * static_cast<int64_t>(sizeof(T)) <= kKept);
    features = layer[depth - 1].OH * layer[depth - 1].OW * layer[depth - 1].out;
    head = values, head_t = values + features * classes, head_bias = values + 2 * features * classes;
    values += 2 * features * classes + classes;
    head_begin = round_up(operands * sizeof(Operand), 64);
    filters = head_begin + round_up(values * sizeof(T), 64);
    sum_head = sums, sum_head_bias = sums + features * classes;
    partials = (sum_head_bias + classes) * sizeof(T);
    logits_grad = tapes;
    tape = (tapes + classes) * sizeof(T);
    stored = step.fused() ? tapes * sizeof(typename A::Stored) + classes * sizeof(T) : tape;
    exchange = exchanged * sizeof(T);
  }

  // Elements of the first layer's transformed input [rows][points][channels][tile_columns], and of its pixels by phase.
  int64_t first_tiles(const Step& step) const {
    return tiled_first ? layer[0].rows * Winograd::kPoints * step.layer[0].in * tile_columns : 0;
  }
  int64_t phases(const Step& step) const {
    return tiled_first ? step.layer[0].in * (4 * layer[0].rows + 2) * 4 * phase : 0;
  }
  int64_t first_stride() const { return round_up(layer[0].H * layer[0].W, A::kTiles); }  // of its panels
  // Of an image's columns; gathering writes one element beyond.
  int64_t columns() const { return round_up(first_stride() * taps + 1, 64); }
  const Operand* operands(const void* set) const { return static_cast<const Operand*>(set); }
  T* values(void* set) const { return reinterpret_cast<T*>(static_cast<char*>(set) + head_begin); }
  void* set(const Step& step, int64_t e, bool of_direction) const {
    const int64_t sets = step.form == Step::Form::tangent ? 2 : 1;
    return static_cast<char*>(step.filters) + (e * sets + of_direction) * filters;
  }
};

// Whether a tape that is handed on can be used in place.
template <class T, class A>
constexpr bool kTapeInPlace = sizeof(typename A::Stored) == sizeof(T);

// A thread's working memory, cut from one block of bytes; with a null block it only counts them.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class S>
  S* take(int64_t count) {
    S* const at = reinterpret_cast<S*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(S)), 64);
    return at;
  }
};

template <class T, class A>
struct Workspace {
  using Operand = typename A::Operand;
  T *tape, *tape_t;
  Vec<T>*padded, *x, *x_t, *y, *attention;
  Vec<T>*first, *first_t;                    // the first convolutions of a chunk, or of the panels in progress
  T *lanes, *combined;                       // of blocks in stages: sums of an image's channels; those of the batch
  Operand *input, *input_t, *grad, *grad_t;  // transformed tiles [points][tiles][channels]
  typename A::Primal::Operand* primal;       // an input's for the primal forward pass if it has another class
  T* product;
  // the first layer's: padded planes, [positions][taps], [positions][a bunch of panels]; _rest if factors are split
  Operand *image, *image_rest, *columns, *columns_rest, *rows, *rows_t;
  T *taps_grad, *phases, *tiles;  // the last two: its input by column modulo 4, and as transformed tiles

  Workspace(const Step& step, const Layout<T, A>& layout, Arena& arena) {
    const bool tangent = step.form == Step::Form::tangent;
    const int64_t positions = round_up(layout.positions, A::kTiles);
    const bool in_place =
        step.over_batch() || (step.tape_use != Step::Tape::none && (kTapeInPlace<T, A> || !step.fused()));
    tape = arena.take<T>(in_place ? 0 : step.chunk * layout.tape / sizeof(T));
    tape_t = arena.take<T>(tangent && !step.over_batch() ? step.chunk * layout.tape / sizeof(T) : 0);
    lanes = arena.take<T>(step.fused() ? 0 : layout.chunk * 4 * layout.widest);
    combined = arena.take<T>(step.fused() ? 0 : 6 * layout.widest);
    padded = arena.take<Vec<T>>(layout.padded_panel);
    const int64_t panels = layout.keeps_first ? step.chunk * layout.layer[0].out_groups * layout.first_stride()
                                              : Layout<T, A>::kBunch * positions;
    first = arena.take<Vec<T>>(panels);
    first_t = arena.take<Vec<T>>(tangent ? panels : 0);
    x = layout.keeps_first ? arena.take<Vec<T>>(positions) : first;
    x_t = layout.keeps_first && tangent ? arena.take<Vec<T>>(positions) : first_t;
    y = arena.take<Vec<T>>(positions);
    attention = arena.take<Vec<T>>(step.form == Step::Form::features ? layout.positions : 0);
    input = arena.take<Operand>(layout.input_elements);
    primal = arena.take<typename A::Primal::Operand>(layout.primal_apart ? layout.tile_elements : 0);
    grad = arena.take<Operand>(layout.tile_elements);
    input_t = arena.take<Operand>(tangent ? layout.input_elements : 0);
    grad_t = arena.take<Operand>(tangent ? layout.tile_elements : 0);
    product = arena.take<T>(layout.tile_elements);
    const int64_t edge = 2 * layout.layer[0].padding;
    const int64_t pixels = step.layer[0].in * (step.image_h + edge) * (step.image_w + edge) + 1;
    image = arena.take<Operand>(pixels);
    columns = arena.take<Operand>((layout.keeps_first ? step.chunk : 1) * layout.columns());
    image_rest = arena.take<Operand>(A::kSplit ? pixels : 0);
    columns_rest = arena.take<Operand>(A::kSplit ? layout.columns() : 0);
    rows = arena.take<Operand>(positions * Layout<T, A>::kBunch * Lanes<T>::count);
    rows_t = arena.take<Operand>(tangent ? positions * Layout<T, A>::kBunch * Lanes<T>::count : 0);
    taps_grad = arena.take<T>(layout.to_images ? positions * layout.taps : 0);
    phases = arena.take<T>(layout.phases(step));
    tiles = arena.take<T>(layout.first_tiles(step));
  }
};

}  // namespace
}  // namespace pydistill

// CPU body: see convnet_step.h for what is computed and in what order.
//
// Names: `conv` is a convolution's output before the norm, `pooled` a block's output; _t is the derivative along the
// direction, grad_ that of the loss, grad_..._t both. Panels are those of cpu_vocabulary.h; channel counts are padded
// to whole panels, and the padding stays zero all the way: its filters and affine parameters are.
#include "convnet_block.h"
#include "convnet_step.h"
#include "instance_norm_relu_avg_pool_panel.h"
#include "vocabulary/matrix_product.h"
#include "vocabulary/matrix_product_amx.h"
#include "vocabulary/winograd.h"

namespace pydistill {
namespace {

using Step = ConvNetStep;

PYDISTILL_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
PYDISTILL_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
PYDISTILL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

PYDISTILL_INLINE float exp_scalar(float v) { return __builtin_expf(v); }
PYDISTILL_INLINE double exp_scalar(double v) { return __builtin_exp(v); }
PYDISTILL_INLINE float log_scalar(float v) { return __builtin_logf(v); }
PYDISTILL_INLINE double log_scalar(double v) { return __builtin_log(v); }

// The factors of the convolutions' products as they are computed in: T itself, or rounded to bfloat16 but kept in T.
//
// Rounded factors cost a linear map little, but a unit that falls on the ReLU's other side changes every derivative by
// a term of its own size: the cosine of a step's image gradient to that in float32 is 0.990 where the products that
// decide this, those of the primal forward pass, are rounded too, else 0.9998. So that pass has an operand class of its
// own, Primal, which rounds nothing; or, on matrix tiles, it takes each factor as a sum of two operands: value value +
// rest value + value rest is right to 16 bits, at three products of the dozen that a step has.
template <bool FIRST, class A, class B>
struct Choose {
  using Type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using Type = B;
};

template <class A>
constexpr bool kPrimalApart = !__is_same(A, typename A::Primal);

template <class T, bool ROUNDED>
struct Native {
  using Operand = T;
  static constexpr int64_t kChannels = Lanes<T>::count;    // channel counts are padded to multiples of this
  static constexpr int64_t kTiles = 1;                     // and rows of a product to multiples of this
  static constexpr bool kSplit = false;                    // the primal forward pass has sums of two operands
  using Primal = Native<T, false>;                         // what it is computed in
  using Stored = typename Choose<ROUNDED, Bf16, T>::Type;  // what steps keep of activations, one to another

  PYDISTILL_INLINE static Operand narrow_one(T v) {
    if constexpr (ROUNDED) {
      Bf16 half;
      narrow(v, half);
      return widen(half);
    }
    return v;
  }
  template <class V>
  PYDISTILL_INLINE static void put(Operand* to, V v) {  // one register or some
    Register<T> part[sizeof(V) / sizeof(Register<T>)];
    __builtin_memcpy(part, &v, sizeof(V));
    if constexpr (ROUNDED)
      for (Register<T>& p : part) p = rounded_to_bf16(p);
    __builtin_memcpy(to, part, sizeof(V));
  }
  PYDISTILL_INLINE static void keep(Stored* to, Vec<T> v) { store_narrowed<T>(to, v); }
  // Rows d and d + 1 of vector v of a right factor [depth][vectors].
  PYDISTILL_INLINE static void pack(Operand* to, int64_t d, int64_t v, int64_t depth, int64_t vectors, Vec<T> even,
                                    Vec<T> odd) {
    put(to + packed_offset<T>(d, v, depth, vectors), even);
    if (d + 1 < depth) put(to + packed_offset<T>(d + 1, v, depth, vectors), odd);
  }
  // out (+)= the sum of left right, left [rows][depth] with its rows `left_row` apart, right packed
  static void product(int64_t rows, int64_t depth, int64_t vectors, const Factors<T>* factors, int terms,
                      int64_t left_row, Product<T> out) {
    for (int i = 0; i < terms; ++i, out.add = true)
      multiply<T>(rows, depth, vectors, {factors[i].left, left_row, 1}, {factors[i].right, 0, 0, true}, out);
  }
  // out (+)= the sum of left^T right, left [depth][rows], right [depth][vectors], rows of both `..._row` apart
  static void outer(int64_t rows, int64_t depth, int64_t vectors, const Factors<T>* factors, int terms,
                    int64_t left_row, int64_t right_row, Product<T> out) {
    for (int i = 0; i < terms; ++i, out.add = true)
      multiply<T>(rows, depth, vectors, {factors[i].left, 1, left_row},
                  {factors[i].right, right_row, Lanes<T>::count, false}, out);
  }
};

// Sizes and offsets of one layer. Offsets are in elements of what they point into.
struct LayerLayout {
  int64_t in, out, in_groups, out_groups;  // padded channels, panels
  int64_t H, W, OH, OW, padding;
  int64_t in_row, out_row;                // of transformed tiles: a power of two would crowd few cache sets
  int64_t rows, columns, tiles;           // of Winograd tiles
  int64_t filter, filter_t, filter_rest;  // packed [in][out] and [out][in], per point; first layer: [taps][out]
  int64_t filter_primal;                  // that of the primal forward pass where it has another class
  int64_t norm, norm_size;                // weight, bias, each [out], of layer norm [panels][positions][L]
  int64_t bias;                           // the convolution's [out], where the norm does not subtract it
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
  static constexpr int64_t kTiledGroup = 4;  // tiles of the first layer whose products are at work at a time
  static constexpr int64_t kBunch = 2;       // panels of the first layer that are at work at a time
  static constexpr int64_t kKept = 1 << 20;  // bytes that leave room for the rest in a second-level cache
  using Operand = typename A::Operand;
  static constexpr int64_t kPrimalSize = sizeof(typename A::Primal::Operand) / sizeof(Operand);

  int64_t depth, taps, used_taps, classes, features;  // padded, but for used_taps: those that products run over
  LayerLayout layer[Step::kMaxDepth];
  int64_t head, head_t, head_bias;  // packed [features][classes], [classes][features], [classes], in T
  int64_t head_begin, filters;      // bytes: where T begins in a filter set, and all of it
  int64_t sum_head, sum_head_bias, partials;
  int64_t logits_grad, tape, stored;                      // bytes of an image's tape at work, and as it is kept
  int64_t exchange, widest;                               // bytes of a slot's; the most channels of a layer
  int64_t tile_elements, padded_panel, positions, chunk;  // the largest over layers
  int64_t input_elements;                                 // of the input's tiles of all layers
  bool backwards, to_images;       // whether the form has a pass backwards, and takes it to the images
  bool tiled_first, tiled_primal;  // the first convolution, or its primal pass, runs on Winograd tiles
  int64_t phase,
      tile_columns;   // of its input: a row's pixels by column modulo 4, and tiles of a row, in whole registers
  bool primal_apart;  // there is a primal forward pass, in another operand class than the rest
  bool keeps_first;   // a chunk's columns and first convolutions stay in cache from the forward to the backward pass

  explicit Layout(const Step& step) {
    depth = step.depth;
    classes = round_up(step.classes, L);
    taps = round_up(9 * step.layer[0].in, larger(L, A::kChannels));
    used_taps = round_up(9 * step.layer[0].in, A::kSplit ? taps : A::kTiles);  // matrix tiles take whole ones only
    // An image of one channel is not worth the transforms but where its products would be rounded; matrix tiles take a
    // convolution's taps as they are. And where weights have gradients, which ReLUs are open decides derivatives, and
    // no later sum hides that tiles round three times as much as the sum of a few taps does: there only the tangent
    // runs on them, if the taps are not rounded.
    const bool weights = step.form == Step::Form::gradient || step.form == Step::Form::tangent;
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
      to.grad_pooled = tapes, tapes += out_plane;
      to.statistics = tapes, tapes += step.fused() ? 0 : 2 * to.out;
      to.means = exchanged, to.means_t = exchanged + 2 * to.out, to.sums = exchanged + 5 * to.out;
      exchanged += step.over_batch() ? 9 * to.out : 0;
      widest = larger(widest, to.out);
      to.conv = tapes;
      to.chunk = step.chunk;
      if (l > 0) {
        tapes += to.H * to.W * to.out;
        // Where every layer is a pass of its own, later ones take more images at a time: as many tiles as the second.
        const int64_t slot = (step.N + step.slots - 1) / step.slots;
        if (step.over_batch()) to.chunk = smaller(slot, larger(step.chunk, step.chunk * layer[1].tiles / to.tiles));
        chunk = larger(chunk, to.chunk);
        const int64_t tiles = round_up(to.chunk * to.tiles, A::kTiles), gap = 64 / sizeof(Operand);
        tile_elements = larger(tile_elements, Winograd::kPoints * (tiles * larger(to.in_row, to.out_row) + gap));
        // Else the backward pass finds those of the forward pass.
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

// Whether a tape that is handed on can be worked in.
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
  Vec<T>*first, *first_t;                    // the first convolutions of a chunk, or of the panels at work
  T *lanes, *combined;                       // of blocks in stages: sums of an image's channels; those of the batch
  Operand *input, *input_t, *grad, *grad_t;  // transformed tiles [points][tiles][channels]
  typename A::Primal::Operand* primal;       // an input's for the primal forward pass where it has another class
  T* product;
  // the first layer's: padded planes, [positions][taps], [positions][a bunch of panels]; _rest where factors are split
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

// Takes the images of one slot through the network, a chunk at a time, adding to the slot's sums.
template <class T, class A>
class Slot {
 protected:
  using V = Vec<T>;
  using R = Register<T>;
  using Operand = typename A::Operand;
  static constexpr int L = Lanes<T>::count, kParts = Wide<T>::parts, kLanes = Registers<T>::lanes;

 public:
  Slot(const Step& step, int64_t e, int64_t slot, void* scratch)
      : step(step), layout(step), arena{static_cast<char*>(scratch)}, work(step, layout, arena), e(e) {
    filters = layout.set(step, e, false);
    filters_t = layout.set(step, e, true);
    tape_t = work.tape_t;
    if (step.grad != nullptr)
      sums = reinterpret_cast<T*>(static_cast<char*>(step.partials) + (e * step.slots + slot) * layout.partials);
    scale = step.scale != nullptr ? static_cast<const T*>(step.scale)[e] : T(1);
    split = A::kSplit && step.form != Step::Form::features && step.form != Step::Form::features_backward;
    begin = step.N * slot / step.slots;
    end = step.N * (slot + 1) / step.slots;
  }

  void run() {
    if (sums != nullptr)
      for (int64_t l = 0; l < layout.depth; ++l) fill(sums + layout.layer[l].sum_norm, 2 * layout.layer[l].out);
    for (first = begin; first < end; first += count) {
      count = smaller(step.chunk, end - first);
      fresh = first == begin;
      tape = work.tape;
      if (kTapeInPlace<T, A> && step.tape_use != Step::Tape::none) tape = reinterpret_cast<T*>(kept_tape(0));
      if (step.form != Step::Form::tangent) {
        if (step.tape_use != Step::Tape::read)
          forward();
        else if (!kTapeInPlace<T, A>)
          take_tape();
        if (step.form == Step::Form::gradient) backward(true);
        if (step.form == Step::Form::features_backward) features_backward();
        if (!kTapeInPlace<T, A> && step.tape_use == Step::Tape::write) keep_tape();
      } else {
        if (step.tape_use != Step::Tape::read) {
          forward();
          backward(false);
        } else if (!kTapeInPlace<T, A>) {
          take_tape();
        }
        tangent_forward();
        tangent_backward();
      }
    }
    if (begin == end && sums != nullptr) fill(sums, layout.partials / sizeof(T));
  }

 protected:
  const Step& step;
  const Layout<T, A> layout;
  Arena arena;
  Workspace<T, A> work;
  int64_t e, begin, end, first = 0, count = 0;
  T scale;
  bool split;         // the primal forward pass takes its factors as sums of two operands
  bool fresh = true;  // the slot's first chunk overwrites its sums
  void *filters, *filters_t;
  Operand* columns = nullptr;                             // of the first layer's input, for the image at work
  T *sums = nullptr, *tape = nullptr, *tape_t = nullptr;  // no sums where step.grad is absent

  static void fill(T* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = 0;
  }
  static void fill(V* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = V{};
  }

  // Image g of the chunk's part of the tape that steps hand on; there and back again.
  char* kept_tape(int64_t g) const { return static_cast<char*>(step.tape) + (e * step.N + first + g) * layout.stored; }
  void keep_tape() const {
    for (int64_t g = 0; g < count; ++g) {
      auto* to = reinterpret_cast<typename A::Stored*>(kept_tape(g));
      for (int64_t i = 0; i < layout.logits_grad; i += L) A::keep(to + i, load(at(tape, g, i)));
      T* const logits = reinterpret_cast<T*>(to + layout.logits_grad);
      for (int64_t k = 0; k < layout.classes; ++k) logits[k] = at(tape, g, layout.logits_grad)[k];
    }
  }
  void take_tape() const {
    for (int64_t g = 0; g < count; ++g) {
      const auto* from = reinterpret_cast<const typename A::Stored*>(kept_tape(g));
      for (int64_t i = 0; i < layout.logits_grad; i += L) store(at(tape, g, i), load_widened<T>(from + i));
      const T* const logits = reinterpret_cast<const T*>(from + layout.logits_grad);
      for (int64_t k = 0; k < layout.classes; ++k) at(tape, g, layout.logits_grad)[k] = logits[k];
    }
  }

  // Image g of the chunk's part of a tape, and panel `group` of a plane there.
  T* at(T* in, int64_t g, int64_t offset) const { return in + g * (layout.tape / sizeof(T)) + offset; }
  V* panel(T* in, int64_t g, int64_t offset, int64_t group, int64_t plane) const {
    return reinterpret_cast<V*>(at(in, g, offset) + group * plane * L);
  }
  const Operand* filter(const void* set, int64_t offset) const { return layout.operands(set) + offset; }
  const T* value(void* set, int64_t offset) const { return layout.values(set) + offset; }

  Affine<T> affine(const LayerLayout& at, int64_t group, bool tangent) const {
    Affine<T> out;
    out.g = load(value(filters, at.norm) + group * L), out.b = load(value(filters, at.norm + at.out) + group * L);
    if (tangent) {
      out.g_t = load(value(filters_t, at.norm) + group * L);
      out.b_t = load(value(filters_t, at.norm + at.out) + group * L);
    }
    return out;
  }
  void add_norm(const LayerLayout& at, int64_t group, const AffineGradient<T>& grad) {
    if (sums == nullptr) return;
    T* const g = sums + at.sum_norm + group * L;
    T* const b = g + at.out;
    store(g, load(g) + grad.g);
    store(b, load(b) + grad.b);
  }

  // ---- Winograd tiles

  // A block's pooled output, as the next layer's transformed input tiles.
  template <class B = A>
  __attribute__((noinline)) void transform_input(int64_t l, T* from, typename B::Operand* to,
                                                 typename B::Operand* rest = nullptr) {
    const LayerLayout& at = layout.layer[l];
    const LayerLayout& before = layout.layer[l - 1];
    const int64_t width = 4 * at.columns + 2, plane_size = tile_plane<typename B::Operand>(at, at.in_row);
    fill(work.padded, (4 * at.rows + 2) * width);
    for (int64_t g = 0; g < count; ++g)
      for (int64_t group = 0; group < at.in_groups; ++group) {
        const V* plane = panel(from, g, before.pooled, group, at.H * at.W);
        for (int64_t h = 0; h < at.H; ++h)
          for (int64_t w = 0; w < at.W; ++w) work.padded[(h + 1) * width + w + 1] = plane[h * at.W + w];
        for (int64_t row = 0; row < at.rows; ++row)
          for (int64_t column = 0; column < at.columns; ++column)
            for (int part = 0; part < kParts; ++part) {
              R x[6][6], v[6][6];
              const Wide<T>* corner = wide<T>(work.padded) + 4 * row * width + 4 * column;
#pragma GCC unroll 6
              for (int i = 0; i < 6; ++i)
#pragma GCC unroll 6
                for (int j = 0; j < 6; ++j) x[i][j] = corner[i * width + j].part[part];
              both_ways<T, 6, 6>(Winograd::input<T>, x, v);
              const int64_t lane = group * L + part * kLanes;
              typename B::Operand* out = to + (g * at.tiles + row * at.columns + column) * at.in_row + lane;
#pragma GCC unroll 36
              for (int p = 0; p < 36; ++p) B::put(out + p * plane_size, v[p / 6][p % 6]);
              if constexpr (B::kSplit)
                if (rest != nullptr)
#pragma GCC unroll 36
                  for (int p = 0; p < 36; ++p)
                    B::put(rest + (out - to) + p * plane_size, v[p / 6][p % 6] - B::widened(out + p * plane_size));
            }
      }
    clear_rest<B>(at, to, at.in_row);
    if (B::kSplit && rest != nullptr) clear_rest<B>(at, rest, at.in_row);
  }

  // The gradient of a convolution's output, transformed by the adjoint of the output transform.
  __attribute__((noinline)) void transform_grad(const LayerLayout& at, V* plane, int64_t g, int64_t group,
                                                Operand* to) {
    const int64_t plane_size = tile_plane<Operand>(at, at.out_row);
    for (int64_t row = 0; row < at.rows; ++row)
      for (int64_t column = 0; column < at.columns; ++column)
        for (int part = 0; part < kParts; ++part) {
          R y[4][4], m[6][6];
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
              const int64_t h = 4 * row + i, w = 4 * column + j;
              y[i][j] = h < at.H && w < at.W ? wide<T>(plane)[h * at.W + w].part[part] : R{};
            }
          both_ways<T, 4, 6>(Winograd::output_adjoint<T>, y, m);
          const int64_t lane = group * L + part * kLanes;
          Operand* out = to + (g * at.tiles + row * at.columns + column) * at.out_row + lane;
#pragma GCC unroll 36
          for (int p = 0; p < 36; ++p) A::put(out + p * plane_size, m[p / 6][p % 6]);
        }
  }

  // Products' tiles back to a convolution's output.
  __attribute__((noinline)) void transform_output(const LayerLayout& at, int64_t g, int64_t group, V* plane) const {
    const int64_t plane_size = tile_plane<T>(at, at.out);
    for (int64_t row = 0; row < at.rows; ++row)
      for (int64_t column = 0; column < at.columns; ++column)
        for (int part = 0; part < kParts; ++part) {
          R m[6][6], y[4][4];
          const int64_t lane = group * L + part * kLanes;
          const T* in = work.product + (g * at.tiles + row * at.columns + column) * at.out + lane;
#pragma GCC unroll 36
          for (int p = 0; p < 36; ++p) m[p / 6][p % 6] = load_register<T>(in + p * plane_size);
          both_ways<T, 6, 4>(Winograd::output<T>, m, y);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
              const int64_t h = 4 * row + i, w = 4 * column + j;
              if (h < at.H && w < at.W) wide<T>(plane)[h * at.W + w].part[part] = y[i][j];
            }
        }
  }

  // Products' tiles back to the gradient of the previous block's pooled output, overlaps added.
  __attribute__((noinline)) void transform_input_adjoint(int64_t l, T* to) {
    const LayerLayout& at = layout.layer[l];
    const int64_t width = 4 * at.columns + 2, plane_size = tile_plane<T>(at, at.in);
    for (int64_t g = 0; g < count; ++g)
      for (int64_t group = 0; group < at.in_groups; ++group) {
        fill(work.padded, (4 * at.rows + 2) * width);
        for (int64_t row = 0; row < at.rows; ++row)
          for (int64_t column = 0; column < at.columns; ++column)
            for (int part = 0; part < kParts; ++part) {
              R v[6][6], x[6][6];
              const int64_t lane = group * L + part * kLanes;
              const T* in = work.product + (g * at.tiles + row * at.columns + column) * at.in + lane;
#pragma GCC unroll 36
              for (int p = 0; p < 36; ++p) v[p / 6][p % 6] = load_register<T>(in + p * plane_size);
              both_ways<T, 6, 6>(Winograd::input_adjoint<T>, v, x);
              Wide<T>* corner = wide<T>(work.padded) + 4 * row * width + 4 * column;
#pragma GCC unroll 6
              for (int i = 0; i < 6; ++i)
#pragma GCC unroll 6
                for (int j = 0; j < 6; ++j) corner[i * width + j].part[part] += x[i][j];
            }
        V* plane = panel(to, g, layout.layer[l - 1].grad_pooled, group, at.H * at.W);
        for (int64_t h = 0; h < at.H; ++h)
          for (int64_t w = 0; w < at.W; ++w) plane[h * at.W + w] = work.padded[(h + 1) * width + w + 1];
      }
  }

  int64_t padded_tiles(const LayerLayout& at) const { return round_up(count * at.tiles, A::kTiles); }

  // From one point's tiles to the next one's, in elements of S: a cache line more than they take, or a tile's 36 points
  // would all fall into one set of the first-level cache.
  template <class S>
  int64_t tile_plane(const LayerLayout& at, int64_t row) const {
    return padded_tiles(at) * row + 64 / static_cast<int64_t>(sizeof(S));
  }

  // Tiles that only fill up a product's rows hold zeros: sums over tiles run over them.
  template <class B = A>
  void clear_rest(const LayerLayout& at, typename B::Operand* tiles, int64_t row) const {
    const int64_t all = padded_tiles(at), used = count * at.tiles;
    if (used < all)
      for (int p = 0; p < 36; ++p)
        for (int64_t i = used * row; i < all * row; ++i) tiles[p * tile_plane<typename B::Operand>(at, row) + i] = {};
  }

  // product = the sum of inputs filters, for every point
  template <class B = A, int N>
  void multiply_inputs(const LayerLayout& at, const Factors<typename B::Operand> (&factors)[N]) {
    multiply_tiles<B>(at, factors, at.in_row, at.in, at.out);
  }

  // product = the sum of gradients filters^T
  template <int N>
  void multiply_grads(const LayerLayout& at, const Factors<Operand> (&factors)[N]) {
    multiply_tiles<A>(at, factors, at.out_row, at.out, at.in);
  }

  // A point's terms one after the other: its sums stay in cache.
  template <class B, int N>
  void multiply_tiles(const LayerLayout& at, const Factors<typename B::Operand> (&factors)[N], int64_t row,
                      int64_t from, int64_t to) {
    for (int p = 0; p < 36; ++p)
      B::product(count * at.tiles, from, to / L,
                 of_point(factors, p * tile_plane<typename B::Operand>(at, row), p * from * to).terms, N, row,
                 {work.product + p * tile_plane<T>(at, to), to, L, false});
  }

  // the slot's sums (+)= the sum of inputs^T gradients, for every point
  template <int N>
  void add_outer(const LayerLayout& at, const Factors<Operand> (&factors)[N]) {
    for (int p = 0; p < 36; ++p)
      A::outer(at.in, padded_tiles(at), at.out_groups,
               of_point(factors, p * tile_plane<Operand>(at, at.in_row), p * tile_plane<Operand>(at, at.out_row)).terms,
               N, at.in_row, at.out_row, {sums + at.sum + p * at.in * at.out, at.out, L, !fresh});
  }

  template <class S, int N>
  struct Terms {
    Factors<S> terms[N];
  };
  template <class S, int N>
  static Terms<S, N> of_point(const Factors<S> (&factors)[N], int64_t left, int64_t right) {
    Terms<S, N> at;
    for (int i = 0; i < N; ++i) at.terms[i] = {factors[i].left + left, factors[i].right + right};
    return at;
  }

  // ---- the first layer: its output from tiles where that pays and may be, all else from its input's columns

  // Readies the first layer's input for image g of the chunk: the forward pass gathers it, and the backward pass again
  // where it is not kept. Features need no columns beside the tiles.
  void use_input(int64_t g, bool forward) {
    columns = work.columns + (layout.keeps_first ? g * layout.columns() : 0);
    if (!forward && layout.keeps_first) return;
    if (layout.tiled_first) gather_tiles(first + g);
    const bool sums_taps = step.form == Step::Form::gradient || step.form == Step::Form::tangent;
    if (!layout.tiled_first || sums_taps) gather_columns(first + g);
  }

  // A row's pixels lie apart by their column modulo 4, so that a register takes the same pixel of tiles side by side.
  __attribute__((noinline)) void gather_tiles(int64_t n) {
    const LayerLayout& at = layout.layer[0];
    const int64_t C = step.layer[0].in, H = step.image_h, W = step.image_w, edge = at.padding;
    const int64_t row = 4 * layout.phase, plane = (4 * at.rows + 2) * row, lanes = Registers<T>::lanes;
    const T* image = static_cast<const T*>(step.images) + e * step.images_student + n * C * H * W;
    fill(work.phases, C * plane);
    for (int64_t c = 0; c < C; ++c)
      for (int64_t h = 0; h < H; ++h)
        for (int64_t w = 0; w < W; ++w)
          work.phases[c * plane + (h + edge) * row + (w + edge) % 4 * layout.phase + (w + edge) / 4] =
              image[(c * H + h) * W + w];
    for (int64_t r = 0; r < at.rows; ++r)
      for (int64_t c = 0; c < C; ++c)
        for (int64_t tile = 0; tile < layout.tile_columns; tile += lanes) {
          R x[6][6], v[6][6];
          const T* from = work.phases + c * plane + 4 * r * row + tile;
#pragma GCC unroll 6
          for (int i = 0; i < 6; ++i)
#pragma GCC unroll 6
            for (int j = 0; j < 6; ++j) x[i][j] = load_register<T>(from + i * row + j % 4 * layout.phase + j / 4);
          both_ways<T, 6, 6>(Winograd::input<T>, x, v);
          T* to = work.tiles + (r * Winograd::kPoints * C + c) * layout.tile_columns + tile;
#pragma GCC unroll 36
          for (int p = 0; p < 36; ++p)
            *reinterpret_cast<typename Registers<T>::Unaligned*>(to + p * C * layout.tile_columns) = v[p / 6][p % 6];
        }
  }

  // The first convolution's output for one panel, from the image's tiles.
  __attribute__((noinline)) void tiled_product(const T* filters, V* to) const {
    const LayerLayout& at = layout.layer[0];
    constexpr int64_t group = Layout<T, A>::kTiledGroup;
    const int64_t C = step.layer[0].in, columns = layout.tile_columns;
    alignas(64) Wide<T> products[group][Winograd::kPoints];
    for (int64_t r = 0; r < at.rows; ++r)
      for (int64_t tile = 0; tile < at.columns; tile += group) {
        const T* tiles = work.tiles + r * Winograd::kPoints * C * columns + tile;
        const T* filter = filters;
        for (int p = 0; p < 36; ++p) {
          Wide<T> sum[group] = {};
          for (int64_t c = 0; c < C; ++c, tiles += columns, filter += L)
            for (int part = 0; part < kParts; ++part) {
              const R weight = load_register<T>(filter + part * kLanes);
              for (int i = 0; i < group; ++i)
                sum[i].part[part] = multiply_add(splat(tiles + i), weight, sum[i].part[part]);
            }
          for (int i = 0; i < group; ++i) products[i][p] = sum[i];
        }
        for (int64_t i = 0; i < smaller(group, at.columns - tile); ++i)
          for (int part = 0; part < kParts; ++part) {
            R m[6][6], y[4][4];
#pragma GCC unroll 36
            for (int p = 0; p < 36; ++p) m[p / 6][p % 6] = products[i][p].part[part];
            both_ways<T, 6, 4>(Winograd::output<T>, m, y);
#pragma GCC unroll 4
            for (int a = 0; a < 4; ++a)
#pragma GCC unroll 4
              for (int b = 0; b < 4; ++b) {
                const int64_t h = 4 * r + a, w = 4 * (tile + i) + b;
                if (h < at.H && w < at.W) wide<T>(to)[h * at.W + w].part[part] = y[a][b];
              }
          }
      }
  }

  __attribute__((noinline)) void gather_columns(int64_t n) {
    const LayerLayout& at = layout.layer[0];
    const int64_t C = step.layer[0].in, H = step.image_h, W = step.image_w, edge = at.padding;
    const int64_t width = W + 2 * edge, plane = (H + 2 * edge) * width;
    const T* image = static_cast<const T*>(step.images) + e * step.images_student + n * C * H * W;
    for (int64_t i = 0; i < C * plane; ++i) work.image[i] = Operand{};
    if (split)
      for (int64_t i = 0; i < C * plane; ++i) work.image_rest[i] = Operand{};
    for (int64_t c = 0; c < C; ++c)
      for (int64_t h = 0; h < H; ++h)
        for (int64_t w = 0; w < W; ++w) {
          const T value = image[(c * H + h) * W + w];
          const int64_t to = c * plane + (h + edge) * width + w + edge;
          work.image[to] = A::narrow_one(value);
          if (split) work.image_rest[to] = A::narrow_one(value - widen(work.image[to]));
        }
    fill_columns(work.image, columns);
    if (split) fill_columns(work.image_rest, work.columns_rest);
  }

  void fill_columns(const Operand* image, Operand* columns) const {
    const LayerLayout& at = layout.layer[0];
    const int64_t C = step.layer[0].in, edge = at.padding, positions = at.H * at.W;
    const int64_t width = step.image_w + 2 * edge, plane = (step.image_h + 2 * edge) * width;
    for (int64_t h = 0; h < at.H; ++h)
      for (int64_t w = 0; w < at.W; ++w) {
        Operand* to = columns + (h * at.W + w) * layout.taps;
        for (int64_t c = 0; c < C; ++c)
          for (int i = 0; i < 3; ++i, to += 3)  // four at once, of which the next three overwrite the last
            __builtin_memcpy(to, image + c * plane + (h + i) * width + w, 4 * sizeof(Operand));
        for (int64_t t = 9 * C; t < layout.used_taps; ++t) *to++ = Operand{};
      }
    for (int64_t i = positions * layout.taps; i < round_up(positions, A::kTiles) * layout.taps; ++i)
      columns[i] = Operand{};
  }

  __attribute__((noinline)) void scatter_taps(int64_t n) const {
    const LayerLayout& at = layout.layer[0];
    const int64_t C = step.layer[0].in, H = step.image_h, W = step.image_w;
    T* image = static_cast<T*>(step.images_grad) + (e * step.N + n) * C * H * W;
    fill(image, C * H * W);
    for (int64_t h = 0; h < at.H; ++h)  // outermost: a row's taps stay in the first-level cache
      for (int64_t c = 0; c < C; ++c)
        for (int i = 0; i < 3; ++i) {
          const int64_t y = h + i - at.padding;
          if (y < 0 || y >= H) continue;
          for (int j = 0; j < 3; ++j) {
            const int64_t from = larger(0, at.padding - j), to = smaller(at.W, W + at.padding - j);
            T* row = image + (c * H + y) * W + j - at.padding;
            const T* taps = work.taps_grad + h * at.W * layout.taps + c * 9 + i * 3 + j;
            for (int64_t w = from; w < to; ++w) row[w] += taps[w * layout.taps];
          }
        }
    for (int64_t i = 0; i < C * H * W; ++i) image[i] *= scale;
  }

  // The first convolution's output for the panels [group, group + panels), one after the other in `to`.
  void first_product(void* set, int64_t group, int64_t panels, V* to) {
    const LayerLayout& at = layout.layer[0];
    if (set == filters ? layout.tiled_primal : layout.tiled_first) {
      for (int64_t v = 0; v < panels; ++v)
        tiled_product(value(set, at.tiled_filter) + (group + v) * Winograd::kPoints * step.layer[0].in * L,
                      to + v * layout.first_stride());
      return;
    }
    const int64_t positions = at.H * at.W, offset = group * L * layout.taps;
    const Operand *const whole = filter(set, at.filter) + offset, *const rest = filter(set, at.filter_rest) + offset;
    const Factors<Operand> factors[] = {{columns, whole}, {work.columns_rest, whole}, {columns, rest}};
    A::product(positions, layout.used_taps, panels, factors, split && set == filters ? 3 : 1, layout.taps,
               {reinterpret_cast<T*>(to), L, round_up(positions, A::kTiles) * L, false});
  }

  // Panels side by side as rows [positions][panels * L].
  __attribute__((noinline)) void join_panels(const V* from, int64_t panels, Operand* to) const {
    const int64_t positions = layout.layer[0].H * layout.layer[0].W, all = round_up(positions, A::kTiles);
    for (int64_t i = 0; i < all; ++i)
      for (int64_t v = 0; v < panels; ++v) A::put(to + (i * panels + v) * L, i < positions ? from[v * all + i] : V{});
  }

  // Where image g's panels from `group` on lie in `all`.
  V* first_panels(V* all, int64_t g, int64_t group) const {
    return layout.keeps_first ? all + (g * layout.layer[0].out_groups + group) * layout.first_stride() : all;
  }

  template <class Visit>
  void for_bunches(Visit visit) {
    constexpr int64_t bunch = Layout<T, A>::kBunch;
    const int64_t groups = layout.layer[0].out_groups;
    for (int64_t group = 0; group < groups; group += bunch) visit(group, smaller(bunch, groups - group));
  }

  // ---- features

  bool attends(int64_t l) const { return step.features.attended >> l & 1; }

  // Where block l's maps begin in image g's rows.
  int64_t spatial_offset(int64_t l, int64_t g) const {
    int64_t at = (e * step.N + first + g) * step.features.spatial_row;
    for (int64_t k = 0; k < l; ++k) at += attends(k) ? layout.layer[k].H * layout.layer[k].W : 0;
    return at;
  }
  int64_t channel_offset(int64_t l, int64_t g) const {
    int64_t at = (e * step.N + first + g) * step.features.channel_row;
    for (int64_t k = 0; k < l; ++k) at += attends(k) ? step.layer[k].out : 0;
    return at;
  }

  // A block behind its convolution, and the maps of its attention: panels of an image come in order.
  void forward_panel(int64_t l, int64_t g, int64_t group, V* conv) {
    const LayerLayout& at = layout.layer[l];
    const Panels<T> panels = {conv, nullptr, nullptr, nullptr, panel(tape, g, at.pooled, group, at.OH * at.OW)};
    if (step.form != Step::Form::features || !attends(l)) {
      run_panel<T, Form::forward, true, true>(at.H, at.W, T(step.eps), affine(at, group, false), panels);
      return;
    }
    const Step::Features& to = step.features;
    Attention<T> attention;
    attention.power = T(to.power);
    attention.spatial = to.spatial != nullptr ? work.attention : nullptr;
    if (group == 0) fill(work.attention, at.H * at.W);
    run_panel<T, Form::forward, true, true, true>(at.H, at.W, T(step.eps), affine(at, group, false), panels,
                                                  &attention);
    if (to.channel != nullptr) {
      T* const out = static_cast<T*>(to.channel) + channel_offset(l, g) + group * L;
      for (int i = 0; i < L && group * L + i < step.layer[l].out; ++i) out[i] = attention.channel[i];
    }
    if (to.spatial != nullptr && group == at.out_groups - 1) {
      T* const out = static_cast<T*>(to.spatial) + spatial_offset(l, g);
      for (int64_t i = 0; i < at.H * at.W; ++i) out[i] = lane_sum(reinterpret_cast<const T*>(work.attention + i));
    }
  }

  // The gradient of a block's input to its norm, in x's place, from those of its pooled output and its maps.
  AffineGradient<T> backward_panel(int64_t l, int64_t g, int64_t group, V* x) {
    const LayerLayout& at = layout.layer[l];
    const Panels<T> panels = {x, nullptr, panel(tape, g, at.grad_pooled, group, at.OH * at.OW), nullptr, nullptr};
    if (step.form != Step::Form::features_backward || !attends(l))
      return run_panel<T, Form::backward, true, true>(at.H, at.W, T(step.eps), affine(at, group, false), panels);
    const Step::Features& from = step.features;
    Attention<T> attention;
    attention.power = T(from.power);
    if (from.spatial_grad != nullptr)
      attention.grad_spatial = static_cast<const T*>(from.spatial_grad) + spatial_offset(l, g);
    if (from.channel_grad != nullptr) {
      const T* const grad = static_cast<const T*>(from.channel_grad) + channel_offset(l, g) + group * L;
      for (int i = 0; i < L && group * L + i < step.layer[l].out; ++i) attention.grad_channel[i] = grad[i];
    }
    return run_panel<T, Form::backward, true, true, true>(at.H, at.W, T(step.eps), affine(at, group, false), panels,
                                                          &attention);
  }

  // Visits the chunk's embeddings, or their gradients, as visit(image of all students', feature, value in the tape).
  template <class Visit>
  void for_embedding(Visit visit) {
    const LayerLayout& at = layout.layer[layout.depth - 1];
    const bool of_grad = step.form == Step::Form::features_backward;
    const int64_t plane = at.OH * at.OW, channels = step.layer[layout.depth - 1].out;
    for (int64_t g = 0; g < count; ++g)
      for (int64_t group = 0; group < at.out_groups; ++group) {
        T* const values = reinterpret_cast<T*>(panel(tape, g, of_grad ? at.grad_pooled : at.pooled, group, plane));
        for (int i = 0; i < L && group * L + i < channels; ++i)
          for (int64_t p = 0; p < plane; ++p)
            visit(e * step.N + first + g, (group * L + i) * plane + p, values[p * L + i]);
      }
  }

  void embedding_backward() {
    const LayerLayout& at = layout.layer[layout.depth - 1];
    for (int64_t g = 0; g < count; ++g)  // padded channels have no gradient
      fill(panel(tape, g, at.grad_pooled, 0, 0), at.OH * at.OW * at.out_groups);
    if (step.features.embedding_grad != nullptr)
      for_embedding([&](int64_t n, int64_t f, T& value) {
        value = static_cast<const T*>(step.features.embedding_grad)[n * step.features.embedding_row + f];
      });
  }

  void features_backward() {
    embedding_backward();
    blocks_backward(false);
    const int64_t stride = layout.first_stride();
    for (int64_t g = 0; g < count; ++g) {
      use_input(g, false);
      for_bunches([&](int64_t group, int64_t panels) {
        V* const x = first_panels(work.first, g, group);
        if (!layout.keeps_first) first_product(filters, group, panels, x);
        for (int64_t v = 0; v < panels; ++v) backward_panel(0, g, group + v, x + v * stride);
        join_panels(x, panels, work.rows);
        first_adjoint(group, panels, work.rows, filters, group > 0);
      });
      scatter_taps(first + g);
    }
  }

  // ---- passes over the chunk

  // Whether the primal forward pass has left the tiles of its inputs for tangents.
  bool has_inputs() const { return !layout.primal_apart && step.tape_use != Step::Tape::read && !step.over_batch(); }

  // The products of a later layer's primal forward pass.
  void convolve_tiles(int64_t l) {
    const LayerLayout& at = layout.layer[l];
    Operand* const rest = split ? work.grad : nullptr;  // unused before the backward pass
    if (layout.primal_apart) {
      transform_input<typename A::Primal>(l, tape, work.primal);
      multiply_inputs<typename A::Primal>(
          at, {{work.primal, reinterpret_cast<const typename A::Primal::Operand*>(filter(filters, at.filter_primal))}});
    } else {
      Operand* const input = work.input + at.input;
      transform_input(l, tape, input, rest);
      if (split)
        multiply_inputs(at, {{input, filter(filters, at.filter)},
                             {rest, filter(filters, at.filter)},
                             {input, filter(filters, at.filter_rest)}});
      else
        multiply_inputs(at, {{input, filter(filters, at.filter)}});
    }
  }

  void forward() {
    const int64_t stride = layout.first_stride();
    for (int64_t g = 0; g < count; ++g) {
      use_input(g, true);
      for_bunches([&](int64_t group, int64_t panels) {
        V* const x = first_panels(work.first, g, group);
        first_product(filters, group, panels, x);
        for (int64_t v = 0; v < panels; ++v) forward_panel(0, g, group + v, x + v * stride);
      });
    }
    for (int64_t l = 1; l < layout.depth; ++l) {
      const LayerLayout& at = layout.layer[l];
      convolve_tiles(l);
      for (int64_t g = 0; g < count; ++g)
        for (int64_t group = 0; group < at.out_groups; ++group) {
          // The panel leaves its deviations from the mean behind; for all later purposes they are as good.
          V* conv = panel(tape, g, at.conv, group, at.H * at.W);
          transform_output(at, g, group, conv);
          forward_panel(l, g, group, conv);
        }
    }
    head_forward();
  }

  // From the last block's pooled output: the embedding, the logits, or the loss and its gradient in the logits.
  void head_forward() {
    if (step.form == Step::Form::features)
      return for_embedding([&](int64_t n, int64_t f, T& value) {
        static_cast<T*>(step.features.embedding)[n * step.features.embedding_row + f] = value;
      });
    if (step.form == Step::Form::features_backward) return;
    const int64_t row = layout.tape / sizeof(T);
    T* const logits = at(tape, 0, layout.logits_grad);
    multiply<T>(count, layout.features, layout.classes / L,
                {at(tape, 0, layout.layer[layout.depth - 1].pooled), row, 1}, {value(filters, layout.head), 0, 0, true},
                {logits, row, L, false});
    for (int64_t g = 0; g < count; ++g) {
      const T* bias = value(filters, layout.head_bias);
      for (int64_t k = 0; k < step.classes; ++k) logits[g * row + k] += bias[k];
      if (step.form == Step::Form::logits) {
        T* out = static_cast<T*>(step.logits) + (e * step.N + first + g) * step.classes;
        for (int64_t k = 0; k < step.classes; ++k) out[k] = logits[g * row + k];
      } else {
        cross_entropy(first + g, logits + g * row);
      }
    }
  }

  // The target's weight of class k, and the sum of all.
  T target(int64_t n, int64_t k, T high) const {
    if (step.kind == Step::Labels::hard)
      return static_cast<const int64_t*>(step.labels)[e * step.labels_student + n] == k ? T(1) : T(0);
    const T* row = static_cast<const T*>(step.labels) + e * step.labels_student + n * step.classes;
    return step.kind == Step::Labels::probs ? row[k] : exp_scalar(row[k] - high);
  }
  T target_scale(int64_t n) const {  // log-sum-exp of label logits
    if (step.kind != Step::Labels::logits) return 0;
    return log_sum_exp(static_cast<const T*>(step.labels) + e * step.labels_student + n * step.classes);
  }
  T log_sum_exp(const T* row) const {
    T high = row[0], sum = 0;
    for (int64_t k = 1; k < step.classes; ++k) high = row[k] > high ? row[k] : high;
    for (int64_t k = 0; k < step.classes; ++k) sum += exp_scalar(row[k] - high);
    return high + log_scalar(sum);
  }

  // Logits to the loss and, in their place, the gradient with respect to them; the row's padding becomes zero.
  __attribute__((noinline)) void cross_entropy(int64_t n, T* row) {
    const T high = target_scale(n), log_sum = log_sum_exp(row);
    T loss = 0, mass = 0;
    for (int64_t k = 0; k < step.classes; ++k) {
      const T t = target(n, k, high);
      mass += t;
      if (t != 0) loss -= t * (row[k] - log_sum);
    }
    for (int64_t k = 0; k < step.classes; ++k) {
      const T p = exp_scalar(row[k] - log_sum);
      row[k] = (mass * p - target(n, k, high)) / T(step.N);
    }
    for (int64_t k = step.classes; k < layout.classes; ++k) row[k] = 0;
    if (step.form == Step::Form::gradient) static_cast<T*>(step.losses)[e * step.N + n] = loss;
  }

  // From the logits' tangents to the tangent of their gradient, in their place; the loss's slope; the labels' gradient.
  // The gradient is (mass p - target) / N, from which mass p is had back.
  void cross_entropy_tangent(int64_t n, const T* grad, T* row_t) {
    const T high = target_scale(n), N = T(step.N);
    T slope = 0, mass = 0, mean = 0, target_mean = 0;
    for (int64_t k = 0; k < step.classes; ++k) {
      const T t = target(n, k, high);
      slope += grad[k] * row_t[k];
      mass += t;
      mean += (grad[k] * N + t) * row_t[k];
      target_mean += t * row_t[k];
    }
    static_cast<T*>(step.losses)[e * step.N + n] = slope * N;
    const T average = mass != 0 ? mean / mass : T(0);
    if (step.labels_grad != nullptr) {
      T* out = static_cast<T*>(step.labels_grad) + (e * step.N + n) * step.classes;
      for (int64_t k = 0; k < step.classes; ++k)
        out[k] = scale * (step.kind == Step::Labels::probs ? (average - row_t[k]) / N
                                                           : target(n, k, high) * (target_mean - row_t[k]) / N);
    }
    for (int64_t k = 0; k < step.classes; ++k) row_t[k] = (grad[k] * N + target(n, k, high)) * (row_t[k] - average) / N;
    for (int64_t k = step.classes; k < layout.classes; ++k) row_t[k] = 0;
  }

  void head_backward(T* grad_of, const T* logits_grad, void* set, bool add) {
    const int64_t row = layout.tape / sizeof(T);
    multiply<T>(count, step.classes, layout.features / L, {logits_grad, row, 1},
                {value(set, layout.head_t), 0, 0, true},
                {at(grad_of, 0, layout.layer[layout.depth - 1].grad_pooled), row, L, add});
  }

  void head_outer(T* features_of, const T* logits_grad, bool add) {
    const int64_t row = layout.tape / sizeof(T);
    multiply<T>(step.classes, count, layout.features / L, {logits_grad, 1, row},
                {at(features_of, 0, layout.layer[layout.depth - 1].pooled), row, L, false},
                {sums + layout.sum_head, layout.features, L, add});
  }

  void head_bias(const T* logits_grad) {
    T* const sum = sums + layout.sum_head_bias;
    for (int64_t k = 0; k < layout.classes; ++k) {
      T total = fresh ? T(0) : sum[k];
      for (int64_t g = 0; g < count; ++g) total += logits_grad[g * (layout.tape / sizeof(T)) + k];
      sum[k] = total;
    }
  }

  __attribute__((noinline)) static void copy(const V* from, V* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }

  void head_gradient(bool weights) {
    const T* const logits_grad = at(tape, 0, layout.logits_grad);
    head_backward(tape, logits_grad, filters, false);
    if (weights) {
      head_outer(tape, logits_grad, !fresh);
      head_bias(logits_grad);
    }
  }

  void backward(bool weights) {
    head_gradient(weights);
    blocks_backward(weights);
    if (weights) first_backward();
  }

  // From the gradient of the last block's pooled output to that of the first's.
  void blocks_backward(bool weights) {
    for (int64_t l = layout.depth - 1; l > 0; --l) {
      const LayerLayout& at = layout.layer[l];
      for (int64_t g = 0; g < count; ++g)
        for (int64_t group = 0; group < at.out_groups; ++group) {
          copy(panel(tape, g, at.conv, group, at.H * at.W), work.x, at.H * at.W);
          const auto grad = backward_panel(l, g, group, work.x);
          if (weights) add_norm(at, group, grad);
          transform_grad(at, work.x, g, group, work.grad);
        }
      clear_rest(at, work.grad, at.out_row);
      if (weights) {
        if (layout.primal_apart) transform_input(l, tape, work.input + at.input);
        add_outer(at, {{work.input + at.input, work.grad}});
      }
      multiply_grads(at, {{work.grad, filter(filters, at.filter_t)}});
      transform_input_adjoint(l, tape);
    }
  }

  // The first block's weights' gradient.
  void first_backward() {
    const LayerLayout& top = layout.layer[0];
    const int64_t stride = layout.first_stride();
    for (int64_t g = 0; g < count; ++g) {
      use_input(g, false);
      for_bunches([&](int64_t group, int64_t panels) {
        V* const x = first_panels(work.first, g, group);
        if (!layout.keeps_first) first_product(filters, group, panels, x);
        for (int64_t v = 0; v < panels; ++v) add_norm(top, group + v, backward_panel(0, g, group + v, x + v * stride));
        join_panels(x, panels, work.rows);
        first_outer(group, panels, work.rows, g);
      });
    }
  }

  void first_outer(int64_t group, int64_t panels, const Operand* rows, int64_t g) {
    const LayerLayout& top = layout.layer[0];
    const Factors<Operand> factors = {columns, rows};
    A::outer(layout.used_taps, round_up(top.H * top.W, A::kTiles), panels, &factors, 1, layout.taps, panels * L,
             {sums + top.sum + group * L, top.out, L, !(fresh && g == 0)});
  }

  void first_adjoint(int64_t group, int64_t panels, const Operand* rows, const void* set, bool add) {
    const LayerLayout& top = layout.layer[0];
    const Factors<Operand> factors = {rows, filter(set, top.filter_t) + group * L * layout.taps};
    A::product(top.H * top.W, panels * L, layout.taps / L, &factors, 1, panels * L,
               {work.taps_grad, layout.taps, L, add});
  }

  void tangent_forward() {
    const LayerLayout& top = layout.layer[0];
    const int64_t stride = layout.first_stride();
    for (int64_t g = 0; g < count; ++g) {
      use_input(g, true);
      for_bunches([&](int64_t group, int64_t panels) {
        V *const x = first_panels(work.first, g, group), *const x_t = first_panels(work.first_t, g, group);
        first_product(filters, group, panels, x);
        first_product(filters_t, group, panels, x_t);
        for (int64_t v = 0; v < panels; ++v)
          run_panel<T, Form::jvp, true, true>(top.H, top.W, T(step.eps), affine(top, group + v, true),
                                              {x + v * stride, x_t + v * stride, nullptr, nullptr,
                                               panel(tape_t, g, top.pooled, group + v, top.OH * top.OW)});
      });
    }
    for (int64_t l = 1; l < layout.depth; ++l) {
      const LayerLayout& at = layout.layer[l];
      Operand *const input = work.input + at.input, *const input_t = work.input_t + at.input;
      if (!has_inputs()) transform_input(l, tape, input);
      transform_input(l, tape_t, input_t);
      multiply_inputs(at, {{input_t, filter(filters, at.filter)}, {input, filter(filters_t, at.filter)}});
      for (int64_t g = 0; g < count; ++g)
        for (int64_t group = 0; group < at.out_groups; ++group) {
          V* conv_t = panel(tape_t, g, at.conv, group, at.H * at.W);
          transform_output(at, g, group, conv_t);
          run_panel<T, Form::jvp, true, true>(at.H, at.W, T(step.eps), affine(at, group, true),
                                              {panel(tape, g, at.conv, group, at.H * at.W), conv_t, nullptr, nullptr,
                                               panel(tape_t, g, at.pooled, group, at.OH * at.OW)});
        }
    }
    head_tangent();
  }

  void head_tangent() {
    const int64_t row = layout.tape / sizeof(T);
    const int64_t features = layout.layer[layout.depth - 1].pooled;
    T* const logits_t = at(tape_t, 0, layout.logits_grad);
    multiply<T>(count, layout.features, layout.classes / L, {at(tape_t, 0, features), row, 1},
                {value(filters, layout.head), 0, 0, true}, {logits_t, row, L, false});
    multiply<T>(count, layout.features, layout.classes / L, {at(tape, 0, features), row, 1},
                {value(filters_t, layout.head), 0, 0, true}, {logits_t, row, L, true});
    for (int64_t g = 0; g < count; ++g) {
      const T* bias = value(filters_t, layout.head_bias);
      for (int64_t k = 0; k < step.classes; ++k) logits_t[g * row + k] += bias[k];
      cross_entropy_tangent(first + g, at(tape, g, layout.logits_grad), logits_t + g * row);
    }
  }

  void head_tangent_backward() {
    const T* const logits_grad = at(tape, 0, layout.logits_grad);
    const T* const logits_grad_t = at(tape_t, 0, layout.logits_grad);
    head_backward(tape_t, logits_grad_t, filters, false);
    head_backward(tape_t, logits_grad, filters_t, true);
    if (sums != nullptr) {
      head_outer(tape, logits_grad_t, !fresh);
      head_outer(tape_t, logits_grad, true);
      head_bias(logits_grad_t);
    }
  }

  void tangent_backward() {
    head_tangent_backward();
    for (int64_t l = layout.depth - 1; l > 0; --l) {
      const LayerLayout& at = layout.layer[l];
      for (int64_t g = 0; g < count; ++g)
        for (int64_t group = 0; group < at.out_groups; ++group) {
          copy(panel(tape, g, at.conv, group, at.H * at.W), work.x, at.H * at.W);
          copy(panel(tape_t, g, at.conv, group, at.H * at.W), work.x_t, at.H * at.W);
          add_norm(at, group,
                   run_panel<T, Form::backward_jvp, true, true>(
                       at.H, at.W, T(step.eps), affine(at, group, true),
                       {work.x, work.x_t, panel(tape, g, at.grad_pooled, group, at.OH * at.OW),
                        panel(tape_t, g, at.grad_pooled, group, at.OH * at.OW), work.y}));
          transform_grad(at, work.x, g, group, work.grad_t);
          transform_grad(at, work.x_t, g, group, work.grad);
        }
      clear_rest(at, work.grad, at.out_row);
      clear_rest(at, work.grad_t, at.out_row);
      if (sums != nullptr) add_outer(at, {{work.input + at.input, work.grad_t}, {work.input_t + at.input, work.grad}});
      multiply_grads(at, {{work.grad_t, filter(filters, at.filter_t)}, {work.grad, filter(filters_t, at.filter_t)}});
      transform_input_adjoint(l, tape_t);
    }
    const LayerLayout& top = layout.layer[0];
    const int64_t stride = layout.first_stride();
    for (int64_t g = 0; g < count; ++g) {
      use_input(g, false);
      for_bunches([&](int64_t group, int64_t panels) {
        V *const x = first_panels(work.first, g, group), *const x_t = first_panels(work.first_t, g, group);
        if (!layout.keeps_first) {
          first_product(filters, group, panels, x);
          first_product(filters_t, group, panels, x_t);
        }
        for (int64_t v = 0; v < panels; ++v)
          add_norm(top, group + v,
                   run_panel<T, Form::backward_jvp, true, true>(
                       top.H, top.W, T(step.eps), affine(top, group + v, true),
                       {x + v * stride, x_t + v * stride, panel(tape, g, top.grad_pooled, group + v, top.OH * top.OW),
                        panel(tape_t, g, top.grad_pooled, group + v, top.OH * top.OW), work.y}));
        join_panels(x, panels, work.rows_t);
        join_panels(x_t, panels, work.rows);
        if (sums != nullptr) first_outer(group, panels, work.rows_t, g);
        first_adjoint(group, panels, work.rows_t, filters, group > 0);
        first_adjoint(group, panels, work.rows, filters_t, true);
      });
      scatter_taps(first + g);
    }
  }
};

}  // namespace
}  // namespace pydistill

#include "convnet_variants.h"

namespace pydistill {
namespace {

// ---- filters: theta (and the direction) into the packed factors that the products read

template <class T, class A>
class Filters {
  using V = Vec<T>;
  using Operand = typename A::Operand;
  static constexpr int L = Lanes<T>::count, kParts = Wide<T>::parts, kLanes = Registers<T>::lanes;

 public:
  explicit Filters(const Step& step) : step(step), layout(step) {
    per_set = 2;  // the first layer and the classifier
    for (int64_t l = 1; l < layout.depth; ++l) per_set += (layout.layer[l].in + layout.layer[l].out + 1) / 2;
  }

  int64_t units() const { return step.E * (step.form == Step::Form::tangent ? 2 : 1) * per_set; }

  void run(int64_t unit) const {
    const int64_t sets = step.form == Step::Form::tangent ? 2 : 1;
    const int64_t e = unit / per_set / sets;
    const bool of_direction = unit / per_set % sets;
    const T* theta = static_cast<const T*>(of_direction ? step.direction : step.theta) + e * step.P;
    void* set = layout.set(step, e, of_direction);
    int64_t part = unit % per_set;
    if (part == 0) return first(theta, set, of_direction);
    if (part == per_set - 1) return classifier(theta, set);  // at the other end, for another thread
    --part;
    for (int64_t l = 1; l < layout.depth; ++l) {
      const int64_t parts = (layout.layer[l].in + layout.layer[l].out + 1) / 2;
      if (part < parts) return winograd(l, 2 * part, theta + step.layer[l].theta, set, of_direction);
      part -= parts;
    }
  }

 private:
  const Step& step;
  const Layout<T, A> layout;
  int64_t per_set;

  // What rounding takes from v.
  static V remainder(V v) {
    for (int i = 0; i < L; ++i) v[i] -= widen(A::narrow_one(v[i]));
    return v;
  }

  // Rows d and d + 1 of both packed forms of layer l: the first `in` rows are input channels (vectors over output
  // channels), the next `out` rows output channels (vectors over input channels).
  void winograd(int64_t l, int64_t d, const T* weight, void* set, bool of_direction) const {
    const LayerLayout& at = layout.layer[l];
    const bool over_out = d < at.in;
    const int64_t in = step.layer[l].in, out = step.layer[l].out;
    const int64_t depth = over_out ? at.in : at.out, width = over_out ? at.out : at.in;
    const int64_t row = over_out ? d : d - at.in;
    Operand* to = static_cast<Operand*>(set) + (over_out ? at.filter : at.filter_t);
    [[maybe_unused]] Operand* rest = static_cast<Operand*>(set) + at.filter_rest;
    using P = typename A::Primal;
    typename P::Operand* const primal =
        over_out && !of_direction && layout.primal_apart
            ? reinterpret_cast<typename P::Operand*>(static_cast<Operand*>(set) + at.filter_primal)
            : nullptr;
    const bool rounded = primal == nullptr || step.form == Step::Form::tangent;
    for (int64_t group = 0; group < width / L; ++group) {
      Wide<T> u[2][36];
      for (int half = 0; half < 2; ++half)
        for (int part = 0; part < kParts; ++part) {
          Register<T> w[3][3] = {}, transformed[6][6];
          const int64_t fixed = row + half;
          for (int i = 0; i < kLanes; ++i) {
            const int64_t moving = group * L + part * kLanes + i;
            const int64_t c = over_out ? fixed : moving, k = over_out ? moving : fixed;
            if (c < in && k < out)
              for (int t = 0; t < 9; ++t) w[t / 3][t % 3][i] = weight[(k * in + c) * 9 + t];
          }
          both_ways<T, 3, 6>(Winograd::filter<T>, w, transformed);
#pragma GCC unroll 36
          for (int p = 0; p < 36; ++p) u[half][p].part[part] = transformed[p / 6][p % 6];
        }
      for (int p = 0; p < 36; ++p) {
        const V even = vector_of(u[0][p]), odd = vector_of(u[1][p]);
        if (primal != nullptr) P::pack(primal + p * depth * width, row, group, depth, width / L, even, odd);
        if (rounded) A::pack(to + p * depth * width, row, group, depth, width / L, even, odd);
        if constexpr (A::kSplit)
          if (over_out)
            A::pack(rest + p * depth * width, row, group, depth, width / L, remainder(even), remainder(odd));
      }
    }
  }

  // The first layer's filters for tiles, unrounded: [panels][points][in][L]. `value` is that of a tap and a channel.
  template <class Value>
  void tiled(Value value, T* to) const {
    const int64_t C = step.layer[0].in;
    for (int64_t group = 0; group < layout.layer[0].out_groups; ++group)
      for (int64_t c = 0; c < C; ++c)
        for (int part = 0; part < kParts; ++part) {
          Register<T> w[3][3], u[6][6];
          for (int t = 0; t < 9; ++t)
            for (int i = 0; i < kLanes; ++i) w[t / 3][t % 3][i] = value(c * 9 + t, group * L + part * kLanes + i);
          both_ways<T, 3, 6>(Winograd::filter<T>, w, u);
#pragma GCC unroll 36
          for (int p = 0; p < 36; ++p)
            *reinterpret_cast<typename Registers<T>::Unaligned*>(to + ((group * Winograd::kPoints + p) * C + c) * L +
                                                                 part * kLanes) = u[p / 6][p % 6];
        }
  }

  // The first layer's filters by bunches of panels ([taps][panels] and its transpose), and all norms' parameters.
  void first(const T* theta, void* set, bool of_direction) const {
    const LayerLayout& at = layout.layer[0];
    const int64_t taps = 9 * step.layer[0].in, out = step.layer[0].out;
    const T* weight = theta + step.layer[0].theta;
    const auto value = [&](int64_t t, int64_t k) { return t < taps && k < out ? weight[k * taps + t] : T(0); };
    constexpr int64_t bunch = Layout<T, A>::kBunch;
    for (int64_t group = 0; group < at.out_groups; group += bunch) {
      const int64_t panels = smaller(bunch, at.out_groups - group);
      Operand* to = static_cast<Operand*>(set) + at.filter + group * L * layout.taps;
      for (int64_t t = 0; t < layout.used_taps; t += 2)
        for (int64_t v = 0; v < panels; ++v) {
          V rows[2] = {};
          for (int half = 0; half < 2; ++half)
            for (int i = 0; i < L; ++i) rows[half][i] = value(t + half, (group + v) * L + i);
          A::pack(to, t, v, layout.used_taps, panels, rows[0], rows[1]);
          if constexpr (A::kSplit)
            A::pack(to - at.filter + at.filter_rest, t, v, layout.used_taps, panels, remainder(rows[0]),
                    remainder(rows[1]));
        }
      to = static_cast<Operand*>(set) + at.filter_t + group * L * layout.taps;
      for (int64_t k = 0; k < panels * L; k += 2)
        for (int64_t v = 0; v < layout.taps / L; ++v) {
          V rows[2] = {};
          for (int half = 0; half < 2; ++half)
            for (int i = 0; i < L; ++i) rows[half][i] = value(v * L + i, group * L + k + half);
          A::pack(to, k, v, panels * L, layout.taps / L, rows[0], rows[1]);
        }
    }
    if (of_direction ? layout.tiled_first : layout.tiled_primal) tiled(value, layout.values(set) + at.tiled_filter);
    for (int64_t l = 0; l < layout.depth; ++l) {
      const Step::Layer& from = step.layer[l];
      const LayerLayout& to = layout.layer[l];
      T* norm = layout.values(set) + to.norm;
      const int64_t each = to.norm_size / to.out;  // positions with parameters of their own
      for (int64_t which = 0; which < 2; ++which)
        for (int64_t group = 0; group < to.out_groups; ++group)
          for (int64_t position = 0; position < each; ++position)
            for (int64_t c = group * L; c < (group + 1) * L; ++c, ++norm)
              if (from.affine < 0)
                *norm = which == 0 && !of_direction ? T(1) : T(0);
              else
                *norm = c < from.out ? theta[from.affine + (which * from.out + c) * each + position] : T(0);
      if (!step.fused())
        for (int64_t c = 0; c < to.out; ++c)
          layout.values(set)[to.bias + c] =
              c < from.out && from.bias >= 0 && !step.subtracts_bias() ? theta[from.bias + c] : T(0);
    }
  }

  // theta's features run over (channel, position), a tape's over (panel, position, lane)
  void classifier(const T* theta, void* set) const {
    const LayerLayout& at = layout.layer[layout.depth - 1];
    const int64_t plane = at.OH * at.OW, out = step.layer[layout.depth - 1].out;
    const T* weight = theta + step.head;
    T* const values = layout.values(set);
    const int64_t vectors = layout.features / L;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t c = v / plane * L, position = v % plane;
      for (int64_t k = 0; k < layout.classes; ++k) {
        V row{};  // of class k: this position's neighbouring channels
        for (int i = 0; i < L; ++i)
          if (c + i < out && k < step.classes) row[i] = weight[k * out * plane + (c + i) * plane + position];
        if (k < step.classes) store(values + layout.head_t + packed_offset<T>(k, v, step.classes, vectors), row);
        const auto column = [&](int64_t f) {
          return packed_offset<T>(f, k / L, layout.features, layout.classes / L) + k % L;
        };
        T* const to = values + layout.head + column(v * L);
        const int64_t next = column(1) - column(0);
        for (int i = 0; i < L; ++i) to[i * next] = row[i];
      }
    }
    for (int64_t k = 0; k < layout.classes; ++k)
      values[layout.head_bias + k] = k < step.classes ? weight[step.classes * out * plane + k] : T(0);
  }
};

// ---- reduction: the slots' sums, in order, back to theta's layout

template <class T, class A>
class Reduction {
  using V = Vec<T>;
  static constexpr int L = Lanes<T>::count, kParts = Wide<T>::parts, kLanes = Registers<T>::lanes;

 public:
  explicit Reduction(const Step& step) : step(step), layout(step) {
    per_student = 2;
    for (int64_t l = 1; l < layout.depth; ++l) per_student += step.layer[l].in;
  }

  int64_t units() const { return step.E * per_student; }

  void run(int64_t unit) const {
    const int64_t e = unit / per_student;
    int64_t part = unit % per_student;
    T* grad = static_cast<T*>(step.grad) + e * step.P;
    if (part == 0) return first(e, grad);
    if (part == per_student - 1) return classifier(e, grad);  // at the other end, for another thread
    --part;
    for (int64_t l = 1; l < layout.depth; ++l) {
      if (part < step.layer[l].in) return winograd(e, l, part, grad + step.layer[l].theta);
      part -= step.layer[l].in;
    }
  }

 private:
  const Step& step;
  const Layout<T, A> layout;
  int64_t per_student;

  const T* slot(int64_t e, int64_t s) const {
    return reinterpret_cast<const T*>(static_cast<const char*>(step.partials) + (e * step.slots + s) * layout.partials);
  }
  V total(int64_t e, int64_t offset) const {
    V sum = load(slot(e, 0) + offset);
    for (int64_t s = 1; s < step.slots; ++s) sum += load(slot(e, s) + offset);
    return step.scale != nullptr ? sum * static_cast<const T*>(step.scale)[e] : sum;
  }

  void winograd(int64_t e, int64_t l, int64_t c, T* grad) const {
    const LayerLayout& at = layout.layer[l];
    const int64_t in = step.layer[l].in, out = step.layer[l].out;
    for (int64_t group = 0; group < at.out_groups; ++group) {
      Wide<T> sums[36];
      for (int p = 0; p < 36; ++p) sums[p] = wide_of<T>(total(e, at.sum + (p * at.in + c) * at.out + group * L));
      for (int part = 0; part < kParts; ++part) {
        Register<T> u[6][6], w[3][3];
        for (int p = 0; p < 36; ++p) u[p / 6][p % 6] = sums[p].part[part];
        both_ways<T, 6, 3>(Winograd::filter_adjoint<T>, u, w);
        const int64_t k = group * L + part * kLanes;
        for (int i = 0; i < kLanes && k + i < out; ++i)
          for (int t = 0; t < 9; ++t) grad[((k + i) * in + c) * 9 + t] = w[t / 3][t % 3][i];
      }
    }
  }

  void first(int64_t e, T* grad) const {
    const LayerLayout& at = layout.layer[0];
    const int64_t taps = 9 * step.layer[0].in, out = step.layer[0].out;
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t group = 0; group < at.out_groups; ++group) {
        const V sum = total(e, at.sum + t * at.out + group * L);
        for (int i = 0; i < L && group * L + i < out; ++i)
          grad[step.layer[0].theta + (group * L + i) * taps + t] = sum[i];
      }
    for (int64_t l = 0; l < layout.depth; ++l) {
      const Step::Layer& to = step.layer[l];
      const LayerLayout& from = layout.layer[l];
      if (to.bias >= 0)
        for (int64_t group = 0; group < from.out_groups; ++group) {
          const V sum = step.subtracts_bias() ? V{} : total(e, from.sum_bias + group * L);
          for (int i = 0; i < L && group * L + i < to.out; ++i) grad[to.bias + group * L + i] = sum[i];
        }
      if (to.affine < 0) continue;
      const int64_t each = from.norm_size / from.out;
      for (int64_t which = 0; which < 2; ++which)
        for (int64_t group = 0; group < from.out_groups; ++group)
          for (int64_t position = 0; position < each; ++position) {
            const V sum = total(e, from.sum_norm + which * from.norm_size + (group * each + position) * L);
            for (int i = 0; i < L && group * L + i < to.out; ++i)
              grad[to.affine + (which * to.out + group * L + i) * each + position] = sum[i];
          }
    }
  }

  void classifier(int64_t e, T* grad) const {
    const LayerLayout& at = layout.layer[layout.depth - 1];
    const int64_t plane = at.OH * at.OW, out = step.layer[layout.depth - 1].out;
    T* const weight = grad + step.head;
    for (int64_t k = 0; k < step.classes; ++k)
      for (int64_t f = 0; f < layout.features; f += L) {
        const V sum = total(e, layout.sum_head + k * layout.features + f);
        const int64_t c = f / L / plane * L, position = f / L % plane;
        for (int i = 0; i < L && c + i < out; ++i) weight[k * out * plane + (c + i) * plane + position] = sum[i];
      }
    for (int64_t v = 0; v < layout.classes / L; ++v) {
      const V sum = total(e, layout.sum_head_bias + v * L);
      for (int i = 0; i < L && v * L + i < step.classes; ++i) weight[step.classes * out * plane + v * L + i] = sum[i];
    }
  }
};

// Calls visit with the types that a step is computed in.
template <class Visit>
PYDISTILL_INLINE auto with_types([[maybe_unused]] const Step& step, Visit visit) {
#if defined(__AMX_BF16__)
  return visit(float(), Amx());
#elif defined(__AVX512BF16__)
  return visit(float(), Bf16Pairs());
#else
  if (step.scalar == Scalar::f64) return visit(double(), Native<double, false>());
  if (step.bf16) return visit(float(), Native<float, true>());
  return visit(float(), Native<float, false>());
#endif
}

ConvNetStepSizes sizes(const Step& step) {
  return with_types(step, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const Layout<T, A> layout(step);
    Arena arena{nullptr};
    Workspace<T, A>(step, layout, arena);
    return ConvNetStepSizes{layout.filters, layout.partials, arena.used, layout.stored, layout.exchange, layout.tape};
  });
}

template <template <class, class> class Part>
int64_t units(const Step& step) {
  return with_types(step, [&](auto t, auto a) { return Part<decltype(t), decltype(a)>(step).units(); });
}

template <template <class, class> class Part>
void run_units(const Step& step, int64_t begin, int64_t end) {
  with_types(step, [&](auto t, auto a) {
    const Part<decltype(t), decltype(a)> part(step);
    for (int64_t unit = begin; unit < end; ++unit) part.run(unit);
  });
}

int64_t passes(const Step& step) { return step.fused() ? 1 : Program(step).passes; }

void run_slots(const Step& step, int64_t pass, int64_t begin, int64_t end, void* scratch) {
#if defined(__AMX_BF16__)
  const TileConfig tiles;
  _tile_loadconfig(&tiles);
#endif
  with_types(step, [&](auto t, auto a) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t e = unit / step.slots, slot = unit % step.slots;
      if (step.fused())
        Slot<decltype(t), decltype(a)>(step, e, slot, scratch).run();
      else
        VariantSlot<decltype(t), decltype(a)>(step, e, slot, scratch).run(pass);
    }
  });
#if defined(__AMX_BF16__)
  _tile_release();
#endif
}

}  // namespace

extern const ConvNetStepKernel PYDISTILL_KERNEL;
const ConvNetStepKernel PYDISTILL_KERNEL = {sizes,     units<Filters>,   run_units<Filters>,  passes,
                                            run_slots, units<Reduction>, run_units<Reduction>};

}  // namespace pydistill

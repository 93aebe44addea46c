// CPU body: see conv2d_filters.h.
#include "conv2d_filters.h"
#include "frozen_conv2d_points.h"
#include "vocabulary/cpu_vocabulary.h"

namespace pydistill {
namespace {

template <class T, int TAPS>
void run(const Conv2dFilters& call, int64_t begin, int64_t end) {
  constexpr int L = Lanes<T>::count, kLanes = Registers<T>::lanes, kTaps = TAPS * TAPS;
  constexpr int64_t kChannels = Conv2dFilters::kChannels;
  alignas(64) T taps[kTaps][kChannels][L];
  const Map& map = call.weight;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t vector = unit / call.blocks(), first = unit % call.blocks() * kChannels;
    const int64_t channels = call.C - first < kChannels ? call.C - first : kChannels;
    const int64_t lanes = call.K - vector * L < L ? call.K - vector * L : L;
    if (lanes < L) __builtin_memset(taps, 0, sizeof(taps));
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const T* const from = static_cast<const T*>(map.data) + (vector * L + lane) * map.n + first * map.c;
      for (int tap = 0; tap < kTaps; ++tap)
        for (int64_t c = 0; c < channels; ++c)
          taps[tap][c][lane] = from[c * map.c + tap / TAPS * map.h + tap % TAPS * map.w];
    }
    for (int64_t c = 0; c < channels; ++c)
      for (int lane = 0; lane < L; lane += kLanes) {
        T* const to = static_cast<T*>(call.out) + (vector * call.C + first + c) * L + lane;
        Register<T> half[6][TAPS];
#pragma GCC unroll 6
        for (int j = 0; j < TAPS; ++j) {
          Register<T> column[TAPS], out[6];
#pragma GCC unroll 6
          for (int i = 0; i < TAPS; ++i) column[i] = load_register(&taps[i * TAPS + j][c][lane]);
          filter_of_taps<T, TAPS>(column, out);
#pragma GCC unroll 6
          for (int i = 0; i < 6; ++i) half[i][j] = out[i];
        }
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) {
          Register<T> out[6];
          filter_of_taps<T, TAPS>(half[i], out);
#pragma GCC unroll 6
          for (int j = 0; j < 6; ++j)
            *reinterpret_cast<typename Registers<T>::Unaligned*>(to + (6 * i + j) * call.vectors() * call.C * L) =
                out[j];
          in_order();
        }
      }
  }
}

}  // namespace

void PYDISTILL_KERNEL(const Conv2dFilters& call, int64_t begin, int64_t end) {
  with_number(call.scalar, [&](auto t) PYDISTILL_LAMBDA {
    using T = decltype(t);
    call.taps == 3 ? run<T, 3>(call, begin, end) : run<T, 5>(call, begin, end);
  });
}

}  // namespace pydistill

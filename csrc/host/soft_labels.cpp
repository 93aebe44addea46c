#include "soft_labels.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>

namespace pydistill {
namespace {

static_assert(std::endian::native == std::endian::little);

// Of numbers in [0, 1], to the nearest, ties to even.
uint16_t half_of(float x) {
  if (x < 0x1p-14f) return static_cast<uint16_t>(std::nearbyint(x * 0x1p24f));  // a subnormal, or the first normal
  uint32_t bits = std::bit_cast<uint32_t>(x);
  bits += 0xFFF + ((bits >> 13) & 1);
  return static_cast<uint16_t>((bits >> 13) - (112 << 10));
}

float float_of(uint16_t half) {
  const uint32_t exponent = half >> 10, mantissa = half & 1023;
  if (exponent == 0) return static_cast<float>(mantissa) * 0x1p-24f;
  return std::bit_cast<float>(((exponent + 112) << 23) | (mantissa << 13));
}

// The weight of the first class needs no code: its byte says by which power of 2^(1/16) the row's steps are finer.
double step_of(const TopK& form, uint8_t finer) { return form.step * std::exp2(-finer / 16.0); }

// The most that still lets 255 steps reach as far as `span`.
uint8_t finer_for(const TopK& form, double span) {
  if (!(span > 0)) return 255;
  return static_cast<uint8_t>(std::clamp(std::floor(16 * std::log2(form.step * 255 / span)), 0.0, 255.0));
}

}  // namespace

Flaw encode(const float* values, const TopK& form, bool probs, double temperature, int32_t* order, double* weights,
            uint8_t* row) {
  double sum = 0;
  for (int64_t c = 0; c < form.classes; ++c) {
    if (!std::isfinite(values[c])) return Flaw::not_finite;
    if (probs && values[c] < 0) return Flaw::negative;
    sum += values[c];
  }
  if (probs && std::abs(sum - 1) > 1e-2) return Flaw::not_one;
  std::iota(order, order + form.classes, 0);
  std::partial_sort(order, order + form.k, order + form.classes, [values](int32_t a, int32_t b) {
    return values[a] > values[b] || (values[a] == values[b] && a < b);
  });
  const double first = values[order[0]];
  for (int64_t c = 0; c < form.classes; ++c)
    weights[c] = probs ? values[c] : std::exp((values[c] - first) / temperature);

  // the rest is summed separately: one minus the sum of the others would lose its digits if it is small
  const double top = weights[order[0]];
  double kept = 0, rest = 0;
  uint8_t* codes = row + 4 + 2 * form.k;
  const auto logarithm = [&](int32_t c) {
    return probs ? std::log(weights[c] / top) : (values[c] - first) / temperature;
  };
  const uint8_t finer = form.row_step ? finer_for(form, -logarithm(order[form.k - 1])) : 0;
  const double step = step_of(form, finer);
  for (int64_t i = 0; i < form.k; ++i) {
    const int32_t c = order[i];
    const double ratio = weights[c] / top;
    const uint16_t number = static_cast<uint16_t>(c);
    std::memcpy(row + 4 + 2 * i, &number, 2);
    if (form.step > 0) {
      codes[i] = i == 0 ? finer : static_cast<uint8_t>(std::nearbyint(std::min(-logarithm(c) / step, 255.0)));
    } else {
      const uint16_t half = half_of(static_cast<float>(ratio));
      std::memcpy(codes + 2 * i, &half, 2);
    }
    kept += weights[c];
    weights[c] = 0;
  }
  for (int64_t c = 0; c < form.classes; ++c) rest += weights[c];
  const float tail = static_cast<float>(rest / (kept + rest));
  std::memcpy(row, &tail, 4);
  return Flaw::none;
}

const float* Weights::of(const TopK& form, uint8_t finer) {
  if (form.step != step_) {
    tables_.assign(256 * 256, 0.0f);
    step_ = form.step;
  }
  float* table = tables_.data() + 256 * finer;
  if (table[0] == 0) {  // that of code 0 is 1
    const double fine = step_of(form, finer);
    for (int code = 0; code < 256; ++code) table[code] = static_cast<float>(std::exp(-fine * code));
  }
  return table;
}

bool decode(const uint8_t* row, const TopK& form, Weights& weights, int64_t* classes, float* values, float* tail) {
  std::memcpy(tail, row, 4);
  uint16_t last = 0;
  for (int64_t i = 0; i < form.k; ++i) {
    uint16_t number;
    std::memcpy(&number, row + 4 + 2 * i, 2);
    classes[i] = number;
    last = std::max(last, number);
  }
  if (last >= form.classes) return false;
  const uint8_t* codes = row + 4 + 2 * form.k;
  const float* table = form.step > 0 ? weights.of(form, codes[0]) : nullptr;
  double sum = 0;
  for (int64_t i = 0; i < form.k; ++i) {
    if (table) {
      values[i] = table[i == 0 ? 0 : codes[i]];
    } else {
      uint16_t half;
      std::memcpy(&half, codes + 2 * i, 2);
      values[i] = float_of(half);
    }
    sum += values[i];
  }
  const double scale = (1.0 - *tail) / sum;
  for (int64_t i = 0; i < form.k; ++i) values[i] = static_cast<float>(values[i] * scale);
  return true;
}

}  // namespace pydistill

// Top-k labels in bytes: a row is the float32 mass of the other classes, k uint16 classes, and k weights relative to
// the first class's, each a half or its negative logarithm in steps; the first of the latter says how fine the steps
// are. Torch-free, little-endian.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pydistill {

struct TopK {
  int64_t classes = 0, k = 0;
  double step = 0;        // largest step of the logarithms in uint8; 0: weights are halves
  bool row_step = false;  // whether steps are as fine as each row allows
  int64_t bytes() const { return 4 + k * (step > 0 ? 3 : 4); }
};

enum class Flaw { none, not_finite, negative, not_one };  // of a row

// Writes the row of softmax(values / temperature), or of `values` themselves if they are probabilities. Of equal ones
// the lower class comes first. `order` and `weights` are scratch of `classes` elements.
Flaw encode(const float* values, const TopK& form, bool probs, double temperature, int32_t* order, double* weights,
            uint8_t* row);

// The values of the codes, for every fineness seen so far.
class Weights {
 public:
  const float* of(const TopK& form, uint8_t finer);  // the 256 codes

 private:
  double step_ = 0;
  std::vector<float> tables_;  // [256, 256], zeros until asked for
};

// The k classes, and probabilities that add up to one minus tail; false if a class is out of range.
bool decode(const uint8_t* row, const TopK& form, Weights& weights, int64_t* classes, float* values, float* tail);

}  // namespace pydistill

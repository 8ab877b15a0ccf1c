#include "moe/routing.h"

#include <stdexcept>
#include <string>

namespace kt {

void Routing::group(const RoutingInput& input, int num_experts, const uint8_t* device_mask) {
  experts_.clear();
  token_of_pair_.clear();
  weight_of_pair_.clear();
  entry_of_pair_.clear();
  if (input.id_type == IdType::kInt32) {
    group_typed<int32_t>(input, num_experts, device_mask);
  } else {
    group_typed<int64_t>(input, num_experts, device_mask);
  }
}

template <class Id>
void Routing::group_typed(const RoutingInput& input, int num_experts, const uint8_t* device_mask) {
  const Id* ids = static_cast<const Id*>(input.ids);
  const int64_t entries = static_cast<int64_t>(input.tokens) * input.top_k;
  const auto skipped = [&](Id id) { return id < 0 || (device_mask != nullptr && device_mask[id] != 0); };

  first_.assign(num_experts, 0);
  for (int64_t i = 0; i < entries; ++i) {
    if (ids[i] < -1 || ids[i] >= num_experts) {
      throw std::invalid_argument("expert id " + std::to_string(ids[i]) + " of token " +
                                  std::to_string(i / input.top_k) + " is out of range; ids go from 0 to " +
                                  std::to_string(num_experts - 1) + ", and -1 means skip");
    }
    if (!skipped(ids[i])) ++first_[ids[i]];
  }
  int total = 0;
  for (int e = 0; e < num_experts; ++e) {
    const int count = first_[e];
    if (count > 0) experts_.push_back({e, total, count});
    first_[e] = total;
    total += count;
  }
  token_of_pair_.resize(total);
  weight_of_pair_.resize(total);
  entry_of_pair_.resize(total);
  for (int64_t i = 0; i < entries; ++i) {
    if (skipped(ids[i])) continue;
    const int pair = first_[ids[i]]++;
    token_of_pair_[pair] = static_cast<int32_t>(i / input.top_k);
    weight_of_pair_[pair] = input.weights[i];
    entry_of_pair_[pair] = static_cast<int32_t>(i);
  }
}

}  // namespace kt

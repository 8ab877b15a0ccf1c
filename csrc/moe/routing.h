// Groups the (token, expert) pairs of one call by expert.
#pragma once

#include <cstdint>
#include <vector>

namespace kt {

enum class IdType : int { kInt32 = 0, kInt64 = 1 };

struct RoutingInput {
  int tokens;
  int top_k;
  const void* ids;  // [tokens, top_k]
  IdType id_type;
  const float* weights;  // [tokens, top_k]
};

struct ActiveExpert {
  int expert;
  int first_pair;  // into Routing::token_of_pair
  int pairs;
};

// Pairs are ordered by expert, then token, then place in the token's list: an order that does not depend on how many
// tokens run together, so that each token's weighted sum always adds in the same order.
class Routing {
 public:
  // ids of -1 and experts with device_mask[id] != 0 are skipped (`device_mask` may be null). Throws
  // std::invalid_argument for ids outside [-1, num_experts); the object is then empty.
  void group(const RoutingInput& input, int num_experts, const uint8_t* device_mask);

  const std::vector<ActiveExpert>& experts() const { return experts_; }
  const std::vector<int32_t>& token_of_pair() const { return token_of_pair_; }
  const std::vector<float>& weight_of_pair() const { return weight_of_pair_; }
  // The pair's place in the caller's ids and weights.
  const std::vector<int32_t>& entry_of_pair() const { return entry_of_pair_; }
  int pairs() const { return static_cast<int>(token_of_pair_.size()); }

 private:
  template <class Id>
  void group_typed(const RoutingInput& input, int num_experts, const uint8_t* device_mask);

  std::vector<int> first_;  // scratch: counts, then running positions
  std::vector<ActiveExpert> experts_;
  std::vector<int32_t> token_of_pair_;
  std::vector<float> weight_of_pair_;
  std::vector<int32_t> entry_of_pair_;
};

}  // namespace kt

// What this house needs to know of an operator's schema ("name(Tensor x, float eps, Tensor? bias=None) -> Tensor").
#pragma once

#include <string>
#include <vector>

namespace kt {

enum class ArgumentKind {
  kTensor,
  kOptionalTensor,
  kInteger,
  kOptionalInteger,
  kNumber,
  kOptionalNumber,
  kFlag,
  kOptionalFlag,
  kText,
  kIntegers,
  kOptionalIntegers
};

struct Schema {
  std::string name;
  std::vector<ArgumentKind> arguments;
};

// Throws std::invalid_argument for types that no operator of ours has.
Schema parse_schema(const std::string& text);

}  // namespace kt

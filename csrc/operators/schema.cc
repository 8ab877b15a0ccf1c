#include "operators/schema.h"

#include <algorithm>
#include <stdexcept>

namespace kt {
namespace {

ArgumentKind kind_of(const std::string& type, const std::string& schema) {
  static const std::pair<const char*, ArgumentKind> kKinds[] = {{"Tensor", ArgumentKind::kTensor},
                                                                {"Tensor?", ArgumentKind::kOptionalTensor},
                                                                {"int", ArgumentKind::kInteger},
                                                                {"int?", ArgumentKind::kOptionalInteger},
                                                                {"float", ArgumentKind::kNumber},
                                                                {"float?", ArgumentKind::kOptionalNumber},
                                                                {"bool", ArgumentKind::kFlag},
                                                                {"bool?", ArgumentKind::kOptionalFlag},
                                                                {"str", ArgumentKind::kText},
                                                                {"int[]", ArgumentKind::kIntegers},
                                                                {"int[]?", ArgumentKind::kOptionalIntegers}};
  for (const auto& [name, kind] : kKinds) {
    if (type == name) return kind;
  }
  throw std::invalid_argument("an operator's schema has the type " + type + ": " + schema);
}

// "Tensor(a!) x" -> "Tensor"; "Tensor(a!)? x" -> "Tensor?".
std::string type_of(std::string argument) {
  argument.erase(0, argument.find_first_not_of(' '));
  std::string type = argument.substr(0, argument.find(' '));
  const size_t alias = type.find('(');
  if (alias != std::string::npos) type.erase(alias, type.find(')') - alias + 1);
  return type;
}

}  // namespace

Schema parse_schema(const std::string& text) {
  Schema schema;
  const size_t open = text.find('(');
  const size_t close = text.find(") ->");
  if (open == std::string::npos || close == std::string::npos) {
    throw std::invalid_argument("not an operator's schema: " + text);
  }
  schema.name = text.substr(0, open);
  const std::string arguments = text.substr(open + 1, close - open - 1);
  for (size_t begin = 0; begin < arguments.size();) {
    const size_t end = std::min(arguments.find(',', begin), arguments.size());
    const std::string argument = arguments.substr(begin, end - begin);
    begin = end + 1;
    if (argument.find_first_not_of(" *") == std::string::npos) continue;  // "*": keyword-only from here on
    schema.arguments.push_back(kind_of(type_of(argument), text));
  }
  return schema;
}

}  // namespace kt

#include "formats/gguf/gguf_types.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "formats/gguf/grids.h"

namespace kt {
namespace {

#include "formats/gguf/block_types-inl.h"

template <class T>
void numbers_of_codes(const uint8_t* blocks, int64_t count, float* numbers) {
  int8_t codes[T::kColumns];
  float scale[T::kColumns / T::kGroup];
  float low[T::kColumns / T::kGroup];
  for (int64_t begin = 0; begin < count; begin += T::kColumns, blocks += T::kBytes) {
    T::read(blocks, codes, scale, low);
    for (int k = 0; k < T::kColumns; ++k, ++numbers) {
      const float product = scale[k / T::kGroup] * static_cast<float>(codes[k]);
      *numbers = T::kLow ? product + low[k / T::kGroup] : product;
    }
  }
}

template <class T>
void plain_numbers(const uint8_t* bytes, int64_t count, float* numbers) {
  constexpr int kAtOnce = 1 << 20;
  for (int64_t i = 0; i < count; i += kAtOnce) {
    T::numbers(bytes + i * T::kBytes, static_cast<int>(std::min<int64_t>(count - i, kAtOnce)), numbers + i);
  }
}

template <class T, class = void>
struct Table {
  static constexpr const int8_t* kValues = nullptr;
};
template <class T>
struct Table<T, decltype(static_cast<void>(T::kTable))> {
  static constexpr const int8_t* kValues = T::kTable;
};

template <class T>
GgufType row_of_codes() {
  GgufType row = {T::kName, T::kId,  T::kColumns, T::kBytes, T::kGroup,
                  T::kLow,  nullptr, 0,           nullptr,   numbers_of_codes<T>};
  if constexpr (T::kRepacked) {
    row.parts = T::parts;
    row.offset = T::kOffset;
    row.table = Table<T>::kValues;
  }
  return row;
}

template <class T>
GgufType row_of_numbers() {
  return {T::kName, T::kId, T::kColumns, T::kBytes, 0, false, nullptr, 0, nullptr, plain_numbers<T>};
}

template <class... Codes, class... Numbers>
std::vector<GgufType> rows_of(TypeList<Codes...>, TypeList<Numbers...>) {
  std::vector<GgufType> rows = {row_of_codes<Codes>()..., row_of_numbers<Numbers>()...};
  std::sort(rows.begin(), rows.end(), [](const GgufType& a, const GgufType& b) { return a.id < b.id; });
  return rows;
}

}  // namespace

const std::vector<GgufType>& gguf_types() {
  static const std::vector<GgufType> types = rows_of(CodeTypes(), NumberTypes());
  return types;
}

const GgufType& gguf_type(int id) {
  for (const GgufType& type : gguf_types()) {
    if (type.id == id) return type;
  }
  std::string known;
  for (const GgufType& type : gguf_types()) known += (known.empty() ? "" : ", ") + std::to_string(type.id);
  throw std::invalid_argument("ggml type " + std::to_string(id) + " is not known; expected one of " + known);
}

}  // namespace kt

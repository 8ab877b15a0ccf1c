// When a function of device_runtime.h may be called as a vendor's function: both put every argument and the result into
// the same registers. Handles and what only the vendor's headers can name are void* in ours, enums are int.
#pragma once

#include <type_traits>

namespace device_headers {

template <class Ours, class Theirs>
constexpr bool fits();

template <class Ours, class Theirs>
struct FitsPointer : std::bool_constant<fits<Ours, Theirs>()> {};

template <class OurResult, class... Ours, class TheirResult, class... Theirs>
struct FitsPointer<OurResult(Ours...), TheirResult(Theirs...)> {
  static constexpr bool compare() {
    if constexpr (sizeof...(Ours) == sizeof...(Theirs)) {
      return fits<OurResult, TheirResult>() && (fits<Ours, Theirs>() && ...);
    } else {
      return false;
    }
  }
  static constexpr bool value = compare();
};

template <class Ours, class Theirs>
constexpr bool fits() {
  if constexpr (std::is_same_v<Ours, Theirs>) {
    return true;
  } else if constexpr (std::is_enum_v<Theirs>) {
    return std::is_same_v<Ours, int> && sizeof(Theirs) == sizeof(int);
  } else if constexpr (std::is_integral_v<Ours> && std::is_integral_v<Theirs>) {
    return sizeof(Ours) == sizeof(Theirs) && std::is_signed_v<Ours> == std::is_signed_v<Theirs>;
  } else if constexpr (std::is_pointer_v<Ours> && std::is_pointer_v<Theirs>) {
    using OurTarget = std::remove_pointer_t<Ours>;
    using TheirTarget = std::remove_pointer_t<Theirs>;
    if constexpr (std::is_const_v<TheirTarget> && !std::is_const_v<OurTarget>) {
      return false;  // would not warn of memory that the vendor's function only reads
    } else if constexpr (std::is_void_v<OurTarget>) {
      return !std::is_function_v<TheirTarget>;
    } else {
      return FitsPointer<std::remove_const_t<OurTarget>, std::remove_const_t<TheirTarget>>::value;
    }
  } else {
    return false;
  }
}

}  // namespace device_headers

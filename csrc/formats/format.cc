#include "formats/format.h"

#include <algorithm>
#include <set>
#include <stdexcept>

#include "formats/bf16.h"
#include "formats/code4.h"
#include "formats/e4m3.h"
#include "formats/gguf_blocks.h"
#include "formats/gguf_formats.h"
#include "formats/integers.h"

namespace kt {

const std::vector<const Format*>& all_formats() {
  static const std::vector<const Format*> all = [] {
    std::vector<const Format*> rows = {&kFormatBf16,    &kFormatFp8,      &kFormatFp8PerChannel, &kFormatMxfp8,
                                       &kFormatRawInt4, &kFormatGptqInt4, &kFormatMxfp4,         &kFormatNvfp4,
                                       &kFormatAmxInt4, &kFormatAmxInt8,  &kFormatMoeInt4,       &kFormatMoeInt8};
    const std::vector<const Format*>& panels = gguf_panel_formats();
    rows.insert(rows.end(), panels.begin(), panels.end());
    for (const Format& format : block_formats()) {
      const auto same = [&](const Format* in_panels) { return in_panels->as_blocks == &format; };
      if (std::none_of(panels.begin(), panels.end(), same)) rows.push_back(&format);
    }
    return rows;
  }();
  return all;
}

std::vector<const Format*> formats_of_method(const std::string& method) {
  std::vector<const Format*> found;
  std::set<std::string> known;
  for (const Format* format : all_formats()) {
    if (method == format->method()) found.push_back(format);
    known.insert(format->method());
  }
  if (!found.empty()) return found;
  std::string names;
  for (const std::string& name : known) names += (names.empty() ? "" : ", ") + name;
  throw std::invalid_argument("no weight format for method '" + method + "'; there are " + names);
}

const Format& format_of(const std::string& method, const std::string& name) {
  std::string known;
  for (const Format* format : formats_of_method(method)) {
    if (name == format->name) return *format;
    known += (known.empty() ? "" : ", ") + std::string(format->name);
  }
  throw std::invalid_argument("no weight format '" + name + "' of method " + method + "; there are " + known);
}

}  // namespace kt

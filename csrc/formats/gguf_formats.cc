#include "formats/gguf_formats.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>

#include "formats/bf16.h"
#include "formats/code4.h"
#include "formats/gguf/gguf_types.h"
#include "formats/gguf_blocks.h"

namespace kt {
namespace {

constexpr const char* kMethod = "LLAMAFILE";

// 0 .. 15
constexpr CodeTable kUnsignedInt4 = {{0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0x4100, 0x4110,
                                      0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170},
                                     0};

// -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113
constexpr CodeTable kNonLinear4 = {{0xC2FE, 0xC2D0, 0xC2A6, 0xC282, 0xC244, 0xC20C, 0xC1B0, 0xC120, 0x3F80, 0x4150,
                                    0x41C8, 0x4218, 0x4254, 0x428A, 0x42B2, 0x42E2},
                                   0};

// How panels keep a type.
struct InPanels {
  const char* name;
  CodeType codes;
  const CodeTable* table;
  ScaleType scale;
};

constexpr InPanels kInPanels[] = {
    {"Q8_0", CodeType::kInt8, nullptr, ScaleType::kF16},
    {"Q4_0", CodeType::kCode4, &kOffsetInt4, ScaleType::kF16},
    {"Q4_1", CodeType::kCode4, &kUnsignedInt4, ScaleType::kF16Min},
    {"Q5_0", CodeType::kCode5, nullptr, ScaleType::kF16},
    {"Q5_1", CodeType::kCode5, nullptr, ScaleType::kF16Min},
    {"Q2_K", CodeType::kCode2, nullptr, ScaleType::kSuperMin4},
    {"Q3_K", CodeType::kCode3, nullptr, ScaleType::kSuper},
    {"Q4_K", CodeType::kCode4, &kUnsignedInt4, ScaleType::kSuperMin},
    {"Q5_K", CodeType::kCode5, nullptr, ScaleType::kSuperMin},
    {"Q6_K", CodeType::kCode6, nullptr, ScaleType::kSuper},
    {"IQ4_NL", CodeType::kCode4Wide, &kNonLinear4, ScaleType::kF16},
    {"IQ4_XS", CodeType::kCode4Wide, &kNonLinear4, ScaleType::kSuper},
    {"MXFP4", CodeType::kCode4, &kE2m1, ScaleType::kE8m0},
};

Format format_in_panels(const InPanels& panels, const GgufType& type) {
  Format format = {type.name, panels.codes, panels.table, Order::kRowMajor, 1,
                   1,         type.group,   panels.scale, ScaleType::kNone};
  format.blocks = &type;
  format.code_offset = panels.table == nullptr ? type.offset : 0;
  format.shared_method = kMethod;
  format.as_blocks = &block_format(type);
  return format;
}

// Numbers that method BF16 reads as well.
Format bf16_in_panels(const GgufType& type) {
  Format format = kFormatBf16;
  format.shared_method = kMethod;
  format.as_blocks = &block_format(type);
  return format;
}

}  // namespace

const std::vector<const Format*>& gguf_panel_formats() {
  static const std::vector<const Format*> all = [] {
    static std::deque<Format> rows;  // whose addresses stay
    std::vector<const Format*> listed;
    for (const InPanels& panels : kInPanels) {
      for (const GgufType& type : gguf_types()) {
        if (std::strcmp(type.name, panels.name) == 0) rows.push_back(format_in_panels(panels, type));
      }
    }
    for (const GgufType& type : gguf_types()) {
      if (std::strcmp(type.name, kFormatBf16.name) == 0) rows.push_back(bf16_in_panels(type));
    }
    for (const Format& format : rows) listed.push_back(&format);
    return listed;
  }();
  return all;
}

}  // namespace kt

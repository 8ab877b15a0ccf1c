"""Defects of the kernels and of what is stored for them (csrc/kernels, csrc/formats)."""

from __future__ import annotations

from mutant import Mutant

BF16 = ("kernels/avx2/bf16.cc",)
CODE4 = ("kernels/avx2/code4.cc",)
E4M3 = ("kernels/avx2/e4m3.cc",)
INT8 = ("kernels/avx2/int8_int8.cc",)
CODE4_INT8 = ("kernels/avx2/code4_int8.cc",)
ROWS = ("kernels/avx2/rows.cc",)
INTEGER_ROWS = ("kernels/avx2/integer_rows.cc",)

EXACT = "tests/kernels/test_exact_on_integers.py"
LEFT_OVER = "left_over_from_a_crowd"
EVERY_COUNT = "every_element_is_exact_for_every_token_count"


def exact(which: str) -> tuple[str, ...]:
    return EXACT, "-k", which


def some(file: str, which: str) -> tuple[str, ...]:
    return f"tests/kernels/test_{file}.py", "-k", which


LEFT_OVER_BF16 = exact(f"{LEFT_OVER} and BF16")
LARGE_BF16 = exact(f"{EVERY_COUNT} and BF16 and (192x576 or 95x1409)")
COUNTS_RAWINT4 = exact(f"{EVERY_COUNT} and RAWINT4 and (160x128 or 192x576)")
COUNTS_NVFP4 = exact(f"{EVERY_COUNT} and NVFP4 and 64x64")
COUNTS_FP8 = exact(f"{EVERY_COUNT} and FP8-f32 and (129x127 or 300x130)")
INT8_SUMS = some("integer_sums", "AMXINT8 or RAWINT4")
ONE_TOKEN = some("result_depends_on_the_token_alone", "neighbours and by-int8 and (AMXINT8 or RAWINT4)")
Q4_K = some("gguf_panels", "(whole_numbers or own_code) and Q4_K")
NAN_CODES = some("special_values", "nan_code")
BAD_WEIGHTS = ("tests/kernels/test_bad_weights.py",)
WRITE_BACK = ("tests/kernels/test_write_expert.py",)
SWIGLU = ("tests/kernels/test_swiglu.py",)
CONVERTED = ("tests/convert/test_converted_numbers.py",)
SMALL_ERROR = some("error_is_small", "dtype or rounded")

MUTANTS = (
    # ---- few tokens ----
    Mutant(
        "kernels/few-inl.h",
        "g.store == kt::Store::kAccumulate ? Ops::load(from) : Ops::zero()",
        "Ops::zero()",
        LEFT_OVER_BF16,
        BF16,
    ),
    Mutant(
        "kernels/few-inl.h",
        "walk.go_to(k + (u + 1) * sum_k)",
        "walk.go_to(k + u * sum_k)",
        COUNTS_RAWINT4,
        CODE4,
    ),
    Mutant(
        "kernels/few-inl.h",
        "for (; p < g.panel_count; ++p) few<kTokens, 1>",
        "for (; p + 1 < g.panel_count; ++p) few<kTokens, 1>",
        LARGE_BF16,
        BF16,
    ),
    Mutant(
        "kernels/few-inl.h", "a.group(t, first_sum)->scale", "a.group(0, first_sum)->scale", ONE_TOKEN, INT8
    ),
    Mutant(
        "kernels/few-inl.h",
        "P::open(a.group(t, sum + u))",
        "P::open(a.group(0, sum + u))",
        ONE_TOKEN,
        CODE4_INT8,
    ),
    # ---- many tokens ----
    Mutant(
        "kernels/tiles-inl.h",
        "      if (store == kt::Store::kOverwrite) {\n",
        "      if (true) {\n",
        LARGE_BF16,
        BF16,
    ),
    Mutant(
        "kernels/tiles-inl.h",
        "const bool fresh = k == 0 && store == kt::Store::kOverwrite;",
        "const bool fresh = k == 0;",
        exact(f"{EVERY_COUNT} and FP8_PERCHANNEL and 2048x768"),
        E4M3,
    ),
    Mutant(
        "kernels/tiles-inl.h",
        "first_sum, k == 0 ? store : kt::Store::kAccumulate",
        "first_sum, store",
        INT8_SUMS,
        CODE4_INT8,
    ),
    Mutant(
        "kernels/tiles-inl.h",
        "k == 0 ? g.store : kt::Store::kAccumulate);",
        "g.store);",
        exact(f"{EVERY_COUNT} and FP8_PERCHANNEL and 2048x768"),
        E4M3,
    ),
    Mutant("kernels/tiles-inl.h", "      walk.go_to(k);\n", "", COUNTS_RAWINT4, CODE4),
    Mutant(
        "kernels/tiles-inl.h",
        "block.first / P::sum_of(*g.layout)",
        "0",
        exact(f"{EVERY_COUNT} and AMXINT8 and by-int8"),
        INT8,
    ),
    # ---- panels and scales ----
    Mutant("kernels/panel-inl.h", "t < g.tokens; ++t) column", "t < 1; ++t) column", NAN_CODES, E4M3),
    Mutant(
        "kernels/panel-inl.h",
        "if (k < group_end) return;",
        "if (k <= group_end) return;",
        COUNTS_RAWINT4,
        CODE4,
    ),
    Mutant("kernels/scales-inl.h", "header.factor * 256", "header.factor * 128", COUNTS_NVFP4, CODE4),
    Mutant(
        "kernels/scales-inl.h",
        "Ops::load(record + kt::kPanelRows + row)}",
        "Ops::load(record + row)}",
        Q4_K,
        CODE4_INT8,
    ),
    Mutant("kernels/scales-inl.h", "Ops::set(group->total)", "Ops::zero()", Q4_K, CODE4_INT8),
    Mutant(
        "kernels/scales-inl.h",
        "(group & (groups - 1)) * kGroupBytes",
        "(group & (groups / 2 - 1)) * kGroupBytes",
        Q4_K,
        CODE4_INT8,
    ),
    # ---- rows ----
    Mutant(
        "kernels/rows-inl.h",
        "up = clamp(up, -limit, limit);",
        "up = Ops::min(Ops::set(limit), up);",
        SWIGLU,
        ROWS,
    ),
    Mutant("kernels/rows-inl.h", "Ops::add(up, Ops::set(1.0f))", "up", SWIGLU, ROWS),
    Mutant(
        "kernels/rows-inl.h",
        "Ops::store_activation(Ops::round_bf16(v), to)",
        "Ops::store_activation(v, to)",
        SMALL_ERROR,
        ROWS,
    ),
    Mutant(
        "kernels/rows-inl.h", "s.rows[t] * s.sum_stride", "t * s.sum_stride", exact("skewed and BF16"), ROWS
    ),
    Mutant(
        "kernels/avx2/integer_rows.cc",
        "largest_of(largest) / 127",
        "largest_of(largest) / 128",
        INT8_SUMS,
        INTEGER_ROWS,
    ),
    Mutant(
        "kernels/avx2/integer_rows.cc",
        "static_cast<int16_t>(-offset * second)",
        "static_cast<int16_t>(-offset * first)",
        INT8_SUMS,
        INTEGER_ROWS,
    ),
    Mutant(
        "kernels/avx2/integer_rows.cc",
        "columns - k < sum_k ? columns - k : sum_k",
        "sum_k",
        exact(f"{EVERY_COUNT} and AMXINT8 and by-int8 and not 2048x768 and not 64x4096"),
        INTEGER_ROWS,
    ),
    Mutant(
        "kernels/avx2/quantise.cc",
        "(block + 1) * blocks.block_columns < end ?",
        "false ?",
        CONVERTED,
        ("kernels/avx2/quantise.cc",),
    ),
    Mutant(
        "kernels/avx2/quantise.cc",
        "scale == 0.0f ? 1.0f : scale",
        "scale",
        CONVERTED,
        ("kernels/avx2/quantise.cc",),
    ),
    # ---- what is stored ----
    Mutant("formats/panel.cc", "group % kSmallestStepK != 0 || ", "", BAD_WEIGHTS, ("formats/panel.cc",)),
    Mutant(
        "formats/panel.cc",
        "layout.integer_factor = whole ? 1 : 0.5f;",
        "layout.integer_factor = 1;",
        some("integer_sums", "random_codes and MXFP4"),
        ("formats/panel.cc",),
    ),
    Mutant(
        "formats/panel.cc",
        "if (parts > 1 && part % block != 0 && block % part != 0)",
        "if (parts > 1 && part % block != 0 && false)",
        WRITE_BACK,
        ("formats/panel.cc",),
    ),
    Mutant("formats/panel_scales.cc", "byte == 0 ? 0x0040 : ", "", WRITE_BACK, ("formats/panel_scales.cc",)),
    Mutant(
        "formats/panel_scales.cc",
        "(first + r) / format.rows_per_scale * scales.stride_row",
        "(first + r) * scales.stride_row / format.rows_per_scale",
        COUNTS_FP8,
        ("formats/panel_scales.cc",),
    ),
    Mutant(
        "formats/panel_scales.cc",
        "if (scales.type == ScaleType::kE8m0) require_numbers",
        "if (false) require_numbers",
        BAD_WEIGHTS,
        ("formats/panel_scales.cc",),
    ),
    Mutant(
        "formats/panel_scales.cc",
        "header.nan_rows |= 1u << r;",
        "header.nan_rows = 1u << r;",
        some("special_values", "nan_scale"),
        ("formats/panel_scales.cc",),
    ),
    Mutant(
        "formats/panel_scales.cc",
        "entry(layout, panel, r, part.column / layout.group_k)",
        "entry(layout, panel, r, 0)",
        WRITE_BACK,
        ("formats/panel_scales.cc",),
    ),
    Mutant(
        "formats/panel_scales.cc",
        "return {data, type, 1, static_cast<size_t>(shape.rows)};",
        "return {data, type, static_cast<size_t>(groups_of(layout, shape)), 1};",
        exact(f"{EVERY_COUNT} and GPTQ and (256x640 or 72x304)"),
        ("formats/panel_scales.cc",),
    ),
    Mutant(
        "formats/codes/code4.cc",
        "static_cast<size_t>(source.index) * kPanelRows * 4",
        "static_cast<size_t>(0)",
        exact(f"{EVERY_COUNT} and GPTQ and (256x640 or 72x304)"),
        ("formats/codes/code4.cc",),
    ),
    Mutant(
        "formats/numa_parts.cc",
        "^ 0x88888888u",
        "^ 0x08888888u",
        ("tests/api/test_api_numa_parts.py",),
        ("formats/numa_parts.cc",),
    ),
    Mutant(
        "formats/gguf_panel.cc",
        "bits + 0x7FFF + (bits >> 16 & 1)",
        "bits + 0x8000",
        some("gguf_panels", "written_back"),
        ("formats/gguf_panel.cc",),
    ),
)

"""Operators that SGLang may call and that nobody computes here: pictures, and layers in formats that we keep
ourselves (doc/serving.md). Where a native operator or a twin has a name of this list, that counts.
"""

from __future__ import annotations

ABSENT = {
    # pictures and sound
    "sgl_kernel::apply_multidimensional_rope_cpu": (
        "(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()"
    ),
    "sgl_kernel::conv3d_embed_cpu": "(Tensor x, Tensor weight, Tensor? bias, bool is_vnni) -> Tensor",
    "sgl_kernel::conv3d_embed_weight_pack": "(Tensor weight) -> Tensor",
    "sgl_kernel::flash_attn_varlen_func": (
        "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int "
        "max_seqlen_k, float? softmax_scale=None, bool causal=False) -> Tensor"
    ),
    "sgl_kernel::image_preprocess_cpu": (
        "(Tensor[] images, bool do_convert_rgb, bool do_resize, int shortest_edge, int longest_edge, str "
        "interpolation, bool do_rescale, float rescale_factor, bool do_normalize, float[] image_mean, "
        "float[] image_std, int patch_size, int temporal_patch_size, int merge_size, bool disable_grouping,"
        " ScalarType dtype) -> (Tensor, Tensor)"
    ),
    # formats of weights
    "sgl_kernel::convert_scale_packed": "(Tensor scale) -> Tensor",
    "sgl_kernel::convert_weight_packed_scale_zp": (
        "(Tensor qweight, Tensor qzeros, Tensor scales, int quant_method) -> (Tensor, Tensor, Tensor)"
    ),
    "sgl_kernel::fp8_scaled_mm_cpu": (
        "(Tensor mat1, Tensor mat2, Tensor scales2, int[] block_size, Tensor? bias, ScalarType out_dtype, "
        "bool is_vnni) -> Tensor"
    ),
    "sgl_kernel::fp8_per_tensor_scaled_mm_cpu": (
        "(Tensor mat1, Tensor mat2, Tensor scale2, Tensor? bias, ScalarType out_dtype, bool is_vnni) -> "
        "Tensor"
    ),
    "sgl_kernel::int4_scaled_mm_cpu": (
        "(Tensor x, Tensor w, Tensor w_zeros, Tensor w_scales, Tensor? bias) -> Tensor"
    ),
    "sgl_kernel::int8_scaled_mm_with_quant": (
        "(Tensor mat1, Tensor mat2, Tensor scales2, Tensor? bias, ScalarType out_dtype, bool is_vnni) -> "
        "Tensor"
    ),
    "sgl_kernel::fused_experts_cpu": (
        "(Tensor hidden_states, Tensor w1, Tensor w2, Tensor topk_weights, Tensor topk_ids, bool inplace, "
        "int quant_method, Tensor? w1_scale, Tensor? w2_scale, Tensor? w1_zp, Tensor? w2_zp, int[]? "
        "block_size, Tensor? w1_bias, Tensor? w2_bias, float? alpha, float? limit, bool is_vnni, str? "
        "activation=None) -> Tensor"
    ),
}

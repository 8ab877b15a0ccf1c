"""Stages of a pipeline (--pp-size): each process has some of the layers, and their experts alone."""

from __future__ import annotations

from kt_kernel.integrations.sglang.settings import KTSettings


def last_layer_here(settings: KTSettings) -> int:
    """The last layer with experts of this process's stage; of a draft model, which is in the last one, its
    own.
    """
    from sglang.srt.distributed.utils import get_pp_indices
    from sglang.srt.runtime_context import get_parallel

    layout, parallel = settings.layout, get_parallel()
    if parallel.pp_size == 1 or settings.for_draft_model:
        return layout.moe_layers[-1]
    first, end = get_pp_indices(layout.num_layers, parallel.pp_rank, parallel.pp_size)
    return max((layer for layer in layout.moe_layers if first <= layer < end), default=-1)

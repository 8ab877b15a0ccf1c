"""A plug-in for a test's server: what its draft model's experts are, written to a file once it is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_FILE = "TEST_DRAFT_PROBE"


def install(folder: Path) -> dict[str, str]:
    """Make `folder` a place on Python's path that holds the plug-in; returns the server's environment."""
    from plugin_folder import install_plugin

    return {**install_plugin(folder, Path(__file__)), _FILE: str(answer(folder))}


def answer(folder: Path) -> Path:
    """The file, one JSON object."""
    return folder / "draft.json"


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.model_executor.model_runner.ModelRunner.load_model"
    HookRegistry.register(target, _loaded, HookType.AFTER)


def _loaded(result: Any, runner: Any, *arguments: Any, **options: Any) -> None:
    if runner.is_draft_worker:
        file = Path(os.environ[_FILE])
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(_look_at(runner)))
        unfinished.rename(file)


def _look_at(runner: Any) -> dict[str, Any]:
    """One call of the draft layer's experts, and what both models say of themselves."""
    import torch

    from kt_kernel.integrations.sglang.moe_method import HybridMoEMethod
    from kt_kernel.integrations.sglang.served_model import served_models

    methods = [getattr(module, "quant_method", None) for module in runner.model.modules()]
    (draft,) = [method.hybrid for method in methods if isinstance(method, HybridMoEMethod)]
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, draft.wrapper.hidden_size, generator=generator)
    ids = torch.stack([torch.randperm(draft.num_experts, generator=generator)[:4] for _ in range(5)])
    weights = torch.rand(ids.shape, generator=generator)
    for served in served_models():
        if served.settings.for_draft_model:
            served.begin_step()
    return {
        "hidden": hidden.tolist(),
        "ids": ids.tolist(),
        "weights": weights.tolist(),
        "output": draft.forward(hidden, ids, weights).tolist(),
        "models": [
            {
                "draft": served.settings.for_draft_model,
                "layers": [
                    [layer.layer_idx, list(layer.placement.current.experts)] for layer in served.hybrid.layers
                ],
            }
            for served in served_models()
        ],
    }

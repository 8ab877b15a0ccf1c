"""A GGUF model in ik_llama.cpp, seen at the nodes between which it runs a layer's experts.

llama.cpp's scheduler asks a callback, node by node, whether somebody wants to look. It computes all nodes up
to the wanted one as one graph, then shows it. Wanting the node before the experts' first product and the
weighted sum of their outputs makes each layer's experts a graph of their own: the time between the last
question and the answer is what its threads took for them, and nothing else.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ik_llama
import torch

from kt_kernel.bench.shapes import Call

_BEFORE_EXPERTS, _AFTER_EXPERTS = " (reshaped)", "routed_out-"
_INPUT, _CHOICE, _WEIGHTS = "ffn_inp_normed-", "ffn_moe_topk-", "ffn_moe_weights_norm-"
_LOGGER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@dataclass(frozen=True)
class LayerPass:
    """One layer's experts in one pass: how long, what they were given, what they gave (float32 [T, H])."""

    seconds: float
    call: Call
    output: torch.Tensor


class _Tensor(ctypes.Structure):
    """The beginning of ggml's tensor, as its header declares it."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("backend", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_size_t * 4),
    ]


class Peer:
    """A loaded model, in memory of its own, and an empty context of `context` tokens.

    `repacking`: "rearranged" as its option -rtr does while loading, or "as stored". Raises RuntimeError
    if ik_llama.cpp is not here or does not load the file.
    """

    def __init__(self, path: Path, *, threads: int, context: int, batch: int, repacking: str) -> None:
        folder = ik_llama.find()
        if folder is None:
            raise RuntimeError(ik_llama.ABSENT)
        sys.path.append(str(folder.parent))
        from ik_llama_cpp import _ctypes_api

        self._api = _ctypes_api
        self._ggml = ctypes.CDLL(str(folder / "lib" / "libggml.so"))
        self._ggml.ggml_get_name.restype = ctypes.c_char_p
        self._ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
        self._ggml.ggml_get_data.restype = ctypes.c_void_p
        self._ggml.ggml_get_data.argtypes = [ctypes.c_void_p]
        self._silence()
        self._passes: list[LayerPass] = []
        self._seen: dict[str, int] = {}
        self._call: Call | None = None
        self._asked = 0.0
        self._callback = _ctypes_api.ggml_backend_sched_eval_callback(self._look)
        self._load(path, threads, context, batch, repacking)
        self._position = 0

    def run(self, tokens: Sequence[int]) -> list[LayerPass]:
        """Put `tokens` through the model in one pass, behind those already there; its layers in order."""
        self._passes = []
        self._decode(tokens, logits_from=0)  # or the last layer would run the last token alone
        if not self._passes:
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens showed no layers")
        return self._passes

    def _decode(self, tokens: Sequence[int], logits_from: int) -> None:
        api, count = self._api, len(tokens)
        batch = api.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, self._position + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = int(place >= logits_from)
        result = api.llama_decode(self._context, batch)
        api.llama_batch_free(batch)
        if result:
            raise RuntimeError(f"llama_decode of {count} tokens returned {result}")
        self._position += count

    def forget(self) -> None:
        """Empty the context."""
        self._api.llama_kv_cache_clear(self._context)
        self._position = 0

    def close(self) -> None:
        """Give the memory back."""
        self._api.llama_free(self._context)
        self._api.llama_free_model(self._model)

    # ---- how it is done -----------------------------------------------------------------------

    def _silence(self) -> None:
        self._log = _LOGGER(lambda level, text, user: None)
        with suppress(AttributeError):
            self._api._lib.llama_log_set(self._log, None)

    def _load(self, path: Path, threads: int, context: int, batch: int, repacking: str) -> None:
        api = self._api
        api.llama_backend_init()
        options = api.llama_model_default_params()
        options.use_mmap = False
        options.repack_tensors = repacking == "rearranged"
        self._model = api.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise RuntimeError(f"ik_llama.cpp does not load {path}")
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, batch, batch
        settings.n_threads = settings.n_threads_batch = threads
        self._watch(settings)
        self._context = api.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"ik_llama.cpp makes no context for {path}")

    def _watch(self, settings: Any) -> None:
        settings.cb_eval = self._callback

    def _look(self, tensor: int, asks: bool, user: int) -> bool:  # noqa: FBT001, ggml's signature
        name = self._ggml.ggml_get_name(tensor).decode()
        starts = name.startswith(_INPUT) and name.endswith(_BEFORE_EXPERTS)
        ends = name.startswith(_AFTER_EXPERTS)
        if asks:
            self._seen[name.rstrip("0123456789")] = tensor
            self._asked = time.perf_counter()
        elif starts:
            self._call = Call(
                self._numbers(tensor).bfloat16(),
                self._rows(self._seen[_CHOICE], ctypes.c_int32).long(),
                self._rows(self._seen[_WEIGHTS], ctypes.c_float),
            )
        elif ends:
            seconds = time.perf_counter() - self._asked
            assert self._call is not None
            self._passes.append(LayerPass(seconds, self._call, self._numbers(tensor)))
        return not asks or starts or ends

    def _numbers(self, tensor: int) -> torch.Tensor:
        """A contiguous float32 tensor as [tokens, columns]."""
        columns = _Tensor.from_address(tensor).sizes[0]
        return self._rows(tensor, ctypes.c_float).reshape(-1, columns)

    def _rows(self, tensor: int, kind: type) -> torch.Tensor:
        """A copy of rows of 4-byte elements that may lie apart: [tokens, columns]."""
        head = _Tensor.from_address(tensor)
        columns, rows, depth = head.sizes[0], head.sizes[1], head.sizes[2]
        if depth > 1:  # [columns, 1, tokens]
            rows, stride = depth, head.strides[2]
        else:
            stride = head.strides[1]
        step = stride // 4
        count = (rows - 1) * step + columns
        memory = (kind * count).from_address(self._ggml.ggml_get_data(tensor))
        return torch.frombuffer(memory, dtype=_DTYPES[kind]).as_strided((rows, columns), (step, 1)).clone()


class WholeModel(Peer):
    """The model as its own programs run it: nobody looks between its layers."""

    def _watch(self, settings: Any) -> None:
        pass

    def seconds(self, prompt: Sequence[int], new_tokens: int) -> tuple[float, float]:
        """Of the prompt, and of each further token after it, from an empty context; logits of the last alone.

        Which tokens follow does not change the work: they are the prompt's, not sampled.
        """
        self.forget()
        begin = time.perf_counter()
        self._decode(prompt, logits_from=len(prompt) - 1)
        between = time.perf_counter()
        for place in range(new_tokens):
            self._decode([prompt[place % len(prompt)]], logits_from=0)
        return between - begin, (time.perf_counter() - between) / max(new_tokens, 1)


_DTYPES = {ctypes.c_float: torch.float32, ctypes.c_int32: torch.int32}

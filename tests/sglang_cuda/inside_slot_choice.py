"""Runs in a process of its own: which slots stand beside a layer's own, by what the trial says."""

from __future__ import annotations

import logging

from inside_slots import _on_rank, enter


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def check_choice(capability: str) -> None:
    """Native where the trial is right; decoded, said once, where it fails; weight-only for other kernels."""
    enter(capability)
    import layers
    from slot_checkpoints import CASES

    from kt_kernel.integrations.sglang import device_check
    from kt_kernel.integrations.sglang.device_experts import SglangExperts, resident_format, spare_experts

    warnings = _Warnings()
    device_check.logger.addHandler(warnings)
    case = CASES["NVFP4 of ModelOpt"]
    own_kernels = {"9.0": "auto", "10.0": "flashinfer_cutlass"}[capability]

    def slots(trial, count=3):
        device_check.difference = trial
        device_check._verdicts.clear()
        warnings.said.clear()
        return [spare_experts(layer, layer.quant_method, count, case.encoding) for _ in range(2)]

    def fails(*_):
        raise RuntimeError("no kernel image is available")

    with _on_rank(own_kernels, 0, 1):
        layers.EXPERTS, layers.HIDDEN, layers.INTERMEDIATE = (
            3,
            case.encoding.hidden,
            case.encoding.intermediate,
        )
        layer = layers.make_layer(case.config())
        if capability == "9.0":
            layer.quant_method.process_weights_after_loading(layer)
        for trial, kind, said in (
            (lambda *_: 0.0, "MarlinNvfp4", 0),
            (lambda *_: 0.5, "Unquantised", 1),
            (fails, "Unquantised", 1),
        ):
            made = slots(trial)
            assert [type(experts.filled_as).__name__ for experts in made] == [kind] * 2
            # Another kind of kernels is tried, too, and has a sentence of its own.
            assert said <= len(warnings.said) <= 2 * said, warnings.said
            assert all(experts.layer.w13_weight.shape[0] == 3 for experts in made)
            resident = resident_format(layer, layer.quant_method, case.encoding)
            if capability == "9.0" and kind == "MarlinNvfp4":
                own = SglangExperts(layer, layer.quant_method, 3, resident)
                assert made[0].takes_slots_of(own)
            else:
                assert resident is None
    print("chosen")

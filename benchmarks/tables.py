"""The tables of measurements on the pages, made from the files in `benchmarks/results`.

A page has a table between the lines `<!-- results: NAME -->` and `<!-- /results -->`.
"""

from derive import (
    Table,
    Tried,
    beside_fastest_of_others,
    decode_by_model,
    every,
    has,
    pivot,
    speed_and_memory,
    then,
    with_kinds_of_collectives,
    with_percent,
    with_worst_gradient,
)

SHAPE = "{B}, {T}, {H}, {K}"
MODEL = "{layers} x {width}"
TIMES = {"forward ms": "{forward_ms:.2f}", "forward + backward ms": "{forward_backward_ms:.2f}"}
ERRORS = {"o": "{error_o:.1e}", "gradients": "{error_gradients:.1e}"}

OPERATOR_TIMES = pivot(("operator",), ("direction", "implementation"), ("ms", "floor_ms"))
RUNS = pivot(
    ("step", "million_tokens"),
    ("weight_decay",),
    ("held_out_bits_per_byte", "training_bits_per_byte"),
)
PEER_STEPS = then(
    speed_and_memory,
    pivot(("layers", "width", "batch_size", "sequence_length"), ("peer",), ("speed",)),
)

OPERATORS = {
    "operator": "{operator}",
    "forward: kernel, XLA, floor, ms": "{forward_mosaic_gpu_ms:.3f}, {forward_xla_ms:.3f}, "
    "{forward_mosaic_gpu_floor_ms:.3f}",
    "backward: kernel, XLA, floor, ms": "{backward_mosaic_gpu_ms:.3f}, {backward_xla_ms:.3f}, "
    "{backward_mosaic_gpu_floor_ms:.3f}",
}
FROM_WHAT_FORWARD_KEEPS = {
    "from what the forward keeps": ", ".join(
        f"{{backward_from_what_the_forward_keeps_{name}:.3f}}"
        for name in ("mosaic_gpu_ms", "xla_ms", "mosaic_gpu_floor_ms")
    )
}
BATCH = "{batch_size} x {sequence_length}"
TRAINING = {
    "model": f"{MODEL}, {{parameters_millions:,}} million parameters",
    "batch": BATCH,
    "tokens/s": "{tokens_per_s:,}",
    "ms": "{ms_per_step:.1f}",
    "GiB planned": "{planned_gib:.1f}",
    "GiB measured": "{peak_gib:.1f}",
}

TABLES = {
    "wkv7-cpu": Table(
        ("wkv7-cpu",),
        {
            "B, T, H, K": SHAPE,
            "implementation": "{implementation}",
            **TIMES,
            "MiB": "{temp_mib:.0f}",
            **ERRORS,
        },
    ),
    "wkv7-h200": Table(
        ("wkv7-h200",),
        {
            "B, T, H, K": SHAPE,
            "forward, ms": "{forward_ms:.3f}",
            "forward + backward, ms": "{forward_backward_ms:.3f}",
            "floor, ms": "{floor_forward_ms:.2f}, {floor_forward_backward_ms:.2f}",
            "fastest of others, ms": "{other} {other_forward_ms:.3g}, "
            "{other_forward_backward_ms:.3g}",
        },
        beside_fastest_of_others,
    ),
    "wkv7-all-h200": Table(
        ("wkv7-h200",),
        {
            "B, T, H, K": SHAPE,
            "implementation": "{implementation}",
            "forward, ms": "{forward_ms:.3f}",
            "forward + backward, ms": "{forward_backward_ms:.3f}",
            "MiB": "{temp_mib:.0f}",
            **ERRORS,
        },
        has(B=...),
    ),
    "wkv7-nsight-h100": Table(
        ("wkv7-nsight-h100",),
        {
            "Kernel": "{kernel}",
            "shared memory": "{shared_memory_percent} %",
            "tensor cores": "{tensor_cores_percent} %",
            "issue of instructions": "{issue_percent} %",
            "bandwidth of memory": "{memory_percent} %",
            "barriers": "{barriers_percent} %",
            "instructions": "{instructions_percent} %",
        },
    ),
    "wkv7-hard-tokens": Table(
        ("wkv7-hard-tokens",),
        {
            "Tokens, T = 2500": "{described}",
            "kernels: o, largest gradient": "{mosaic_gpu_error_o:.1e}, {mosaic_gpu_worst}",
            '`precision="high"`': "{high_precision_error_o:.1e}, {high_precision_worst}",
            "FLA": "{FLA_error_o:.1e}, {FLA_worst}",
            "jax-linear-attention": "{jax_linear_attention_error_o:.1e}, "
            "{jax_linear_attention_worst}",
        },
        then(
            has(tokens=...),
            with_worst_gradient,
            pivot(("tokens", "described"), ("implementation",), ("error_o", "worst")),
        ),
    ),
    "operators-h200": Table(
        ("operators-h200",), OPERATORS | FROM_WHAT_FORWARD_KEEPS, OPERATOR_TIMES
    ),
    "operators-h100": Table(("operators-h100",), OPERATORS, OPERATOR_TIMES),
    "model-curves": Table(
        ("model-numerics-h200",),
        {
            "curves": "{curves}",
            "mean difference": "{mean_difference:.4f}",
            "largest difference": "{largest_difference:.4f}",
        },
        has(curves=...),
    ),
    "model-gradients": Table(
        ("model-numerics-h200",),
        {
            "tokens": "{tokens}",
            "parameter": "{parameter}",
            "error with kernels": "{error:.1e}",
            "ratio to XLA": "{ratio:.2f} ± {ratio_standard_error:.2f}",
            "of single models": "{smallest_ratio:.2f} to {largest_ratio:.2f}",
            "median of all parameters": "{median_ratio:.2f}",
            "XLA without excess precision": (
                "{ratio_of_other:.2f} ± {ratio_of_other_standard_error:.2f}"
            ),
        },
        has(parameter=...),
    ),
    "two-layers": Table(
        ("two-layers-h200",),
        {
            "tokens": "{tokens}",
            "largest ratio of a parameter": "{worst_ratio:.2f}",
            "median ratio": "{median_ratio:.2f}",
        },
    ),
    "train-step-h200": Table(
        ("train-step-h200",), TRAINING | {"first step after, s": "{first_step_s:.0f}"}
    ),
    "train-step-cpu": Table(
        ("train-step-cpu",),
        {
            "code": "{code}",
            "tokens/s": "{tokens_per_s:,}",
            "ms per step": "{ms_per_step:.1f}",
            "GiB planned": "{planned_gib}",
        },
    ),
    "trainer-h200": Table(
        ("trainer-h200",),
        {"program": "`{program}`", "tokens/s": "{tokens_per_s:,}"},
    ),
    "run-debian-h200": Table(
        ("run-debian-h200", "run-debian-weight-decay-h200"),
        {
            "step": "{step:,}",
            "million tokens": "{million_tokens:.0f}",
            "weight decay 1: held out, in training": "{1_held_out_bits_per_byte:.3f}, "
            "{1_training_bits_per_byte:.3f}",
            "0.1: held out, in training": "{0_1_held_out_bits_per_byte:.3f}, "
            "{0_1_training_bits_per_byte:.3f}",
        },
        then(every(2500), RUNS),
    ),
    "train-step-h100": Table(
        ("train-step-h100",),
        {
            "vocabulary": "{vocab_size:,}",
            "`remat`": "{remat}",
            **TRAINING,
            "compile s": "{compile_s:.0f}",
        },
    ),
    "peers-train-step-h200": Table(
        ("peers-train-step-h200",),
        {
            "model": MODEL,
            "batch": BATCH,
            "RWKV-LM: tokens/s, GiB": "{RWKV_LM_speed}",
            "FLA: tokens/s, GiB": "{FLA_speed}",
        },
        PEER_STEPS,
    ),
    "train-step-changes-h200": Table(
        ("train-step-changes-h200",),
        {"change": "{change}", "ms per step": "{ms_per_step:.1f}"},
    ),
    "train-step-fused-h200": Table(
        ("train-step-fused-h200",),
        {"run": "{run}", "change": "{change}", "ms per step": "{ms_per_step:.1f}"},
    ),
    "train-step-profile-h200": Table(
        ("train-step-profile-h200",),
        {
            "operator": "{operator}",
            "forward": "{forward_ms:.1f}",
            "again": "{again_ms:.1f}",
            "backward": "{backward_ms:.1f}",
            "all": "{all_ms:.1f}",
            "floor": "{floor_ms:.1f}",
        },
    ),
    "decode-h200": Table(
        ("decode-h200",),
        {
            "Model": MODEL,
            "one row, ms per token": "{ms_1:.2f}",
            "128 rows, tokens/s": "{tokens_per_s_128:,}",
            "reading 2,048 tokens, tokens/s": "{prefill_tokens_per_s:,}",
        },
        decode_by_model,
    ),
    "peers-decode-h200": Table(
        ("peers-decode-h200",),
        {
            "Model": MODEL,
            "peer": "{peer}",
            "one row, ms per token": "{ms:.2f}",
            "128 rows, tokens/s": "{tokens_per_s_128:,}",
            "reading 2,048 tokens, tokens/s": "{prefill_tokens_per_s:,}",
        },
    ),
    "decode-copy-share": Table(
        ("decode-h100", "decode-h200"),
        {
            "Model": MODEL,
            "GPU": "{gpu}",
            "a copy, TB/s": "{1_copy_tb_per_s}",
            "one row": "{1_percent} %",
            "128 rows": "{128_percent} %",
        },
        then(
            has(measure="decode", implementation="mosaic_gpu"),
            with_percent,
            pivot(("layers", "width", "gpu"), ("batch",), ("percent", "copy_tb_per_s")),
        ),
    ),
    "decode-ratios": Table(
        ("decode-ratios",),
        {"": "{what}", "GPU": "{gpu}", "ratio": "{ratio}"},
    ),
    "wkv7-recurrent-h200": Table(
        ("wkv7-recurrent-h200",),
        {
            "B, T": "{B}, {T}",
            "scan: forward, with backward, ms": "{recurrent_forward_ms:.3f}, "
            "{recurrent_forward_backward_ms:.3f}",
            "kernel: forward, with backward, ms": "{recurrent_mosaic_gpu_forward_ms:.3f}, "
            "{recurrent_mosaic_gpu_forward_backward_ms:.3f}",
        },
        pivot(("B", "T"), ("implementation",), ("forward_ms", "forward_backward_ms")),
    ),
    "chat": Table(
        ("chat-h200", "chat-cpu"),
        {
            "Device": "{device}",
            "model": MODEL,
            "first text, ms": "{first_ms:.0f}",
            "tokens/s": "{tokens_per_s:,.0f}",
            "whole reply, s": "{reply_s:.2f}",
        },
    ),
    "finetuning-cpu": Table(
        ("finetuning-cpu",),
        {
            "": "{tune}",
            "before": "{before_bits_per_byte:.2f}",
            "after": "{after_bits_per_byte:.2f}",
        },
    ),
    "parallel-plan-h100": Table(
        ("parallel-plan-h100",),
        {
            "model, rows of each GPU, `remat`": "{model}",
            "GPUs": "{gpus}",
            "mesh": "{mesh}",
            "GiB": "{planned_gib:.1f}",
            "GB that each GPU sends in a step": "{sent}",
            "forecast, ms": "{forecast_ms:.1f}",
        },
        with_kinds_of_collectives,
    ),
    "parallel-h200x2": Table(
        ("parallel-h200x2",),
        {
            "case": "{case}",
            "devices": "{devices}",
            "tokens/s": "{tokens_per_s:,}",
            "for each device": "{tokens_per_s_per_device:,}",
            "ms per step": "{ms_per_step:.1f}",
            "in collectives, ms": "{collectives_ms:.1f}",
            "exposed": "{exposed_percent:.1f} %",
        },
    ),
    "checkpoint-memory-cpu": Table(
        ("checkpoint-memory-cpu",),
        {
            "Model": "{model}",
            "Parameters, MiB": "{parameters_mib}",
            "Anonymous memory, peak, MiB": "{anonymous_mib}",
            "With mapped pages of the file, peak, MiB": "{mapped_mib}",
        },
    ),
    "official-code-cpu": Table(
        ("official-code-cpu",),
        {"": "{what}", "largest difference": "{difference:.1e}"},
    ),
}

LISTS = {
    name: Tried((name,))
    for name in ("tried-wkv7", "tried-xla", "tried-operators", "tried-decode", "tried-parallel")
}

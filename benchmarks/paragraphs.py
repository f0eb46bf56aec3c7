"""Sentences with measurements, made from the files in `benchmarks/results` like the tables."""

import dataclasses
from collections.abc import Callable
from typing import Any

from derive import Table, Tried, cell, has, wrap
from results import Row, read_results
from tables import LISTS, TABLES


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Sentences of a page.

    Attributes:
      files: whose numbers they show.
      markdown: returns the sentences.
      named: whether a line names the files, as below a table.
    """

    files: tuple[str, ...]
    markdown: Callable[[], str]
    named: bool = False


def _row(file: str, **wanted: Any) -> Row:
    (row,) = has(**wanted)(read_results(file).rows)
    return row


def _one_and_many(words: str, of_one: str = "") -> list[Row]:
    """Returns the row of one device, and the first row of several that has these words.

    The row of one device is the last one before it, and has the words `of_one`.
    """
    one: Row = {}
    for row in read_results("parallel-h200x2").rows:
        if row["devices"] == 1:
            one = row
        elif words in row["case"] and of_one in one["case"]:
            return [one, row]
    raise ValueError(f"no row of several devices has {words!r} after one with {of_one!r}")


LARGE = {"B": 8, "T": 4096, "H": 64, "K": 64}
MIDDLE = {**LARGE, "H": 32}


def cost_of_high_precision() -> str:
    """Says how long WKV7 takes in high precision."""
    kernels, high = (
        _row("wkv7-h200", implementation=name, **LARGE) for name in ("mosaic_gpu", "high precision")
    )
    shape = ", ".join(str(high[axis]) for axis in "BTHK")
    return wrap(
        f"At {shape} on an H200 it takes {high['forward_ms']:.1f} ms forward and "
        f"{high['forward_backward_ms']:.1f} ms with the backward, the kernels "
        f"{kernels['forward_ms']:.1f} and {kernels['forward_backward_ms']:.1f} ms."
    )


def caption() -> str:
    """Says where the numbers of the main figure come from."""
    ours, peers = read_results("train-step-h200"), read_results("peers-train-step-h200")
    step = _row("train-step-h200", layers=24, width=1024)
    return wrap(
        f"A model of {step['layers']} x {step['width']} trains with {step['tokens_per_s']:,} tokens/s on "
        f"one H200. WKV7 is measured at 8 rows of 4,096 tokens with 32 heads of 64, training at 8 x "
        f"4,096 tokens (12 x 768: 16 x 512), all in bfloat16 on NVIDIA H200s, ours with JAX "
        f"{ours.versions['jax']}, others with torch {peers.versions['torch']} and Triton "
        f"{peers.versions['triton']}, their own CUDA, or JAX, in different runs. Ours keep matrix products and "
        f'compute the rest again (`remat="dots"`); the others keep everything. '
        f"[All measurements](docs/performance.md) are files in [benchmarks/results](benchmarks/results), "
        f"with date, versions, commit and command."
    )


def errors() -> str:
    """Returns a table of errors on random and on hard tokens."""
    random = [
        cell(
            "{error_o:.1e}, {error_gradients:.1e}", _row("wkv7-h200", implementation=name, **LARGE)
        )
        for name in ("mosaic_gpu", "high precision", "FLA", "jax-linear-attention")
    ]
    lines = [
        "| bfloat16: relative RMS error of outputs, of the worst gradient | kernels "
        '| `precision="high"` | FLA | jax-linear-attention |',
        "| --- | --- | --- | --- | --- |",
        f"| random tokens | {' | '.join(random)} |",
        *TABLES["wkv7-hard-tokens"].markdown().splitlines()[2:],
    ]
    return "\n".join(lines)


def losses() -> str:
    """Lists where others, or plain XLA, are better."""
    kernel = _row("wkv7-h200", implementation="mosaic_gpu", **LARGE)
    middle, xla = (
        _row("wkv7-h200", implementation=name, **MIDDLE) for name in ("mosaic_gpu", "xla, bounded")
    )
    shift = {
        x["implementation"]: x["ms"]
        for x in has(operator="token shift, 6 mixes", direction="forward")(
            read_results("operators-h200").rows
        )
    }
    one_row = {"measure": "decode", "implementation": "mosaic_gpu", "batch": 1}
    share = _row("decode-h200", layers=24, width=1024, **one_row)["share_of_copy"]
    parallel_keys, in_turn = (
        _row("wkv7-hard-tokens", implementation="mosaic_gpu", tokens=tokens)
        for tokens in ("nearly parallel keys", "three tokens in turn")
    )
    scan, recurrent = (
        _row("wkv7-recurrent-h200", implementation=name, B=128, T=1)["forward_backward_ms"]
        for name in ("recurrent", "recurrent, mosaic_gpu")
    )
    cpu = {x["implementation"]: x["forward_ms"] for x in has(T=2048)(read_results("wkv7-cpu").rows)}
    (chat,) = read_results("chat-cpu").rows
    one, two = (row["tokens_per_s"] for row in _one_and_many("fsdp"))
    first_step = _row("train-step-h200", layers=24, width=1024)["first_step_s"]
    ratio = kernel["forward_backward_ms"] / kernel["floor_forward_backward_ms"]
    slower = xla["forward_backward_ms"] / middle["forward_backward_ms"]
    items = (
        f"**GPUs that are not Hopper, and TPUs, have no kernels.** There everything runs through XLA, which on "
        f"an H200 takes {slower:.0f} times as long for WKV7 (8 x 4096 tokens, 32 heads, forward and "
        "backward). FLA's Triton kernels run on such GPUs, too.",
        "**Hard tokens in 16 bits.** Where keys are nearly parallel and little is forgotten, the kernels' "
        f"outputs are off by {100 * parallel_keys['error_o']:.1f} %; where tokens take turns, the gradient "
        f'of b by {100 * in_turn["error_db"]:.0f} %. `precision="high"` avoids that, through XLA.',
        cell(
            "**Random tokens in 16 bits.** Outputs of the kernels are off by {kernel:.1e}, those of FLA by {FLA:.1e} "
            "and those of jax-linear-attention by {jla:.1e}.",
            {
                name: _row("wkv7-h200", implementation=who, **LARGE)["error_o"]
                for name, who in (
                    ("kernel", "mosaic_gpu"),
                    ("FLA", "FLA"),
                    ("jla", "jax-linear-attention"),
                )
            },
        ),
        f"**WKV7 is {ratio:.1f} times above the floor of memory traffic** "
        f"({kernel['forward_backward_ms']:.1f} instead of {kernel['floor_forward_backward_ms']:.1f} ms at 8, 4096, 64 "
        "on an H200).",
        "**Where little is forgotten, WKV7 is slower.** Such chunks take float16, and about a tenth more time. "
        "The tables are for random tokens, which forget more.",
        f"**Some kernels do not pay.** Token shift with six mixes takes {shift['mosaic_gpu']:.3f} ms forward, "
        f"XLA {shift['xla']:.3f}; one token of 128 rows of `wkv7_recurrent` with its backward takes "
        f"{recurrent:.2f} ms, the scan through XLA {scan:.2f}.",
        f"**One row of a small model does not fill a GPU.** Decoding 24 x 1024 moves its weights and states at "
        f"{100 * share:.0f} % of the rate of a copy on an H200.",
        f"**On a CPU, outputs alone** are faster by the plain scan ({cpu['reference']:.1f} ms) than in chunks "
        f"({cpu['xla, bounded']:.1f} ms, 2,048 tokens, 4 heads); chunks pay with gradients.",
        f"**Chat on a CPU is slow.** A model of {chat['layers']} x {chat['width']} in float32 writes "
        f"{chat['tokens_per_s']:.0f} tokens/s on two virtual cores.",
        f"**More than two GPUs are not measured.** Two H200s with FSDP are {two / one:.2f} times as fast as one.",
        f"**Compiling takes time**: the first step of 24 unrolled layers ends {first_step:.0f} s after the start.",
        "**Not there**: quantised weights, RWKV-7a and 7b, and kernels for rows of more than 128 keys per head.",
    )
    return "\n".join(wrap(item, "- ", "  ") for item in items)


def errors_of_kernels() -> str:
    """Says how exact WKV7's kernels are."""
    rows = has(implementation="mosaic_gpu", B=...)(read_results("wkv7-h200").rows)
    narrow, wide = has(K=64)(rows), has(K=128)(rows)
    errors = {
        "o": max(row["error_o"] for row in rows),
        "narrow": max(row["error_gradients"] for row in narrow),
        "wide": max(row["error_gradients"] for row in wide),
    }
    return wrap(
        cell(
            "Errors of the kernels are at most {o:.1e} in outputs and {narrow:.1e} in gradients ({wide:.1e} with "
            "128 keys).",
            errors,
        )
    )


def wide_heads() -> str:
    """Compares heads of 128 with heads of 64."""
    shape = {"implementation": "mosaic_gpu", "B": 8, "T": 4096}
    narrow, wide = (_row("wkv7-h200", **shape, H=H, K=K) for H, K in ((32, 64), (16, 128)))
    forward, both = (wide[x] / narrow[x] for x in ("forward_ms", "forward_backward_ms"))
    return wrap(
        f"16 heads of 128 take {forward:.1f} times as long as 32 heads of 64 in the forward, and {both:.1f} "
        "times as long with the backward, measured in different runs."
    )


def quick_start() -> str:
    """Says what `goose-jax train` learns."""
    (row,) = read_results("quick-start-cpu").rows
    return wrap(
        f"Held-out text goes from {row['before_bits_per_byte']:.2f} to {row['after_bits_per_byte']:.2f} bits per "
        "byte."
    )


def two_devices() -> str:
    """Compares the speed of two devices with that of one."""
    short, long = _one_and_many("context")
    short_million, million = _one_and_many("1,048,576")
    part, whole = _one_and_many("tensor")

    def ratio(words: str, of_one: str) -> str:
        one, many = _one_and_many(words, of_one)
        return f"{many['tokens_per_s'] / one['tokens_per_s']:.2f}"

    def share(many: Row, few: Row) -> float:
        return many["tokens_per_s_per_device"] / few["tokens_per_s_per_device"]

    return wrap(
        f"Two devices of `data` are {ratio('data', 'another')} times as fast as one device with layers one after "
        f"another, {ratio('data', 'loop')} times with layers in a loop; two of `fsdp` are {ratio('fsdp', 'another')} "
        f"and {ratio('fsdp', 'loop')} times as fast, with the wide model {ratio('fsdp', '24 x 2048')} times. "
        f"With the long row, each device has {share(long, short):.2f} of the speed that it has with short rows, "
        f"with a row of a million tokens {share(million, short_million):.2f}. "
        f"One device takes {part['ms_per_step']:.0f} ms for half of the layers of the widest model, two devices of "
        f"`tensor` {whole['ms_per_step']:.0f} ms for all of them: by layers, two are "
        f"{2 * whole['tokens_per_s'] / part['tokens_per_s']:.2f} times as fast."
    )


def end_of_a_long_row() -> str:
    """Compares the loss at the end of long rows with that of one device."""
    sentences = []
    for length in ("131,072", "1,048,576"):
        _, row = _one_and_many(length)
        sentences.append(
            f"Of the row of {length} tokens, the mean loss of the last 4,096 is {row['loss_together']:.5f} on "
            f"two devices, and {row['loss_in_pieces']:.5f} on one that reads the row in pieces and carries the "
            f"state; without the tokens before it is {row['loss_alone']:.5f}."
        )
    return wrap(" ".join(sentences))


BLOCKS: dict[str, Table | Tried | Paragraph] = {
    **TABLES,
    **LISTS,
    "wkv7-errors": Paragraph(("wkv7-h200",), errors_of_kernels),
    "wkv7-wide-heads": Paragraph(("wkv7-h200",), wide_heads),
    "wkv7-high-precision": Paragraph(("wkv7-h200",), cost_of_high_precision, named=True),
    "quick-start": Paragraph(("quick-start-cpu",), quick_start, named=True),
    "parallel-speed": Paragraph(("parallel-h200x2",), two_devices),
    "parallel-long-rows": Paragraph(("parallel-h200x2",), end_of_a_long_row),
    "readme-caption": Paragraph(("train-step-h200", "peers-train-step-h200"), caption),
    "readme-errors": Paragraph(("wkv7-h200", "wkv7-hard-tokens"), errors),
    "readme-losses": Paragraph(
        (
            *("wkv7-h200", "operators-h200", "wkv7-cpu", "chat-cpu"),
            *(
                "wkv7-hard-tokens",
                "decode-h200",
                "wkv7-recurrent-h200",
                "parallel-h200x2",
                "train-step-h200",
            ),
        ),
        losses,
    ),
}

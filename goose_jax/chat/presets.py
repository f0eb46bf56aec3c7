"""Settings of sampling that are recommended for the official chat models (G1).

Sources:

- `API_DEMO_CHAT.py` in https://github.com/BlinkDL/ChatRWKV (January 2026): "demo".
- The README of the package `rwkv`, version 0.8.32, whose example is a prompt that ends with
  `<think`: "think".
- https://rwkv.cn/RWKV-Prompts/RWKV-Parameters: "precise", and, from the model card of the G1
  models, "chat", "creative" (top_p 0.6 to 0.8 there) and "tools" (the models G1f from 1.5B on).

All are meant for the order of filters of the package `rwkv`, which is the default of
`SamplingConfig`.
"""

from typing import Literal

from goose_jax.generation import SamplingConfig

type SamplingPreset = Literal["demo", "think", "chat", "creative", "precise", "tools"]
"""The names of `SAMPLING_PRESETS`."""

SAMPLING_PRESETS: dict[SamplingPreset, SamplingConfig] = {
    "demo": SamplingConfig(
        temperature=1.0,
        top_p=0.3,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        penalty_decay=0.996,
    ),
    "think": SamplingConfig(temperature=1.0, top_p=0.5, top_k=100, penalty_decay=0.997),
    "chat": SamplingConfig(
        temperature=1.0,
        top_p=0.5,
        presence_penalty=2.0,
        frequency_penalty=0.1,
        penalty_decay=0.99,
    ),
    "creative": SamplingConfig(
        temperature=0.6,
        top_p=0.7,
        presence_penalty=2.0,
        frequency_penalty=0.2,
        penalty_decay=0.99,
    ),
    "precise": SamplingConfig(temperature=0.3, top_p=0.3, penalty_decay=0.996),
    "tools": SamplingConfig(temperature=0.0),
}
"""The settings by name; `goose-jax chat --preset` takes a name."""


__all__ = ["SAMPLING_PRESETS", "SamplingPreset"]

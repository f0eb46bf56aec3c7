import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from goose_jax import RWKV7Config
from goose_jax.config import OFFICIAL_MODELS

SMALL = {"vocab_size": 257, "hidden_size": 128, "num_layers": 2}


@pytest.mark.parametrize(
    ("hidden_size", "ranks"),
    [
        (128, (32, 32, 32, 64)),
        (768, (64, 64, 32, 128)),
        (1024, (64, 64, 64, 160)),  # 2.5 multiples of 32 round to 2, not 3
        (2048, (128, 128, 64, 224)),
    ],
)
def test_low_rank_widths_are_the_official_ones(hidden_size, ranks):
    config = RWKV7Config(vocab_size=1, hidden_size=hidden_size, num_layers=1)
    widths = (config.decay_rank, config.alpha_rank, config.value_rank, config.gate_rank)
    assert widths == ranks


def test_defaults():
    config = RWKV7Config(**SMALL)
    assert config.intermediate_size == 512
    assert config.num_heads == 2
    assert config.head_norm_eps == pytest.approx(64e-5, rel=1e-12)
    assert RWKV7Config(**SMALL, head_size=32).head_norm_eps == pytest.approx(32e-5, rel=1e-12)
    assert RWKV7Config(**SMALL, head_size=32).num_heads == 4
    assert config == RWKV7Config(**SMALL, decay_rank=32)
    assert hash(config) == hash(RWKV7Config(**SMALL))


@pytest.mark.parametrize(
    ("name", "layers", "hidden_size", "ranks", "mebibytes"),
    [  # with the size of the released file, which holds bfloat16 and little else
        ("0.1B", 12, 768, (64, 64, 32, 128), 365),
        ("0.4B", 24, 1024, (64, 64, 32, 128), 860),
        ("1.5B", 24, 2048, (96, 96, 64, 256), 2914),
        ("2.9B", 32, 2560, (96, 96, 64, 320), 5896273469 / 2**20),
        ("7.2B", 32, 4096, (128, 128, 96, 480), 13733),
        ("13.3B", 61, 4096, (192, 192, 128, 384), 26540868485 / 2**20),
    ],
)
def test_presets_have_the_sizes_of_the_released_files(name, layers, hidden_size, ranks, mebibytes):
    config = RWKV7Config.preset(name)
    assert (config.num_layers, config.hidden_size) == (layers, hidden_size)
    assert (config.vocab_size, config.head_size) == (65536, 64)
    assert ranks == (config.decay_rank, config.alpha_rank, config.value_rank, config.gate_rank)
    numbers = number_of_released_parameters(65536, layers, hidden_size, *ranks)
    assert 2 * numbers / 2**20 == pytest.approx(mebibytes, rel=5e-4, abs=0.7)


def number_of_released_parameters(V, L, C, decay, alpha, value, gate):
    """Counts the official tensors; a release leaves out the first layer's value residual."""
    time_mix = 4 * C * C + 2 * C * (decay + alpha + gate) + 6 * C + 2 * C + 3 * C + 2 * C
    channel_mix = 2 * C * 4 * C + C
    norms = 2 * 2 * C
    return 2 * V * C + 4 * C + L * (time_mix + channel_mix + norms) + (L - 1) * (2 * C * value + C)


@pytest.mark.parametrize("name", ["7a", "rwkv7a-g1d-0.1b-20260212-ctx8192", "RWKV-7B-0.1B"])
def test_experimental_families_are_refused_by_name(name):
    with pytest.raises(ValueError, match=r"is RWKV-7[ab], which is experimental .*DeepEmbed"):
        RWKV7Config.preset(name)


def test_official_models_are_named_after_their_sizes():
    for name, model in OFFICIAL_MODELS.items():
        size, date, context = re.fullmatch(
            r"rwkv7-g1[a-z]-([\d.]+b)-(\d{8})-ctx(\d+)", model.file
        ).groups()
        assert (size.upper(), int(context)) == (name, model.context_length)
        assert date >= "20260129"


def test_preset_overrides():
    config = RWKV7Config.preset("0.1B", vocab_size=257, hidden_size=1024, remat="full")
    assert (config.vocab_size, config.num_layers, config.remat) == (257, 12, "full")
    assert config.intermediate_size == 4096
    assert (config.value_rank, config.gate_rank) == (64, 160)  # of the formula
    assert RWKV7Config.preset("0.4B", gate_rank=7).gate_rank == 7
    with pytest.raises(ValueError, match=r"name='0\.2B' is unknown"):
        RWKV7Config.preset("0.2B")


def test_dictionary_round_trip():
    choices = {"implementation": "reference", "precision": "high"}
    config = RWKV7Config(**SMALL, gate_rank=7, remat="dots", **choices)
    values = json.loads(json.dumps(config.to_dict()))
    assert values["decay_rank"] == 32
    assert RWKV7Config.from_dict(values) == config
    assert RWKV7Config.from_dict(SMALL) == RWKV7Config(**SMALL)
    with pytest.raises(ValueError, match=r"unknown=\['hiden_size'\] and missing=\['hidden_size'\]"):
        RWKV7Config.from_dict({"vocab_size": 1, "hiden_size": 64, "num_layers": 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": -1}, "vocab_size must be an integer >= 1, got -1"),
        ({"vocab_size": 257.0}, "vocab_size must be an integer >= 1, got 257.0"),
        ({"num_layers": 0}, "num_layers must be an integer >= 1, got 0"),
        ({"num_layers": True}, "num_layers must be an integer >= 1, got True"),
        ({"hidden_size": 100}, r"self.head_size=64 must .* divide self.hidden_size=100"),
        ({"head_size": 48}, r"self.head_size=48 must .* divide self.hidden_size=128"),
        ({"head_size": 1}, "self.head_size=1 must be at least 2"),
        ({"intermediate_size": 0}, "intermediate_size must be an integer >= 1, got 0"),
        ({"gate_rank": -32}, "gate_rank must be an integer >= 1, got -32"),
        ({"norm_eps": 0.0}, "norm_eps must be a number > 0, got 0.0"),
        ({"head_norm_eps": "1"}, "head_norm_eps must be a number > 0, got '1'"),
        ({"param_dtype": "int8"}, "param_dtype must be one of .*, got 'int8'"),
        ({"param_dtype": jnp.int8}, "param_dtype must be one of .*, got <class .*int8"),
        ({"compute_dtype": "fp32"}, "compute_dtype must be one of .*, got 'fp32'"),
        ({"compute_dtype": 32}, "compute_dtype must be one of .*, got 32"),
        ({"compute_dtype": {"names": 3}}, "compute_dtype must be one of .*, got {'names': 3}"),
        ({"compute_dtype": None}, "compute_dtype must be one of .*, got None"),
        ({"compute_dtype": np.dtype("i4,f4")}, "compute_dtype must be one of .*, got dtype"),
        ({"param_dtype": np.float64}, "param_dtype='float64' needs .*jax_enable_x64"),
        ({"compute_dtype": "float64"}, "compute_dtype='float64' needs .*jax_enable_x64"),
        ({"remat": "some"}, "self.remat='some' must be one of"),
        ({"implementation": 3}, "self.implementation=3 must be None or one of .*'xla'"),
        ({"implementation": "triton"}, "self.implementation='triton' must be None or one of"),
        ({"implementation": ("xla", None)}, "self.implementation=.* must be None or one of"),
        ({"precision": "highest"}, "precision must be None or 'high', got 'highest'"),
        (
            {"precision": "high", "implementation": "mosaic_gpu"},
            "self.precision='high' is not what self.implementation='mosaic_gpu' offers",
        ),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        RWKV7Config(**(SMALL | values))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("bfloat16", "bfloat16"),
        (jnp.bfloat16, "bfloat16"),
        (jnp.dtype("bfloat16"), "bfloat16"),
        (jnp.float32, "float32"),
        (np.float32, "float32"),
        (np.dtype("<f4"), "float32"),
        ("f4", "float32"),
        (float, "float32"),  # JAX's default float
        (np.float16, "float16"),
    ],
)
def test_every_form_of_a_dtype_is_kept_as_its_name(dtype, name):
    config = RWKV7Config(**SMALL, param_dtype=dtype, compute_dtype=dtype)
    assert (config.param_dtype, config.compute_dtype) == (name, name)
    assert config == RWKV7Config(**SMALL, param_dtype=name, compute_dtype=name)
    assert hash(config) == hash(RWKV7Config.from_dict(json.loads(json.dumps(config.to_dict()))))
    assert dataclasses.replace(RWKV7Config(**SMALL), param_dtype=dtype).param_dtype == name
    assert RWKV7Config.preset("0.1B", param_dtype=dtype).param_dtype == name


def test_it_is_frozen_and_float64_is_allowed_where_jax_has_it():
    config = RWKV7Config(**SMALL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3
    with jax.enable_x64(True):
        assert RWKV7Config(**SMALL, compute_dtype="float64").compute_dtype == "float64"
        assert RWKV7Config(**SMALL, compute_dtype=float).compute_dtype == "float64"

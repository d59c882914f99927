"""What is measured, and on what: shapes by preset, and how the machine is to be used. Imports no torch."""

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any

from jsae_lightning.errors import UserError
from jsae_lightning.tiny_lm import NAME as TINY_LM

DTYPES = ("float32", "bf16-mixed")
DEVICES = ("auto", "cpu", "cuda")
AXES = ("tokens", "d_sae", "k", "d_mlp")
"""The sizes that a sweep doubles."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one step: a batch, an MLP and a pair of SAEs of equal width and k."""

    tokens: int
    d_model: int
    d_mlp: int
    d_sae: int
    k: int
    gated: bool
    activation: str
    """A key of `activation_functions.ACTIVATIONS`."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise UserError(f"--{name.replace('_', '-')}: {value} is no positive whole number: raise it")
        if self.k > self.d_sae:
            raise UserError(f"--k: {self.k} is more than the {self.d_sae} latents: lower it or raise --d-sae")

    @property
    def coef(self) -> float:
        """The penalty's weight: the paper's rule, 0.5 k^2 / d_model."""
        return 0.5 * self.k**2 / self.d_model

    def scaled(self, axis: str, factor: int) -> "Shape":
        """Return this shape with one of its sizes multiplied."""
        return dataclasses.replace(self, **{axis: factor * getattr(self, axis)})


@dataclass(frozen=True)
class ModelSpec:
    """A language model without weights: its configuration in numbers, and the layer whose MLP input is wanted."""

    layer: int
    context_length: int
    name: str | None = None
    """A model that comes with the package, in place of `config`."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of transformers' configuration of `config["model_type"]`."""


@dataclass(frozen=True)
class Preset:
    """A shape, and the language model that it is taken from."""

    shape: Shape
    model: ModelSpec


def _neox(layers: int, heads: int, d_model: int, d_mlp: int) -> dict[str, Any]:
    """The Pythia models' configuration."""
    return {
        "model_type": "gpt_neox",
        "hidden_size": d_model,
        "intermediate_size": d_mlp,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "vocab_size": 50304,
    }


_GEMMA_2_2B = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "num_hidden_layers": 26,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "vocab_size": 256000,
}

PRESETS = {
    "tiny": Preset(Shape(4096, 128, 512, 2048, 16, False, "gelu"), ModelSpec(2, 256, name=TINY_LM)),
    "70m": Preset(Shape(4096, 512, 2048, 16384, 32, False, "gelu"), ModelSpec(3, 2048, config=_neox(6, 8, 512, 2048))),
    "410m": Preset(
        Shape(4096, 1024, 4096, 65536, 32, False, "gelu"), ModelSpec(15, 2048, config=_neox(24, 16, 1024, 4096))
    ),
    "gemma-2-2b": Preset(
        Shape(4096, 2304, 9216, 36864, 32, True, "gelu_tanh"), ModelSpec(12, 1024, config=_GEMMA_2_2B)
    ),
}
"""The default run's shape, the paper's two, and a gated MLP; models, layers and widths are those of `conf/`."""


@dataclass(frozen=True)
class Settings:
    """How to measure: everything but the shape. Plain values, so that another process can be told."""

    preset: str
    dtype: str = "float32"
    kernels: str = "auto"
    device: str = "auto"
    threads: int | None = None
    """None: as many as torch takes by itself."""
    repeats: int = 5
    seed: int = 0


def choose_shape(preset: str, **changes: Any) -> Shape:
    """Return the preset's shape with those sizes replaced that are not None; raise UserError for impossible ones."""
    return dataclasses.replace(PRESETS[preset].shape, **{key: v for key, v in changes.items() if v is not None})

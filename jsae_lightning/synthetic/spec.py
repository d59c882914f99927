"""What a synthetic language model is made of: plain numbers, checked without torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from jsae_lightning.errors import UserError

ACTIVATION_NAMES = ("relu", "gelu", "gelu_tanh")
_WHOLE = (
    "d_model", "n_in", "n_out", "group_size", "inputs_per_output", "active_groups", "vocab_size", "document_length",
    "num_documents",
)  # fmt: skip
_ORDERED = ("threshold", "weight", "magnitude")
_ABOVE_ZERO = ("weight_low", "magnitude_low", "readout_scale")


@dataclass
class SyntheticSpec:
    """The keys of `model.synthetic`; what they mean and their values stand in `conf/model/synthetic.yaml`."""

    seed: int
    d_model: int
    n_in: int
    n_out: int
    group_size: int
    inputs_per_output: int
    active_groups: int
    activation: str
    threshold_low: float
    threshold_high: float
    weight_low: float
    weight_high: float
    negative_share: float
    magnitude_low: float
    magnitude_high: float
    vocab_size: int
    document_length: int
    num_documents: int
    readout_scale: float

    @property
    def groups_in(self) -> int:
        """Groups of input features."""
        return self.n_in // self.group_size

    @property
    def groups_out(self) -> int:
        """Groups of output features."""
        return self.n_out // self.group_size

    def to_dict(self) -> dict[str, Any]:
        """Return the keys and values as JSON holds them."""
        return asdict(self)


def make_spec(values: Mapping[str, Any]) -> SyntheticSpec:
    """Turn the keys of `model.synthetic` into a checked `SyntheticSpec`.

    Raises UserError, naming the key, for keys that are missing or unknown and for values that fit no computation.
    """
    known = [entry.name for entry in fields(SyntheticSpec)]
    for key in values:
        if key not in known:
            raise UserError(f"model.synthetic.{key}: there is no such key: correct it; the keys are {', '.join(known)}")
    missing = [key for key in known if key not in values]
    if missing:
        raise UserError(f"model.synthetic.{missing[0]}: is missing: give it, or choose model=synthetic")
    spec = SyntheticSpec(**values)
    _check_values(spec)
    _check_groups(spec)
    return spec


def _check_values(spec: SyntheticSpec) -> None:
    for key in _WHOLE:
        value = getattr(spec, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"model.synthetic.{key}: {value!r} is not above zero: give a whole number from 1")
    for key in _ABOVE_ZERO:
        if not getattr(spec, key) > 0:
            raise UserError(f"model.synthetic.{key}: {getattr(spec, key)} is not above zero: give a positive number")
    for name in _ORDERED:
        low, high = getattr(spec, f"{name}_low"), getattr(spec, f"{name}_high")
        if low > high:
            raise UserError(f"model.synthetic.{name}_low: {low} is more than {name}_high, {high}: lower it")
    if not 0 <= spec.negative_share <= 1:
        raise UserError(f"model.synthetic.negative_share: {spec.negative_share} is not a share: give 0 to 1")
    if spec.activation not in ACTIVATION_NAMES:
        raise UserError(
            f"model.synthetic.activation: {spec.activation!r} is not known: choose one of {', '.join(ACTIVATION_NAMES)}"
        )


def _check_groups(spec: SyntheticSpec) -> None:
    for key in ("n_in", "n_out"):
        if getattr(spec, key) % spec.group_size:
            raise UserError(
                f"model.synthetic.{key}: {getattr(spec, key)} is no multiple of group_size, {spec.group_size}: change "
                "one of them"
            )
    if spec.groups_in < spec.inputs_per_output:
        raise UserError(
            f"model.synthetic.inputs_per_output: {spec.inputs_per_output} inputs of different groups, but n_in = "
            f"{spec.n_in} makes {spec.groups_in} groups of {spec.group_size}: lower it or raise n_in"
        )
    if spec.groups_in % spec.active_groups:
        raise UserError(
            f"model.synthetic.active_groups: {spec.active_groups} does not divide the {spec.groups_in} groups of input "
            "features (n_in / group_size): change it or n_in"
        )

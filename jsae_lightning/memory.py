"""How much memory training takes at its peak, estimated from shapes before it starts.

Of a training step, in bytes, with p parameters of b bytes each (16 p at b = 4: weights, gradients, Adam's two moments),
S latents, T tokens of a micro-batch, k active latents, and m hidden units a slice (`kernels.cpu_jacobian.slice_units`):

    kept       what the forward pass leaves to the backward one: inputs, outputs, reconstructions, errors (6 T d_model),
               the slopes (T d_mlp each), latents (T k) and the Jacobian with what the penalty makes of it (5 T k^2)
    forward    4 b p + kept + the largest of: an encoder's pre-activations (T S; on a CPU those of the T' <= T tokens of
               a chunk, and 3/2 S d_model for copies of the weights where bfloat16 products screen them), the MLP's
               hidden values (3 T d_mlp), a slice of the projections of both dictionaries ((1 + terms) S m)
    backward   3 b p + kept + that slice and its gradient + the gradients of two weights (2 S d_model); b p of gradients
               replaces all this as it grows
    optimizer  4 b p + Adam's temporaries of one weight (3 S d_model)

The step takes the largest of the three. For float32 that is at most 16 p + 8 T S + kept: the slices are chosen so.
Triton's and the plain kernels (`reference`) project whole dictionaries (m = d_mlp), which may take more; the plain ones
gather rows of (T, k, d_model) and (T, k, d_mlp) besides.
AuxK's part is left out: no latent is dead before `sae.dead_after_tokens`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jsae_lightning.kernels.cpu import chunk_tokens
from jsae_lightning.kernels.cpu_jacobian import slice_units
from jsae_lightning.kernels.cpu_topk import screening_pays

LIBRARIES_BYTES = 900_000_000
"""What Python, torch, Lightning, transformers, matplotlib and the others take in a process on a CPU, measured."""
FIRST_STEP_BYTES = 170_000_000
"""Of these, what torch loads only when a step is made first, measured."""
HEAP_BYTES = 2**25
"""The C library gives a freed tensor of up to this size back to the process, not to the system."""
HEAP_TENSORS = 4
"""About so many weights' worth of such memory lie idle between a step's tensors, measured."""
MAX_LOGITS_ELEMENTS = 2**26
"""Elements of the logits that an evaluation judges at a time (`splicing.MAX_ELEMENTS`)."""


@dataclass(frozen=True)
class StepShape:
    """The sizes that decide on a training step's memory, of one rank."""

    tokens: int
    """Of a micro-batch."""
    d_model: int
    d_mlp: int
    d_sae: int
    d_sae_output: int
    k: int
    k_output: int
    gated: bool
    penalty: bool
    kernels: str
    """Which implementation: `cpu` and `triton` gather in blocks; `cpu` slices d_mlp and tokens, too."""
    precision: str = "32-true"
    """Lightning's name: 32-true, bf16-mixed, 16-mixed, 64-true."""

    @property
    def params(self) -> int:
        """Trained parameters."""
        both = self.d_sae + self.d_sae_output
        return 2 * both * self.d_model + both + 2 * self.d_model

    @property
    def bound(self) -> int:
        """16 bytes a parameter and two float32 tensors of (tokens, d_sae): with a constant, the most a step takes."""
        return 16 * self.params + 8 * self.tokens * max(self.d_sae, self.d_sae_output)


def step_phases(shape: StepShape) -> dict[str, int]:
    """Return the bytes that each phase of a training step holds; see the module's docstring."""
    wide, terms = max(shape.d_sae, shape.d_sae_output), 2 if shape.gated else 1
    size = 8 if shape.precision.startswith("64") else 4
    kept = 6 * shape.tokens * shape.d_model + 3 * shape.tokens * (shape.k + shape.k_output)
    encoders = _encoding(shape, shape.d_sae, shape.k), _encoding(shape, shape.d_sae_output, shape.k_output)
    forward, backward = max(*encoders, 3 * shape.tokens * shape.d_mlp), wide * shape.d_model
    if shape.penalty:
        kept += shape.tokens * (terms * shape.d_mlp + 5 * shape.k * shape.k_output)
        units = slice_units(shape.tokens, shape.d_model, shape.d_mlp, terms)
        units = units if shape.kernels == "cpu" else shape.d_mlp
        projections = (shape.d_sae_output + terms * shape.d_sae) * units
        forward = max(forward, projections)
        backward = 2 * projections + (shape.d_sae + shape.d_sae_output) * shape.d_model
    if shape.kernels == "reference":
        kept += shape.tokens * (shape.k + shape.k_output) * shape.d_model
        backward = max(backward, shape.tokens * wide)
        if shape.penalty:
            gathered = shape.tokens * shape.d_mlp * (shape.k_output + terms * (shape.k_output + shape.k))
            kept, backward = kept + gathered, backward + gathered
    casts = 2 * shape.params if shape.precision.endswith("mixed") else 0  # autocast's copies of the weights
    weight = wide * shape.d_model
    return {
        "forward": size * (4 * shape.params + kept + forward) + casts,
        "backward": size * (3 * shape.params + kept + backward) + casts,
        "optimizer": size * (4 * shape.params + 3 * weight),
    }


def _encoding(shape: StepShape, d_sae: int, k: int) -> int:
    """Return how many numbers an encoder holds at a time."""
    if shape.kernels != "cpu":
        return shape.tokens * d_sae
    products = chunk_tokens(shape.tokens, d_sae) * d_sae
    screened = shape.precision.startswith("32") and screening_pays(shape.tokens, shape.d_model, d_sae, k)
    return products + (3 * d_sae * shape.d_model // 2 if screened else 0)


def step_bytes(shape: StepShape) -> int:
    """Return the peak of a training step on a CPU: its largest phase, and what the C library keeps of freed tensors."""
    weight = 4 * max(shape.d_sae, shape.d_sae_output) * shape.d_model
    return max(step_phases(shape).values()) + HEAP_TENSORS * min(weight, HEAP_BYTES)


@dataclass(frozen=True)
class LanguageModelShape:
    """The language model, and the sizes of its forward passes."""

    num_bytes: int
    """Of its weights."""
    itemsize: int
    """Bytes of one of its numbers."""
    d_model: int
    d_mlp: int
    vocab_size: int
    pass_tokens: int
    """Tokens of a forward pass that makes activations."""
    evaluation_tokens: int
    """Tokens of a forward pass of an evaluation, all of which have logits."""


def activation_pass_bytes(model: LanguageModelShape) -> int:
    """Bytes of a forward pass up to the layer: about 8 tensors of d_model and 3 of d_mlp a token."""
    return model.pass_tokens * (8 * model.d_model + 3 * model.d_mlp) * model.itemsize


def evaluation_bytes(model: LanguageModelShape) -> int:
    """Bytes of a forward pass of an evaluation: clean and spliced logits in float32, and 5 tensors to judge a part."""
    logits = model.evaluation_tokens * model.vocab_size
    own = logits * model.itemsize if model.itemsize < 4 else 0  # before they are made float32
    hidden = model.evaluation_tokens * (8 * model.d_model + 3 * model.d_mlp) * model.itemsize
    return 4 * (2 * logits + 5 * min(logits, MAX_LOGITS_ELEMENTS)) + own + hidden


def run_parts(
    shape: StepShape, model: LanguageModelShape, *, block_bytes: int, prefetch: bool, on_cpu: bool
) -> Mapping[str, int]:
    """Return what a rank holds at its peak, in bytes, by name; the sum is the estimate.

    libraries        on a CPU only: a GPU's own context is not reckoned
    language model   its weights, and the float32 copy of the layer's MLP
    activations      the block that is served, and with `prefetch` the one that is made
    step             `step_bytes`; where a pass of the language model or an evaluation needs more beside the parameters
                     and moments, that; with `prefetch` a pass runs beside the step
    """
    step, lasting = step_bytes(shape), 16 * shape.params
    filling, evaluation = activation_pass_bytes(model), evaluation_bytes(model)
    peak = max(step + filling if prefetch else step, lasting + filling, lasting + evaluation)
    mlp = (3 if shape.gated else 2) * shape.d_model * shape.d_mlp * 4
    return {
        "libraries": LIBRARIES_BYTES if on_cpu else 0,
        "language model": model.num_bytes + mlp,
        "activations": block_bytes * (2 if prefetch else 1),
        "step": peak,
    }


def describe(parts: Mapping[str, int]) -> str:
    """One line for the log."""
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
    return f"memory: about {sum(parts.values()) / 1e9:.2f} GB at the peak of training ({listed})"

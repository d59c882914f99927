"""The frozen language model: loading, the MLP's input at one layer, and splicing tensors back in.

Training and evaluation load models here and nowhere else, on raw weights (no folding of norms, no centring), so that
both see the same activations. The model is a transformers model inside a TransformerBridge that hooks norms and MLPs
only: attention stays transformers' own, at its speed.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from jsae_lightning.architecture import Architecture, check_layer, load_config, read_architecture
from jsae_lightning.bridge import check_mlp, extract_mlp, wrap
from jsae_lightning.cache_files import bytes_hash
from jsae_lightning.errors import UserError
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.model_files import model_folder
from jsae_lightning.model_loading import load_tokenizer, load_weights
from jsae_lightning.random_weights import fresh_model, redraw_matrices
from jsae_lightning.torch_devices import usable_device

__all__ = ["Architecture", "LanguageModel", "check_layer", "load_tokenizer", "read_architecture"]

Splice = Callable[[Float[Tensor, "batch seq d_model"]], Float[Tensor, "batch seq d_model"]]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class LanguageModel:
    """A frozen language model, hooked at the MLP of one layer.

    Attributes: `name`, `revision`, `layer`, `architecture`, `device`, and `frozen_mlp`, the layer's MLP as a
    `FrozenMLP` in float32 on `device`. No nn.Module on purpose: it must enter neither a checkpoint nor DDP, and
    `train()` must not wake its dropout. Build it in the process that uses it; it cannot be pickled. Several threads may
    use it, one forward pass at a time.
    """

    def __init__(
        self,
        bridge: Any,
        frozen_mlp: FrozenMLP,
        *,
        name: str,
        revision: str | None,
        layer: int,
        architecture: Architecture,
        device: torch.device,
    ) -> None:
        """Use `LanguageModel.load`."""
        self._bridge = bridge
        self.frozen_mlp = frozen_mlp
        self.name, self.revision, self.layer = name, revision, layer
        self.architecture, self.device = architecture, device
        self._lock = threading.RLock()  # the hooks of one forward pass are on the model while it runs

    @classmethod
    def load(
        cls,
        name_or_path: str,
        *,
        layer: int,
        revision: str | None = None,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        random_weights: bool | Literal["full"] = False,
        seed: int = 0,
        synthetic: Mapping[str, Any] | None = None,
    ) -> "LanguageModel":
        """Load a Hugging Face model, local or from the hub, and check that its MLP is one that we can write down.

        `layer` counts from 0; `dtype` (a key of DTYPES or its value) is the language model's own, whatever its files
        hold.
        `random_weights=True` redraws its weight matrices under `seed` (`redraw_matrices`), `"full"` initialises it
        afresh from its configuration (no weights are read or downloaded). With `synthetic` (the keys of
        `model.synthetic`) the model is made, not read: a `SyntheticLanguageModel`, of one layer and in float32 only.
        Raises UserError for everything that `read_architecture` refuses, a device that is not there, a layer out of
        range, missing, corrupt or incomplete weights, an unsupported activation, and an MLP whose formula does not give
        the model's own output.
        """
        device = usable_device(device)
        dtype = str(dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise UserError(f"model.dtype: {dtype!r} is not a floating-point type: choose one of {', '.join(DTYPES)}")
        if random_weights not in (False, True, "full"):
            raise UserError(f"model.random_weights: {random_weights!r} is unknown: choose one of false, true, full")
        architecture = read_architecture(name_or_path, revision=revision, synthetic=synthetic)
        check_layer(architecture, layer)
        if synthetic is not None:
            if dtype != "float32" or random_weights is not False:
                raise UserError(
                    f"model.synthetic: the model is made in float32 with weights of its own, but model.dtype is "
                    f"{dtype} and model.random_weights {random_weights}: leave them float32 and false"
                )
            from jsae_lightning.synthetic.language_model import SyntheticLanguageModel

            return SyntheticLanguageModel(synthetic, device=device)
        folder = model_folder(name_or_path, revision=revision, part="config" if random_weights == "full" else "weights")

        def make_model() -> Any:
            model: Any
            if random_weights == "full":
                model = fresh_model(load_config(folder, name_or_path), seed=seed, dtype=DTYPES[dtype])
            else:
                model = load_weights(folder, name_or_path, DTYPES[dtype])
            if random_weights is True:
                redraw_matrices(model, d_model=architecture.d_model, seed=seed)
            return model.to(device).eval()

        tokens = _check_tokens(architecture).to(device)
        with _own_precision(device), _exact_products():
            bridge = wrap(make_model, tokens)
            frozen_mlp = extract_mlp(bridge, layer).to(device)
            check_mlp(bridge, layer, frozen_mlp, tokens)
        return cls(
            bridge,
            frozen_mlp,
            name=name_or_path,
            revision=revision,
            layer=layer,
            architecture=architecture,
            device=device,
        )

    @torch.no_grad()
    def mlp_in(self, tokens: Int64[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_model"]:
        """Return the tensor that enters the layer's MLP, after its norm, as float32; later layers are not run.

        Raises UserError for tokens that the model has not, as `check_tokens` says.
        """
        from transformer_lens.model_bridge.exceptions import StopAtLayerException

        self.check_tokens(tokens)
        captured: list[Tensor] = []

        def stop(tensor: Tensor, hook: Any) -> None:
            captured.append(tensor)
            raise StopAtLayerException(tensor)

        self._run(tokens, [("hook_in", stop)], return_type=None)
        return captured[0].reshape(*tokens.shape, -1).float()

    @torch.no_grad()
    def logits(
        self,
        tokens: Int64[Tensor, "batch seq"],
        *,
        replace_mlp_in: Splice | None = None,
        replace_mlp_out: Splice | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Return next-token logits as float32, with the layer's MLP input or output, or both, replaced.

        Each callable gets the tensor at its site, (batch, seq, d_model) in float32, and returns what takes its place;
        the MLP then runs on the replaced input. The identity leaves the logits bit-identical. Raises UserError for
        tokens that the model has not, as `check_tokens` says.
        """
        self.check_tokens(tokens)
        hooks = [
            (site, _splice(replace, tokens.shape))
            for site, replace in (("hook_in", replace_mlp_in), ("hook_out", replace_mlp_out))
            if replace is not None
        ]
        return self._run(tokens, hooks, return_type="logits").float()

    @property
    def num_bytes(self) -> int:
        """Bytes of its parameters and buffers."""
        tensors = chain(self._bridge.parameters(), self._bridge.buffers())
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    @property
    def itemsize(self) -> int:
        """Bytes of one of its parameters' numbers."""
        return next(iter(self._bridge.parameters())).element_size()

    def weights_hash(self) -> str:
        """Hash (hex) of every parameter and buffer, in the model's dtype, and of the settings that they are used with.

        The same on every device, and for two folders that hold the same model.
        """
        settings = {
            name: value
            for name, value in self._bridge.original_model.config.to_dict().items()
            if name not in ("_name_or_path", "transformers_version")
        }
        parts = [json.dumps(settings, sort_keys=True, default=str)]
        for name, tensor in chain(self._bridge.named_parameters(), self._bridge.named_buffers()):
            parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {bytes_hash(tensor)}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def check_tokens(self, tokens: Any) -> None:
        """Raise UserError unless these are rows of token ids of this model, no longer than its context."""
        if not isinstance(tokens, Tensor):
            raise UserError(f"tokens: is a {type(tokens).__name__}, not a tensor: give torch.tensor([ids, ids, ...])")
        if tokens.dtype not in (torch.int64, torch.int32) or tokens.ndim != 2 or not tokens.numel():
            raise UserError(
                f"tokens: is {tokens.dtype} of shape {list(tokens.shape)}, not int64 of (batch, seq): give "
                "torch.tensor([ids, ids, ...]), rows of token ids"
            )
        length, vocab = self.architecture.context_length, self.architecture.vocab_size
        if tokens.shape[1] > length:
            raise UserError(
                f"tokens: rows of {tokens.shape[1]:,}, but {self.name} has a context of {length:,}: cut them into rows "
                "of at most that"
            )
        low, high = torch.stack(torch.aminmax(tokens)).tolist()  # one wait for the device
        if low < 0 or high >= vocab:
            raise UserError(
                f"tokens: there is an id {low if low < 0 else high:,}, but {self.name} knows 0 to {vocab - 1:,}: take "
                "the ids of its own tokenizer"
            )

    def _run(self, tokens: Tensor, hooks: list[tuple[str, Callable]], *, return_type: str | None) -> Any:
        sites = [(f"blocks.{self.layer}.mlp.{site}", hook) for site, hook in hooks]
        with self._lock, _own_precision(self.device):
            return self._bridge.run_with_hooks(
                tokens.to(self.device), fwd_hooks=sites, return_type=return_type, use_cache=False
            )


def _splice(replace: Splice, shape: torch.Size) -> Callable:
    """Wrap `replace` as a hook; some architectures flatten (batch, seq) at the MLP, and the model has its own dtype."""

    def hook_function(tensor: Tensor, hook: Any) -> Tensor:
        replaced = replace(tensor.reshape(*shape, -1).float())
        return replaced.to(tensor.dtype).reshape(tensor.shape)

    return hook_function


def _own_precision(device: torch.device) -> torch.autocast:
    """Keep the trainer's autocast out: the activations must not depend on who calls."""
    return torch.autocast(device.type, enabled=False)


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Keep TF32 out while two computations are compared."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _check_tokens(architecture: Architecture) -> Tensor:
    """A few random tokens to compare two computations on, always the same."""
    size = (2, min(16, architecture.context_length))
    return torch.randint(architecture.vocab_size, size, generator=torch.Generator().manual_seed(0))

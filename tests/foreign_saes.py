"""SAEs of other projects for the tests: what their packages wrote (`converted/`), and small ones by hand."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from jsae_lightning.conversion import dictionary_learning, saelens, sparsify
from jsae_lightning.conversion.sites import Sites
from jsae_lightning.conversion.writing import Origin
from jsae_lightning.sae import TopKSAE

CONVERTED = Path(__file__).parent / "converted"
FORMATS = {
    "saelens": saelens,
    "saelens_plain": saelens,
    "saelens_rescaled": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
}
SITES = Sites("base.layers.2.norm", "base.layers.2.mlp", "base")
ORIGIN = Origin(
    {
        "model": {"name": "team/model", "layer": 2, "revision": "main", "dtype": "float32", "mlp_kind": "plain"},
        "jacobian": {"coef": 0.5, "penalty": "l1"},
        "recipe": {"sae.mse_output_coef": 2.0},
        "data": {"path": "team/data", "context_length": 64, "bos": "sequence"},
    },
    SITES,
    prepends_bos=True,
)


def dense(sae: TopKSAE, x: torch.Tensor) -> torch.Tensor:
    latents = sae.encode(x)
    return torch.zeros(len(x), sae.d_sae, dtype=latents.values.dtype).scatter_(1, latents.indices, latents.values)


def paper_folder(folder: Path, **config) -> Path:
    """A pair of one dimension: x -> latents (x, -x) at the input, (2 x + 1, 0) at the output."""
    tensors = {
        "_W_enc": [[1.0, -1.0]], "_b_enc": [0.0, 0.0], "_W_dec": [[1.0], [-1.0]], "_b_dec": [1.0],
        "_W_enc_out": [[2.0, 0.0]], "_b_enc_out": [1.0, 0.0], "_W_dec_out": [[1.0], [1.0]], "_b_dec_out": [0.0],
    }  # fmt: skip
    folder.mkdir()
    save_file({name: torch.tensor(value) for name, value in tensors.items()}, folder / "sae_weights.safetensors")
    base = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 1}, "d_in": 1, "d_sae": 2}
    (folder / "cfg.json").write_text(json.dumps(base | config))
    return folder

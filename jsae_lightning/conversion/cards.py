"""The README.md of a pair in another project's format."""

from jsae_lightning.conversion.sparsify import folder_name
from jsae_lightning.conversion.writing import Origin, by_side
from jsae_lightning.sae import SAEPair

_PROJECTS = {
    "saelens": ("SAELens", 'SAE.load_from_disk("{folder}")'),
    "sparsify": ("EleutherAI's sparsify", 'SparseCoder.load_from_disk("{folder}")'),
    "dictionary_learning": ("dictionary_learning", 'load_dictionary("{folder}", "cpu")'),
    "paper": ("the published code of Jacobian Sparse Autoencoders (arXiv 2502.18147)", None),
}
_SITES = (
    "Module names are those of the model in transformers. The MLP's input is what enters it after its norm, gain",
    "included; its output is what leaves it, before any further norm and before it is added to the residual stream.",
)


def card(form: str, origin: Origin, pair: SAEPair) -> str:
    """Return the text: what each folder holds, where its activations are, and how it is loaded."""
    project, call = _PROJECTS[form]
    model, folders = origin.model, {side: _folder(form, side, origin) for side in by_side(pair)}
    layer = "?" if model.get("layer") is None else model["layer"]
    revision = f", revision `{model['revision']}`" if model.get("revision") else ""
    drawn = " with its weights drawn at random" if model.get("random_weights") else ""
    lines = [
        "# Jacobian SAE pair",
        "",
        f"Two TopK sparse autoencoders on the input and output of the MLP in layer {layer} of "
        f"`{model.get('name') or '?'}`{revision}{drawn}, in the format of {project}.",
        "",
        "| SAE | folder | d_model | latents | k | activations |",
        "|---|---|---|---|---|---|",
    ]
    for side, sae in by_side(pair).items():
        site = origin.hook_name(side)
        where = f"output of the module `{site}`" if site else f"the MLP's {side}"
        lines.append(f"| {side} | `{folders[side]}` | {sae.d_model} | {sae.d_sae} | {sae.k} | {where} |")
    lines += ["", *_SITES]
    if call is not None:
        lines += ["", "```python", *(call.format(folder=folder) for folder in folders.values()), "```"]
    return "\n".join([*lines, ""])


def _folder(form: str, side: str, origin: Origin) -> str:
    if form == "paper":
        return "."
    return folder_name(side, origin) if form == "sparsify" else side

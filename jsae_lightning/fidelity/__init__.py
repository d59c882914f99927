"""Is the sparse graph the computation? Ablations, shapes of scalar functions, curvature, and curves over kept edges.

J is a first-order statement about one token. `ablation` asks whether it predicts finite changes, `linearity` and
`curvature` how straight the functions behind it are, `edge_curves` how few of its edges can stand for the MLP.
"""

from jsae_lightning.fidelity.run import FidelityResult, run_fidelity

__all__ = ["FidelityResult", "run_fidelity"]

"""A language model with one MLP whose sparse graph is known: what a pair finds can be compared with the truth.

`spec` (its parameters), `computation` (features, graph and MLP), `tokens` (which features a sequence of tokens
activates), `language_model` (the model around the MLP), `documents` (token sequences sampled from it).
"""

NAME = "synthetic"
"""What the model is called where a name is expected; it is never looked for on the hub."""

"""What the server imports once from which `running` forks processes."""

from jsae_lightning.lasting_imports import lasting_imports

with lasting_imports():
    import datasets  # noqa: F401
    import transformer_lens  # noqa: F401

    import jsae_lightning.building  # noqa: F401
    import running  # noqa: F401

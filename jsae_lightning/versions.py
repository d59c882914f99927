"""The versions that a result was made with."""

import platform
from importlib.metadata import version

from jsae_lightning import __version__

_PACKAGES = ("torch", "lightning", "transformers", "transformer-lens", "datasets")


def package_versions() -> dict[str, str]:
    """Return the versions of this package, Python, and the packages that figures depend on."""
    own = {"jsae_lightning": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in _PACKAGES}

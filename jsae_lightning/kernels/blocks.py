"""How the kernels for processors cut what is large into what is worked on at a time."""


def blocks(total: int, size: int) -> list[slice]:
    """Return slices of `size`, at least 1, that cover `total` in order; the last one has what is left."""
    size = max(1, size)
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]

"""Compile every Triton kernel, as training launches it, for cards that need not be there; one printed line for each.

Forward and backward run on CPU tensors, and each launch compiles the kernel instead of running it: what is printed is
the kernel, the architecture, the shape's name, a digest of the specialisation, bytes of shared memory and of the
stack (registers that were spilled), and the number of atomic instructions.

    python tests/compile_triton.py 90 80:k32        (every shape for 9.0, one for 8.0)
"""

import contextlib
import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton as triton_package
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from jsae_lightning.kernels import triton

_TYPES = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
_TYPES |= {torch.int32: "*i32"}
SHAPES = {  # k_out, k_in, d_model, d_mlp
    "k1": (1, 16, 64, 256),
    "k32": (32, 32, 512, 2048),
    "k50": (50, 40, 30, 100),
    "k100": (100, 128, 64, 256),
}
KINDS = [  # dtype, autocast to bfloat16, TF32; the first two for every shape
    (torch.float32, True, False),
    (torch.float32, False, False),
    (torch.float32, False, True),
    (torch.float64, False, False),
    (torch.bfloat16, False, False),
]


def record_compilations(architectures: list[int], label: list[str], lines: set[str]) -> None:
    """Replace the launch of a kernel by its compilation for each architecture of the (changing) list."""

    def run(self, *args, grid, warmup, num_stages=3, **kwargs):
        bound = dict(zip(self.arg_names, args, strict=False)) | kwargs
        signature, constants, hints = {}, {}, {}
        for place, parameter in enumerate(self.params):
            value = bound[parameter.name]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name], constants[(place,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name], hints[(place,)] = _TYPES[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "i32"
                if value % 16 == 0:
                    hints[(place,)] = [["tt.divisibility", 16]]
        digest = hashlib.sha256(repr((signature, constants, hints)).encode()).hexdigest()[:8]
        for architecture in architectures:
            source = ASTSource(fn=self, signature=signature, constexprs=constants, attrs=hints)
            target = GPUTarget("cuda", architecture, 32)
            compiled = triton_package.compile(source, target=target, options={"num_stages": num_stages})
            stack = _stack_bytes(compiled.asm["cubin"])
            atomics = len(re.findall(r"\b(?:atom|red)\.", compiled.asm["ptx"]))
            name = f"{self.fn.__name__} {architecture} {label[0]} {digest}"
            lines.add(f"{name} {compiled.metadata.shared} {stack} {atomics}")

    JITFunction.run = run  # type: ignore[method-assign]
    triton._on_device_of = lambda tensor: contextlib.nullcontext()  # type: ignore[assignment]


def _stack_bytes(cubin: bytes) -> int:
    tool = Path(triton_package.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    stack, local = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage.stdout).groups()  # type: ignore[union-attr]
    return int(stack) + int(local)


def run_all(shape: tuple[int, int, int, int], dtype: torch.dtype, autocast: bool) -> None:
    """Run each operation and its backward once, with gradients of everything."""
    k_out, k_in, d_model, d_mlp = shape
    x, W = torch.randn(2, d_model, dtype=dtype), torch.randn(d_model, 256, dtype=dtype)
    leaves = [x, W, W[0].clone(), W.T.contiguous(), torch.randn(256, d_mlp, dtype=dtype)]
    x, W_enc, b_enc, W_dec, rows = (leaf.requires_grad_() for leaf in leaves)
    slope = torch.randn(2, d_mlp, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        values, indices = triton.topk_encode(x, W_enc, b_enc, k_in)
        decoded = triton.sparse_decode(values, indices, W_dec)
        J = triton.bilinear_rows(rows, slope, rows, indices[:, :1].expand(-1, k_out), indices)
    (decoded.square().mean() + J.square().mean()).backward()


def main() -> None:
    """Compile for the architectures, and the shapes of each, that the command line names."""
    wanted = [argument.partition(":") for argument in sys.argv[1:]]
    architectures, label, lines = list[int](), [""], set[str]()
    record_compilations(architectures, label, lines)
    for name, shape in SHAPES.items():
        architectures[:] = [int(number) for number, _, names in wanted if not names or name in names.split(",")]
        if not architectures:
            continue
        for dtype, autocast, tf32 in KINDS if name == "k32" else KINDS[:2]:
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            label[0] = f"{name},{str(dtype).removeprefix('torch.')}{',autocast' * autocast}{',tf32' * tf32}"
            run_all(shape, dtype, autocast)
    print("\n".join(sorted(lines)))


if __name__ == "__main__":
    main()

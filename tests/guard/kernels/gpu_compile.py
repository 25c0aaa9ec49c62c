"""Compiles the GPU kernel's programs for sm_80 and sm_90 (no GPU needed): `python -m tests.guard.kernels.gpu_compile`.

The interpreter accepts much that the compiler refuses. Shapes: 32 heads on 8 of size 128, and 16 of size 80.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from guard.kernels import triton_programs

_INTS = ("token", "slot", "kv_len", "prompt_len", "blocks")


def kind(name: str, element: str, shape: dict[str, int]) -> str:
    if name in shape:
        return "constexpr"
    if name in ("query", "cache"):
        return "*" + element
    if name in _INTS:
        return "*i32"
    if name == "layer_rows":
        return "*i64"
    if name == "scale":
        return "fp32"
    return "i32" if name.startswith("stride") or name in ("S", "T_MAX") else "*fp32"


def main() -> None:
    for element, (H, H_kv, D, HP, DP) in {"bf16": (32, 8, 128, 32, 128), "fp16": (16, 16, 80, 16, 128)}.items():
        shape = {"H": H, "H_KV": H_kv, "D": D, "HP": HP, "DP": DP, "N": 16, "P": 8, "TILE": 64}
        for program in (triton_programs.statistics, triton_programs.weights, triton_programs.finish):
            signature = {name: kind(name, element, shape) for name in program.arg_names}
            constants = {name: value for name, value in shape.items() if name in program.arg_names}
            for arch in (80, 90):
                source = ASTSource(fn=program, signature=signature, constexprs=constants)
                compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
                # 99 KiB is what the smallest of these processors' relatives (sm_86) lets a program have.
                assert compiled.metadata.shared <= 99 << 10, (program.__name__, compiled.metadata.shared)
                assert compiled.asm["cubin"]


if __name__ == "__main__":
    main()

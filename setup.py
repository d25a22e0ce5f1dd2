"""The compiled loops; everything else about the package is in pyproject.toml."""

from setuptools import Extension, setup

NATIVE = "lora_merge/native"

setup(
    ext_modules=[
        Extension(
            "lora_merge.native._kernels",
            [f"{NATIVE}/kernels.c"],
            depends=[
                f"{NATIVE}/{name}.inc"
                for name in ("rounding", "decoding", "computing", "adding", "summing", "projecting")
            ],
            extra_compile_args=["-O3", "-ffp-contract=fast"],
            # Without a compiler the package is installed without them, and torch does the same.
            optional=True,
            py_limited_api=True,
        )
    ],
    # They call nothing of Python: one wheel for all versions.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

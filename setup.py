"""The library of compiled kernels, which pyproject.toml cannot describe. It is optional: where it cannot be built, for want of a
C compiler, installation goes on and mpc-fl computes with torch and numpy. It is no extension module and does not depend
on the version of Python, so neither its name nor that of a wheel has one.
"""

from __future__ import annotations

import os

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = "mpc_fl/inference/fast/kernels/native"
KERNELS = Extension(
    NATIVE.replace("/", ".") + ".ring_kernels",
    sources=[f"{NATIVE}/convolution.c", f"{NATIVE}/gates.c"],
    depends=[f"{NATIVE}/{name}.h" for name in ("ring_kernels", "panel", "gates", "planes", "values", "corrections")],
    extra_compile_args=["-std=gnu11", "-O3", "-g0", "-pthread", "-fvisibility=hidden"],
    extra_link_args=["-pthread"],
    optional=True,
)


class BuildKernels(build_ext):
    """A library that ctypes loads."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


class Wheel(bdist_wheel):
    """A wheel for this system and any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[KERNELS], cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel})

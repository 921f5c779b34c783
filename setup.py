"""Packages of the wheel: the library, and the scripts of prepare/, finetune/ and generate/ as lit_llama/doors/.

In a clone the command `lit-llama` runs the scripts where they lie, from a wheel those in lit_llama/doors/.
"""

from setuptools import find_namespace_packages, setup

DOORS = {f"lit_llama.doors.{stage}": stage for stage in ("prepare", "finetune", "generate")}

setup(packages=[*find_namespace_packages(include=["lit_llama", "lit_llama.*"]), *DOORS], package_dir=DOORS)

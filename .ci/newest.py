"""What `make test-newest` and `make constraints` ask of an environment of newest releases.

    python .ci/newest.py requirements      what the tests need, without upper bounds
    python .ci/newest.py report STATUS     what is newer here than constraints.txt, and how it went
    python .ci/newest.py constraints       constraints.txt as this environment would have it
"""

from __future__ import annotations

import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
LOWER = (">=", ">", "!=")
# They come with one build of torch and not with another, which asks for exact versions itself.
WITH_TORCH = ("nvidia-", "cuda-")


def project() -> dict:
    """The section of pyproject.toml that describes the package."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def oldest_python() -> str:
    """The lowest Python that the package supports, such as 3.11."""
    (lowest,) = (s for s in SpecifierSet(project()["requires-python"]) if s.operator == ">=")
    return lowest.version


def asked() -> list[Requirement]:
    """What the package and its tests need, as pyproject.toml has it."""
    about = project()
    return [
        Requirement(line)
        for line in (*about["dependencies"], *about["optional-dependencies"]["test"])
    ]


def without_upper_bounds(requirement: Requirement) -> str:
    """One line of a requirements file."""
    kept = [str(part) for part in requirement.specifier if part.operator in LOWER]
    requirement.specifier = SpecifierSet(",".join(kept))
    return str(requirement)


def tested() -> dict[str, Version]:
    """The versions of constraints.txt."""
    lines = [Requirement(line) for line in CONSTRAINTS.read_text().splitlines() if line[:1] != "#"]
    return {line.name: Version(next(iter(line.specifier)).version) for line in lines}


def here(name: str) -> Version | None:
    """The version installed here, whatever it was built for."""
    try:
        return Version(Version(metadata.version(name)).public)
    except metadata.PackageNotFoundError:
        return None


def report(status: int) -> None:
    """Print what differs from constraints.txt, and whether the tests passed."""
    caps = {canonicalize_name(line.name): line.specifier for line in asked()}
    count = 0
    for name, old in tested().items():
        new = here(name)
        if new is not None and new > old:
            count += 1
            cap = caps.get(canonicalize_name(name))
            beyond = cap is not None and not cap.contains(new, prereleases=True)
            print(f"{name} {old} -> {new}" + (f"  (beyond {cap})" if beyond else ""))
    verdict = "pass" if status == 0 else f"fail (exit code {status})"
    print(f"{count} packages are newer than constraints.txt; the tests {verdict}")


def constraints() -> None:
    """Print the head of constraints.txt, then every version that is installed here.

    A newer Python gets versions that the oldest supported one cannot install; refused there.
    """
    if f"{sys.version_info[0]}.{sys.version_info[1]}" != (oldest := oldest_python()):
        sys.exit(f"python {sys.version_info[0]}.{sys.version_info[1]} here; allowed: {oldest}")
    lines = CONSTRAINTS.read_text().splitlines()
    print("\n".join(line for line in lines if line.startswith("#")))
    found = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    for name in sorted(found, key=str.lower):
        if name != "hybrid-sleep" and not name.startswith(WITH_TORCH):
            print(f"{name}=={Version(found[name]).public}")


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "requirements":
        print("\n".join(map(without_upper_bounds, asked())))
    elif command == "report":
        report(int(*rest))
    elif command == "constraints":
        constraints()
    else:
        sys.exit(f"command={command!r}; allowed: requirements, report, constraints")

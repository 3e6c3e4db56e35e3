"""Which versions this package was tested with, and which of those installed here were not.

The ranges in the distribution's own requirements end where testing ended. A checkout also has
constraints.txt, the exact versions of the last test.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import hybrid_sleep

DISTRIBUTION = "hybrid-sleep"
# Of a checkout; an installed package has neither file beside it.
ROOT = Path(hybrid_sleep.__file__).resolve().parents[1]


@dataclass(frozen=True)
class Checked:
    """A package, the version found here, and what is known about that version.

    name: of the distribution. version: None where it is not installed. wanted: the range that this
    package asks for, "" where it asks for none. last: the version of constraints.txt, None outside
    a checkout.
    """

    name: str
    version: str | None
    wanted: str
    last: str | None

    @property
    def tested(self) -> bool:
        """Whether the version is within the tested range; True where there is no range."""
        if self.version is None:
            return False
        return SpecifierSet(self.wanted).contains(self.version, prereleases=True)

    @property
    def too_old(self) -> bool:
        """Whether the version is below the range: this package was written for later ones."""
        lower = [part for part in SpecifierSet(self.wanted) if part.operator.startswith(">")]
        if self.version is None:
            return False
        return not all(part.contains(self.version, prereleases=True) for part in lower)

    @property
    def same_as_last(self) -> bool:
        """Whether the version is that of constraints.txt, whatever it was built for (+cpu)."""
        if self.version is None or self.last is None:
            return False
        return Version(self.version).public == Version(self.last).public

    def verdict(self) -> str:
        """What is known about the version, in words; "" where nothing is known."""
        # The lower bound first, however the distribution's metadata have it.
        wanted = ",".join(sorted(map(str, SpecifierSet(self.wanted)), reverse=True))
        if self.version is None:
            return f"needs {wanted}" if wanted else ""
        if self.tested and self.same_as_last:
            return "the version last tested"
        last = f"last tested: {self.last}" if self.last else ""
        if self.too_old:
            verdict = f"too old: needs {wanted}"
        elif not self.tested:
            verdict = f"never tested: outside {wanted}"
        else:
            verdict = f"in the tested range {wanted}" if wanted else ""
        return "; ".join(part for part in (verdict, last) if part)


def version(distribution: str) -> str | None:
    """The installed version of a distribution, None if there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check(name: str, found: str | None) -> Checked:
    """What is known about version `found` of distribution `name`, or of "python"."""
    wanted = {**optional(), **needed()}.get(name, "")
    return Checked(name, found, wanted, last_tested().get(canonicalize_name(name)))


def needed() -> dict[str, str]:
    """Ranges of Python and of the packages that every installation needs, by name."""
    python, lines = _declared()
    return {"python": python, **_ranges(line for line in lines if not _extra(line))}


def optional() -> dict[str, str]:
    """Ranges of the packages that only the extras ask for, by name."""
    return _ranges(line for line in _declared()[1] if _extra(line))


def last_tested() -> dict[str, str]:
    """The versions of constraints.txt by normalised name; none outside a checkout."""
    file = ROOT / "constraints.txt"
    if not (file.is_file() and (ROOT / "pyproject.toml").is_file()):
        return {}
    lines = [line for line in file.read_text().splitlines() if "==" in line and line[0] != "#"]
    pairs = [line.split("==", 1) for line in lines]
    return {canonicalize_name(name): pinned.strip() for name, pinned in pairs}


def not_as_last_tested() -> list[Checked]:
    """The packages installed here in another version than constraints.txt has."""
    found = [Checked(name, version(name), "", last) for name, last in last_tested().items()]
    return [package for package in found if package.version and not package.same_as_last]


def _declared() -> tuple[str, list[Requirement]]:
    """The range of Python, and every requirement: of the installation, or of the checkout."""
    try:
        about = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return _declared_by_checkout()
    lines = about.get_all("Requires-Dist") or []
    python = about.get_all("Requires-Python") or [""]
    return python[0], [Requirement(line) for line in lines]


def _declared_by_checkout() -> tuple[str, list[Requirement]]:
    file = ROOT / "pyproject.toml"
    if not file.is_file():
        return "", []
    about = tomllib.loads(file.read_text())["project"]
    lines = [Requirement(line) for line in about["dependencies"]]
    for extra, asked in about["optional-dependencies"].items():
        for line in asked:
            text, _, marker = line.partition(";")
            both = f"({marker}) and " if marker else ""
            lines.append(Requirement(f"{text}; {both}extra == '{extra}'"))
    return about["requires-python"], lines


def _extra(requirement: Requirement) -> bool:
    return "extra" in str(requirement.marker)


def _ranges(requirements: Iterable[Requirement]) -> dict[str, str]:
    """Range by name; of several extras that ask for one package the first counts."""
    found: dict[str, str] = {}
    for line in requirements:
        found.setdefault(line.name, str(line.specifier))
    return found

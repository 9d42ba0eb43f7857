"""Code of others in a run: functions of installed packages that a configuration names, once this site allows the package.

A configuration may come from somebody else, and to import a package is to run its code. So nothing is imported that the person
who starts the program has not allowed by name on the command line (`site.allow_packages`); a file cannot allow itself. A package
is what pip installed: it has metadata with a name and a version, and its files lie where these say. What merely lies in the
current directory is none, whatever it is called, unless PYTHONPATH names that directory.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mpc_fl.errors import ConfigError, printable
from mpc_fl.parsing import parse_json

_SEPARATORS = re.compile(r"[-_.]+")
_REFERENCE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


@dataclass(frozen=True)
class Package:
    """An installed package: its name and version, as pip shows them."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def is_reference(text: str) -> bool:
    """Whether this names a function of a package, as `package.module:function`."""
    return _REFERENCE.fullmatch(text) is not None


def package_of(reference: str) -> Package:
    """The installed package that `package.module:function` is of; nothing is imported. Raises `ConfigError`."""
    return _described(_distribution_of(reference.partition(":")[0].partition(".")[0], reference))


def load_function(reference: str, allowed: Iterable[str]) -> tuple[Any, Package]:
    """Import what `package.module:function` names, and say of which package. Raises `ConfigError` unless that is allowed."""
    package = package_of(reference)
    _require_allowed(package, reference, allowed)
    module_name, _, name = reference.partition(":")
    module = _imported(module_name, package)
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"{reference}: {package} has no function '{name}' there", "correct the name, or the version")
    return found, package


def loaders(group: str) -> dict[str, list[Package]]:
    """Names that installed packages have announced in a group of entry points, and which packages; nothing is imported."""
    found: dict[str, list[Package]] = {}
    for distribution in _distributions():
        for point in distribution.entry_points:
            if point.group == group:
                found.setdefault(point.name, []).append(_described(distribution))
    return found


def load_entry_point(group: str, name: str, allowed: Iterable[str]) -> tuple[Any, Package]:
    """Import what one package announced under `name`. Raises `ConfigError` for none, for several, or unless it is allowed."""
    points = [
        (point, distribution)
        for distribution in _distributions()
        for point in distribution.entry_points
        if (point.group, point.name) == (group, name)
    ]
    if len(points) != 1:
        packages = ", ".join(str(_described(distribution)) for _, distribution in points) or "no installed package"
        raise ConfigError(f"'{name}' is announced by {packages} ({group})", "install one package that has it")
    (point, distribution) = points[0]
    if not is_reference(point.value):
        raise ConfigError(
            f"{_described(distribution)} announces '{name}' as '{printable(point.value, 80)}'", "ask its author"
        )
    found, package = load_function(point.value, allowed)
    if package != _described(distribution):
        raise ConfigError(
            f"{_described(distribution)} announces '{name}' in another package, {package}", "ask its author"
        )
    return found, package


def _require_allowed(package: Package, what: str, allowed: Iterable[str]) -> None:
    if _plain(package.name) not in {_plain(name) for name in allowed}:
        raise ConfigError(
            f"{what} is code of the package {package}, which this site does not allow",
            f"if you trust it, give --set site.allow_packages=[{package.name}] on the command line",
        )


def _plain(name: str) -> str:
    """A package's name as it is compared (PEP 503)."""
    return _SEPARATORS.sub("-", name).lower()


def _described(distribution: importlib.metadata.Distribution) -> Package:
    return Package(printable(distribution.metadata["Name"] or "?", 80), printable(distribution.version or "?", 40))


def _imported(module: str, package: Package) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = f": it lacks '{printable(error.name, 60)}'" if error.name else ""
        raise ConfigError(f"{package}: '{module}' cannot be imported{missing}", "install it whole") from None
    except Exception as error:  # noqa: BLE001 - code of others
        raise ConfigError(
            f"{package}: '{module}' raised {type(error).__name__} when imported", "ask its author"
        ) from None


# ---- where packages are ------------------------------------------------------------------------------------------------


def _places() -> list[str]:
    """Where packages are looked for: Python's path without the current directory, unless PYTHONPATH names it."""
    named = [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    here = Path.cwd()
    return [entry for entry in sys.path if entry and (Path(entry).resolve() != here or here in named)]


def _distributions() -> list[importlib.metadata.Distribution]:
    """All installed packages, each once: the first on the path hides others of its name, as for imports."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions(path=_places()):
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(_plain(name), distribution)
    return list(found.values())


def _distribution_of(top: str, reference: str) -> importlib.metadata.Distribution:
    """The package whose files an import of the module `top` would run. Raises `ConfigError` where that is none."""
    missing = ConfigError(
        f"{printable(reference, 100)}: no installed package has a module '{printable(top, 60)}'",
        "install it with pip; a file in the current directory is no package",
    )
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        raise missing from None
    if spec is None:
        raise missing
    folders: Sequence[str] = list(spec.submodule_search_locations or ())
    files = [Path(entry) for entry in (folders if folders else [spec.origin or ""]) if entry]
    for distribution in _distributions():
        if top in _modules_of(distribution) and files and all(_lies_in(path, distribution) for path in files):
            return distribution
    raise missing


def _modules_of(distribution: importlib.metadata.Distribution) -> set[str]:
    """Top-level modules of a package: as it says itself, else by its files."""
    said = (distribution.read_text("top_level.txt") or "").split()
    files = [path.parts for path in distribution.files or []]
    return {*said, *(parts[0].removesuffix(".py") for parts in files if len(parts) > 1 or parts[0].endswith(".py"))}


def _lies_in(path: Path, distribution: importlib.metadata.Distribution) -> bool:
    """Whether a module's file or folder is where the package was installed, or where its sources are (pip install -e)."""
    places = [Path(str(distribution.locate_file("")))]
    try:
        direct = parse_json(distribution.read_text("direct_url.json") or "{}")
        if direct.get("dir_info", {}).get("editable"):
            places.append(Path(unquote(urlsplit(direct["url"]).path)))
    except (ValueError, LookupError, AttributeError, TypeError):
        pass
    return any(path.resolve().is_relative_to(place.resolve()) for place in places)

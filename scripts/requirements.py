"""What pyproject.toml declares, for make: the list to install, or what an existing environment lacks.

    python scripts/requirements.py list build run test       # one requirement a line
    python scripts/requirements.py check run test            # exit 1 and say what to install, if something is missing

`build` is what compiling needs, `run` the dependencies of the package, `test` the extra of that name. Nothing but the
standard library and pip is needed to run this.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:  # a fresh environment has pip's copy
    from pip._vendor.packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib


def declared(groups: list[str]) -> list[Requirement]:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    lists = {
        "build": project["build-system"]["requires"],
        "run": project["project"]["dependencies"],
        **project["project"]["optional-dependencies"],
    }
    if unknown := sorted(set(groups) - set(lists)):
        sys.exit(f"requirements: expected groups out of {', '.join(lists)}, got {', '.join(unknown)}")
    requirements = [Requirement(text) for group in groups for text in lists[group]]
    return [r for r in requirements if r.marker is None or r.marker.evaluate()]


def is_met(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def main(command: str, *groups: str) -> None:
    requirements = dict.fromkeys(f"{r.name}{r.specifier}" for r in declared(list(groups)))
    if command == "list":
        print("\n".join(requirements))
        return
    missing = [text for text in requirements if not is_met(Requirement(text))]
    if missing:
        quoted = " ".join(f"'{text}'" for text in missing)
        sys.exit(
            f"us3l: {sys.executable} has torch and is used as it is, but it lacks (for {', '.join(groups)}):\n"
            f"    {sys.executable} -m pip install {quoted}"
        )


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("list", "check"):
        sys.exit(__doc__)
    main(*sys.argv[1:])

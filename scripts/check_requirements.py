"""List the requirements that the running Python lacks: one line each, nothing when all are there. No network.

    python scripts/check_requirements.py [requirements.txt]

Exit status 0: all there; 1: some are missing or of a wrong version; 2: the file cannot be read.
Knows lines `name` and `name>=1.2,<3` alone (no extras, markers or URLs), which is all that requirements.txt uses.
Standard library only, since it runs before anything is installed.
"""
import importlib.metadata
import operator
import re
import sys
from pathlib import Path

COMPARE = {">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt,
           "<": operator.lt}
LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*((?:(?:[<>]=?|[=!]=)\s*[0-9][0-9.]*\s*,?\s*)*)")
BOUND = re.compile(r"([<>]=?|[=!]=)\s*([0-9][0-9.]*)")


def parse_requirements(text: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """[(name, [(operator, version), ...]), ...]; comments and blank lines are skipped."""
    requirements = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        match = LINE.fullmatch(line)
        if not match:
            raise ValueError(f"line {number}: cannot read {line!r}; write it like name>=1.2,<3")
        requirements.append((match[1], BOUND.findall(match[2])))
    return requirements


def release(version: str) -> tuple[int, ...]:
    """The release numbers without trailing zeros: 2.11.0+cu130 -> (2, 11), 3.0rc1 -> (3,)."""
    numbers = [int(number) for number in re.match(r"[0-9.]*", version)[0].split(".") if number]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def complaint(name: str, bounds: list[tuple[str, str]]) -> str | None:
    """What is wrong with the installed package, None when nothing is."""
    wanted = name + ",".join(sign + version for sign, version in bounds)
    try:
        installed = importlib.metadata.version(name) or "unreadable"  # None: what a broken installation leaves behind
    except importlib.metadata.PackageNotFoundError:
        return f"{wanted} (not installed)"
    fits = all(COMPARE[sign](release(installed), release(version)) for sign, version in bounds)
    return None if fits else f"{wanted} (installed: {installed})"


def main(argv: list[str]) -> int:
    path = Path(argv[0]) if argv else Path(__file__).resolve().parent.parent / "requirements.txt"
    try:
        requirements = parse_requirements(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 2
    complaints = [line for line in (complaint(*requirement) for requirement in requirements) if line]
    print("\n".join(complaints), end="\n" if complaints else "")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""constraints.txt pins all that the README's commands install, now and next year."""

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = Path(__file__).resolve().parent.parent / "constraints.txt"


def pins() -> list[Requirement]:
    lines = LOCK.read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def needed_by(distribution: str, *extras: str, found: set[str]) -> None:
    """Add what the distribution needs here, indirectly too, as it is installed."""
    for line in metadata.requires(distribution) or []:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        if name not in found or requirement.extras:
            found.add(name)
            needed_by(name, *requirement.extras, found=found)


def test_every_package_of_the_test_extra_is_pinned():
    found: set[str] = set()
    needed_by("vlcache-triton", "test", found=found)
    assert {"torch", "transformers", "pytest", "numpy", "huggingface-hub"} <= found
    pinned = {
        canonicalize_name(pin.name) for pin in pins() if not pin.marker or pin.marker.evaluate()
    }
    assert found - {"vlcache-triton"} <= pinned


def test_every_pin_is_exact_and_the_only_one_of_its_package_here():
    here = [pin for pin in pins() if not pin.marker or pin.marker.evaluate()]
    assert len({pin.name for pin in here}) == len(here)
    assert all(str(pin.specifier).startswith("==") for pin in pins())

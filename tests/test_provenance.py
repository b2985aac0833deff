"""Versions outside the tested ranges are named, with what was tested."""

from scripts.provenance import STRICT, version_problems, versions

REQUIREMENTS = "# data\ntrl>=1.10,<1.16\ntorch>=2.10,<2.14  # CPU build\nnumpy>=2,<3\n\n"


def test_installed_set_is_the_tested_one():
    assert version_problems(versions()) == {}


def test_package_outside_its_range_is_named(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text(REQUIREMENTS)
    found = version_problems({"trl": "0.24.0", "torch": "2.13.0+cpu"}, path)
    assert found == {"trl": "trl 0.24.0 is outside the tested <1.16,>=1.10"}
    assert version_problems({"trl": "1.15.0", "torch": "2.14.0"}, path).keys() == {"torch"}


def test_packages_with_moving_interfaces_are_strict():
    assert {"trl", "transformers", "unsloth"} <= set(STRICT)

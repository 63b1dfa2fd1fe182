"""What README and docs/ name exists: files, functions, commands, settings, pictures."""
import re

from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(p.read_text() for p in PAGES if p.exists())


def test_pictures_exist():
    for path in re.findall(r"\]\((?:\.\./)?(assets/[^)]+)\)", TEXT):
        assert (ROOT / path).exists(), path


def test_make_targets_exist():
    for target in set(re.findall(r"^make (\w+)", TEXT, re.M)):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target

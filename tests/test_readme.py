"""What README and docs/ name exists: files, functions, commands, settings, pictures, links, messages."""
import ast
import importlib
import re
import shlex

import pytest
from conftest import ROOT
from test_style import CORE, FILES, TREES

import common
import train

README = (ROOT / "README.md").read_text()
PAGES = {p.relative_to(ROOT).as_posix(): p.read_text() for p in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
TEXT = "\n".join(PAGES.values())
# python FILE.py ..., python -m ROOM.NAME ..., torchrun ... FILE.py ...
RUNS = r"(?:python -m ([a-z]+(?:\.\w+)?)|(?:python|nproc_per_node=\d+)(?: --[\w.:=-]+)* ([\w/]+\.py))((?: [^`\n#]*)?)"
COMMANDS = sorted({(module or file[:-3].replace("/", "."), args.strip()) for module, file, args
                   in re.findall(RUNS, TEXT) if module not in ("venv", "pip", "pytest", "room.file")})
MODULES = {name[:-3].replace("/", "."): name for name in FILES if not name.endswith("__init__.py")}
CONFIGS = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
           and "dataclass" in map(ast.unparse, node.decorator_list)]
OPTIONS = {n.target.id for c in CONFIGS for n in c.body if isinstance(n, ast.AnnAssign)} | {"help"}
BUDGET = dict(readme_lines=250, readme_bytes=20_000, page_lines=250)

class Parsed(Exception):
    """Raised in place of what a command would do once its settings are read."""

@pytest.fixture(scope="module")
def modules():
    """Every module that a command names, and what it may open a door to, loaded."""
    return {name: importlib.import_module(name) for name in MODULES}

@pytest.mark.parametrize("name,args", COMMANDS, ids=[" ".join(c) for c in COMMANDS])
def test_command_parses(name, args, modules, monkeypatch):
    """main() of the module reads these settings with its own Config, through whatever door. catches: an option, a
    preset or a module of another name."""
    assert name in modules, f"no such module: {name}"
    real = common.configure

    def parse(*given, **options):
        real(*given, **options)
        raise Parsed

    for module in modules.values():
        if getattr(module, "configure", None) is real:
            monkeypatch.setattr(module, "configure", parse)
    args = shlex.split(args)
    plain = "configure" not in FILES[MODULES[name]].read_text()
    if "--help" in args or plain and ("." in name or not args):  # without settings main would do its work; a file of
        return                                                   # the core that takes words may open a door to them
    with pytest.raises(Parsed):
        modules[name].main(args)

def test_functions_files_options_and_targets_exist():
    """... and the line that is named lies in its function."""
    for file, name, line in set(re.findall(r"`((?:\w+/)?\w+\.py)::(\w+)`(?: line (\d+))?", TEXT)):
        found = [n for n in ast.walk(TREES[file]) if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name
                 or isinstance(n, ast.Assign) and name in [ast.unparse(v) for v in n.targets]]
        assert found, f"{file} has no {name}"
        assert not line or any(n.lineno <= int(line) <= n.end_lineno for n in found), f"{file}: {name} is not at {line}"
    for file in set(re.findall(r"`((?:\w+/)?\w+\.py)`", TEXT)):
        assert file in FILES, file
    for option in set(re.findall(r"`--([a-z_A-Z.]+)", TEXT)) - {"key"}:
        assert option.split(".")[0] in OPTIONS, option
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for test in set(re.findall(r"`(test_\w+)`", TEXT)):
        assert f"def {test}(" in tests, test
    for target in set(re.findall(r"^make (\w+)", TEXT, re.M)):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target

def test_equations_are_told_where_they_stand():
    """A function that the map names for an equation says so itself. catches: Eq. 4 and Eq. 6 swapped."""
    rows = re.findall(r"^\| [^|]*?Eq\. (\d+)[^|]*\| `(\w+\.py)::(\w+)`", README, re.M)
    assert {number for number, *_ in rows} >= {"1", "3", "4", "5", "6"}
    for number, file, name in rows:
        text = FILES[file].read_text()
        for node in ast.walk(TREES[file]):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                above = [line for line in text.splitlines()[:node.lineno] if line.startswith("# -----")][-1:]
                told = "".join(above) + ast.get_source_segment(text, node)      # the banner of its section, and itself
                assert re.search(rf"Eq\. (\d, |\d-)*{number}\b", told), f"{file}::{name}: Eq. {number}"

def test_all_files_and_pages_are_told():
    """The core in reading order; the rooms in docs/rooms.md; every page linked from README."""
    table = README[README.index("## The eleven files"):README.index("## Names")]
    assert re.findall(r"^\| `(\w+)\.py`", table, re.M) == list(CORE)
    told = set(re.findall(r"^\| `(\w+/\w+\.py)`", PAGES["docs/rooms.md"], re.M))
    assert told == {name for name in FILES if "/" in name and not name.endswith("__init__.py")}
    assert set(PAGES) - {"README.md"} <= set(re.findall(r"\]\((docs/\w+\.md)\)", README))

def anchor(title):
    """GitHub's name for a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")

@pytest.mark.parametrize("page", PAGES)
def test_links_and_lengths(page):
    """Every link and picture is there. What a command printed may be wide, and so may tables."""
    lines, inside, folder = PAGES[page].splitlines(), False, (ROOT / page).parent
    assert len(lines) <= BUDGET["readme_lines" if page == "README.md" else "page_lines"]
    assert page != "README.md" or len(README.encode()) <= BUDGET["readme_bytes"]
    for number, line in enumerate(lines, 1):
        inside ^= line.startswith("```")
        assert inside or len(line) <= 120 or line[:2] in ("| ", "!["), f"{page}:{number} is {len(line)} wide"
    for path, at in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)]*))?\)", PAGES[page]):
        target = folder / path if path else ROOT / page
        assert target.exists(), f"{page}: {path}"
        assert not at or at in map(anchor, re.findall(r"^#+ (.*)", target.read_text(), re.M)), f"{page}: {path}#{at}"

def test_messages_are_raised():
    code = "\n".join(p.read_text() for p in FILES.values())
    code = re.sub(r'"\s*\n\s*f?"', "", code)                          # strings that go on in the next line
    for row in re.findall(r"^\| (`.*?) \|", PAGES["docs/troubleshooting.md"], re.M):
        for message in re.findall("`([^`]+)`", row):
            assert message.replace(" --x", "") in code, message

def test_ranks_divide_the_batch():
    """In every torchrun line. catches: 8 ranks for a batch of 420."""
    lines = re.findall(r"torchrun ([^\n`]*?) train\.py([^\n`#]*)", TEXT)
    assert len(lines) > 3
    for launch, args in lines:
        if found := re.search(r"nproc_per_node=(\d+)", launch):
            nodes = re.search(r"nnodes=(\d+)", launch)
            cfg = common.configure(train.Config, shlex.split(args), train.PRESETS, ("preset",))
            assert cfg.batch % (int(found[1]) * int(nodes[1] if nodes else 1)) == 0, args

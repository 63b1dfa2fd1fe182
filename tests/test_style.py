"""House rules a machine checks: the eleven files, who imports whom, how long and how dense, forbidden calls."""
import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# the core in reading order: each file imports only from those before it
CORE = ("common", "zoom_vae", "summarizer", "unet", "diffusion", "data", "train", "cdm", "sample_joint", "invert",
        "mil")
MOST_LINES, MOST_IN_ALL, MOST_IN_A_FUNCTION, MOST_SETTINGS = 430, 3400, 45, 25
ROOMS = ("slides", "toy", "large", "text", "labs", "experiments", "weights")
SHIPPED = {f"weights/{name}.safetensors" for name in ("vae", "toy", "cdm", "proxy")}    # of at most 16 MB together
RUNTIME = {"torch", "numpy", "PIL", "tqdm", "safetensors"}
SOURCES = (*ROOT.glob("*.py"), *(p for room in ROOMS for p in (ROOT / room).rglob("*.py")))
FILES = {p.relative_to(ROOT).as_posix(): p for p in SOURCES}
TREES = {name: ast.parse(p.read_text(), name) for name, p in FILES.items()}
core = pytest.mark.parametrize("name", CORE)

def imported(node):
    """The top-level names that an import statement brings in; none for other statements."""
    if isinstance(node, ast.Import):
        return [a.name.split(".")[0] for a in node.names]
    return [node.module.split(".")[0]] if isinstance(node, ast.ImportFrom) else []

def at_module_level(tree):
    """What a file imports as soon as it is imported itself, and not in a function that needs it."""
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    return {m for n in ast.walk(tree) if id(n) not in inside for m in imported(n)}

def test_imports():
    """The core imports from files above alone. What is optional is imported in the function that needs it."""
    for number, name in enumerate(CORE):
        foreign = at_module_level(TREES[f"{name}.py"]) & {*CORE[number:], *ROOMS}
        assert not foreign, f"{name}.py imports {foreign} for all"
    for name, tree in TREES.items():
        foreign = at_module_level(tree) - {*CORE, *ROOMS} - set(sys.stdlib_module_names) - RUNTIME
        assert not foreign, f"{name} imports {foreign} for all"

def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.Lambda)]

def test_the_core_is_short():
    """An afternoon: eleven files of so many lines, none of them wide as a rule."""
    assert sorted(p.stem for p in ROOT.glob("*.py")) == sorted(CORE)
    lines = {name: (ROOT / f"{name}.py").read_text().splitlines() for name in CORE}
    assert max(map(len, lines.values())) <= MOST_LINES, {name: len(text) for name, text in lines.items()}
    total = sum(lines.values(), [])
    assert len(total) <= MOST_IN_ALL, f"{len(total)} lines: simplify, or move what a reader may skip into a room"
    assert sum(len(line) > 110 for line in total) <= 0.03 * len(total), "too many lines of over 110 columns"

@core
def test_functions_are_short_and_flat(name):
    """catches: a function that one cannot see whole, a closure inside a closure, a command of too many settings."""
    for f in functions(TREES[f"{name}.py"]):
        label = f"{name}.py:{f.lineno}"
        assert f.end_lineno - f.lineno < MOST_IN_A_FUNCTION, f"{label} is a function of too many lines"
        inner = [g for g in functions(f) if g is not f]
        assert all(len(functions(g)) == 1 for g in inner), f"{label} holds a closure in a closure"
    for node in ast.walk(TREES[f"{name}.py"]):
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            settings = [n for n in node.body if isinstance(n, ast.AnnAssign)]
            assert len(settings) <= MOST_SETTINGS, f"{name}.py: {len(settings)} settings"

def test_one_name_one_meaning():
    """No function or class of the core is defined twice."""
    seen = {}
    for name in CORE:
        for node in TREES[f"{name}.py"].body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in ("Config", "main"):
                assert node.name not in seen, f"{node.name} stands in {seen[node.name]}.py and {name}.py"
                seen[node.name] = name

@pytest.mark.parametrize("folder", (".", *ROOMS, "tests"))
def test_forbidden(folder):
    """No code from strings, no unpickling, no error swallowed, no key dropped in silence."""
    files = (ROOT / folder).glob("*.py" if folder == "." else "**/*.py")
    for file, node in [(f, n) for f in files for n in ast.walk(ast.parse(f.read_text()))]:
        where = f"{file.name}:{getattr(node, 'lineno', 0)}"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{where}: bare except"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        assert called not in ("eval", "exec", "pickle.load", "pickle.loads"), f"{where}: {called}()"
        assert called == "zip" or options.get("strict") is not False, f"{where}: strict=False"
        assert options.get("weights_only") is not False, f"{where}: weights_only=False"
        assert called != "torch.load" or options.get("weights_only") is True, f"{where}: say weights_only"
        assert called != "np.load" or not options.get("allow_pickle"), f"{where}: allow_pickle"

def test_no_large_file_is_tracked():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout: nothing says which files are tracked")
    sizes = {p: (ROOT / p).stat().st_size for p in listing.stdout.split("\0") if p and (ROOT / p).is_file()}
    large = {p: size for p, size in sizes.items() if size > 2 * 2**20 and p not in SHIPPED}
    assert not large, f"over 2 MB: {large}"
    shipped = {p: size for p, size in sizes.items() if p in SHIPPED}
    assert sum(shipped.values()) <= 16_000_000, f"over 16 MB together: {shipped}"
    astray = [p for p in sizes if p.startswith("weights/") and not p.endswith(".py") and p not in SHIPPED]
    assert not astray, f"no weights of ours: {astray}"

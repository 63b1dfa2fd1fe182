"""House rules a machine checks: imports, lengths, file sizes, forbidden calls (design §2, style §4)."""
import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

# reading order: each file imports only from those before it
CAPS = dict(
    common=350, metrics=290, zoom_vae=365, slide=250, tiff=260, reader=350, vit=220, encoder=200, summarizer=290,
    unet=350, diffusion=350,
    toy=200, toy_task=120, pyramid=200, published=205, strips=260, build=360, data=350, wording=180,
    tissues=150, captions=250, state=185, log=180, loop=270,
    train=420, canvas=340, joint=350, patches=250, proxy=155, cost=200, dit=390, cdm=350,
    reference=120, sample_joint=450, quality=265, cdm_table=290,
    invert=335, sr_trained=110, sr_table=205, features=180, bags=280, heads=220, mil=350,
    mil_table=240, joint_table=280, rivals=110, plan=265, bench=350)
ORDER = list(CAPS)
RUNTIME = {"torch", "numpy", "PIL", "tqdm", "safetensors"}
FILES = sorted(ROOT.glob("*.py"))
TREES = {p.stem: ast.parse(p.read_text(), p.name) for p in FILES}
each = pytest.mark.parametrize("name", TREES)


def imported(node):
    """The top-level names that an import statement brings in; none for other statements."""
    if isinstance(node, ast.Import):
        return [a.name.split(".")[0] for a in node.names]
    return [node.module.split(".")[0]] if isinstance(node, ast.ImportFrom) else []


def test_every_file_has_a_place_in_the_reading_order():
    assert set(TREES) <= set(ORDER), f"not in design.md §2: {set(TREES) - set(ORDER)}"
    listed = re.search(r"py-modules = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    assert set(TREES) <= set(re.findall(r'"(\w+)"', listed)), "py-modules in pyproject.toml lacks a file"


@each
def test_imports_only_from_files_above(name):
    above = ORDER[:ORDER.index(name)]
    below = [m for node in ast.walk(TREES[name]) for m in imported(node) if m in ORDER and m not in above]
    assert not below, f"{name}.py imports {below}, which come after it in {ORDER}"


@each
def test_third_party_imports(name):
    inside = {id(n) for f in ast.walk(TREES[name]) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)
              for n in ast.walk(f)}
    module_level = [m for n in ast.walk(TREES[name]) if id(n) not in inside for m in imported(n)]
    foreign = set(module_level) - set(ORDER) - set(sys.stdlib_module_names) - RUNTIME
    assert not foreign, f"{name}.py imports {foreign} for all: an optional package belongs inside a function"


@each
def test_length(name):
    lines = len((ROOT / f"{name}.py").read_text().splitlines())
    assert lines <= CAPS[name], f"{name}.py has {lines} lines, at most {CAPS[name]}: simplify or split"


@each
def test_module_docstring(name):
    doc = ast.get_docstring(TREES[name], clean=False)
    assert doc, f"{name}.py has no docstring"
    assert len(doc.strip().splitlines()) <= 15, f"the docstring of {name}.py is over 15 lines"
    assert f"python {name}.py" in doc or name in ("common", "state", "log", "loop", "patches"), (
        f"{name}.py does not say how to run it")


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "tests").glob("*.py"))], ids=lambda p: p.stem)
def test_forbidden(path):
    """No code from strings, no unpickling, no error swallowed, no key dropped in silence."""
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
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
    paths = [ROOT / p for p in listing.stdout.split("\0") if p]
    large = {p.name: p.stat().st_size for p in paths if p.is_file() and p.stat().st_size > 2 * 2**20}
    assert not large, f"over 2 MB: {large}"

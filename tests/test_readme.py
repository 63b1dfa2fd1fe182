"""What the README names exists: files, functions, commands, settings, pictures, messages."""
import ast
import re
import shlex

import pytest
from conftest import ROOT
from test_style import ORDER

import bench
import captions
import cdm
import cdm_table
import data
import invert
import joint_table
import mil_table
import plan
import quality
import sample_joint
import sr_table
import train
from common import configure

MODULES = {f"{m.__name__}.py": m for m in (
    bench, captions, cdm_table, invert, joint_table, mil_table, plan, quality, sr_table)}  # one Config each
TEXT = (ROOT / "README.md").read_text()
SOURCES = {p.name: p.read_text() for p in ROOT.glob("*.py")}
COMMANDS = sorted(set(re.findall(r"(?:python|nproc_per_node=\d+)(?: --[\w.:=-]+)* (\w+\.py[^\n`#]*)", TEXT)))


@pytest.mark.parametrize("place", sorted(set(re.findall(r"`(\w+\.py)::(\w+)`", TEXT))), ids="::".join)
def test_function_exists(place):
    tree = ast.parse(SOURCES[place[0]])
    assert place[1] in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def test_file_table_is_the_reading_order():
    table = TEXT[TEXT.index("## Files"):TEXT.index("## Names")]
    assert re.findall(r"^\| `(\w+)\.py`", table, re.M) == [n for n in ORDER if f"{n}.py" in SOURCES]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command):
    file, *args = shlex.split(command)
    assert file in SOURCES
    if file == "train.py":
        configure(train.Config, args, train.PRESETS, ("preset",)) if "--help" not in args else None
    elif file == "sample_joint.py":
        configure(sample_joint.Config, args, words=("run",))
    elif file == "cdm.py" and args:
        configure(cdm.Config if args[0] == "train" else cdm.SampleConfig, args[1:],
                  cdm.PRESETS if args[0] == "train" else None, ("run", "preset") if args[0] == "train" else ("run",))
    elif file == "bench.py" and args[:1] not in (["plan"], ["loader"]):
        configure(bench.Config, args, words=("command",))
    elif file in MODULES:
        file = "plan.py" if file == "bench.py" else file
        configure(MODULES[file].Config, args, words=("command", "path" if file == "captions.py" else "run")
                  if "command" in MODULES[file].Config.__annotations__ else ("run",))
    elif file == "data.py" and "--help" not in args:
        configure({"toy": data.ToyConfig, "build": data.BuildConfig}[args[0]], args[1:])


@pytest.mark.parametrize("option", sorted(set(re.findall(r"`--([a-z_.]+)", TEXT))))
def test_option_exists(option):
    kinds = set().union(*(c.__annotations__ for c in (
        train.Config, sample_joint.Config, data.BuildConfig, cdm.Config, cdm.SampleConfig,
        *(module.Config for module in MODULES.values()))))
    assert option.split(".")[0] in kinds


def test_pictures_exist():
    for path in re.findall(r"\]\((assets/[^)]+)\)", TEXT):
        assert (ROOT / path).exists(), path


def test_make_targets_exist():
    for target in set(re.findall(r"^make (\w+)", TEXT, re.M)):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


def test_messages_of_the_table_are_raised():
    table = TEXT[TEXT.index("## When it stops"):TEXT.index("## Exercises")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(SOURCES.values()))      # strings that go on in the next line
    for row in re.findall(r"^\| (`.*?) \|", table, re.M):
        for message in re.findall("`([^`]+)`", row):
            assert message.replace(" --x", "") in code, message


def test_ranks_divide_the_batch():
    """In every torchrun line. catches: 8 ranks for a batch of 420."""
    lines = re.findall(r"torchrun ([^\n`]*?) train\.py ([^\n`]*)", TEXT)
    assert len(lines) > 3
    for launch, args in lines:
        if found := re.search(r"nproc_per_node=(\d+)", launch):
            nodes = re.search(r"nnodes=(\d+)", launch)
            cfg = configure(train.Config, shlex.split(args), train.PRESETS, ("preset",))
            assert cfg.batch % (int(found[1]) * int(nodes[1] if nodes else 1)) == 0, args

"""Import paths of before the folders."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
import runpy
import subprocess
import sys
import warnings

import pytest

import l2l_prune
from l2l_prune._basics.moved import MOVED

OLD_PATHS = {f"l2l_prune.{old}" for old in MOVED}


def forget_old_paths():
    """As in a process that has imported nothing by an old path yet."""
    for name in [n for n in sys.modules if any(f"{n}.".startswith(f"{o}.") for o in OLD_PATHS)]:
        del sys.modules[name]
        parent, _, child = name.rpartition(".")
        vars(sys.modules.get(parent, l2l_prune)).pop(child, None)


@pytest.fixture(autouse=True)
def _no_old_path_yet():
    forget_old_paths()
    yield
    forget_old_paths()


@pytest.fixture
def warned():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message="l2l_prune")
        yield found


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_gives_the_module_at_the_new_one(old, warned):
    try:
        new = importlib.import_module(f"l2l_prune.{MOVED[old]}")
    except ModuleNotFoundError as error:
        pytest.skip(f"needs {error.name}")
    spec = new.__spec__
    assert importlib.import_module(f"l2l_prune.{old}") is new
    assert new.__name__ == new.__spec__.name == f"l2l_prune.{MOVED[old]}"
    assert new.__spec__ is spec
    (warning,) = warned
    assert issubclass(warning.category, DeprecationWarning)
    assert f"l2l_prune.{old} has moved to l2l_prune.{MOVED[old]};" in str(warning.message)


@pytest.mark.parametrize(
    "statement",
    [
        "import l2l_prune.criteria",
        "from l2l_prune import criteria",
        "from l2l_prune.criteria import magnitude",
        "import l2l_prune.data.sine",
        "from l2l_prune.data import SineTasks",
        "from l2l_prune.data.sine import SineTasks",
    ],
)
def test_one_warning_points_at_the_line_that_imports(statement, tmp_path, warned):
    file = tmp_path / "script.py"
    file.write_text(f"import sys\n\n{statement}\n{statement}\n")
    runpy.run_path(str(file))
    (warning,) = warned
    assert (warning.filename, warning.lineno) == (str(file), 3)


def test_modules_of_a_moved_package_are_not_executed_twice(warned):
    old = importlib.import_module("l2l_prune.data.sine")
    assert old is importlib.import_module("l2l_prune.fewshot.data.sine")
    assert old.__name__ == "l2l_prune.fewshot.data.sine"


def test_pickles_with_old_names_load(warned):
    data = b"cl2l_prune.segments\nSegment\n."
    assert pickle.loads(data) is l2l_prune.Segment
    assert len(warned) == 1


@pytest.mark.parametrize(
    "name", ["nowhere", "data.nowhere", "criteria.nowhere", "experiments.nowhere"]
)
def test_a_path_that_never_was_is_still_unknown(name, warned):
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        importlib.import_module(f"l2l_prune.{name}")


@pytest.mark.process
def test_new_paths_do_not_warn():
    """Neither does the library use an old path itself."""
    names = [m.name for m in pkgutil.walk_packages(l2l_prune.__path__, "l2l_prune.")]
    assert len(names) > 60
    code = f"""
import importlib, warnings
import l2l_prune
warnings.resetwarnings()
warnings.simplefilter("ignore")
warnings.filterwarnings("error", message="l2l_prune")
for name in {[n for n in names if not n.endswith("__main__")]!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert not error.name.startswith("l2l_prune"), error
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)

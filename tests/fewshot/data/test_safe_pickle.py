"""The reader of strangers' pickles: what it must refuse, and thousands that nobody thought of."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest

from l2l_prune.fewshot.data import safe_pickle
from l2l_prune.fewshot.data.safe_pickle import SafeUnpickler

from .fuzz_pickles import Hostile


def load(value, protocol=2):
    return SafeUnpickler(io.BytesIO(pickle.dumps(value, protocol))).load()


OBJECT_FIELD = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)


def dtype(name="i4", state=(3, "<", None, None, None, -1, -1, 0)):
    return Hostile(np.dtype, (name, False, True), state)


def array(*state):
    return Hostile(np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"), state)


CASES = {
    "object field": dtype("V8", OBJECT_FIELD),
    "object field of a number": dtype("i8", OBJECT_FIELD),
    "objects": np.array(["a", None], dtype=object),
    "records": np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
    "bytes of no kind": np.zeros(2, dtype="V8"),
    "subarrays": dtype("i4", (3, "|", (np.dtype("i4"), (2,)), None, None, 8, 4, 0)),
    "another size": dtype("S4", (3, "|", None, None, None, 1 << 20, 1, 0)),
    "another flag": dtype("V4", (3, "|", None, None, None, 4, 1, 63)),
    "no order": dtype("i4", (3, "?", None, None, None, -1, -1, 0)),
    "no state": dtype("i4", (3,)),
    "names of many fields": dtype("i4,i4"),
    "nothing long": dtype("S0"),
    "less content": array(1, (2,), dtype(), False, b"1234"),
    "more content": array(1, (2,), dtype(), False, b"1234" * 3),
    "negative": array(1, (-1, -1), dtype(), False, b"1234"),
    "overflow": array(1, (0, 1 << 62, 1 << 62), dtype(), False, b""),
    "list for content": array(1, (1,), dtype(), False, [1]),
    "no dtype": array(1, (1,), "i4", False, b"1234"),
    "buffer of less": Hostile(np.zeros(1).__reduce_ex__(5)[0], (b"1", np.dtype("i4"), (1,), "C")),
    "no Unicode": array(
        1, (1,), dtype("U1", (3, "<", None, None, None, 4, 4, 8)), False, b"\xff" * 4
    ),
    "a function's names": Hostile(np.dtype, ("i4",), {"__defaults__": (1,)}),
    "tuples for keys": {(1, 2): 3},
    "a set": {1, 2},
}


@pytest.mark.parametrize("case", CASES)
def test_what_no_benchmark_needs_is_refused(case):
    with pytest.raises(pickle.UnpicklingError, match="the file"):
        load(CASES[case])


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x05\x8e" + (1 << 45).to_bytes(8, "little") + b"a.",  # bytes of a claimed length
        b"\x80\x05\x96" + (1 << 34).to_bytes(8, "little") + b"a.",  # bytearray
        b"\x80\x05\x95" + (1 << 45).to_bytes(8, "little") + b"N.",  # frame
    ],
    ids=["bytes", "bytearray", "frame"],
)
def test_a_claimed_length_takes_no_memory(content, tmp_path):
    """Real files: those give the memory before they look."""
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("rb") as file:
        with pytest.raises(pickle.UnpicklingError, match="ends too early"):
            SafeUnpickler(file).load()


def test_state_reaches_no_function_of_the_library():
    """``BUILD`` on what a name stands for: it had rewritten the attributes of that function."""
    for module, name in safe_pickle._KNOWN:
        content = f"\x80\x02c{module}\n{name}\n}}X\x01\x00\x00\x00aK\x01sb.".encode("latin1")
        with pytest.raises(pickle.UnpicklingError, match="gives a state to"):
            SafeUnpickler(io.BytesIO(content)).load()
    assert not any(vars(f) for f in safe_pickle._KNOWN.values() if callable(f))


def test_nested_tuples_are_no_keys():
    """Their hash would take all of the stack, and the process with it."""
    content = b"\x80\x02}N" + b"\x85" * 1_000_000 + b"Ns."
    with pytest.raises(pickle.UnpicklingError, match="tuple as a key"):
        SafeUnpickler(io.BytesIO(content)).load()


@pytest.mark.process
@pytest.mark.parametrize("count", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_mutated_pickles_do_no_harm(count):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fewshot.data.fuzz_pickles", "0", str(count)],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}{done.stderr}"

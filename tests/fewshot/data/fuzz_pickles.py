"""Mutated pickles for the safe reader, under limits of time and memory.

A process of its own, ``python -m tests.fewshot.data.fuzz_pickles SEED COUNT``: what the reader
must never do may end it. A pickle either gives plain values, all of which can be looked at, or an
error of Python's; it takes neither much time nor much memory, and changes nothing outside.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import resource
import signal
import struct
import sys
from collections import OrderedDict

import numpy as np

from l2l_prune.fewshot.data import safe_pickle
from l2l_prune.fewshot.data.safe_pickle import SafeUnpickler

MEMORY = 1 << 29  # bytes beyond what the process has at its start
PROTOCOLS = 6
SECONDS = 10  # for one pickle

LABELS = {"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "labels": [1, 2, 3]}
MIXED = [
    OrderedDict(a=np.array(["ab", "c"]), b=np.float32(3)),
    {"n01": [0, 1], 5: b"\xff\x00", None: 1},
    np.arange(3, dtype=">i4"),
    (np.asfortranarray(np.eye(2)), np.bool_(True), "text", 1.5, 1 << 70),
]


class Hostile:
    """Pickled, it is a call of one of the reader's own functions with a state on top."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


DANGEROUS = ["V8", "O", "O8", "i4,O", "(2,2)O", "S0", "M8[ns]", "U999999999", "i4"]
STATES = [
    (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0),
    (3, "|", (np.dtype("O"), (1,)), None, None, 8, 1, 0),
    (3, "|", None, None, None, -1, -1, 63),
    (3, ">", None, None, None, 1 << 40, 1, 0),
    {"__name__": "taken", "__code__": None},
]


def seeds():
    found = [
        pickle.dumps(value, protocol) for value in (LABELS, MIXED) for protocol in range(PROTOCOLS)
    ]
    for name in DANGEROUS:
        for state in STATES:
            dtype = Hostile(np.dtype, (name, False, True), state)
            found.append(pickle.dumps([dtype], 2))
            array = (1, (1,), dtype, False, b"A" * 8)
            start = (np.ndarray, (0,), b"b")
            reconstruct = np.zeros(1).__reduce__()[0]
            found.append(pickle.dumps({"labels": Hostile(reconstruct, start, array)}, 2))
    found.append(pickle.dumps(Hostile(np.dtype, ("i4",), {"__defaults__": ()}), 2))
    return found


OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
NAMES = [f"c{module}\n{name}\n".encode() for module, name in safe_pickle._KNOWN]
LENGTHS = [struct.pack("<Q", 1 << n) for n in (0, 3, 20, 31, 40, 62, 63)]


def mutated(pickles, draw):
    content = bytearray(draw.choice(pickles[: 2 * PROTOCOLS] if draw.random() < 0.7 else pickles))
    for _ in range(draw.choice([1, 1, 1, 2, 4, 8])):
        at = draw.randrange(len(content) + 1)
        kind = draw.choice([0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 5])
        if kind == 0 and at < len(content):
            content[at] = draw.choice([draw.randrange(256), content[at] ^ 1 << draw.randrange(8)])
        elif kind == 1:
            del content[at : at + draw.randint(1, 8)]
        elif kind == 2:
            content[at:at] = draw.choice(OPCODES)
        elif kind == 3:
            content[at:at] = draw.choice(NAMES)
        elif kind == 4:
            content[at:at] = draw.choice(LENGTHS)[: draw.choice([1, 4, 8])]
        else:
            other = draw.choice(pickles)
            start = draw.randrange(len(other))
            content[at:at] = other[start : start + draw.randint(1, 60)]
    return bytes(content)


def look_at(value, seen):
    """Read everything, as the loaders would."""
    if id(value) in seen:
        return
    seen[id(value)] = value
    if isinstance(value, np.ndarray):
        assert value.dtype.kind in "biufcSU", value.dtype
        value.copy().tolist()
        assert value.nbytes < MEMORY
    elif isinstance(value, np.dtype):
        assert value.kind in "biufcSU", value
    elif isinstance(value, dict):
        for key, part in value.items():
            hash(key)
            look_at(part, seen)
    elif isinstance(value, (list, tuple)):
        for part in value:
            look_at(part, seen)
    else:
        plain = (str, bytes, bytearray, memoryview, int, float, np.generic, type(None))
        known = any(value is entry for entry in safe_pickle._KNOWN.values())
        assert isinstance(value, plain) or known, type(value)


def read(content):
    """Whether a pickle is read at all."""
    try:
        value = SafeUnpickler(io.BytesIO(content)).load()
    except MemoryError:
        raise
    except Exception:
        return False
    try:
        look_at(value, {})
    except (ValueError, RecursionError):  # text that is no Unicode; lists a thousand deep
        return False
    return True


def tell(content):
    """Called when the time is over."""

    def stop(*args):
        print(f"this pickle takes too long: {content!r}", flush=True)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGALRM)

    return stop


def main(seed, count):
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pickles, draw = seeds(), random.Random(seed)
    functions = {name: dict(vars(f)) for name, f in safe_pickle._KNOWN.items() if callable(f)}
    whole = 0
    for number in range(count):
        content = pickles[number] if number < len(pickles) else mutated(pickles, draw)
        signal.signal(signal.SIGALRM, tell(content))
        signal.alarm(SECONDS)
        try:
            whole += read(content)
        except BaseException:
            print(f"pickle {number}: {content!r}", flush=True)
            raise
        signal.alarm(0)
    assert functions == {n: vars(f) for n, f in safe_pickle._KNOWN.items() if callable(f)}
    assert np.dtype("i4").isnative
    assert len(str(np.dtype("u1"))) == 5
    print(f"{whole} of {count} were read")
    assert whole > count // 50, "hardly a pickle is read: nothing is tried"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

"""Full disks, folders that cannot be written, damaged and hostile files: what a person sees."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import zipfile

import pytest
import torch
from typer.testing import CliRunner

from l2l_prune._basics.files import remove_unfinished, replace_file
from l2l_prune._basics.tensor_files import DamagedFile, load_tensors, save_tensors
from l2l_prune.experiments.cli import app
from l2l_prune.experiments.config import make_config
from l2l_prune.experiments.run_result import RunResult
from l2l_prune.experiments.running.checkpoint import load_checkpoint, save_checkpoint
from l2l_prune.experiments.running.run import run
from l2l_prune.experiments.running.storage import run_name
from tests.experiments.conftest import settings, whole_run

STATE = {"a": torch.arange(6.0).view(2, 3), "b": [1, 2.5, None, (True, "c")], 0: torch.empty(0)}


def same(a, b):
    return torch.equal(a.pop("a"), b.pop("a")) and len(a.pop(0)) == len(b.pop(0)) and a == b


@contextlib.contextmanager
def tmpfs(folder, options):
    """A file system of our own on ``folder``; needs the rights to mount one."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder]).returncode:
        pytest.skip("no rights to mount a file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_every_flipped_bit_is_seen_or_does_no_harm(tmp_path):
    """One bit of each byte; what is loaded is what was saved, or nothing."""
    file = tmp_path / "state.pt"
    save_tensors(STATE, file)
    data = file.read_bytes()
    draw, refused = random.Random(0), 0
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        try:
            assert same(load_tensors(file), dict(STATE)), position
        except DamagedFile:
            refused += 1
    assert refused > sum(map(len, records(data))) > 300


def records(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [archive.read(record) for record in archive.infolist()]


def test_torch_alone_would_load_a_flipped_bit(tmp_path):
    """Why the checksums are looked at: should torch do so one day, ours can go."""
    file = tmp_path / "state.pt"
    save_tensors(STATE, file)
    data = bytearray(file.read_bytes())
    data[data.find(STATE["a"].numpy().tobytes()) + 6] ^= 64
    file.write_bytes(data)
    assert not torch.equal(torch.load(file, weights_only=True)["a"], STATE["a"])
    with pytest.raises(DamagedFile, match="checksum of its record"):
        load_tensors(file)


def middle_of_the_largest_record(file):
    """A byte that means something: between the records of a zip there are some that do not."""
    with zipfile.ZipFile(file) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
    name, extra = struct.unpack("<HH", file.read_bytes()[record.header_offset :][26:30])
    return record.header_offset + 30 + name + extra + record.file_size // 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, tmp_path):
    whole = whole_run(settings())
    file = tmp_path / "run.pt"
    list(itertools.islice(run(settings(), file, checkpoint_every=3), 14))
    newest = bytearray(file.read_bytes())
    newest[middle_of_the_largest_record(file)] ^= 1
    content = {"truncated": newest[:-10], "flipped": newest, "empty": b""}[damage]
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"run\.pt is damaged.*resuming from the previous"):
        progress, *_, resumed = run(settings(), file, checkpoint_every=3)
    assert progress.iteration == 10
    assert isinstance(resumed, RunResult)
    assert whole.curve == resumed.curve
    assert all(torch.equal(whole.weights[k], resumed.weights[k]) for k in whole.weights)


def test_two_damaged_checkpoints_are_both_named(tmp_path):
    file = tmp_path / "run.pt"
    for done in (3, 6):
        save_checkpoint(file, settings(), {"done": done})
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"run\.pt is damaged.*run\.pt\.previous is damaged"):
        load_checkpoint(file, settings())


def test_killed_between_the_two_renames(tmp_path, monkeypatch):
    file = tmp_path / "run.pt"
    save_checkpoint(file, settings(), {"done": 3})
    rename = os.replace

    def then_killed(source, target):
        rename(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", then_killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(file, settings(), {"done": 6})
    monkeypatch.undo()
    assert not file.exists()
    assert load_checkpoint(file, settings()) == {"done": 3}
    assert load_checkpoint(file, settings()) == {"done": 3}


def test_content_reaches_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path, monkeypatch
):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(*arguments, name=name, real=real):
            folder = name == "fsync" and os.path.isdir(f"/proc/self/fd/{arguments[0]}")
            calls.append(f"{name} folder" if folder else name)
            return real(*arguments)

        monkeypatch.setattr(os, name, noted)
    save_tensors(STATE, tmp_path / "state.pt")
    assert calls == ["fsync", "replace", "fsync folder"]


@pytest.mark.process
def test_a_full_disk_is_told_and_leaves_the_checkpoint(tmp_path):
    with tmpfs(tmp_path, "size=256k"):
        file = tmp_path / "run.pt"
        for done in (1, 2):
            save_checkpoint(file, settings(), {"done": done})
        with pytest.raises(OSError, match=r"No space left on device: '.*/run\.pt'") as caught:
            save_checkpoint(file, settings(), {"done": 3, "large": torch.zeros(100_000)})
        assert caught.value.errno == errno.ENOSPC
        assert {path.name for path in tmp_path.iterdir()} == {"run.pt", "run.pt.previous"}
        assert load_checkpoint(file, settings()) == {"done": 2}


def test_a_file_that_may_not_grow_is_told_and_leaves_the_one_before(tmp_path):
    """As on a full disk, for who may not mount one: the system refuses to write more."""
    file = tmp_path / "state.pt"
    save_tensors({"a": 1}, file)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/state\.pt'"):
            save_tensors({"a": torch.zeros(100_000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_tensors(file) == {"a": 1}
    assert os.listdir(tmp_path) == ["state.pt"]


@pytest.mark.process
@pytest.mark.parametrize("size", ["200k", "32k"])
@pytest.mark.slow
def test_the_command_on_a_full_disk(tmp_path, size):
    """In results, then already in the checkpoint's folder: a line, no traceback."""
    arguments = ["run", "--iterations", "100", "--channels", "32", "--tasks", "1", "--eval-tasks"]
    with tmpfs(tmp_path, f"size={size}"):
        result = CliRunner().invoke(app, [*arguments, "2", "--out", str(tmp_path / "out")])
        assert result.exit_code == 2
        assert "No space left on device" in result.stderr
        assert str(tmp_path / "out") in result.stderr
        assert "Traceback" not in result.stderr
        assert not list(tmp_path.rglob("*l2l_prune-tmp"))


@pytest.mark.process
def test_the_commands_in_a_read_only_folder(tmp_path):
    (tmp_path / "grid.toml").write_text('[base]\nalgorithm = "reptile"\nschedule = "dense"\n')
    place = tmp_path / "place"
    place.mkdir()
    with tmpfs(place, "size=1m"):
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        for arguments in (["run"], ["sweep", str(tmp_path / "grid.toml")], ["demo"]):
            result = CliRunner().invoke(app, [*arguments, "--out", str(place / "out")])
            assert result.exit_code == 2
            assert result.stderr == f"l2l-prune: {place / 'out'}: Read-only file system\n"


def test_what_a_killed_writer_left_is_removed(tmp_path):
    with replace_file(tmp_path / "a.json") as temporary:
        assert temporary.exists()
    temporary.touch()  # as SIGKILL leaves it
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".other").touch()
    (tmp_path / "b.json").touch()
    remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".other", "a.json", "b.json"]


class Exploding:
    def __reduce__(self):
        return os.mkdir, (EXPLODED,)


EXPLODED = "exploded"


def archive_with(code, **options):
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(4.0)}, buffer)
    out = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(out, "w", **options) as new:
        for record in old.infolist():
            mine = record.filename.endswith("data.pkl")
            new.writestr(record.filename, code(old.read(record)) if mine else old.read(record))
    return out.getvalue()


def stretched(code):
    """A tensor of two billion numbers, all of them the first one in the file."""
    before = b"K\x04\x85q\x08K\x01\x85"
    assert before in code
    return code.replace(before, b"J\x00\x94\x35\x77\x85q\x08K\x00\x85")


HOSTILE = {
    "code": lambda: archive_with(lambda code: pickle.dumps(Exploding(), 2)),
    "bytearray": lambda: archive_with(
        lambda code: b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R."
    ),
    "stretched": lambda: archive_with(stretched),
    "packed": lambda: archive_with(
        lambda code: code + bytes(10**7), compression=zipfile.ZIP_DEFLATED
    ),
    "lists in lists": lambda: archive_with(
        lambda code: (
            b"\x80\x02]q\x00" + b"".join(b"(" + b"h\x00" * 9 + b"lq\x00" for _ in "x" * 30) + b"."
        )
    ),
    "pickle": lambda: pickle.dumps(Exploding()),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_checkpoint_runs_nothing_and_takes_no_memory(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.pt").write_bytes(HOSTILE[kind]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"run\.pt is damaged or was not written by this program"):
        load_checkpoint(tmp_path / "run.pt", settings())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert os.listdir(tmp_path) == ["run.pt"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = " + "[" * 100_000, "nested too deeply"),
        ("x = " + "9" * 10_000, "digits"),
        ("#" * 2_000_000, "more than 1000000 bytes"),
        ('[base]\nalgorithm="reptile"\nschedule="dsd"\n[grid]\nseeds = 1000000000000', "the grid"),
        (
            '[base]\nalgorithm="reptile"\nschedule="dsd"\n[grid]\n'
            + "".join(
                f"{name} = [{','.join(map(str, range(1, 400)))}]\n"
                for name in ("seed", "ways", "shots", "tasks", "channels")
            ),
            "the grid has 10",
        ),
    ],
    ids=["deep", "digits", "large", "seeds", "grid"],
)
def test_hostile_settings(text, words, tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    result = CliRunner().invoke(app, ["sweep", str(file), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr) < 1000
    result = CliRunner().invoke(app, ["run", "--config", "/dev/zero", "--out", str(tmp_path / "o")])
    assert result.exit_code == 2
    assert "not a file" in result.stderr


def test_a_damaged_result_is_named(tmp_path):
    arguments = ["sweep", str(tmp_path / "sweep.toml"), "--out", str(tmp_path / "out")]
    (tmp_path / "sweep.toml").write_text('[base]\nalgorithm = "reptile"\nschedule = "dense"\n')
    place = tmp_path / "out" / run_name(make_config("reptile", "dense"))
    place.mkdir(parents=True)
    for text in ("", "[" * 100_000, json.dumps({"runs": []}), "null"):
        (place / "results.json").write_text(text)
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert "results.json is damaged" in result.stderr

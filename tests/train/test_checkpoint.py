"""Checkpoints: any ranks load what any others saved, a bad one is known, and a crash at any instant costs none."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from disks import small_disk
from ranks import Ranks
from torch import Tensor

from helixpipe.config import Config
from helixpipe.errors import CheckpointError
from helixpipe.train import checkpoint, manifest
from helixpipe.train.checkpoint import Checkpoints

SIZE = 9


def tensors(names: range, step: int) -> dict[str, Tensor]:
    return {f"model.{i}.weight": torch.full((i + 1, 3), 100.0 * step + i) for i in names}


def save(folder: Path, step: int, keep: int = 9) -> Path:
    return Checkpoints(folder, keep, None).save(tensors(range(SIZE), step), step, Config())


def load(path: Path, names: range = range(SIZE)) -> dict[str, Tensor]:
    state = {name: torch.zeros_like(tensor) for name, tensor in tensors(names, 0).items()}
    Checkpoints(path.parent, 9, None).load(path, state)
    return state


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_one_process_needs_no_group_and_hears_no_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = save(tmp_path / "checkpoints", 7)
        assert same(load(path), tensors(range(SIZE), 7))
    assert path == tmp_path / "checkpoints" / "step-00000007"
    made = manifest.verify(path)
    assert made.step == 7
    assert made.shape == dataclasses.asdict(Config().shape())
    assert set(made.files) == {path.name for path in path.iterdir()} - {"manifest.json"}
    assert capfd.readouterr() == ("", "")


def _save_shared(folder: str, step: int) -> str:
    """Four ranks with uneven shares; the last has nothing."""
    names = (range(4), range(4, 5), range(5, SIZE), range(0))[dist.get_rank()]
    return str(Checkpoints(Path(folder), 2, dist.group.WORLD).save(tensors(names, step), step, Config()))


def _load_shared(path: str, step: int) -> bool:
    names = (range(1), range(1, 7), range(0), range(7, SIZE))[dist.get_rank()]
    state = {name: torch.zeros_like(tensor) for name, tensor in tensors(names, 0).items()}
    Checkpoints(Path(path).parent, 2, dist.group.WORLD).load(Path(path), state)
    return same(state, tensors(names, step))


@pytest.mark.timeout(120)
def test_any_ranks_load_what_any_others_saved(tmp_path: Path, four_ranks: Ranks) -> None:
    paths = four_ranks.run(_save_shared, str(tmp_path), 3)
    assert len(set(paths)) == 1
    assert same(load(Path(paths[0])), tensors(range(SIZE), 3))
    assert all(four_ranks.run(_load_shared, paths[0], 3))
    assert all(four_ranks.run(_load_shared, str(save(tmp_path / "one", 5)), 5))


def test_the_newest_are_kept_and_those_of_a_course_left_go(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9):
        save(tmp_path, step)
    (tmp_path / ".step-00000004.tmp").mkdir()
    save(tmp_path, 4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_course_that_is_left_is_not_the_newest_any_more(tmp_path: Path) -> None:
    """Guards against a crash that returns a run to what it went back from."""
    for step in (80, 100, 120):
        save(tmp_path, step)
    (tmp_path / ".left-step-00000120").mkdir()  # of an earlier time
    assert [path.name for path in manifest.leave_later(tmp_path, 80)] == ["step-00000100", "step-00000120"]
    found = manifest.find_newest(tmp_path, pytest.fail)
    assert found is not None
    assert found[1].step == 80
    assert same(load(tmp_path / ".left-step-00000120"), tensors(range(SIZE), 120))
    assert manifest.leave_later(tmp_path, 80) == []
    save(tmp_path, 90)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000080", "step-00000090"]


def test_a_later_checkpoint_that_cannot_be_set_aside_is_named(tmp_path: Path) -> None:
    for step in (80, 100):
        save(tmp_path, step)
    (tmp_path / ".left-step-00000100").touch()
    with pytest.raises(CheckpointError) as caught:
        manifest.leave_later(tmp_path, 80)
    assert str(caught.value) == f"{tmp_path}/step-00000100: not a directory; it cannot be set aside, remove it"


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    _corrupt(path)
    save(tmp_path, 2, keep=2)
    assert same(load(path), tensors(range(SIZE), 2))


def _corrupt(path: Path) -> None:
    file = path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _truncate(path: Path) -> None:
    os.truncate(path / "__0_0.distcp", 100)


def _remove(path: Path) -> None:
    (path / ".metadata").unlink()


def _forge(path: Path) -> None:
    body = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(body | {"step": 77}))


def _cut_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 50)


def _no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def _newer(path: Path) -> None:
    body = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(body | {"format": 2}))


SPOILED = [
    (_newer, "/manifest.json: format 2, and this version reads 1; use the one that wrote it"),
    (_corrupt, "/__0_0.distcp: corrupted, its checksum differs; choose another checkpoint"),
    (_truncate, "/__0_0.distcp: 100 bytes where "),
    (_remove, "/.metadata: no such file or directory; choose another checkpoint"),
    (_forge, "/manifest.json: corrupted; choose another checkpoint"),
    (_cut_manifest, "/manifest.json: corrupted; choose another checkpoint"),
    (_no_manifest, "/manifest.json: no such file or directory; this is no whole checkpoint, choose another"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILED)
def test_a_bad_checkpoint_is_known_by_its_file(tmp_path: Path, spoil: object, message: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    spoil(path)  # type: ignore[operator]
    with pytest.raises(CheckpointError) as caught:
        manifest.verify(path)
    assert str(caught.value).startswith(str(path) + message)
    assert "\n" not in str(caught.value)
    said: list[str] = []
    newest = manifest.find_newest(tmp_path, said.append)
    assert newest is not None
    assert newest[0] == tmp_path / "step-00000001"
    assert said == ["a bad checkpoint is passed over: " + str(caught.value).partition(";")[0]]


def test_another_models_checkpoint_is_refused_by_the_field_that_differs(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    shape = dataclasses.replace(Config().shape(), ffn=64)
    with pytest.raises(CheckpointError) as caught:
        manifest.check_shape(manifest.verify(path), shape, path)
    assert str(caught.value) == f"{path}: its model.ffn is 512, and the config's 64; use the same model"


def test_a_name_that_is_not_in_it_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(save(tmp_path, 1), range(SIZE + 1))
    assert "model.9.weight" in str(caught.value)
    assert "\n" not in str(caught.value)


def _save_when_full(folder: str) -> str:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    original = checkpoint.FileSystemWriter.write_data
    if dist.get_rank() == 2:
        checkpoint.FileSystemWriter.write_data = full  # type: ignore[assignment, method-assign]
    try:
        _save_shared(folder, 2)
    except CheckpointError as error:
        return str(error)
    finally:
        checkpoint.FileSystemWriter.write_data = original  # type: ignore[method-assign]
    return "saved"


@pytest.mark.timeout(120)
def test_one_full_disk_is_an_error_of_all_ranks_and_costs_no_checkpoint(tmp_path: Path, four_ranks: Ranks) -> None:
    last = four_ranks.run(_save_shared, str(tmp_path), 1)[0]
    assert (
        four_ranks.run(_save_when_full, str(tmp_path))
        == [
            f"checkpoint of step 2: rank 2 could not write: no space left on device; the last good one is {last}; "
            "--resume continues it"
        ]
        * 4
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert manifest.verify(Path(last)).step == 1


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def _interrupted_inside(*_: object) -> None:
    """As torch's zip writer does it: closing a file that was cut short fails as well."""
    try:
        raise KeyboardInterrupt
    finally:
        raise RuntimeError("unexpected pos 64 vs 0")


@pytest.mark.parametrize("interrupted", [_interrupted, _interrupted_inside])
def test_ctrl_c_is_no_failed_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: Callable[..., None]
) -> None:
    first = save(tmp_path, 1)
    monkeypatch.setattr(checkpoint.FileSystemWriter, "write_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    monkeypatch.setattr(checkpoint.FileSystemReader, "read_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(first)
    assert manifest.checkpoints(tmp_path) == [first]


def test_a_really_full_disk_says_so(tmp_path: Path) -> None:
    with small_disk(tmp_path, "64k"):
        first = save(tmp_path, 1)
        with pytest.raises(CheckpointError) as caught:
            Checkpoints(tmp_path, 9, None).save({"model.large": torch.zeros(100_000)}, 2, Config())
        assert str(caught.value) == (
            f"checkpoint of step 2: rank 0 could not write: no space left on device; the last good one is {first}; "
            "--resume continues it"
        )
        assert [path.name for path in tmp_path.iterdir()] == [first.name]
        assert same(load(first), tensors(range(SIZE), 1))


# every place in a save where a crash is tried, and the newest checkpoint after it
CRASHES = {
    "_prepare:after": 1, "write_data": 1, "write_data:after": 1, "seal:after": 1, "finish": 1, "finish:after": 2,
    "prune": 2,
}  # fmt: skip
CRASH = """
import os, signal, sys
from pathlib import Path
import test_checkpoint
from helixpipe.train import checkpoint, manifest

OWNERS = {"write_data": checkpoint._Writer, "_prepare": checkpoint.Checkpoints}

def crash(where):
    name, _, after = where.partition(":")
    owner = OWNERS.get(name, manifest)
    original = getattr(owner, name)
    def crashing(*args):
        if after:
            original(*args)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, crashing)

for where in test_checkpoint.CRASHES:
    pid = os.fork()
    if not pid:
        folder = Path(sys.argv[1], where)
        test_checkpoint.save(folder, 1)
        crash(where)
        test_checkpoint.save(folder, 2, keep=1)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL, where
"""


@pytest.mark.timeout(120)
def test_a_crash_anywhere_in_a_save_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    here = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*here, *sys.path])}
    ended = subprocess.run([sys.executable, "-c", CRASH, tmp_path], timeout=100, env=environment, capture_output=True)
    assert ended.returncode == 0, ended.stderr.decode()
    for where, newest in CRASHES.items():
        found = manifest.find_newest(tmp_path / where, lambda line: pytest.fail(line))
        assert found is not None
        assert found[1].step == newest, where
        assert same(load(found[0]), tensors(range(SIZE), newest))
        save(tmp_path / where, 3, keep=1)
        assert [path.name for path in (tmp_path / where).iterdir()] == ["step-00000003"]

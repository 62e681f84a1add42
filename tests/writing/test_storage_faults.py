"""Power losses and full disks: no partial file has a final name, and the same command resumes.

The disks are real file systems, and the runs are command lines.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
from disks import (
    JOURNAL_FLUSHED,
    JOURNAL_LOST,
    ext4,
    ext4_image,
    lose_power,
    remount,
    tmpfs,
    tool,
)
from runs import (
    INDEX_NAME,
    OPTIONS,
    WORK_NAME,
    assert_clean_error,
    assert_nothing_half_written,
    assert_resumes,
    convert_command,
    digests,
    disturb,
    interrupted,
    limit_file_size,
    run,
    seconds_of_writing,
)

MB = 1_000_000


def many(quick: int, slow: int) -> pytest.MarkDecorator:
    """Parametrize the number of trials: one that takes seconds, and one that takes minutes."""
    return pytest.mark.parametrize("count", [quick, pytest.param(slow, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def source(checkpoints) -> Path:
    return checkpoints()


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> dict[str, str]:
    """The checksums of an undisturbed output."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert run(convert_command(source, output)).returncode == 0
    return digests(output)


def changed_command(change: str, source: Path, output: Path) -> list[str]:
    """Return the command line of a conversion in which Python's `os` is changed."""
    code = (
        f"import os, sys, gptoss_stream.cli.main\n{change}\nsys.exit(gptoss_stream.cli.main.main())"
    )
    return [sys.executable, "-c", code, "convert", str(source), str(output), *OPTIONS]


# ------------------------------------------------------------------------------- power losses


def survive_power_losses(
    source: Path,
    whole: dict[str, str],
    folder: Path,
    count: int,
    *,
    options: str = "",
    change: str = "",
    journaled: int = 0,
) -> None:
    """Convert to a disk that loses power again and again; assert what must be on the disk then.

    One power loss in five is right after the end of a run, the others at a random moment while it
    writes. After one in four the next power loss is during the resumed run. Moments are a matter of
    chance: the trials go on, up to ten times as many, until a third was during a run and until
    `journaled` left a journal of a shard.
    """
    image = ext4_image(folder / "image", 64 << 20)
    disk = folder / "disk"
    output = disk / "out"
    command = changed_command(change, source, output)
    with ext4(image, disk, options):
        pause = seconds_of_writing(command, output) / len(whole)
        shutil.rmtree(output)
    chance = random.Random(count)
    live = journals = 0
    for number in range(10 * count):
        if number >= count and live >= count // 3 and journals >= journaled:
            break
        journal = (JOURNAL_FLUSHED, JOURNAL_LOST)[number % 2]
        files = None if number % 10 < 2 else chance.randrange(len(whole))
        with ext4(image, disk, options):
            power_loss = partial(lose_power, disk, journal)
            done, running = disturb(command, output, power_loss, files, chance.uniform(0, pause))
        live += running
        with ext4(image, disk, options):
            assert_nothing_half_written(output, whole)
            finished = INDEX_NAME in digests(output)
            if done.returncode == 0:
                assert finished, "a run ended successfully, and its output is not on the disk"
            else:
                assert_clean_error(done, 3)
            journals += any((output / WORK_NAME).glob("*.journal"))
            if finished or chance.random() < 0.75:
                done = run(command)
                assert done.returncode == 0, done.stderr
                assert digests(output) == whole
                shutil.rmtree(output)
    print(f"{number} power losses, {live} during a run, {journals} of them left a journal")
    assert live >= count // 3
    assert journals >= journaled


@many(quick=5, slow=200)
def test_power_losses(count, source, whole, tmp_path):
    """A file with a final name has the right bytes; if there is an index, or if the run ended
    successfully, the output is complete; and the same command completes the output."""
    survive_power_losses(source, whole, tmp_path, count)


@many(quick=3, slow=100)
def test_power_losses_where_data_is_written_after_names(count, source, whole, tmp_path):
    """The same on an ext4 on which a file's new size may reach the disk before its data."""
    survive_power_losses(source, whole, tmp_path, count, options="data=writeback")


@many(quick=3, slow=100)
def test_power_losses_where_shards_go_through_the_page_cache(count, source, whole, tmp_path):
    """The same on a system without direct writing."""
    survive_power_losses(source, whole, tmp_path, count, change="os.O_DIRECT = 0")


JOURNALED = """
from gptoss_stream.writing import executor, shard_in_progress
from gptoss_stream.writing.shard_file import ShardFile
executor.CHUNK_NBYTES, shard_in_progress.JOURNAL_SECONDS = 1 << 14, 0
"""


NOT_SYNCED = """
os.O_DIRECT = 0
def opened(self, existing, open_=ShardFile._open):
    descriptor = open_(self, existing)
    os.ftruncate(descriptor, self._nbytes)  # or the file would be too short to be believed
    return descriptor
ShardFile._open, ShardFile.sync = opened, lambda self: None
"""


@pytest.mark.parametrize("change", ["", "os.O_DIRECT = 0"], ids=["direct", "buffered"])
@many(quick=4, slow=100)
def test_power_losses_within_a_shard(count, change, source, whole, tmp_path):
    """What a journal says is written has the right bytes."""
    change = JOURNALED + change
    survive_power_losses(source, whole, tmp_path, count, change=change, journaled=count // 4)


def test_without_a_sync_before_the_journal_power_losses_cause_failures(source, whole, tmp_path):
    """The control: what a journal says is then not on the disk."""
    with pytest.raises(AssertionError, match="safetensors"):
        survive_power_losses(source, whole, tmp_path, 100, change=JOURNALED + NOT_SYNCED)


@pytest.mark.parametrize("change", ["", "; os.O_DIRECT = 0"], ids=["direct", "buffered"])
def test_without_fsync_power_losses_cause_failures(change, source, whole, tmp_path):
    """The control: if nothing is synced to the disk, these trials fail."""
    change = "os.fsync = os.fdatasync = lambda descriptor: None" + change
    with pytest.raises(AssertionError, match=r"json|safetensors|its output is not on the disk"):
        survive_power_losses(source, whole, tmp_path, 10, change=change)


# --------------------------------------------------------------------------------- full disks


def needed_nbytes(source: Path) -> int:
    """Return the disk space that the shards need, as `plan` reports it."""
    command = [sys.executable, "-m", "gptoss_stream", "plan", str(source), *OPTIONS, "--json"]
    return json.loads(run(command).stdout)["disk_needed"]


def page_sizes(low: int, high: int, count: int) -> list[int]:
    """Return `count` multiples of the page size, from `low` to just below `high`."""
    return [(low + (high - 1 - low) * n // (count - 1)) // 4096 * 4096 for n in range(count)]


@many(quick=8, slow=50)
def test_a_disk_that_is_too_small_is_refused_at_once(count, source, whole, tmp_path):
    """The error has the needed and the free space; with enough space the same command succeeds."""
    output = tmp_path / "disk/out"
    sizes = page_sizes(4096, needed_nbytes(source), count)
    for size in sizes:
        with tmpfs(tmp_path / "disk", size) as disk:
            done = run(convert_command(source, output))
            assert_clean_error(done, 3)
            assert re.search(r"[\d.]+ [kMG]?B are needed and [\d.]+ [kMG]?B are free", done.stderr)
            assert all(name.startswith(WORK_NAME) for name in digests(output))
            if size == sizes[-1]:
                remount(disk, f"size={16 * MB}")
                assert_resumes(source, output, whole)


FILL_THEN_CONVERT = """
import os, sys, gptoss_stream
source, output, ballast, left = sys.argv[1:]
def fill(planned):
    status = os.statvfs(output)
    with open(ballast, "wb") as file:
        nbytes = status.f_bavail * status.f_frsize - int(left)
        os.posix_fallocate(file.fileno(), 0, nbytes)
try:
    gptoss_stream.convert(source, output, max_shard_size="300KB", on_plan=fill)
except gptoss_stream.GptOssStreamError as error:
    print("gptoss_stream:", error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def assert_survives_filling(source: Path, whole: dict[str, str], disk: Path, left: int) -> None:
    """Convert while another file fills the disk up to `left` bytes; delete it and resume."""
    output, ballast = disk / "out", disk / "ballast"
    child = [sys.executable, "-c", FILL_THEN_CONVERT, source, output, ballast, left]
    done = run([str(argument) for argument in child])
    ballast.unlink()
    if done.returncode == 0:
        assert digests(output) == whole  # the space was just enough
        return
    assert_clean_error(done, 3)
    assert_nothing_half_written(output, whole)
    assert_resumes(source, output, whole)
    left = r"([\d.]+ [kMG]?B|only the index and other small files) are (needed|still to be written)"
    assert re.search(rf"{left} and [\d.]+ [kMG]?B are free", done.stderr), done.stderr
    assert "again" in done.stderr


@many(quick=6, slow=50)
def test_a_disk_that_fills_during_the_run(count, source, whole, tmp_path):
    """At the first small file, at any shard, or at the index in the end: the error says how much
    space is needed; when it is free, the same command resumes."""
    for left in page_sizes(0, needed_nbytes(source) + (32 << 10), count):
        with tmpfs(tmp_path / "disk", 16 * MB) as disk:
            assert_survives_filling(source, whole, disk, left)


@many(quick=2, slow=20)
def test_an_ext4_that_fills_during_the_run(count, source, whole, tmp_path):
    """The same with direct writing, on a file system that may report a full disk only when it
    allocates blocks for data."""
    image = ext4_image(tmp_path / "image", 32 << 20)
    for left in page_sizes(0, needed_nbytes(source) + (32 << 10), count):
        with ext4(image, tmp_path / "disk") as disk:
            assert_survives_filling(source, whole, disk, left)
            shutil.rmtree(disk / "out")


@pytest.mark.parametrize("limit", [100, 150_001, 294_000])
def test_files_may_not_grow_that_large(limit, source, whole, tmp_path):
    """A limit on file size cuts a write in the middle of a shard, also at an unaligned offset."""
    output = tmp_path / "out"
    done = run(convert_command(source, output), preexec_fn=limit_file_size(limit))
    assert_clean_error(done, 3)
    assert "File too large" in done.stderr
    assert_nothing_half_written(output, whole)
    assert_resumes(source, output, whole)


# ------------------------------------------------------------------- permissions and names


@pytest.fixture
def permissions_count(tmp_path) -> list[str]:
    """The prefix of a command for which permissions are checked, even if root runs it."""
    prefix = []
    if os.geteuid() == 0:
        drop = "-dac_override,-dac_read_search"
        prefix = [tool("setpriv"), f"--bounding-set={drop}", f"--inh-caps={drop}"]
    probe = tmp_path / "probe"
    probe.touch(0)
    if run([*prefix, "cat", str(probe)]).returncode == 0:
        pytest.skip("needs the right to give up capabilities")
    probe.unlink()
    return prefix


@pytest.mark.parametrize("name", ["", "config.json", INDEX_NAME, "model.safetensors", "vocab.json"])
def test_a_source_that_may_not_be_read(name, permissions_count, tiny, tmp_path):
    """It is a clean error that names the file, before anything is written."""
    (tiny / "vocab.json").write_text("{}")
    mode = (tiny / name).stat().st_mode
    (tiny / name).chmod(0)
    try:
        done = run([*permissions_count, *convert_command(tiny, tmp_path / "out")])
    finally:
        (tiny / name).chmod(mode)
    assert_clean_error(done, 3)
    assert "Permission denied" in done.stderr
    assert str(tiny / name) in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["parent", "output"])
def test_a_folder_that_may_not_be_written(where, permissions_count, source, whole, tmp_path):
    """It is a clean error; nothing is left in the folder, and the same command resumes when it may
    be written."""
    output = tmp_path / "parent/output"
    locked = {"parent": output.parent, "output": output}[where]
    locked.mkdir(parents=True)
    locked.chmod(0o555)
    done = run([*permissions_count, *convert_command(source, output)])
    assert_clean_error(done, 3)
    assert "Permission denied" in done.stderr
    assert str(output) in done.stderr
    assert not list(locked.iterdir())
    locked.chmod(0o755)
    assert_resumes(source, output, whole)


def test_a_disk_that_may_not_be_written(source, whole, tmp_path):
    """A read-only file system is a clean error; the same command resumes when it is writable."""
    with tmpfs(tmp_path / "disk", 16 * MB) as disk:
        for begin in (lambda: None, partial(interrupted, source, disk / "out")):
            begin()
            remount(disk, "ro")
            done = run(convert_command(source, disk / "out"))
            assert_clean_error(done, 3)
            assert "Read-only file system" in done.stderr
            remount(disk, "rw")
            assert_nothing_half_written(disk / "out", whole)
        assert_resumes(source, disk / "out", whole)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "é" * 200])
def test_a_path_that_is_too_long(name, source, tmp_path):
    """It is a clean error, and no folder of the path is created."""
    done = run(convert_command(source, tmp_path / name))
    assert_clean_error(done, 2, 3)
    assert "too long" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("depth", [".", "file"])
def test_an_output_that_is_a_file(depth, source, tmp_path):
    """Or that is below a file: it is a clean error, and the file is kept."""
    (tmp_path / "out").write_text("mine")
    done = run(convert_command(source, tmp_path / "out" / depth, "--overwrite"))
    assert_clean_error(done, 2, 3)
    assert (tmp_path / "out").read_text() == "mine"


NAMES = {
    "spaces": (" a  name with spaces ", "utf-8"),
    "letters of other scripts": ("модель-ü-模型-😀", "utf-8"),
    "letters that the terminal cannot show": ("модель-ü-模型-😀", "ascii"),
    "a line break": ("two\nlines", "utf-8"),
    "bytes that are not UTF-8": (os.fsdecode(b"\xff\xfe"), "utf-8"),
    "folders that do not exist": ("a/b/c", "utf-8"),
}


@pytest.mark.parametrize(("name", "encoding"), NAMES.values(), ids=NAMES.keys())
def test_names_that_folders_may_have(name, encoding, tiny, tmp_path):
    """Source and output may have any name that the system allows, even if the terminal cannot show
    it; an unfinished run resumes."""
    source, output = tmp_path / "sources" / name, tmp_path / "outputs" / name
    source.parent.mkdir(parents=True)
    try:
        tiny.rename(source)
    except OSError as error:
        pytest.skip(f"needs a file system with such names: {error}")
    interrupted(source, output)
    command = [word for word in convert_command(source, output) if word != "--quiet"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = run(command, env=environment, encoding="utf-8", errors="surrogateescape")
    assert done.returncode == 0, done.stderr
    assert "in 4 shards" in done.stdout
    assert len(list(output.glob("*.safetensors"))) == 4

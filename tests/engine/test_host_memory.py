"""How much host memory is left, from what Linux writes into its files; and that freed memory goes back."""

from pathlib import Path

import pytest

from engine.host_memory import free_bytes, give_back_freed

MIB = 2**20


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A machine with 1,000 MiB to spare."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9000000 kB\nMemAvailable:  1024000 kB\nHugePages_Total: 0\n")
    return tmp_path / "proc"


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"memory.{name}").write_text(f"{value}\n")


def stat(**bytes_: int) -> str:
    return "\n".join(f"{name} {value}" for name, value in {"anon": 1, **bytes_}.items())


def test_machine_without_groups_says_what_it_has(proc: Path, tmp_path: Path) -> None:
    assert free_bytes(proc, tmp_path / "none") == 1000 * MIB


def test_machine_that_says_nothing_has_nothing(tmp_path: Path) -> None:
    assert free_bytes(tmp_path, tmp_path) == 0


def test_container_of_version_2_is_less_than_its_machine(proc: Path, tmp_path: Path) -> None:
    (proc / "self/cgroup").write_text("0::/\n")
    group(tmp_path / "groups", max=500 * MIB, high="max", current=420 * MIB)
    assert free_bytes(proc, tmp_path / "groups") == 80 * MIB


def test_lower_limit_of_a_group_holds(proc: Path, tmp_path: Path) -> None:
    (proc / "self/cgroup").write_text("0::/\n")
    group(tmp_path / "groups", max=500 * MIB, high=450 * MIB, current=420 * MIB)
    assert free_bytes(proc, tmp_path / "groups") == 30 * MIB


def test_cached_files_count_as_free_unless_they_are_at_work(proc: Path, tmp_path: Path) -> None:
    (proc / "self/cgroup").write_text("0::/\n")
    cached = stat(active_file=100 * MIB, inactive_file=200 * MIB, file_mapped=30 * MIB, file_dirty=5 * MIB)
    group(tmp_path / "groups", max=500 * MIB, current=500 * MIB, stat=cached)
    assert free_bytes(proc, tmp_path / "groups") == 265 * MIB


def test_group_around_the_own_one_holds_too(proc: Path, tmp_path: Path) -> None:
    (proc / "self/cgroup").write_text("0::/pod/worker\n")
    group(tmp_path / "groups/pod/worker", max="max", current=1)
    group(tmp_path / "groups/pod", max=100 * MIB, current=40 * MIB)
    assert free_bytes(proc, tmp_path / "groups") == 60 * MIB


def test_container_of_version_1_is_the_mounts_root_when_its_path_is_not_there(proc: Path, tmp_path: Path) -> None:
    (proc / "self/cgroup").write_text("12:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n")
    cached = stat(total_active_file=7 * MIB, total_mapped_file=2 * MIB, active_file=900 * MIB)
    group(tmp_path / "groups/memory", limit_in_bytes=300 * MIB, usage_in_bytes=250 * MIB, stat=cached)
    assert free_bytes(proc, tmp_path / "groups") == 55 * MIB


def test_limit_of_version_1_that_is_none_leaves_the_machines(proc: Path, tmp_path: Path) -> None:
    (proc / "self/cgroup").write_text("4:memory:/\n")
    group(tmp_path / "groups/memory", limit_in_bytes=2**63 - 4096, usage_in_bytes=250 * MIB)
    assert free_bytes(proc, tmp_path / "groups") == 1000 * MIB


def test_group_over_its_limit_leaves_nothing(proc: Path, tmp_path: Path) -> None:
    (proc / "self/cgroup").write_text("0::/\n")
    group(tmp_path / "groups", max=100 * MIB, current=101 * MIB)
    assert free_bytes(proc, tmp_path / "groups") == 0


def test_path_that_leads_out_of_the_mount_is_not_followed(proc: Path, tmp_path: Path) -> None:
    """A process in another namespace's group is told /../other."""
    (proc / "self/cgroup").write_text("0::/../other\n")
    group(tmp_path / "other", max=1, current=1)
    (tmp_path / "groups").mkdir()
    assert free_bytes(proc, tmp_path / "groups") == 1000 * MIB


def test_this_machine_has_some() -> None:
    assert free_bytes() > 0


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / MIB


def test_give_back_returns_what_is_free_between_blocks_that_are_not() -> None:
    """Without it nothing of the 100 MiB goes back while every 64th block is held."""
    give_back_freed()  # what earlier tests have left free, or the blocks would only fill it
    before_mib = resident_mib()
    blocks = [bytearray(2048) for _ in range(50_000)]
    held = blocks[::64]
    del blocks
    assert resident_mib() > before_mib + 60
    give_back_freed()
    assert resident_mib() < before_mib + 30
    assert len(held) == 782

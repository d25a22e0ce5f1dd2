"""What of the machine may be used: the tightest of what the kernel, the affinity and every control group say."""

from __future__ import annotations

import os

import pytest

from lora_merge.runtime import machine

GB = 1 << 30


def place(root, files):
    """Write the files of a pretended /proc and /sys."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 24000000 kB\nMemFree: 100 kB\nMemAvailable: 16777216 kB\n"}
V2 = {"proc/self/cgroup": "0::/user/job\n"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/x\n"}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, None),
        (MEMINFO, 16 * GB),
        ({**MEMINFO, **V2}, 16 * GB),
        (
            {**MEMINFO, **V2, "sys/fs/cgroup/user/job/memory.max": "max\n", "sys/fs/cgroup/user/job/memory.current": "7"},
            16 * GB,
        ),
        (
            {**MEMINFO, **V2, "sys/fs/cgroup/user/memory.max": f"{4 * GB}\n", "sys/fs/cgroup/user/memory.current": f"{GB}"},
            3 * GB,
        ),
        (
            {
                **MEMINFO, **V2,
                "sys/fs/cgroup/user/job/memory.max": f"{4 * GB}", "sys/fs/cgroup/user/job/memory.current": f"{3 * GB}",
                "sys/fs/cgroup/user/job/memory.stat": f"anon {GB}\ninactive_file {2 * GB}\nactive_file 5\n",
            },
            3 * GB,
        ),
        (
            {**V2, "sys/fs/cgroup/user/job/memory.max": f"{GB}", "sys/fs/cgroup/user/job/memory.current": f"{2 * GB}"},
            0,
        ),
        (
            {
                **MEMINFO, **V1,
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{2 * GB}",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{GB}",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "5",
            },
            GB,
        ),
    ],
    ids=["nothing known", "the kernel", "no limit", "max", "a parent's limit", "page cache is free", "over", "version 1"],
)  # fmt: skip
def test_free_memory_is_what_the_tightest_limit_leaves(files, wanted, tmp_path):
    assert machine.free_bytes(place(tmp_path, files)) == wanted


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, 6),
        ({**V2, "sys/fs/cgroup/user/job/cpu.max": "max 100000\n"}, 6),
        ({**V2, "sys/fs/cgroup/user/job/cpu.max": "150000 100000\n"}, 2),
        ({**V2, "sys/fs/cgroup/user/cpu.max": "50000 100000\n"}, 1),
        ({**V2, "sys/fs/cgroup/user/cpu.max": "9900000 100000\n"}, 6),
        (
            {
                **V1,
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        (
            {**V1, "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "1"},
            6,
        ),
    ],
    ids=["affinity", "max", "one and a half", "a parent's half", "more than there are", "version 1", "none"],
)  # fmt: skip
def test_cores_are_what_affinity_and_quotas_leave(files, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert machine.usable_cores(place(tmp_path, files)) == wanted


def test_this_machine_has_a_core_and_some_memory():
    assert machine.usable_cores() >= 1
    assert machine.free_bytes() is None or machine.free_bytes() > 1 << 20

"""What is read from the profiler's trace."""

import pytest
import torch

from bench.trace import busy_s, copied_bytes, dearest, idle_s, record, sort_of

COPIES = [
    {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "args": {"bytes": 1000}},
    {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pageable -> Device)", "args": {"bytes": 24}},
    {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pageable)", "args": {"bytes": 512}},
    {"cat": "kernel", "name": "gemm HtoD", "args": {}},
]


def test_copied_bytes_counts_what_goes_to_the_card():
    assert copied_bytes(COPIES) == 1024


def test_card_is_busy_once_where_streams_work_side_by_side():
    spans = [("kernel", 0, 10), ("gpu_memcpy", 5, 20), ("kernel", 6, 2), ("gpu_memset", 30, 1), ("cpu_op", 50, 50)]
    events = [{"cat": cat, "name": "", "ts": begin, "dur": dur} for cat, begin, dur in spans]
    assert busy_s(events) == pytest.approx(26e-6)  # 0 to 25 and 30 to 31 microseconds
    assert idle_s(events, 40e-6) == pytest.approx({"around": 9e-6, "start": 5e-6, "later": 0.0})


def test_idle_time_is_told_apart_by_when_it_was():
    begins = [0.0, 0.1, 0.25, 0.45, 2.0]
    events = [{"cat": "kernel", "name": "", "ts": begin * 1e6, "dur": 0.05e6} for begin in begins]
    assert idle_s(events, 2.5) == pytest.approx({"around": 0.45, "start": 0.15, "later": 1.65})
    assert idle_s([{"cat": "cpu_op", "name": "", "ts": 0, "dur": 1}], 2.5) == {}


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_record_tells_what_the_host_launched_and_its_shapes():
    a = torch.zeros(3, 5)
    _, events = record(lambda: a @ a.t(), with_shapes=True)
    shapes = [event["args"]["Input Dims"] for event in events if event.get("name") == "aten::mm"]
    assert shapes == [[[3, 5], [5, 3]]]


@pytest.mark.parametrize(
    ("kernel", "sort"),
    [
        ("kernel_cutlass_flash_fwd_sm90", "attention"), ("cudnn_generated_fort_native_sdpa_sm90", "attention"),
        ("void cutlass::device_kernel<GemmUniversal>", "product"), ("nvjet_sm90_tst_256x128", "product"),
        ("triton_red_fused_svi_worker_attend_4", "fused"), ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("void at::native::vectorized_elementwise_kernel", "elementwise"),
    ],
)  # fmt: skip
def test_kernel_is_sorted_by_its_name(kernel, sort):
    assert sort_of(kernel) == sort


def test_dearest_kernel_of_each_sort_is_told():
    times = [("nvjet_a", 5), ("nvjet_b", 7), ("nvjet_a", 3), ("flash_fwd", 1)]
    events = [{"cat": "kernel", "name": name, "dur": dur} for name, dur in times]
    assert dearest(events) == {"product": "nvjet_a", "attention": "flash_fwd"}

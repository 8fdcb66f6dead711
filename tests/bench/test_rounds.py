"""Arms take turns; what is found is written at once; what fails does not take the others along."""

from typing import ClassVar

from bench.processes import Died
from bench.rounds import Rounds, Row, groups, host_need_bytes

GB = 10**9


def make_cell(what: str, precision: str = "fp8", mode: str = "svi_endframe", size: str = "full") -> dict:
    return {"what": what, "precision": precision, "attention": None, "mode": mode, "cap_gib": 44.5, "size": size}


class FakeArm:
    """Answers as a process does, and remembers what it was asked."""

    asked: ClassVar[list[str]] = []

    def __init__(self, cell, dies_at=None):
        self.name, self.dies_at = cell["what"], dies_at
        self.jobs = 0

    def ask(self, what, layout, steps):
        FakeArm.asked.append(" ".join([self.name, what, *([layout] if layout else [])]))
        self.jobs += what == "job"
        if self.jobs == self.dies_at:
            raise Died("exit code 1")
        if what == "job":
            memory = {"peak_reserved_gib": 1.0}
            return {"sample": {"seconds": float(self.jobs), "forwards_s": [], "memory": memory}, "notes": []}
        return {what: {"seconds": 1.0}}

    def close(self):
        FakeArm.asked.append(f"{self.name} closed")


def run_rounds(start=FakeArm, repeats=2, traced=("ours",), traces=1):
    FakeArm.asked = []
    plain, ours = make_cell("plain", "bf16"), make_cell("ours")
    rows = [Row(plain, None, None), Row(ours, "svi_latent", None), Row(ours, "flf", None)]
    written: list[list[list[float]]] = []

    def write(found):
        written.append([[sample["seconds"] for sample in row["samples"]] for row in found])

    rounds = Rounds(rows, write, start, traces)
    rounds.run([[plain, ours]], repeats, traced)
    return rounds, written


def test_arms_take_turns_after_a_first_job_each():
    run_rounds(traced=())
    first = ["plain job", "ours job svi_latent", "ours job flf"]
    assert FakeArm.asked == [*first * 3, "plain closed", "ours closed"]


def test_results_are_written_after_every_job():
    _, written = run_rounds(repeats=1, traced=())
    assert written == [
        [[]], [[], []], [[], [], []], [[2.0], [], []], [[2.0], [3.0], []], [[2.0], [3.0], [4.0]],
    ]  # fmt: skip


def test_traced_jobs_and_the_whole_worker_run_for_one_variant_of_a_process():
    rounds, _ = run_rounds(repeats=1, traced=("plain", "ours"), traces=2)
    ours = ["ours trace svi_latent", "ours whole svi_latent"]
    assert FakeArm.asked[6:-2] == ["plain trace", "plain trace", *ours, *ours]
    assert [{name: len(row.found.get(name, [])) for name in ("trace", "whole")} for row in rounds.rows] == [
        {"trace": 2, "whole": 0}, {"trace": 2, "whole": 2}, {"trace": 0, "whole": 0},
    ]  # fmt: skip


def test_arm_that_dies_leaves_its_jobs_and_the_others_running():
    rounds, written = run_rounds(lambda cell: FakeArm(cell, 3 if cell["what"] == "ours" else None))
    assert rounds.failed == ["svi_endframe ours fp8 svi_latent", "svi_endframe ours fp8 flf"]
    assert written[-1] == [[2.0, 3.0], [], []]
    assert FakeArm.asked.count("ours job svi_latent") == 2  # not asked again


def test_arms_that_fit_are_alive_together():
    cells = [make_cell("plain", "bf16"), make_cell("ours", "fp8")]
    assert groups([*cells, cells[1]], 110 * GB, 140 * 2**30) == ([cells], "")  # two rows of one arm


def test_arms_that_do_not_fit_the_host_run_one_after_the_other():
    plain, narrow, wide = make_cell("plain", "bf16"), make_cell("ours", "fp8"), make_cell("ours", "bf16")
    together, why = groups([plain, narrow, wide], 128 * GB, 140 * 2**30)
    assert together == [[plain, narrow], [wide]]
    assert "run in 2 groups" in why


def test_arms_that_do_not_fit_the_card_run_one_after_the_other():
    cells = [make_cell("plain", "bf16"), make_cell("ours", "fp8")]
    assert len(groups(cells, 500 * GB, 80 * 2**30)[0]) == 2
    assert len(groups(cells, 500 * GB, None)[0]) == 2


def test_plain_keeps_every_model_in_host_memory():
    # both experts, the text encoder and the VAE: 69.1 GB; our 8-bit plan holds the visiting encoder alone at most
    assert host_need_bytes(make_cell("plain", "bf16")) == 69_141_731_532 + 6 * GB
    assert host_need_bytes(make_cell("ours", "fp8")) < 18 * GB

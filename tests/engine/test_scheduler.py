import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from engine.scheduler import ReferenceEuler, Split, reference_timesteps, split_at, split_counts
from schemas.errors import InvalidInput

SIX = reference_timesteps(6, 5.0)


def letters(split):
    return "".join(expert[0].upper() for expert in split.experts)


def test_row_11_timesteps_of_the_reference_grid():
    scheduler = ReferenceEuler(shift=5.0)
    scheduler.set_timesteps(6)

    expected = [1000.0, 952.44, 882.53, 769.67, 556.79, 4.98]
    assert scheduler.timesteps.tolist() == pytest.approx(expected, abs=0.01)
    assert scheduler.timesteps.dtype == torch.float32
    assert scheduler.sigmas.tolist() == pytest.approx([t / 1000 for t in expected] + [0.0], abs=1e-5)


def test_stock_grid_misses_the_threshold_so_ours_is_needed():
    stock = FlowMatchEulerDiscreteScheduler(shift=5.0)
    stock.set_timesteps(6)

    assert stock.timesteps[2].item() == pytest.approx(883.21, abs=0.01)


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        (8.0, [1000.0, 969.7, 923.2, 842.4, 667.8, 7.9]),
        (3.0, [1000.0, 923.2, 818.4, 667.2, 429.8, 3.0]),
    ],
)
def test_grid_at_other_shifts(shift, expected):
    assert reference_timesteps(6, shift) == pytest.approx(expected, abs=0.06)


def test_grid_refuses_what_it_would_have_to_ignore():
    with pytest.raises(ValueError, match="one grid"):
        ReferenceEuler(shift=5.0).set_timesteps(6, sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="one grid"):
        ReferenceEuler(shift=5.0).set_timesteps(timesteps=[999.0])


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(883, "HHLLLL"), (900, "HHLLLL"), (875, "HHHLLL"), (953, "HLLLLL"), (5, "HHHHHL")],
)
def test_row_12_threshold_decides_which_expert_runs(threshold, expected):
    assert letters(split_at(SIX, threshold)) == expected


def test_row_12_a_step_on_the_threshold_belongs_to_the_low_expert():
    assert letters(split_at((1000.0, 883.0, 5.0), 883.0)) == "HLL"


def test_threshold_means_another_split_with_eight_steps():
    assert split_at(reference_timesteps(8, 5.0), 883) == Split(3, 5)


@pytest.mark.parametrize(("threshold", "split"), [(1000, "0 high + 6 low"), (4, "6 high + 0 low")])
def test_split_that_leaves_an_expert_out_is_refused_with_what_it_would_give(threshold, split):
    with pytest.raises(InvalidInput) as caught:
        split_at(SIX, threshold)

    (problem,) = caught.value.problems
    assert problem.field == "switch_threshold"
    assert split in problem.message
    assert problem.message.endswith("4.98 it must be from 4.99 to below 1000.00")


@pytest.mark.parametrize(("threshold", "split"), [(4.99, Split(5, 1)), (999.99, Split(1, 5))])
def test_thresholds_that_the_refusal_names_are_accepted(threshold, split):
    assert split_at(SIX, threshold) == split


@pytest.mark.parametrize("flow_shift", [0.01, 1.0, 3.0, 5.0, 8.0, 100.0])
@pytest.mark.parametrize("steps", [2, 6, 8, 100])
def test_least_threshold_that_a_refusal_names_is_accepted_on_every_grid(steps, flow_shift):
    grid = reference_timesteps(steps, flow_shift)
    with pytest.raises(InvalidInput) as caught:
        split_at(grid, 0.0)

    least = float(caught.value.sentence.rpartition(" from ")[2].partition(" to ")[0])
    assert split_at(grid, least).low >= 1


def test_one_step_cannot_be_split():
    with pytest.raises(InvalidInput, match="num_inference_steps: must be at least 2"):
        split_at(reference_timesteps(1, 5.0), 883)


def test_explicit_counts_are_the_split():
    assert letters(split_counts(1, 3)) == "HLLL"


@pytest.mark.parametrize(("high", "low", "field"), [(0, 6, "high_steps"), (6, 0, "low_steps")])
def test_explicit_counts_that_leave_an_expert_out_are_refused(high, low, field):
    with pytest.raises(InvalidInput) as caught:
        split_counts(high, low)

    assert [problem.field for problem in caught.value.problems] == [field]
    assert f"{high} high + {low} low" in caught.value.problems[0].message


def test_step_returns_fp32_for_a_bf16_model():
    scheduler = ReferenceEuler(shift=5.0)
    scheduler.set_timesteps(6)
    velocity = torch.ones(1, 1, dtype=torch.bfloat16)

    stepped = scheduler.step(velocity, scheduler.timesteps[0], torch.ones(1, 1)).prev_sample

    assert stepped.dtype == torch.float32
    assert stepped.item() == pytest.approx(1.0 + 0.9524376 - 1.0, abs=1e-6)


def test_step_never_searches_the_grid_for_its_place():
    scheduler = ReferenceEuler(shift=5.0)
    scheduler.set_timesteps(2)
    scheduler.timesteps, first = torch.empty(0), scheduler.timesteps[0]  # a search would wait for the card

    stepped = scheduler.step(torch.ones(1), first, torch.ones(1), return_dict=False)[0]

    assert stepped.item() == pytest.approx(0.0049801, abs=1e-6)


def test_scheduler_starts_anew_when_the_grid_is_laid_again():
    scheduler = ReferenceEuler(shift=5.0)
    runs = []
    for _ in range(2):
        scheduler.set_timesteps(2)
        sample = torch.ones(1)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(torch.ones(1), timestep, sample, return_dict=False)[0]
        runs.append(sample.item())

    assert runs == pytest.approx([0.0, 0.0], abs=1e-6)

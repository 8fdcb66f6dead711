"""What a kernel of engine.attention_hopper is tested for, beside what every kernel is (engine.attention).

Those numbers make heads of one way. Here are heads of all three side by side, and tiles that are not full.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from engine.attention_reach import WIDTH, score_factor

MAX_RELATIVE_ERROR = 0.01  # against float32: twice what weights and result in bf16 err by
TEST_ROWS = 400, 330  # of queries and keys
SHIFTED_SCORE = 145.0  # beyond float32 as a power of two, and its head within MOST_SPAN

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def problem(attend: Attend, reference: Attend, device: str) -> str | None:
    """Why `attend` is not to be used, or None. `reference`: without the dimension of batches, float32."""
    drawn = heads_of_every_way(device)
    wanted = reference(*(x[0] for x in drawn))
    error = float((attend(*drawn)[0].float() - wanted).norm() / wanted.norm())
    if not error < MAX_RELATIVE_ERROR:  # a NaN is not
        return f"its result is off (relative error {error:.3f})"
    return "it hides a NaN" if any(_hides_a_nan(attend, drawn, at) for at in range(3)) else None


def heads_of_every_way(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, bf16, of four heads: scores as they are; shifted, for 2**score would overflow where a query
    meets itself among the keys; of too far a reach; and keys far from zero."""
    generator = torch.Generator(device).manual_seed(8)
    queries, keys = TEST_ROWS
    query, key, value = (
        torch.randn(1, rows, 4, WIDTH, generator=generator, device=device) for rows in (queries, keys, keys)
    )
    query[:, :, 1] = functional.normalize(query[:, :, 1], dim=2) * (SHIFTED_SCORE / score_factor(WIDTH)) ** 0.5
    key[:, :, 1] = query[:, :keys, 1]
    query[:, :, 2] *= 9
    query[:, :, 3] *= 3
    key[:, :, 3] += 5
    return query.bfloat16(), key.bfloat16(), value.bfloat16()


def _hides_a_nan(attend: Attend, drawn: tuple[Tensor, ...], at: int) -> bool:
    """Whether one in row 7 of query, key or value, in a bounded head and one that is not, is not in all that it
    enters, or elsewhere."""
    given = [x.clone() for x in drawn]
    given[at][0, 7, 1:3, 5] = float("nan")
    entered = torch.zeros_like(given[0][0], dtype=torch.bool)
    rows, columns = (7 if at == 0 else slice(None)), (5 if at == 2 else slice(None))
    entered[rows, 1:3, columns] = True
    return not torch.equal(attend(*given)[0].isnan(), entered)

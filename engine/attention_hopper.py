"""Attention on a Hopper without a look for the maximum, in CuTe, NVIDIA's language (the package nvidia-cutlass-dsl).

A block takes 192 queries of a head: three warp groups with 64 each, which compute, and one that fetches tiles of keys
and values through two places in shared memory. A group multiplies its queries with a tile of keys and begins at once
the product of the tile before, whose weights lie in its registers, with the values, bf16; while that runs, scores
become weights. The groups take turns at beginning products, so that one multiplies while others exponentiate. A head
whose scores reach too far (engine.attention_reach) has its maxima looked for, in the same kernel.

80 keys a tile: their scores, the weights before them and what a query sees are 124 of a thread's 160 registers, and so
the weights need no way through shared memory, whose rate would be next to what all waits for.

Of what kind queries and keys are is a subclass's: engine.attention8_hopper, engine.attention16_hopper.

Not faster on an H200 (docs/LOG.md): 128 queries a block, 128 to 176 keys a tile, three places for a tile, a second
product of scores begun before the weights of the first, a part of the exponentials as polynomials, sums that begin at
the bits of 1.5 * 2**23 so that no score need be converted.

Shapes inside: queries and keys first, then the width of a head, then heads. Imported on a card, when it is asked for.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int64, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers

from engine.attention_reach import KEY_TILE, MOST_SPAN, WIDTH
from engine.attention_weights import (
    OWN_ROWS,
    Bounded,
    Running,
    by_row,
    keep_weights,
    leave_out_keys,
    multiply_rows,
    own_row,
)

GROUP = 128  # threads of a warp group
GROUPS = 3  # that compute
ROWS = 64 * GROUPS  # queries a block
STAGES = 2  # tiles of keys, and of values, in shared memory
COMPUTING_REGISTERS, LOADING_REGISTERS = 160, 32  # a thread; together all that there are
# Named barriers: 0 is the whole block's.
FIRST_TURN, LAST = 1, 8


class HopperAttention:
    """The kernel. Its Python runs once, when it is compiled; what threads do are the operations that it names."""

    score_kind: Any
    """Of queries and keys."""
    sum_kind: Any
    """Of a sum of their products."""

    def numbers(self, queries: Any, tiles: Any, heads: Any) -> tuple[tuple[Any, ...], ...]:
        """The shapes of what the kernel is given beside the tensors, float32; the last two are those of a Reach."""
        raise NotImplementedError

    def row_scales(self, numbers: Any, head: Any, first: Any) -> Any:
        """What a thread's rows of sums are multiplied with. `first`: the number of its first row."""
        raise NotImplementedError

    def tile_scale(self, numbers: Any, head: Any, tile: Any) -> Any:
        """What the sums of a tile of keys are multiplied with."""
        raise NotImplementedError

    def scores(self, sums: Any) -> Any:
        """(2 rows, n columns) float32: where sums become scores, and scores weights."""
        raise NotImplementedError

    def read(self, sums: Any, scores: Any) -> None:
        """Sums to where they become scores, before the next product begins."""
        raise NotImplementedError

    def compiled(self) -> Any:
        """See engine.hopper_kernels."""
        queries, keys, heads, tiles = (cute.sym_int() for _ in range(4))

        def tensor(kind: Any, *shape: Any) -> Any:
            order = tuple(reversed(range(len(shape))))
            return cute.runtime.make_fake_compact_tensor(kind, shape, stride_order=order, assumed_align=16)

        return cute.compile(
            self,
            tensor(self.score_kind, queries, heads, WIDTH),
            tensor(self.score_kind, keys, heads, WIDTH),
            tensor(BFloat16, keys, heads, WIDTH),
            tensor(BFloat16, queries, heads, WIDTH),
            *(tensor(Float32, *shape) for shape in self.numbers(queries, tiles, heads)),
            cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
            options="--enable-tvm-ffi",
        )

    @cute.jit
    def launch(
        self, query: cute.Tensor, key: cute.Tensor, value: cute.Tensor, out: cute.Tensor, numbers: Any, stream: Any
    ) -> None:
        """A block for each 192 queries of a head."""
        query, key, value, out = _heads_last(query), _heads_last(key), _heads_last(value), _heads_last(out)
        scoring = hopper_helpers.make_trivial_tiled_mma(
            self.score_kind,
            self.score_kind,
            OperandMajorMode.K,
            OperandMajorMode.K,
            self.sum_kind,
            (GROUPS, 1, 1),
            (64, KEY_TILE),
        )
        seeing = hopper_helpers.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            OperandMajorMode.K,
            OperandMajorMode.MN,
            Float32,
            (GROUPS, 1, 1),
            (64, WIDTH),
            warpgroup.OperandSource.RMEM,
        )
        query_layout = _shared_layout(self.score_kind, (ROWS, WIDTH))
        key_layout = _shared_layout(self.score_kind, (KEY_TILE, WIDTH, STAGES))
        value_layout = _shared_layout(BFloat16, (KEY_TILE, WIDTH, STAGES))
        out_layout = _shared_layout(BFloat16, (ROWS, WIDTH))
        fetch, give = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        query_mover, query = cpasync.make_tiled_tma_atom(fetch, query, query_layout, (ROWS, WIDTH))
        key_mover, key = cpasync.make_tiled_tma_atom(fetch, key, _place(key_layout), (KEY_TILE, WIDTH))
        value_mover, value = cpasync.make_tiled_tma_atom(fetch, value, _place(value_layout), (KEY_TILE, WIDTH))
        out_mover, out = cpasync.make_tiled_tma_atom(give, out, out_layout, (ROWS, WIDTH))
        self.kernel(
            (query_mover, key_mover, value_mover, out_mover),
            (query, key, value, out),
            numbers,
            (scoring, seeing),
            (query_layout, key_layout, value_layout, out_layout),
        ).launch(
            grid=(cute.ceil_div(query.shape[0], ROWS), query.shape[2], 1),
            block=(GROUP * (GROUPS + 1), 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(self, movers: Any, tensors: Any, numbers: Any, products: Any, layouts: Any) -> None:
        """A block: one group of threads fetches, the others compute."""
        query, key, value, out = tensors
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_index == 0:
            for mover in movers:
                cpasync.prefetch_descriptor(mover)
        memory = SmemAllocator()
        kinds = (self.score_kind, self.score_kind, BFloat16)
        bars = [memory.allocate_array(Int64, 2 * stages) for stages in (1, STAGES, STAGES)]
        shared = [
            memory.allocate_tensor(kind, layout.outer, byte_alignment=1024, swizzle=layout.inner)
            for kind, layout in zip((*kinds, BFloat16), layouts, strict=True)
        ]
        arrivals = [
            pipeline.PipelineTmaAsync.create(
                barrier_storage=bar,
                num_stages=stages,
                producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 1),
                consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, GROUPS * GROUP // 32),
                tx_count=cute.size_in_bytes(kind, _place(layout)),
                defer_sync=True,
            )
            for bar, stages, kind, layout in zip(bars, (1, STAGES, STAGES), kinds, layouts[:3], strict=True)
        ]
        pipeline.pipeline_init_arrive()
        pipeline.pipeline_init_wait()
        block, head, _ = cute.arch.block_idx()
        key_tiles = cute.ceil_div(key.shape[0], KEY_TILE)
        tiles = (
            cute.local_tile(query[None, None, head], (ROWS, WIDTH), (block, 0)),
            cute.local_tile(key[None, None, head], (KEY_TILE, WIDTH), (None, 0)),
            cute.local_tile(value[None, None, head], (KEY_TILE, WIDTH), (None, 0)),
            cute.local_tile(out[None, None, head], (ROWS, WIDTH), (block, 0)),
        )
        if warp_index < GROUP // 32:
            cute.arch.setmaxregister_decrease(LOADING_REGISTERS)
            if warp_index == 0:
                self.fetch(movers, tiles, shared, arrivals, key_tiles)
        else:
            cute.arch.setmaxregister_increase(COMPUTING_REGISTERS)
            span = numbers[len(numbers) - 2]
            first = block * ROWS + own_row(cute.arch.thread_idx()[0] - GROUP)
            ways = (numbers, head, first, key_tiles, key.shape[0])
            if span[head] <= MOST_SPAN:  # not where it is a NaN
                self.compute(Bounded, products, movers[3], tiles[3], shared, arrivals, ways)
            else:
                self.compute(Running, products, movers[3], tiles[3], shared, arrivals, ways)

    @cute.jit
    def fetch(self, movers: Any, tiles: Any, shared: Any, arrivals: Any, key_tiles: Any) -> None:
        """The queries once, then keys and values from the last tile to the first, values a tile behind."""
        (query_from, query_to), (key_from, key_to), (value_from, value_to) = (
            _ends(mover, tile, here) for mover, tile, here in zip(movers[:3], tiles[:3], shared[:3], strict=True)
        )
        queries, keys, values = arrivals
        _fetch(movers[0], query_from, query_to, queries, _at_start(pipeline.PipelineUserType.Producer, 1))
        state = _at_start(pipeline.PipelineUserType.Producer, STAGES)
        last = key_tiles - 1
        _fetch(movers[1], key_from[None, last], key_to[None, state.index], keys, state)
        for i in cutlass.range(last, unroll=1):
            before = state.clone()
            state.advance()
            _fetch(movers[1], key_from[None, last - 1 - i], key_to[None, state.index], keys, state)
            _fetch(movers[2], value_from[None, last - i], value_to[None, before.index], values, before)
        _fetch(movers[2], value_from[None, 0], value_to[None, state.index], values, state)

    @cute.jit
    def compute(
        self,
        weighing: cutlass.Constexpr,
        products: Any,
        mover: Any,
        tile: Any,
        shared: Any,
        arrivals: Any,
        ways: Any,
    ) -> None:
        """What 64 queries see, for each warp group. `weighing`: Bounded or Running."""
        scoring, seeing = products
        query, key, value, out = shared
        queries, keys, values = arrivals
        numbers, head, first, key_tiles, key_count = ways
        thread = cute.arch.thread_idx()[0] - GROUP
        group = cute.arch.make_warp_uniform(thread // GROUP)
        leader = cute.make_layout(GROUPS, stride=GROUP)(group)  # what is in shared memory is a group's, not a thread's
        group_scoring, group_seeing = scoring.get_slice(leader), seeing.get_slice(leader)
        query_part = group_scoring.make_fragment_A(group_scoring.partition_A(query))
        key_part = group_scoring.make_fragment_B(group_scoring.partition_B(key))
        value_turned = cute.make_tensor(value.iterator, cute.select(value.layout, mode=[1, 0, 2]))
        value_part = group_seeing.make_fragment_B(group_seeing.partition_B(value_turned))
        weights = group_seeing.make_fragment_A(group_seeing.partition_shape_A((ROWS, KEY_TILE)))
        seen = cute.make_rmem_tensor(seeing.get_slice(thread).partition_shape_C((ROWS, WIDTH)), Float32)
        sums = cute.make_rmem_tensor(scoring.get_slice(thread).partition_shape_C((ROWS, KEY_TILE)), self.sum_kind)
        scores = self.scores(sums)
        shift = numbers[len(numbers) - 1]
        weigher = weighing(self.row_scales(numbers, head, first), shift[head])
        weigh, shrink, totals = weigher.weigh, weigher.shrink, weigher.totals  # an object cannot go into a loop

        if group == 0:
            _pass_turn_to(0)
        state = _at_start(pipeline.PipelineUserType.Consumer, STAGES)
        queries.consumer_wait(_at_start(pipeline.PipelineUserType.Consumer, 1))
        last = key_tiles - 1
        keys.consumer_wait(state)
        _begin_product(scoring, sums, query_part, key_part[None, None, None, state.index], adds=False)
        warpgroup.wait_group(0)
        keys.consumer_release(state)
        self.read(sums, scores)
        leave_out_keys(scores, key_count - last * KEY_TILE)
        weigh(scores, self.tile_scale(numbers, head, last))
        keep_weights(scores, weights)
        seen.fill(0.0)
        for i in cutlass.range(last, unroll=1):
            before = state.clone()
            state.advance()
            tile_scale = self.tile_scale(numbers, head, last - 1 - i)
            keys.consumer_wait(state)
            cute.arch.barrier(barrier_id=FIRST_TURN + group, number_of_threads=2 * GROUP)
            _begin_product(scoring, sums, query_part, key_part[None, None, None, state.index], adds=False)
            values.consumer_wait(before)
            _begin_product(seeing, seen, weights, value_part[None, None, None, before.index], adds=True)
            _pass_turn_to((group + 1) % GROUPS)
            warpgroup.wait_group(1)
            keys.consumer_release(state)
            self.read(sums, scores)
            weigh(scores, tile_scale)
            warpgroup.wait_group(0)
            values.consumer_release(before)
            keep_weights(scores, weights)
            shrink(by_row(seen))
        values.consumer_wait(state)
        _begin_product(seeing, seen, weights, value_part[None, None, None, state.index], adds=True)
        warpgroup.wait_group(0)
        values.consumer_release(state)

        for r in cutlass.range_constexpr(OWN_ROWS):
            totals[r] = cute.arch.rcp_approx(cute.arch.warp_reduction_sum(totals[r], threads_in_group=4))
        multiply_rows(by_row(seen), totals)
        self.give(seen, seeing, mover, tile, out, thread)

    @cute.jit
    def give(self, seen: Any, seeing: Any, mover: Any, tile: Any, out: Any, thread: Any) -> None:
        """Round what was seen, and write it by way of shared memory."""
        rounded = cute.make_rmem_tensor_like(seen, BFloat16)
        rounded.store(seen.load().to(BFloat16))
        to_shared = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), BFloat16)
        own = cute.make_tiled_copy_C(to_shared, seeing).get_slice(thread)
        cute.copy(to_shared, own.retile(rounded), own.partition_D(out))
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=LAST, number_of_threads=GROUP * GROUPS)
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == GROUP // 32:
            to, here = _ends(mover, tile, out)
            cute.copy(mover, here, to)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)


def _heads_last(x: Any) -> Any:
    """(rows, heads, width) -> (rows, width, heads)."""
    return cute.make_tensor(x.iterator, cute.select(x.layout, mode=[0, 2, 1]))


def _shared_layout(kind: Any, shape: tuple[int, ...]) -> Any:
    """Swizzled as products and the tile mover want it."""
    swizzle = hopper_helpers.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, kind, shape[1])
    return cute.tile_to_shape(warpgroup.make_smem_layout_atom(swizzle, kind), shape, tuple(range(len(shape))))


def _place(layout: Any) -> Any:
    """Of one tile, where there is room for several."""
    return cute.select(layout, mode=[0, 1])


def _ends(mover: Any, tile: Any, shared: Any) -> tuple[Any, Any]:
    """A tile, or a row of tiles, outside and in shared memory, as the mover takes it."""
    here, there = cpasync.tma_partition(
        mover, 0, cute.make_layout(1), cute.group_modes(shared, 0, 2), cute.group_modes(tile, 0, 2)
    )
    return there, here


def _at_start(user: Any, stages: int) -> Any:
    return pipeline.make_pipeline_state(user, stages)


def _fetch(mover: Any, there: Any, here: Any, arrival: Any, state: Any) -> None:
    arrival.producer_acquire(state)
    cute.copy(mover, there, here, tma_bar_ptr=arrival.producer_get_barrier(state))


def _pass_turn_to(group: Any) -> None:
    cute.arch.barrier_arrive(barrier_id=FIRST_TURN + group, number_of_threads=2 * GROUP)


def _begin_product(product: Any, total: Any, one: Any, other: Any, *, adds: bool) -> None:
    """Begin `total` (+)= one * other; nobody may read the total before it is waited for."""
    warpgroup.fence()
    step = cute.make_mma_atom(product.op)
    step.set(warpgroup.Field.ACCUMULATE, adds)
    for k in range(cute.size(one.shape[2])):
        cute.gemm(step, total, one[None, None, k], other[None, None, k], total)
        step.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()

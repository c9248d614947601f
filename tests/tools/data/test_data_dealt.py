"""The order of the rows is the run's: the same for any number of processes, also where another goes on."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import slow_but

from act24.tools.data import merged_state, open_rows
from act24.tools.data.dealt import DealtRows

LAYOUTS = [("text", "packed"), ("json", "padded"), ("shards", "packed")]


def dealt(data, tokenizer, steps, world_size, batch_size, streams, state=None):
    """Rows of some steps of `world_size` × `batch_size` rows in the order of the run, and the state after."""
    per_rank, states = [], []
    for rank in range(world_size):
        where = {"rank": rank, "world_size": world_size, "streams": streams}
        with open_rows(data, tokenizer, batch_size=batch_size, vocab_size=300, **where) as rows:
            if state is not None:
                rows.load_state_dict(json.loads(state))
            batches = [next(rows) for _ in range(steps)]
            per_rank.append([row.tolist() for batch in batches for row in batch.input_ids])
            states.append(rows.state_dict())
    order = [row for together in zip(*per_rank, strict=True) for row in together]
    return order, json.dumps(merged_state(states))


@pytest.mark.parametrize(("source", "layout"), slow_but([("json", "padded"), ("shards", "packed")], LAYOUTS))
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_the_rows_of_a_run_are_the_same_for_any_number_of_processes(sources, tokenizer, source, layout, data):
    """Processes come and go three times, states through JSON, epochs end in between."""
    section = sources[source].model_copy(update={"rows": layout})
    streams = data.draw(st.integers(1, 4), "streams")
    got, state = [], None
    for _ in range(3):
        world_size = data.draw(st.integers(1, 5), "world_size")
        shape = (data.draw(st.integers(1, 3), "steps"), world_size, data.draw(st.integers(1, 12), "batch"))
        rows, state = dealt(section, tokenizer, *shape, streams, state)
        got += rows
    expected, _ = dealt(section, tokenizer, len(got), 1, 1, streams)
    assert got == expected


def test_the_order_is_round_robin_over_the_streams(sources, tokenizer):
    """And a stream is what one process of as many reads, as in runs whose number never changes."""
    data = sources["json"]
    alone = [dealt(data, tokenizer, 1, 1, 24, 3)[0][v::3] for v in range(3)]
    for rank in range(3):
        where = {"rank": rank, "world_size": 3}
        with open_rows(data, tokenizer, batch_size=8, vocab_size=300, **where) as rows:
            assert [row.tolist() for row in next(rows).input_ids] == alone[rank]


@pytest.mark.parametrize(
    ("streams", "world_size", "opened"),
    [(4, 4, [1, 1, 1, 1]), (4, 2, [2, 2]), (2, 4, [1, 1, 1, 1]), (3, 2, [3, 3]), (1, 3, [1, 1, 1])],
)
def test_a_process_opens_only_the_streams_it_has_rows_of(sources, tokenizer, streams, world_size, opened):
    from act24.tools.data.batches import _rows

    for rank in range(world_size):
        seen = []

        def open_stream(stream, seen=seen):
            seen.append(stream)
            return _rows(sources["json"], tokenizer, "train", stream, streams)

        DealtRows(open_stream, streams, rank, world_size)
        assert len(seen) == opened[rank]


def test_states_of_different_steps_or_of_too_few_processes_are_refused(sources, tokenizer):
    states = []
    for rank in range(2):
        with open_rows(
            sources["json"], tokenizer, batch_size=2, vocab_size=300, rank=rank, world_size=2
        ) as rows:
            next(rows)
            states.append(rows.state_dict())
            next(rows)
            states.append(rows.state_dict())
    merged_state([states[0], states[2]])
    with pytest.raises(ValueError, match="stand at different rows"):
        merged_state([states[0], states[3]])
    with pytest.raises(ValueError, match="some are missing"):
        merged_state([states[0]])
    for broken in ({}, [], {"position": {"document": {}}}):
        with pytest.raises(ValueError, match="holds no position that this act24 reads"):
            merged_state([broken])

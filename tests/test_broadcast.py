"""The downlink: both sides rebuild the same arrays, whatever was lost on the way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkit.arrays import add, flatten, num_values, squared_norm, subtract
from fedkit.broadcast import ALL_NONZERO, Broadcast, receive, snapshot_parcel
from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.rotation import Eden
from fedkit.codec.wire import Codec
from fedkit.errors import VersionError
from tests.helpers.quadratic import LIKE

CODECS = {"float32": Codec(), "ours": Codec(EntropyConstrained(2.0)), "eden": Codec(Eden(1))}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=a.shape).astype(np.float32) for name, a in LIKE.items()}


def begin(codec, initial=ALL_NONZERO):
    return Broadcast.begin(codec, draw(0), initial, np.random.default_rng(0))


def advance(broadcast, seed):
    return broadcast.advance(add(broadcast.arrays, draw(seed)), np.random.default_rng(seed))


def same(a, b):
    return np.array_equal(flatten(a), flatten(b))


def test_the_first_version_is_the_initial_arrays_bit_for_bit():
    assert same(begin(Codec(Eden(1))).arrays, draw(0))


@every_codec
@settings(max_examples=20, deadline=None)
@given(plan=st.lists(st.sampled_from(["delivered", "reply lost", "message lost", "state lost"]), max_size=12))
def test_a_client_rebuilds_the_servers_arrays_whatever_was_lost(codec, plan):
    broadcast, state, said = begin(codec), {}, None
    for number, event in enumerate(plan, 1):
        parcel = broadcast.parcel_for(said)
        if event == "state lost":
            state = {}
        if event != "message lost":
            try:
                assert same(receive(parcel, state), broadcast.arrays)
                said = broadcast.version if event != "reply lost" else said
            except VersionError:
                assert event == "state lost"
                said = None
        broadcast = advance(broadcast, number)
    assert same(receive(broadcast.parcel_for(None), {}), broadcast.arrays)


@every_codec
def test_what_coding_lost_is_sent_later(codec):
    broadcast, goal = begin(codec), draw(9)
    for number in range(60):
        broadcast = broadcast.advance(
            subtract(goal, broadcast.residual) if number else goal, np.random.default_rng(number)
        )
    assert squared_norm(subtract(broadcast.arrays, goal)) < 1e-3 * squared_norm(goal)


def test_a_snapshot_replaces_a_chain_that_has_become_longer():
    broadcast = begin(Codec(EntropyConstrained(8.0)))
    for number in range(1, 12):
        broadcast = advance(broadcast, number)
        size = sum(map(len, broadcast.parcel_for(None).frames))
        assert size <= 4 * num_values(LIKE) + 150
        assert same(receive(broadcast.parcel_for(None), {}), broadcast.arrays)
    assert len(broadcast.parcel_for(None).frames) == 1
    assert len(broadcast.parcel_for(broadcast.versions[-2]).frames) == 1


def test_a_client_that_holds_the_newest_version_gets_no_frame_twice():
    broadcast, state = begin(Codec()), {}
    receive(broadcast.parcel_for(None), state)
    assert same(receive(broadcast.parcel_for(broadcast.version), state), broadcast.arrays)


def test_arrays_that_differ_in_one_bit_are_noticed_and_forgotten():
    broadcast, state = begin(Codec()), {}
    receive(broadcast.parcel_for(None), state)
    later = advance(broadcast, 1)
    parcel = later.parcel_for(broadcast.version)
    wrong = type(parcel)(parcel.base, parcel.version, bytes(8), parcel.frames)
    with pytest.raises(VersionError, match="other arrays"):
        receive(wrong, state)
    assert not state


def test_a_snapshot_without_a_version_is_not_remembered():
    state = {}
    assert same(receive(snapshot_parcel(draw(0)), state), draw(0))
    assert not state

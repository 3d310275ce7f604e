"""Laws of the lazy mean: RAM, files and the running sum agree; what is lost costs one client, and no run."""

import hashlib
import logging
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkit.aggregation.lazy import LazyMean, LazyState, LazySum
from fedkit.aggregation.memories import Memories
from fedkit.aggregation.protocol import Cohort, Upload
from fedkit.arrays import flatten, unflatten
from fedkit.errors import ConfigError, StateError

LIKE = {"a": np.zeros((3, 5), np.float32), "b": np.zeros((), np.float32), "c": np.zeros(7, np.float32)}
SIZE = 23
NAMES = ["ann", "bob", "cy", "../di"]
GENESIS = bytes(16)


def digest_of(*parts):
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def values(seed, like=LIKE):
    return {n: np.float32(np.random.default_rng(seed).normal(size=a.shape)) for n, a in like.items()}


def equal(a, b):
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


class Clients:
    """Makes uploads as clients do: the digest is that of the history, and only the first is fresh."""

    def __init__(self):
        self.digests, self.number = {}, 0

    def upload(self, name, kind="add", weight=10.0, like=LIKE):
        """`kind`: "add", "fresh", or "skip"."""
        self.number += 1
        base = GENESIS if kind == "fresh" else self.digests.get(name, GENESIS)
        arrays = None if kind == "skip" else values(self.number, like)
        digest = base if arrays is None else digest_of(base, self.number)
        if arrays is not None:
            self.digests[name] = digest
        return Upload(1, name, weight, arrays, None, base == GENESIS, {}, 0, digest)


def step(state, uploads, aggregator=None, params=LIKE):
    return (aggregator or LazyMean())(params, Cohort(1, {}), uploads, state)


def on_disk(folder, like=LIKE):
    return LazyState.open(like, Path(folder))


def file_of(folder, name):
    return Memories(LIKE, folder)._path(name)


KINDS = st.sampled_from(["add", "add", "add", "skip", "fresh", "leave", None])
ROWS = st.lists(st.tuples(KINDS, st.integers(1, 50)), min_size=4, max_size=4)


@settings(max_examples=40, deadline=None)
@given(schedule=st.lists(ROWS, min_size=1, max_size=8))
def test_ram_and_files_agree_bit_for_bit_and_with_an_obvious_twin(schedule, tmp_path_factory):
    ram, disk, clients = LazyMean().init(LIKE), on_disk(tmp_path_factory.mktemp("m")), Clients()
    params, other, q, weights = LIKE, LIKE, {}, {}
    for row in schedule:
        uploads = []
        for name, (kind, weight) in zip(NAMES, row, strict=True):
            if kind == "leave":
                for state in (ram, disk):
                    state.discard(name)
                q.pop(name, None), clients.digests.pop(name, None)
            elif kind is not None:
                uploads.append(clients.upload(name, kind, float(weight)))
        for upload in uploads:
            name = upload.client_id
            if upload.arrays is not None:
                q[name] = flatten(upload.arrays) + (0 if upload.fresh else q[name])
            weights[name] = upload.num_examples
        params, other = step(ram, uploads, params=params).params, step(disk, uploads, params=other).params
        assert equal(params, other)
        assert ram.digests == disk.digests == clients.digests
        assert list(ram.memory) == list(disk.memory) == sorted(q)
        for name, vector in q.items():
            assert np.array_equal(vector, flatten(ram.memory[name]))
            assert np.array_equal(vector, flatten(disk.memory[name]))
        if q:
            mean = sum(weights[n] * q[n].astype(float) for n in q) / sum(weights[n] for n in q)
            np.testing.assert_allclose(ram.mean(), mean, rtol=1e-6, atol=1e-6)


def test_the_sum_agrees_with_each_while_weights_are_constant():
    each, total, clients = LazyMean(), LazyMean(memory="sum"), Clients()
    one, other = each.init(LIKE), total.init(LIKE)
    rng = np.random.default_rng(0)
    for _ in range(50):
        kinds = rng.choice(["add", "add", "skip"], 4)
        uploads = [clients.upload(name, kind, 3.0 + len(name)) for name, kind in zip(NAMES, kinds, strict=True)]
        a, b = step(one, uploads, each).params, step(other, uploads, total)
        other = b.state
        error = np.linalg.norm(flatten(a) - flatten(b.params))
        assert error <= 1e-6 * np.linalg.norm(flatten(a))
        assert one.digests == other.digests


def test_the_sum_keeps_the_weight_of_the_first_upload():
    aggregator, clients = LazyMean(memory="sum"), Clients()
    state = step(aggregator.init(LIKE), [clients.upload("a", weight=1.0), clients.upload("b", weight=3.0)]).state
    step(state, [clients.upload("a", "skip", weight=9.0), clients.upload("b", weight=9.0)])
    assert state.weights == {"a": 1.0, "b": 3.0}


def test_the_sum_starts_anew_when_a_client_in_it_does(caplog):
    aggregator, clients = LazyMean(memory="sum"), Clients()
    state = step(aggregator.init(LIKE), [clients.upload("a"), clients.upload("b")], aggregator).state
    before = state.mean()
    with caplog.at_level(logging.WARNING, logger="fedkit"):
        found = step(state, [clients.upload("a", "fresh")], aggregator)
    np.testing.assert_array_equal(flatten(found.params), before)  # this round still counts what it sent before
    assert found.state.digests == found.state.weights == {}
    assert not found.state.total.any()
    assert "all 2 start anew" in caplog.text
    clients = Clients()
    upload = clients.upload("b")
    assert equal(step(found.state, [upload], aggregator).params, upload.arrays)


@pytest.mark.parametrize("memory", ["each", "sum"])
def test_who_adds_to_nothing_counts_for_nothing(memory, caplog):
    aggregator = LazyMean(memory=memory)
    stray = Upload(1, "a", 1.0, values(0), None, False, {}, 0, digest_of("a"))
    with caplog.at_level(logging.WARNING, logger="fedkit"):
        found = step(aggregator.init(LIKE), [stray], aggregator)
    assert equal(found.params, LIKE)
    assert not found.state.digests
    assert "'a' added to a memory that is not there" in caplog.text


def test_a_memory_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="expected 'each' or 'sum', got 'all'"):
        LazyMean(memory="all")


# ---- crashes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_after_a_crash_the_values_of_the_last_checkpoint_are_there(tmp_path, rounds):
    state, clients = on_disk(tmp_path), Clients()
    for _ in range(rounds):
        step(state, [clients.upload(name) for name in NAMES])
    digests, weights, old = dict(state.digests), dict(state.weights), {n: state.memory[n] for n in NAMES}
    for name in NAMES[:3]:  # the round that crashes
        state.take(clients.upload(name), 99.0)
    resumed = LazyState.open(LIKE, tmp_path, digests, weights)
    assert (resumed.digests, resumed.weights) == (digests, weights)
    assert all(equal(resumed.memory[name], old[name]) for name in NAMES)


@pytest.mark.parametrize("memory", ["each", "sum"])
def test_a_run_goes_on_from_plain_values_and_the_folder(tmp_path, memory):
    aggregator, clients = LazyMean(memory=memory), Clients()
    state = aggregator.recall(LIKE, {}, tmp_path)
    for _ in range(2):
        found = step(state, [clients.upload(name) for name in NAMES], aggregator)
        state = found.state
    again = aggregator.recall(LIKE, aggregator.remember(state), tmp_path)
    assert (again.digests, again.weights) == (state.digests, state.weights)
    assert np.array_equal(again.mean(), state.mean())
    old = state.mean()
    step(again, [clients.upload("bob")], aggregator)
    assert not np.array_equal(again.mean(), old)
    lost = LazyMean().recall(LIKE, LazyMean().remember(state), tmp_path / "elsewhere")
    assert not lost.digests


@pytest.mark.parametrize("after_resume", [False, True])
def test_kept_values_outlive_any_number_of_updates(tmp_path, after_resume):
    state, clients = on_disk(tmp_path), Clients()
    step(state, [clients.upload(name) for name in NAMES])
    digests, weights, old = dict(state.digests), dict(state.weights), {n: state.memory[n] for n in NAMES}
    state.memory.keep()
    if after_resume:
        state = LazyState.open(LIKE, tmp_path, digests, weights)
        state.memory.keep()
    for _ in range(5):
        step(state, [clients.upload(name) for name in NAMES])
    newest = LazyState.open(LIKE, tmp_path, state.digests, weights)
    assert all(equal(newest.memory[name], state.memory[name]) for name in NAMES)
    resumed = LazyState.open(LIKE, tmp_path, digests, weights)
    assert all(equal(resumed.memory[name], old[name]) for name in NAMES)


def test_half_a_write_leaves_the_value_before_it(tmp_path):
    memory = Memories(LIKE, tmp_path)
    memory.put("a", values(1), digest_of(1))
    memory.put("a", values(2), digest_of(2))
    data, path = file_of(tmp_path, "a").read_bytes(), file_of(tmp_path, "a")
    half = len(data) // 2
    memory.put("a", values(3), digest_of(3))
    torn = path.read_bytes()
    for cut in range(half):  # the first `cut` bytes of the slot are new
        path.write_bytes(torn[:cut] + data[cut:])
        reopened = Memories(LIKE, tmp_path)
        assert reopened.open("a", digest_of(2))
        assert equal(reopened["a"], values(2))
        assert not Memories(LIKE, tmp_path).open("a", digest_of(3)) or torn[cut:half] == data[cut:half]


def _flip(path):
    data = bytearray(path.read_bytes())
    data[70] ^= 1
    data[len(data) // 2 + 70] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "gone": lambda path: path.unlink(),
    "flipped": _flip,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_costs_one_client(tmp_path, damage, caplog):
    state, clients = on_disk(tmp_path), Clients()
    for _ in range(2):
        step(state, [clients.upload(name) for name in NAMES])
    digests, weights = dict(state.digests), dict(state.weights)
    damage(file_of(tmp_path, "bob"))
    with caplog.at_level(logging.WARNING, logger="fedkit"):
        resumed = LazyState.open(LIKE, tmp_path, digests, weights)
    assert set(resumed.digests) == set(NAMES) - {"bob"}
    assert "'bob'" in caplog.text
    found = step(resumed, [clients.upload("bob", "fresh"), clients.upload("ann")])
    assert found.state.digests == clients.digests


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "longer", "gone"])
@pytest.mark.parametrize("kind", ["add", "skip", "fresh"])
def test_a_file_damaged_while_the_server_runs_costs_one_client(tmp_path, damage, kind, caplog):
    state, clients = on_disk(tmp_path), Clients()
    step(state, [clients.upload(name) for name in NAMES])
    DAMAGES[damage](file_of(tmp_path, "bob"))
    with caplog.at_level(logging.WARNING, logger="fedkit"):
        found = step(state, [clients.upload("bob", kind)])
    back = {"bob"} if kind == "fresh" else set()
    assert set(found.state.digests) == set(found.state.weights) == set(NAMES) - {"bob"} | back
    assert ("'bob' sent is lost" in caplog.text) == (kind != "fresh")


def test_a_file_for_other_shapes_is_absent(tmp_path):
    Memories(LIKE, tmp_path).put("a", values(1), digest_of(1))
    other = {"a": np.zeros((5, 3), np.float32), "b": LIKE["b"], "c": LIKE["c"]}  # as many values
    assert not Memories(other, tmp_path).open("a", digest_of(1))
    assert not Memories({"a": LIKE["a"]}, tmp_path).open("a", digest_of(1))


def test_a_leavers_file_is_removed(tmp_path):
    state, clients = on_disk(tmp_path), Clients()
    step(state, [clients.upload("a"), clients.upload("b")])
    for _ in range(2):
        state.discard("a")
    assert [path.name for path in tmp_path.iterdir()] == [file_of(tmp_path, "b").name]
    assert (list(state.memory), list(state.weights)) == (["b"], ["b"])


def test_any_id_has_a_file_of_its_own_inside_the_folder(tmp_path):
    names = ["../x", "a/b", "", "é", "e\u0301", "x" * 300, "/etc/passwd", "..", "nul\0", "A", "a", "\ud800"]
    folder = tmp_path / "deep" / "folder"
    memory = Memories(LIKE, folder)
    for number, name in enumerate(names):
        memory.put(name, values(number), digest_of(number))
    again = Memories(LIKE, folder)
    for number, name in enumerate(names):
        assert again.open(name, digest_of(number))
        assert equal(again[name], values(number))
    assert len(list(folder.iterdir())) == len(names)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


# ---- a disk that fails -------------------------------------------------------------------------


def test_a_folder_that_is_a_file_is_named(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(StateError, match=r"file: what the clients sent cannot be remembered.*exists"):
        Memories(LIKE, path)
    memory = Memories(LIKE, tmp_path / "folder")
    (tmp_path / "folder").rmdir()
    (tmp_path / "folder").write_text("x")
    for use in (lambda: memory.put("a", values(1), GENESIS), lambda: memory.open("a", GENESIS)):
        with pytest.raises(StateError, match="Not a directory"):
            use()


def test_a_full_disk_is_a_clear_error_and_the_value_before_stays(tmp_path):
    memory = Memories(LIKE, tmp_path)
    memory.put("a", values(1), digest_of(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as a full disk: the call fails, root or not
    try:
        with pytest.raises(StateError, match="Free some space"):
            memory.put("a", values(2), digest_of(2))
        with pytest.raises(StateError, match="Free some space"):
            memory.put("b", values(2), digest_of(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again = Memories(LIKE, tmp_path)
    assert again.open("a", digest_of(1))
    assert equal(again["a"], values(1))


def test_200_clients_on_disk_need_the_memory_of_a_few_vectors(tmp_path):
    like = unflatten(np.zeros(100_000, np.float32), like={"w": np.zeros((1000, 100), np.float32)})
    clients, state = Clients(), on_disk(tmp_path, like)
    for _ in range(2):
        tracemalloc.start()
        step(state, (clients.upload(f"{i}", like=like) for i in range(200)), params=like)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * 100_000 * 4
    assert len(state.memory) == 200


def test_the_sum_remembers_no_arrays_of_a_client():
    aggregator, clients = LazyMean(memory="sum"), Clients()
    state = step(aggregator.init(LIKE), [clients.upload(f"{i}") for i in range(50)], aggregator).state
    assert isinstance(state, LazySum)
    assert state.total.size == SIZE
    assert len(state.weights) == len(state.digests) == 50

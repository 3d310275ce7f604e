"""Sub-models: cutting out and putting back are inverse, and what cannot be cut is named."""

import numpy as np
import pytest

from fedkit.arrays import check_same_schema, flatten_mask
from fedkit.errors import ConfigError, SchemaMismatchError
from fedkit.submodels import SubModel, check, embed, lora_rank, owned, shapes, take, whole, width, without

A, B, HEAD = "layer.lora_A.weight", "layer.lora_B.weight", "head.weight"
SHAPES = {A: (16, 12), B: (10, 16), HEAD: (3, 7)}
NET = {
    "conv": (8, 3, 5, 5),
    "conv.bias": (8,),
    "hidden": (6, 8),
    "hidden.bias": (6,),
    "out": (10, 6),
    "out.b": (10,),
}


def random_arrays(shapes_by_name=SHAPES, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes_by_name.items()}


def scattered(params):
    rng = np.random.default_rng(5)
    return SubModel(
        {n: tuple(rng.permutation(s)[: 1 + s // 2] for s in a.shape) for n, a in list(params.items())[1:]},
        {B: 0.25},
    )


CUTS = {
    "whole": whole,
    "r 4": lora_rank(4),
    "r 8, scaled": lora_rank(8, lora_alpha=32, server_lora_alpha=16),
    "scattered": scattered,
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_taking_undoes_embedding_and_embedding_keeps_what_is_owned(cut):
    params = random_arrays()
    submodel = cut(params)
    check(submodel, like=params)
    part = take(params, submodel)
    check_same_schema(part, like=shapes(submodel, like=params))
    back = embed(part, submodel, like=params)
    mask = owned(submodel, like=params)
    check_same_schema(back, like=params)
    for name in params:
        np.testing.assert_array_equal(back[name], np.where(mask[name], params[name], 0))
    again = take(back, submodel)
    assert list(again) == list(part)
    for name in part:
        np.testing.assert_array_equal(again[name], part[name])
    assert flatten_mask(mask).sum() == sum(array.size for array in part.values())


def test_the_whole_changes_no_bit():
    params = random_arrays()
    for there in (take(params, whole(params)), embed(params, whole(params), like=params)):
        assert all(there[name].tobytes() == params[name].tobytes() for name in params)


def test_a_rank_takes_the_first_components_and_all_else_whole():
    part = take(params := random_arrays(), lora_rank(4)(params))
    np.testing.assert_array_equal(part[A], params[A][:4])
    np.testing.assert_array_equal(part[B], params[B][:, :4])
    np.testing.assert_array_equal(part[HEAD], params[HEAD])


@pytest.mark.parametrize(("r", "mine", "servers"), [(4, 8, 32), (8, 16, 16), (16, 16, 24), (4, 3.7, 11.3)])
def test_both_sides_mean_the_same_product(r, mine, servers):
    """(α/R)·B·A of the server's first r components is (αᵢ/r)·B·A of the client, and so are their updates."""
    params, update = random_arrays(), random_arrays(seed=1)
    submodel = lora_rank(r, lora_alpha=mine, server_lora_alpha=servers)(params)
    client = take(params, submodel)
    theirs = mine / r * client[B] @ client[A]
    np.testing.assert_allclose(theirs, servers / 16 * params[B][:, :r] @ params[A][:r], rtol=1e-5)
    trained = {name: client[name] + take(update, submodel)[name] for name in client}
    sent_up = embed({name: trained[name] - client[name] for name in client}, submodel, like=params)
    servers_own = {name: params[name] + sent_up[name] for name in params}
    ours = servers / 16 * servers_own[B][:, :r] @ servers_own[A][:r]
    np.testing.assert_allclose(mine / r * trained[B] @ trained[A], ours, rtol=1e-4, atol=1e-4)


def test_with_the_same_scaling_nothing_is_multiplied():
    params = random_arrays()
    scaled = take(params, lora_rank(4, lora_alpha=8, server_lora_alpha=32)(params))
    plain = take(params, lora_rank(4)(params))
    assert all(scaled[name].tobytes() == plain[name].tobytes() for name in plain)


def test_a_width_keeps_inputs_outputs_and_kernels_whole():
    part = take(random_arrays(NET), width(0.5)(random_arrays(NET)))
    assert {name: array.shape for name, array in part.items()} == {
        "conv": (4, 3, 5, 5),
        "conv.bias": (4,),
        "hidden": (3, 4),
        "hidden.bias": (3,),
        "out": (10, 3),
        "out.b": (10,),
    }


def test_widths_are_nested():
    like = random_arrays(NET)
    masks = [flatten_mask(owned(width(share)(like), like=like)) for share in (0.25, 0.5, 1)]
    assert (masks[0] <= masks[1]).all()
    assert masks[2].all()


def test_what_is_left_out_is_not_held():
    params = random_arrays()
    assert list(take(params, without(lora_rank(4)(params), [A]))) == [B, HEAD]


@pytest.mark.parametrize(
    ("index_sets", "reason"),
    [
        ({"other": (np.arange(1),)}, "got 'other'"),
        ({A: (np.arange(4),)}, "expected 2 index sets, got 1"),
        ({A: (np.arange(17), np.arange(12))}, "axis 0: expected indices from 0 to 15, got 0 to 16"),
        ({A: (np.arange(4), np.array([-1]))}, "axis 1"),
        ({A: (np.array([1, 2, 1]), np.arange(12))}, "twice"),
        ({A: (np.array([0.5]), np.arange(12))}, "whole numbers"),
    ],
)
def test_bad_index_sets_are_named(index_sets, reason):
    with pytest.raises(ConfigError, match=reason):
        check(SubModel(index_sets), like=random_arrays())


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_scales_are_named(scale):
    with pytest.raises(ConfigError, match="scale"):
        check(SubModel({}, {A: scale}), like=random_arrays())


@pytest.mark.parametrize(
    "make",
    [
        lambda: lora_rank(0),
        lambda: lora_rank(4, lora_alpha=8),
        lambda: lora_rank(4)({"w": np.zeros((3, 3), np.float32)}),
        lambda: width(0.0),
        lambda: width(0.5, inputs=["nowhere"])(random_arrays(NET)),
    ],
)
def test_what_cannot_be_cut_is_an_error(make):
    with pytest.raises(ConfigError):
        make()


def test_a_rank_above_the_servers_is_named():
    params = random_arrays()
    with pytest.raises(ConfigError, match="axis 0: expected indices from 0 to 15"):
        check(lora_rank(32)(params), like=params)


def test_arrays_of_another_part_are_not_embedded():
    params = random_arrays()
    with pytest.raises(SchemaMismatchError):
        embed(take(params, lora_rank(8)(params)), lora_rank(4)(params), like=params)

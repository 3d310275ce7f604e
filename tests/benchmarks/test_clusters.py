"""The benchmarks of clustering, in their smallest form."""

import os

import pytest

from benchmarks import clusters, tac, tac_images


@pytest.mark.parametrize("way", ["vectors", "round"])
def test_an_arm_finds_the_tasks(way):
    row = clusters.work(way, 24)
    assert row["ari"] == 1.0
    assert row["cpu"] > 0


def test_a_run_comes_to_the_means_of_its_last_rounds_and_the_clustering_of_its_second_half():
    rows = [
        {"round": 0, "uplink-frame-bytes": 0},
        {"round": 1, "cluster-accuracy": 0.2, "uplink-frame-bytes": 1000},
        {"round": 2, "cluster-accuracy": 0.8, "accuracy": 0.5, "accuracy-rte": 0.4, "uplink-frame-bytes": 1000},
        {"round": 3, "cluster-accuracy": 1.0, "accuracy": 0.7, "accuracy-rte": 0.6, "uplink-frame-bytes": 1000},
    ]
    found = tac.summary(rows)
    assert found == {
        "accuracy": pytest.approx(0.6),
        "accuracy-rte": pytest.approx(0.5),
        "clustering": pytest.approx(0.9),
        "clustering-least": 0.8,
        "uplink": 3.0,
    }
    assert "clustering" not in tac.summary([{"accuracy": 0.5, "uplink-frame-bytes": 0}])


def test_seeds_are_averaged():
    rows = [{"accuracy": 0.5, "rest": 1}, {"accuracy": 0.7, "rest": 2}]
    assert tac.average("TAC", rows, {"arm": "arm", **tac.COLUMNS}) == {
        "arm": "TAC",
        "accuracy": pytest.approx(0.6),
    }


@pytest.mark.slow
@pytest.mark.skipif("FEDKIT_DATA_DIR" not in os.environ, reason="needs FEDKIT_DATA_DIR with cifar/")
def test_two_image_tasks_are_trained_and_clustered(tmp_path):
    tac_images.prepare(str(tmp_path), 2)
    settings = tac.SETTINGS["cifar"] | {"examples": 100, "local-steps": 1, "test-rounds": 1}
    row = tac.measure("cifar", tac.ARMS["TAC, rank 1 per task"], 0, 1, 3, settings)
    assert {"accuracy-cifar10", "accuracy-cifar100", "clustering"} <= row.keys()
    assert row["parameters"] == 2 * (2 * 2 * 192 + 50 * 193)

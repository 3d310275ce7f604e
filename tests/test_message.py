"""What fedkit writes into messages is read back, and nonsense is refused."""

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedkit.errors import ReplyError, WireFormatError
from fedkit.message import (
    FEDKIT,
    SCHEME,
    Report,
    frame_record,
    read_report,
    restore_metrics,
    write_report,
)
from fedkit.parcel import PARCEL, Parcel, read_parcel, write_parcel

HASHES = bytes(range(16)), bytes(range(16, 32))
REPORT = Report("7", HASHES[0], False, HASHES[1], {"num-slots": 2})


def parcel_message(*frames: bytes) -> RecordDict:
    config = ConfigRecord({SCHEME: "any"})
    content = RecordDict({"config": config})
    write_parcel(content, "arrays", config, Parcel(*HASHES, bytes(8), frames))
    return content


def reply(**records: MetricRecord) -> RecordDict:
    content = RecordDict({"arrays": frame_record(b"frame"), **records})
    write_report(content, REPORT)
    return content


@pytest.mark.parametrize("frames", [(), (b"one",), (b"one", b"two2", b"3")], ids=len)
def test_a_parcel_is_read_back(frames):
    assert read_parcel(parcel_message(*frames)) == Parcel(*HASHES, bytes(8), frames)


@pytest.mark.parametrize("sizes", [b"\0\0\0\0", b"\7\0\0\0", b"\xff\xff\xff\xff", b"\1\0\0\0\6\0\0\0", b"\1"])
def test_sizes_that_do_not_add_up_are_refused(sizes):
    content = parcel_message(b"one", b"two2")
    config = content.config_records["config"]
    config[PARCEL] = config[PARCEL][:40] + sizes
    with pytest.raises(WireFormatError):
        read_parcel(content)


def test_the_metrics_of_a_reply_travel_in_the_report_and_are_put_back():
    metrics = {"num-examples": 10, "loss": 0.1, "losses": [1.0, 2.5], "counts": [1, 2], "a/b": 3}
    content = reply(metrics=MetricRecord(metrics), other=MetricRecord({"loss": 7}), empty=MetricRecord())
    assert list(content.metric_records) == ["empty"]
    assert read_report(content) == REPORT
    restore_metrics(content)
    restore_metrics(content)
    assert content.metric_records == {
        "metrics": MetricRecord(metrics),
        "other": MetricRecord({"loss": 7}),
        "empty": MetricRecord(),
    }
    assert read_report(content) == REPORT


def test_metrics_that_somebody_adds_on_the_way_are_kept():
    content = reply(metrics=MetricRecord({"num-examples": 10}))
    content["metrics"] = MetricRecord({"seconds": 2.5})
    restore_metrics(content)
    assert content["metrics"] == MetricRecord({"num-examples": 10, "seconds": 2.5})


@pytest.mark.parametrize(("path", "value"), [("metrics/loss", "text"), ("arrays/frame", 1.0), ("fedkit/x", b"")])
def test_metrics_that_are_none_are_refused(path, value):
    content = reply()
    content[FEDKIT][path] = value
    with pytest.raises(ReplyError):
        restore_metrics(content)


def test_a_reply_without_arrays_is_a_skip():
    content = RecordDict()
    write_report(content, REPORT)
    assert read_report(content).skipped


@pytest.mark.parametrize("change", [{"client-id": 7}, {"base": "text"}, {"version": 1}])
def test_an_incomplete_report_is_refused(change):
    content = reply()
    content[FEDKIT].update(change)
    with pytest.raises(ReplyError, match="incomplete"):
        read_report(content)


@pytest.mark.parametrize(
    "change",
    [{"client-id": ""}, {"client-id": "a" * 257}, {"client-id": 'x\nfedkit round: {"round": 0}'}, {"base": b"1"}],
)
def test_a_report_that_would_fill_or_forge_the_log_is_refused(change):
    content = reply()
    content[FEDKIT].update(change)
    with pytest.raises(ReplyError, match=r"client id|digests"):
        read_report(content)


@pytest.mark.parametrize("names", [["a" * 300], [f"m{i}" for i in range(2000)]])
def test_more_metrics_than_a_client_can_mean_are_refused(names):
    content = reply()
    content[FEDKIT].update({f"metrics/{name}": 1.0 for name in names})
    with pytest.raises(ReplyError, match="at most"):
        restore_metrics(content)

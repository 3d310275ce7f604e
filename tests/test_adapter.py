"""A server without torch asks a client for the adapter to begin with, and saves one as PEFT does."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedkit.adapter import Adapter, ask_for_adapter
from fedkit.clients import AquilaMod
from fedkit.errors import QuorumError
from fedkit.message import from_arrays
from fedkit.rounds import RoundGrid
from tests.helpers.grid import InProcessGrid, VirtualTime

ADAPTER = Adapter(
    {"b.lora_A": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(2, np.float32)}, '{"r": 2}'
)


def app(answer="adapter") -> ClientApp:
    made = ClientApp(mods=[AquilaMod()])

    @made.query()
    def begin(message, context):
        if answer == "error":
            raise RuntimeError("no model here")
        reply = ADAPTER.reply(message) if answer != "nothing" else Message(RecordDict(), reply_to=message)
        if answer == "no config":
            reply.content["adapter"] = ConfigRecord()
        if answer == "nan":
            reply.content["arrays"] = from_arrays({"a": np.full(2, np.nan, np.float32)})
        if answer == "other arrays":
            reply.content["arrays"] = ArrayRecord({"a": Array("float32", (2,), "pickle", b"12345678")})
        return reply

    return made


def rounds(*apps: ClientApp) -> RoundGrid:
    return RoundGrid(InProcessGrid(apps), clock=VirtualTime())


def test_the_adapter_arrives_as_the_client_has_it_and_the_ledger_knows() -> None:
    grid = rounds(app(), app())
    adapter = ask_for_adapter(grid)
    assert adapter.config == ADAPTER.config
    assert list(adapter.arrays) == list(ADAPTER.arrays)
    assert all(np.array_equal(adapter.arrays[name], array) for name, array in ADAPTER.arrays.items())
    assert [(entry.direction, entry.kind) for entry in grid.ledger.entries[0]] == [
        ("downlink", "query"),
        ("uplink", "query"),
    ], "one client is asked, once"


@pytest.mark.parametrize("bad", ["error", "nothing", "no config", "nan", "other arrays"])
def test_another_client_is_asked_if_one_cannot_answer(bad, caplog) -> None:
    assert ask_for_adapter(rounds(app(bad), app())).config == ADAPTER.config
    assert "node 1000: no adapter" in caplog.text


def test_without_any_answer_or_node_it_ends_and_says_so() -> None:
    with pytest.raises(QuorumError, match="2 nodes were asked"):
        ask_for_adapter(rounds(app("error"), app("nothing")))
    grid = rounds()
    with pytest.raises(QuorumError, match="0 nodes were asked"):
        ask_for_adapter(grid, node_timeout=30)
    assert 30 <= grid.clock.monotonic() < 33


def test_a_first_node_is_waited_for() -> None:
    grid, late = rounds(), app()

    class Sleep(VirtualTime):
        def sleep(self, seconds):
            super().sleep(seconds)
            grid.inner.__init__([late])

    grid.clock = Sleep()
    assert ask_for_adapter(grid).config == ADAPTER.config


def test_peft_reads_what_is_saved(tmp_path) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    from fedkit.clients.adapters import describe, get_adapter, set_adapter

    def base():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))

    model = get_peft_model(base(), LoraConfig(r=2, lora_alpha=3, target_modules=["0"], modules_to_save=["1"]))
    adapter = describe(model)
    arrays = {name: array + 1 for name, array in adapter.arrays.items()}
    adapter.save(tmp_path / "adapter", dict(reversed(arrays.items())))
    set_adapter(model, arrays)
    found = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert all(np.array_equal(array, arrays[name]) for name, array in get_adapter(found).items())
    x = torch.ones(1, 4)
    assert torch.equal(found(x), model.eval()(x))

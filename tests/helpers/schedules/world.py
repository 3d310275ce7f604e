"""Clients that come, go, forget and crash, behind an in-process Grid."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import Array, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_object import no_object_id_recompute  # noqa: TID251

from fedkit.flower import deflate, inflate, raised, unavailable
from fedkit.message import read_frame, read_instructions, read_report
from fedkit.state import ClientState
from tests.helpers.grid import InProcessGrid, VirtualTime
from tests.helpers.quadratic import client_app, targets
from tests.helpers.schedules.clients import Clients, Held, check
from tests.helpers.schedules.plan import EVENTS, FATES, MODS, Plan

TARGETS: Final = targets(5)


def travelled(message: Message) -> Message:
    """Return a message as it arrives; Flower hashes each of its objects once instead of many times."""
    with no_object_id_recompute():
        return inflate(*deflate(message))


class Killed(BaseException):
    """A client's process ends here."""


class PowerCut(BaseException):
    """The server ends here."""


@dataclass
class Device:
    """One client, the node that it is now, and what it must remember."""

    name: str
    folder: Path | None  # of its durable state
    node_id: int
    context: Context
    app: ClientApp
    held: Held
    writes: int = 0  # of its state, since it was given that message
    spoils: str = ""  # the fate of the message that it is working on
    kill_at: int = -1  # 2 n: it does not survive the moment before write n; 2 n + 1: the moment after
    local: dict[str, Any] = field(default_factory=dict)
    backup: Held | None = None  # of its folder
    away_until: float = 0.0


class World(InProcessGrid):
    """The clients of a schedule; every reply is compared with what the client's twin remembers."""

    def __init__(self, plan: Plan, folder: Path, clock: VirtualTime, clients: Clients) -> None:
        super().__init__([])
        self.plan, self.folder, self.clock, self.twin = plan, folder, clock, clients
        self.rng = random.Random(f"world/{plan.seed}")
        self.cuts = 0
        self.fates: dict[str, tuple[str, float]] = {}  # of messages, and until when
        self.current: Device | None = None
        self.zombies: dict[int, float] = {}  # nodes that are gone, and until when they are listed
        self.checks = 0
        self.devices = [self._device(i, durable) for i, durable in enumerate(plan.durable)]

    # ---- the server's power ---------------------------------------------------------------------

    def tick(self) -> bool:
        """Return whether the server loses power now."""
        if self.cuts >= 4 or self.rng.random() >= self.plan.cut:
            return False
        self.cuts += 1
        return True

    def restart_server(self) -> None:
        """Let the messages of the former server be served, or not, and nodes connect anew."""
        for message in list(self.waiting.values()):
            if self.rng.random() < 0.5:
                self._fated(message)
        self.waiting.clear()
        self.fates.clear()
        if self.plan.new_ids:
            for device in self.devices:
                self._rename(device, zombie=False)
        self.clock.now += 5.0

    # ---- Grid ----------------------------------------------------------------------------------

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are connected, and some that are not any more."""
        now = self.clock.now
        alive = [device.node_id for device in self.devices if device.away_until <= now]
        return alive + [node_id for node_id, until in self.zombies.items() if until > now]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Let things happen to clients, then take messages."""
        for device in self.devices:
            for event in EVENTS:
                if self.rng.random() < self.plan.rates[event]:
                    getattr(self, f"_{event}")(device)
        ids = super().push_messages(messages)
        for message_id in ids:
            fate = next((f for f in FATES if self.rng.random() < self.plan.rates[f]), "")
            wait = self.rng.expovariate(0.2) if fate == "slow" else 0.0
            self.fates[message_id] = fate, self.clock.now + wait
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return replies."""
        replies = []
        for message_id in message_ids:
            message = self.waiting.get(message_id)
            if message is None:
                continue
            fate, until = self.fates[message_id]
            device = self._at(message.metadata.dst_node_id)
            if fate == "never" or until > self.clock.now or (device and device.away_until > self.clock.now):
                continue
            del self.waiting[message_id]
            reply = self._fated(message)
            replies.append(unavailable(message) if reply is None else reply)
        return replies

    def restart(self, node_id: int) -> None:
        """Let a node lose what it holds in memory."""
        if device := self._at(node_id):
            self._restart(device)

    # ---- a client's work ------------------------------------------------------------------------

    def _fated(self, message: Message) -> Message | None:
        """Return the reply to a message; None if there is none."""
        device = self._at(message.metadata.dst_node_id)
        fate = self.fates[message.metadata.message_id][0]
        if device is not None and fate == "die":
            self._rename(device)
            device = None
        if device is None:
            return None
        device.spoils = fate if message.metadata.message_type == MessageType.TRAIN else ""
        device.writes, device.local = 0, {}
        device.kill_at = self.rng.randrange(4) if fate == "killed" else -1
        before, survives = dict(device.context.state), self.rng.random() < 0.5
        self.current = device
        received = travelled(message)
        received.metadata.__dict__["_message_id"] = message.metadata.message_id
        try:
            reply = device.app(received, device.context)
        except Killed:
            device.context.state = RecordDict(before if survives else {})  # the node outlives its app, or not
            self._expect(device, message, None, survives)
            return None
        except Exception as error:  # as Flower does
            reply = raised(error, reply_to=received)
        finally:
            self.current = None
        reply = travelled(reply)
        self._expect(device, message, reply, True)
        return self._corrupted(reply) if fate == "corrupt" and reply.has_content() else reply

    def tamper(self, device: Device, local: dict[str, Any]) -> dict[str, Any]:
        """Return what training ends with; a little noise makes every frame another."""
        if device.spoils == "raise":
            raise RuntimeError("training fails")
        if device.kill_at >= 0 and device.folder is None:
            raise Killed
        noise = np.random.default_rng(self.rng.randrange(2**32))
        device.local = {k: a + noise.normal(0, 0.05, a.shape).astype(np.float32) for k, a in local.items()}
        if device.spoils == "nan":
            return {name: np.full_like(a, np.nan) for name, a in local.items()}
        return device.local

    def write_state(self, write: Callable[[], None]) -> None:
        """Write a client's state to its folder, unless it is killed before; or right after."""
        device = self.current
        assert device is not None
        if device.kill_at == 2 * device.writes:
            raise Killed
        write()
        device.writes += 1
        if device.kill_at == 2 * device.writes - 1:
            raise Killed

    def _expect(self, device: Device, message: Message, reply: Message | None, survives: bool) -> None:
        """Work out what the client must remember now, and compare."""
        instructions, name = read_instructions(message), device.name
        training = message.metadata.message_type == MessageType.TRAIN and not instructions.introduce
        state = ClientState(device.context, instructions.experiment).load()
        stages = [device.held]  # what is remembered at first, after receiving, and after training
        if not instructions.introduce:
            received = self.twin.receives(device.held, message)
            stages += [] if received is None else [received]
            spoilt = received is None or device.spoils in ("raise", "nan")
            if reply is not None:
                reason = reply.error.reason if reply.has_error() else ""
                check(reply.has_error() == spoilt, f"client {name}: expected an error: {spoilt}, got {reason!r}")
            saved = device.writes == 2 if device.folder else reply is not None
            if received is not None and training and not spoilt and saved:
                frame = state.get(f"{self.plan.scheme}.staged")
                if reply is not None:
                    skipped = read_report(reply.content).skipped
                    frame = None if skipped else read_frame(reply.content)
                stages.append(self.twin.trains(received, message, device.local, frame))
            elif received is not None and saved:
                stages.append(received)
        if reply is not None:
            device.held = stages[-1]
        elif device.folder:
            device.held = stages[device.writes]
        elif not survives:
            device.held = self.twin.fresh()
        self.twin.compare(device.held, state, name)
        self.checks += 1

    def _corrupted(self, reply: Message) -> Message:
        """Return a reply one bit of whose frame is wrong, if it has one."""
        for record in reply.content.array_records.values():
            for key, array in record.items():
                data = bytearray(array.data)
                data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
                record[key] = Array(array.dtype, array.shape, array.stype, bytes(data))
        return reply

    # ---- what happens to clients ----------------------------------------------------------------

    def _device(self, i: int, durable: bool) -> Device:
        name, node_id = f"{i}", self.rng.randrange(2**32)
        folder = self.folder / "clients" / name if durable else None
        context = self._context(name, folder, node_id)
        device = Device(name, folder, node_id, context, ClientApp(), self.twin.fresh())
        self._new_app(device)
        return device

    def _context(self, name: str, folder: Path | None, node_id: int) -> Context:
        config: dict[str, Any] = {"partition-id": int(name)} | ({"state-dir": str(folder)} if folder else {})
        return Context(run_id=1, node_id=node_id, node_config=config, state=RecordDict(), run_config={})

    def _new_app(self, device: Device) -> None:
        device.app = client_app(
            [MODS[self.plan.scheme]()],
            TARGETS[int(device.name)],
            num_examples=self.rng.choice([10, 10, 25]),
            tamper=lambda local: self.tamper(device, local),
        )

    def _at(self, node_id: int) -> Device | None:
        return next((device for device in self.devices if device.node_id == node_id), None)

    def _restart(self, device: Device) -> None:
        """Let a node start anew; what it held in memory is lost."""
        device.context = self._context(device.name, device.folder, device.node_id)
        if device.folder is None:
            device.held = self.twin.fresh()
        self._new_app(device)

    def _wipe(self, device: Device) -> None:
        """Let a client lose all it remembers."""
        if device.folder is not None:
            shutil.rmtree(device.folder, ignore_errors=True)
        device.held, device.backup = self.twin.fresh(), None
        device.context.state = RecordDict()

    def _rewind(self, device: Device) -> None:
        """Make a copy of a client's folder; or put the last copy back."""
        if device.folder is None:
            return
        copy = device.folder.with_name(f"{device.name}.copy")
        source, target = (device.folder, copy) if device.backup is None else (copy, device.folder)
        shutil.rmtree(target, ignore_errors=True)
        if source.exists():
            shutil.copytree(source, target)
        if device.backup is None:
            device.backup = device.held
        else:
            device.held, device.backup = device.backup, None

    def _rename(self, device: Device, *, zombie: bool = True) -> None:
        """Let a node start anew, with another id; the old one may be listed for a while."""
        if zombie and self.rng.random() < 0.5:
            self.zombies[device.node_id] = self.clock.now + self.rng.expovariate(0.1)
        device.node_id = self.rng.randrange(2**32)
        self._restart(device)

    def _vanish(self, device: Device) -> None:
        """Let a node be away for a while."""
        device.away_until = self.clock.now + self.rng.expovariate(0.05)

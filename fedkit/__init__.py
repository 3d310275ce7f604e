"""fedkit: fine-tune pre-trained models with Flower over thin, unreliable links.

One strategy on the server, one mod on the client::

     SERVER  strategies/              FLOWER              CLIENT  clients/
     distribute ── frames, config ──▶ Message ─▶ mod: rebuild the arrays, settle memory
                                                  train (RM-LoRA: torch, peft)
                                                  update = local − received
                                                  mask → quantize → entropy-code → frame   fedkit/codec/
     decode  ◀─── one Array "fedkit/1" ◀─ Message ◀─┘  stage memory, reply (or skip)
       mean | compensate | cluster | lazy sum                         fedkit/aggregation/
     step ──▶ code the change ──▶ next round's arrays, as the clients rebuild them   fedkit/broadcast.py

Principles, in order of weight

1. Functional core, thin shell: the mathematics in `fedkit.codec` and `fedkit.aggregation` is numpy in, numpy
   out. torch lives under `fedkit.clients` alone; what differs between Flower's versions in `fedkit.flower`.
2. One scheme is one pair: `strategies/aquila.py` and `clients/aquila.py` are two halves of one protocol.
3. The server decides, the message carries, the client obeys: mods take no options.
4. State is explicit: a codec or an aggregation hides none, a client trusts what it remembers only once the server
   acknowledged it, and what must outlive a process is on the disk before anybody hears of it.
5. Bytes are real: every size reported is that of what was sent.
6. Quantizing, masking, compensating and clustering are independent choices.

Imports go one way: examples → cli, launch, submit → strategies, clients → adapter → rounds → booking → broadcast,
memory, state, checkpoint, ledger → message, ordinary, skipping, calls → flower, sockets, config, files → codec,
aggregation, faults, limits, processes → submodels → arrays, errors.
"""

__version__ = "0.1.0"

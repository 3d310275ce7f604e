"""fedkit: fine-tune pre-trained models with Flower over thin, unreliable links.

One strategy on the server, one mod on the client::

     SERVER  strategies/              FLOWER              CLIENT  clients/
     distribute ── frames, config ──▶ Message ─▶ mod: rebuild the arrays, settle the memory
                                                  train (RM-LoRA: torch, peft)
                                                  update = local − received
                                                  mask → quantize → entropy-code → frame   fedkit/codec/
     decode  ◀─── one Array "fedkit/1" ◀─ Message ◀─┘  stage memory, reply (or skip)
       mean | compensate | cluster | lazy sum                         fedkit/aggregation/
     step ──▶ encode the change ──▶ next round's arrays, as the clients rebuild them   fedkit/broadcast.py

Design principles, the most important first

1. Functional core, thin shell: the mathematics in `fedkit.codec` and `fedkit.aggregation` takes and returns numpy
   arrays. torch is imported only under `fedkit.clients`; differences between versions of Flower are handled in
   `fedkit.flower`.
2. A scheme is a pair of files: `strategies/aquila.py` and `clients/aquila.py` are the two halves of one protocol.
3. The server decides, its messages carry the decisions, and the clients follow them: mods take no options.
4. State is explicit: codecs and aggregations hold no hidden state, a client relies on what it remembers only once
   the server has acknowledged it, and what must outlive a process is on disk before any other process is told.
5. Bytes are real: every size that is reported is the size of what was sent.
6. Quantization, masks, compensation for missing clients, and clustering can be chosen independently.

Imports go one way: examples → cli, launch, submit → strategies, clients → adapter → rounds → booking → broadcast,
memory, state, checkpoint, ledger → message, ordinary, skipping, calls → flower, sockets, config, files → codec,
aggregation, faults, limits, processes → submodels → arrays, errors.
"""

__version__ = "0.1.0"

"""Every number that the READMEs claim, one command each: ``python -m benchmarks.NAME`` from the repository root.

``python -m benchmarks`` lists them, and runs several, or ``all``; ``python -m benchmarks.claims`` lists the
figures whose modules have changed, and says whether their small forms agree.

- ``codec``: error against real bytes, speed and memory of our codecs and of all installable peers; bounds
- ``aggregate``: the server's work on a thousand uploads, compared with Flower's FedAvg on the same updates
- ``fuzz``: hostile bytes, a minute of mutated frames or a million of them
- ``wire``: the ledger compared with the kernel's count of the SuperLink's port, in a deployment
- ``round_time``: the time of a round compared with Flower's FedAvg, in a deployment
- ``aquila``: bits to FedAvg's accuracy, AQUILA compared with LAQ, QSGD, AdaQuantFL and MARINA, on three tasks
- ``text_lora``: bytes to FedAvg's accuracy with MiniLM on SST-2
- ``mixed_ranks``: ways to average LoRA factors of different ranks
- ``rm_lora``: RM-LoRA compared with LoRA at equal budget and at equal storage, on six tasks
- ``rm_lora_step``: the time of RM-LoRA's step compared with PEFT LoRA's
- ``schedules`` and ``crashes``: random fault schedules, and programs killed in a deployment
- ``innovations``: records the data that the codecs are measured on

Each is small by default; ``--full`` produces the README's figures, ``--json FILE`` writes the table as data. Rows
go to ``benchmark-runs/`` as they finish, and a repeated command continues from there.
"""

import os

for _pool in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "NUMBA", "BLOSC"):  # before numpy is there: one thread each
    os.environ.setdefault(f"{_pool}_NUM_THREADS", "1")

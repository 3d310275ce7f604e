"""A client's training step on a GPU: ``python -m benchmarks.gpu [--full]``, under a minute.

An encoder of BERT-large's size, or a tiny one without --full, with random weights and LoRA (r 16, query and
value), trained by `fedkit.clients.rm_lora`'s own loop. Arms: float32, as in the CPU's profile, but on the GPU; the
profile `gpu`, which is bfloat16; and that profile with batches that are not pinned. ``encode`` is the work after
training: copying the adapter to the CPU, and encoding the update as a frame of 1 bit per parameter. Without CUDA
all arms run on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from benchmarks.harness import Bench, Row, parser, sources_digest

SIZES = {  # hidden, layers, heads, tokens, batch
    "tiny": (32, 2, 2, 16, 8),
    "bert-large": (1024, 24, 16, 128, 32),
}
ARMS = ("float32", "gpu", "gpu, pageable")
COLUMNS = {
    "arm": "arm",
    "milliseconds": "ms a step",
    "times": "times faster",
    "memory": "peak MB on the GPU",
    "encode": "ms to encode",
}


def build(size: str) -> Any:
    """Return an encoder with LoRA and a head for two classes."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    hidden, layers, heads, _, _ = SIZES[size]
    config = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["query", "value"], modules_to_save=["classifier"])
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # drawn there in no time
        return get_peft_model(BertForSequenceClassification(config), lora)


def profile_of(arm: str) -> Any:
    """Return the profile of an arm, on the CPU where there is no CUDA."""
    import torch

    from fedkit.clients.profiles import PROFILES, Profile

    @dataclass(frozen=True, kw_only=True)
    class Pageable(Profile):
        def _moved(self, value: Any) -> Any:
            return value.to(self.device)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arm == "float32":
        return Profile(device=device)
    profile = replace(PROFILES["gpu"], device=device)
    return Pageable(device=device, bfloat16=True) if "pageable" in arm else profile


def batches(size: str, steps: int, seconds: list[float]) -> Iterator[dict[str, Any]]:
    """Yield random batches, and note the time between them: that of a step, with the loss read as a user would."""
    import torch

    _, _, _, tokens, batch = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    made = [
        {
            "input_ids": torch.randint(1000, (batch, tokens), generator=generator),
            "attention_mask": torch.ones(batch, tokens, dtype=torch.long),
            "labels": torch.randint(2, (batch,), generator=generator),
        }
        for _ in range(4)
    ]
    for number in range(steps):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        yield made[number % len(made)]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)


def measure(arm: str, size: str, steps: int) -> Row:
    """Return the row of one arm: the median step after the first quarter."""
    import torch

    from fedkit.arrays import subtract
    from fedkit.clients.adapters import get_adapter
    from fedkit.clients.rm_lora import RMLoraConfig, train_rm_lora
    from fedkit.codec.entropy_constrained import EntropyConstrained
    from fedkit.codec.wire import Codec

    cuda, seconds = torch.cuda.is_available(), []  # type: bool, list[float]
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model, profile = build(size), profile_of(arm)
    before = get_adapter(model)
    profile.prepare(model)
    config = RMLoraConfig(r=16, lora_alpha=32, active_rank=16, target_modules=("query", "value"))
    feed = batches(size, steps, seconds)
    metrics = train_rm_lora(model, feed, config, learning_rate=1e-3, seed=0, profile=profile)
    begin = time.perf_counter()
    frame = Codec(EntropyConstrained(1.0)).encode(subtract(get_adapter(model), before))
    encode = time.perf_counter() - begin
    return {
        "milliseconds": 1e3 * median(seconds[steps // 4 :]),
        "memory": torch.cuda.max_memory_allocated() / 1e6 if cuda else None,
        "encode": 1e3 * encode,
        "frame": len(frame),
        "loss": metrics["train-loss"],
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, help="instead of 40, or 8 without --full")
    options = arguments.parse_args(argv)
    bench = Bench("gpu", options)
    size, steps = "bert-large" if bench.full else "tiny", options.steps or (40 if bench.full else 8)
    code = sources_digest("clients")
    rows = [bench.arm(arm, partial(measure, arm, size, steps), size=size, steps=steps, code=code) for arm in ARMS]
    lines = [row | {"times": rows[0]["milliseconds"] / row["milliseconds"]} for row in rows]
    bench.table(f"A step of {size} on {rows[0]['device']}, {steps} steps", COLUMNS, lines)
    bench.finish()


if __name__ == "__main__":
    main()

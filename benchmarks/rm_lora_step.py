"""A training step of RM-LoRA compared with one of plain LoRA: ``python -m benchmarks.rm_lora_step [--full]``.

The model is the quickstart's vision transformer; with ``--full``, also one of ViT-small's size, and two that are
as deep as those but have next to nothing to compute. The latter show the cost of calls, which is what matters
where a GPU waits for them. All arms have the same batch and the same AdamW. In every turn each arm makes one step,
in an order that changes each time, and its time is divided by that of plain LoRA in the same turn, so that other
load on the machine affects both. Shown is the median; on the CPU, of processor time, which other programs hardly
change. Operations are those that a GPU gets as kernels.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.harness import Bench, Row, parser, sources_digest

BOUND = 1.03  # of plain LoRA's time
CALLS = {"hidden": 16, "heads": 4, "image": 8, "patch": 2, "channels": 1, "batch": 1}
MODELS = {  # hidden size, layers, batch: the quickstart's, and a ViT-small on 65 patches
    "quickstart": {"hidden": 96, "layers": 4, "heads": 4, "image": 8, "patch": 2, "channels": 1, "batch": 32},
    "vit-small": {"hidden": 384, "layers": 12, "heads": 6, "image": 32, "patch": 4, "channels": 3, "batch": 32},
    "calls alone, 4 layers": CALLS | {"layers": 4},
    "calls alone, 12 layers": CALLS | {"layers": 12},
}
ARMS: dict[str, dict[str, Any]] = {
    "LoRA": {"active_rank": 8},
    "LoRA again": {"active_rank": 8},  # what the machine alone makes of it
    "mask": {"active_rank": 4},
    "mask, strict": {"active_rank": 4, "hold": "update"},
    "penalty": {"active_rank": 8, "orth_reg_weight": 0.1},
    "penalty, cosine": {"active_rank": 8, "orth_reg_weight": 0.1, "penalty": "cosine"},
    "RM-LoRA": {"active_rank": 4, "orth_reg_weight": 0.1},
    "RM-LoRA, strict": {"active_rank": 4, "orth_reg_weight": 0.1, "hold": "update"},
}
COLUMNS = {
    "arm": "arm",
    "operations": "operations",
    "milliseconds": "ms, median",
    "ratio": "of plain LoRA's",
    "low": "quartile",
    "high": "quartile",
    "within": f"at most {BOUND}",
}


def build(size: dict[str, int], device: str) -> Any:
    """Return a model with LoRA of rank 8 on all attention projections."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=size["hidden"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        intermediate_size=4 * size["hidden"],
        image_size=size["image"],
        patch_size=size["patch"],
        num_channels=size["channels"],
        num_labels=10,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=["classifier"])
    return get_peft_model(ViTForImageClassification(config), lora).to(device).train()


def stepper(size: dict[str, int], device: str, options: dict[str, Any]) -> Callable[[], float]:
    """Return what makes one step and returns its seconds; the model is its own."""
    import torch

    from fedkit.clients.rm_lora import RMLoraConfig

    model = build(size, device)
    config = RMLoraConfig(r=8, lora_alpha=16, target_modules=("q_proj",), **options)
    masked, penalty = config.masked_step(model, 0), config.regularizer(model)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0, foreach=True
    )
    numbers = itertools.count()
    shape = (size["batch"], size["channels"], size["image"], size["image"])
    pixels, labels = torch.randn(shape, device=device), torch.randint(10, shape[:1], device=device)

    clock = time.perf_counter if device == "cuda" else time.process_time

    def step() -> float:
        begin = clock()
        loss = model(pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        if penalty:
            penalty.add_gradient(config.orth_reg_weight)
        if masked:
            masked.before(next(numbers), optimizer)
        optimizer.step()
        if masked:
            masked.after(optimizer)
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - begin

    return step


def operations(step: Callable[[], float]) -> float:
    """Return how many operations a step has, but for new views: the mean of `BLOCK` steps after the first."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from fedkit.clients.masked_step import BLOCK

    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.total += not func.is_view
            return func(*args, **(kwargs or {}))

    step()
    with Count() as count:
        for _ in range(BLOCK):
            step()
    return count.total / BLOCK


def measure(name: str, device: str, turns: int) -> dict[str, Row]:
    """Return the row of every arm of one model."""
    steps = {arm: stepper(MODELS[name], device, options) for arm, options in ARMS.items()}
    order, seconds = list(steps), {arm: [] for arm in steps}  # type: dict[str, list[float]]
    chance = random.Random(0)
    for turn in range(turns + 5):  # five to warm up
        chance.shuffle(order)
        for arm in order:
            took = steps[arm]()
            if turn >= 5:
                seconds[arm].append(took)
    found = {}
    for arm, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["LoRA"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        median = 1e3 * statistics.median(own)
        found[arm] = {"operations": operations(steps[arm]), "milliseconds": median}
        found[arm] |= {"ratio": middle, "low": low, "high": high, "within": middle <= BOUND}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    import torch

    arguments = parser(__doc__)
    arguments.add_argument("--turns", type=int, help="instead of 200, or 20 without --full")
    arguments.add_argument("--models", nargs="+", choices=MODELS, help="instead of all, or one without --full")
    arguments.add_argument("--device", choices=("cpu", "cuda"), help="instead of all that there are")
    options = arguments.parse_args(argv)
    torch.set_num_threads(1)
    bench = Bench("rm_lora_step", options)
    turns, code = options.turns or (200 if bench.full else 20), sources_digest("clients")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in [options.device] if options.device else devices:
        for name in options.models or (MODELS if bench.full else list(MODELS)[:1]):
            found: dict[str, Row] = {}

            def row(arm: str, name: str = name, device: str = device, found: dict[str, Row] = found) -> Row:
                found.update(found or measure(name, device, turns))
                return found[arm]

            params = {"model": name, "device": device, "turns": turns, "torch": torch.__version__, "code": code}
            rows = [bench.arm(arm, partial(row, arm), **params) for arm in ARMS]
            bench.table(f"A step on {device}, {name}, {turns} turns", COLUMNS, rows)
    bench.finish()


if __name__ == "__main__":
    main()

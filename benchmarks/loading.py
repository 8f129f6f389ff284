"""Loading a LoRA pair over loading one model: time and peak memory, each in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.measure import Aim, Row, Seconds, ratio
from benchmarks.setting import Setting

_CHILD = """
import json, sys, time
import torch, peft
from transformers import AutoModelForCausalLM
from benchmarks.measure import peak_memory
from emmech.models.checkpoints import load_pair
from emmech.models.opening import locate
what, base, adapter, dtype, device = sys.argv[1:]
wall, cpu = time.perf_counter(), time.process_time()
if what == "one":
    model = AutoModelForCausalLM.from_pretrained(locate(base), dtype=getattr(torch, dtype))
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(automatic if device == "auto" else device).eval()
else:
    model = load_pair(base, adapter, dtype=dtype, device=device).finetuned.module
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
with torch.no_grad():
    model(torch.ones(1, 32, dtype=torch.long, device=model.device))
print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak_memory(model.device)}))
"""


def measure(setting: Setting) -> list[Row]:
    """Time of loading, and peak memory (the GPU's, where there is one) of loading and one forward pass."""
    kinds = ("one", "pair")
    found = [{kind: child(setting, kind) for kind in kinds} for _ in range(setting.repeats)]
    seconds = {k: [Seconds(turn[k]["wall"], turn[k]["cpu"]) for turn in found] for k in kinds}
    peaks = {k: [Seconds(turn[k]["peak"], turn[k]["peak"]) for turn in found] for k in kinds}
    memory = ratio("peak memory of a process with a LoRA pair / with one model", peaks["pair"], peaks["one"],
                   Aim(1.05, "lower"), gib=max(one.wall for one in peaks["pair"]) / 2**30)  # fmt: skip
    del memory["cpu"]
    return [
        ratio("loading a LoRA pair, with its checks / loading one model", seconds["pair"], seconds["one"]),
        memory,
    ]


def child(setting: Setting, kind: str) -> dict[str, float]:
    """Seconds of loading and peak memory (bytes) in a process of its own."""
    dtype = str(setting.torch_dtype()).removeprefix("torch.")
    arguments: Sequence[str] = (kind, setting.base, str(setting.adapter), dtype, setting.device)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])

"""A trace of 8000 tokens is scored on a CPU in memory that does not grow with the square of its length."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.atmanrl.tiny import byte_level_tokenizer, llama

TOKENS = 8000
HEADS = 4

# In a process of its own: a peak is that of the process's whole life.
SCRIPT = """
import re
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from atmanrl.evaluation.explain import explain, read_examples
from atmanrl.report import write_page

def mebibytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024

folder = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder / "model")
tokenizer = AutoTokenizer.from_pretrained(folder / "model")
before = mebibytes("VmRSS")
run = explain(model, tokenizer, list(read_examples(folder / "long.jsonl")), estimator="gradient")
write_page(folder / "page.html", run)
print(len(run.rollouts[0].cot), mebibytes("VmHWM") - before)
"""


def test_a_long_trace_is_explained_in_bounded_memory(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    llama(len(tokenizer), max_position_embeddings=2 * TOKENS).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    steps = " ".join(f"{i % 17} - {i % 5} = {i % 17 - i % 5}." for i in range(TOKENS // 4))
    chain = tokenizer.decode(tokenizer.encode(steps, add_special_tokens=False)[:TOKENS])
    line = {"prompt": "How many?", "completion": f"{chain} The final answer is 18"}
    (tmp_path / "long.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    root = Path(__file__).parents[2]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240, check=True)
    tokens, risen = finished.stdout.split()
    assert int(tokens) > TOKENS - 20
    one_layers_maps = HEADS * TOKENS**2 * 4 / 2**20
    assert float(risen) < one_layers_maps / 3
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("data-i=") == int(tokens)

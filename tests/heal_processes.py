"""What two processes do in tests/e2e/test_heal.py: torchrun ... heal_processes.py FOLDER OPTIONS.

First trainings with a copy of the weights in each process (DDP) and with shares of them (FSDP2), on every
term of the loss, then `care heal --shard` as a user types it. The folder holds OUT and its original, `model`;
the first process writes `ddp.json` and the like, and the command `shard.json`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed import get_backend, get_world_size

from care_mla.cli.main import main
from care_mla.workspace import write_json
from heal_cases import curve, run

TERMS = {"hidden_states": 0.2, "attention_outputs": 0.3}
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp-terms": TERMS,
    "fsdp-terms": {**TERMS, "shard": True, "gradient_checkpointing": True},
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    for name, options in WAYS.items():
        state, checkpoints = run(Path("OUT"), Path("model"), Path(name), **options)
        assert (get_world_size(), get_backend()) == (2, "gloo")
        if os.environ["RANK"] == "0":
            write_json(Path(f"{name}.json"), {"curve": curve(state), "step": state.best[0]})
    raise SystemExit(main(["heal", "OUT", "SHARDED", "--shard", "--json", "shard.json", *sys.argv[2:]]))

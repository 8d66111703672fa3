"""StrataKV and its peers, measured in turn on the same tokens. See `docs/benchmarks.md`.

| module | what it is |
| --- | --- |
| `catalog` | every peer: its worker, its venv, its options |
| `install` | the venvs and the models, made once |
| `models` | GGUF files and folders of safetensors from the GGUF that is installed |
| `run` | the driver: starts workers, measures in turn, writes the report |
| `stages`, `contestant` | what is measured; one peer through it, its worker and what went wrong |
| `fidelity`, `fidelity_report` | another driver: what the caches' formats cost in accuracy; its table |
| `client` | the driver's side of a worker: requests, time limits, ends |
| `results`, `report`, `plot` | medians and the JSON; the table; the picture |
| `protocol` | a worker's side: the loop, and the interface of a peer |
| `here` | a worker that measures nothing of a peer: tokens, the machine, the read bandwidth |
| all others | one worker for each peer |

Workers run in venvs of their own and import nothing of this folder but `protocol` and each other.
"""

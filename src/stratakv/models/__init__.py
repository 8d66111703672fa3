"""Loading of causal language models, from this machine alone.

    name or path -> registry / folder / .gguf -> content digest -> (converted once) -> transformers model + tokenizer

| module | what it is |
| --- | --- |
| `loading` | `load`, the only verb a caller needs, and `LoadedModel` |
| `registry` | the models with a name of their own: one entry each |
| `checkpoint` | what a folder must hold to be loaded, and its digest |
| `gguf_file` | a GGUF file, read and dequantised once |
| `conversions` | the cache of converted models: atomic, verified |
| `digests` | content digests, remembered while a file is unchanged |
| `pretrained` | the only calls into transformers' `from_pretrained` for a folder |
| `progress` | what a long load tells its caller |

Nothing here reaches for a network, unpickles a file, or runs code that came with a model.
"""

from stratakv.models.conversions import cache_folder
from stratakv.models.loading import LoadedModel, load
from stratakv.models.progress import Progress, RichProgress, SilentProgress, terminal_progress
from stratakv.models.registry import KNOWN_MODELS, NamedModel

__all__ = [
    "KNOWN_MODELS",
    "LoadedModel",
    "NamedModel",
    "Progress",
    "RichProgress",
    "SilentProgress",
    "cache_folder",
    "load",
    "terminal_progress",
]

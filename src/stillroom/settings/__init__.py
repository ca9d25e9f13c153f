"""One declaration of every setting; the command line, a TOML file and Python all fill the same one."""

from stillroom.settings.declare import Images, Optimizer, Run
from stillroom.settings.errors import Refusal, nearest
from stillroom.settings.fill import from_mapping, from_toml, read_toml, to_mapping, to_toml
from stillroom.settings.seeds import seed_of

__all__ = [
    "Images", "Optimizer", "Refusal", "Run", "from_mapping", "from_toml", "nearest", "read_toml", "seed_of",
    "to_mapping", "to_toml",
]

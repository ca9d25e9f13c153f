"""One declaration of every setting; the command line, a TOML file and Python all fill the same one."""

from stillroom.settings.declare import Images, Optimizer, Run
from stillroom.settings.errors import Refusal, nearest
from stillroom.settings.fill import (
    absent,
    checked,
    fit,
    from_mapping,
    from_toml,
    read_toml,
    required,
    to_mapping,
    to_toml,
)
from stillroom.settings.given import given, refuse_given
from stillroom.settings.limits import (
    Count,
    Decay,
    Natural,
    NotNegative,
    Place,
    Positive,
    Share,
    Where,
    Within,
    expanded,
)
from stillroom.settings.seeds import seed_of

__all__ = [
    "Count", "Decay", "Images", "Natural", "NotNegative", "Optimizer", "Place", "Positive", "Refusal", "Run", "Share",
    "Where", "Within", "absent", "checked", "expanded", "fit", "from_mapping", "from_toml", "given", "nearest",
    "read_toml", "refuse_given", "required", "seed_of", "to_mapping", "to_toml",
]

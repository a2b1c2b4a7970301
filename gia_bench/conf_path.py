"""Where the YAML files lie: in the package (an installed wheel), or at the top of the repository (a checkout)."""

from pathlib import Path

_PACKAGED = Path(__file__).parent / "conf"

CONF = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parent.parent / "conf"

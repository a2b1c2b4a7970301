"""Errors that a person can mend: each says where, what was got, and what to do."""


class GiaBenchError(Exception):
    """A problem the user can mend. The command line prints its sentence and exits with status 1."""


class ConfigError(GiaBenchError):
    """A setting is out of its range, or its name is not known."""


class IncompatibleError(ConfigError):
    """Parts that cannot go together (attack, model, threat, defense). A sweep counts it as skipped, not as failed."""


class DataError(GiaBenchError):
    """A dataset or a file of weights is absent, corrupt, or not what it claims to be."""


class NonFiniteError(GiaBenchError):
    """A client sent NaN or infinity: names the client and the round."""


class WireError(GiaBenchError):
    """An update cannot be packed without loss by the codec that was asked to pack it."""


class StorageError(GiaBenchError):
    """An output folder or a record file cannot be read or written."""


def choices(name: str, got: object, known: object) -> str:
    """The sentence for an unknown name; ``known`` is whatever really exists, so that the list is never stale."""
    listed = ", ".join(sorted(str(k) for k in known))  # type: ignore[attr-defined]
    return f"{name}={got!r} is not known. Choose one of: {listed}."

"""Every error fedkit raises.

::

    FedkitError
    ├── ConfigError (ValueError)     an option that can never work; raised before anything starts
    ├── CodecError (ValueError)      bytes or values that cannot be coded
    │   ├── WireFormatError          bytes that are not a frame, or a damaged one
    │   ├── UnsupportedVersionError  a frame of a format this fedkit does not know
    │   └── SchemaMismatchError      arrays of other names or shapes than expected
    ├── VersionError                 a client that cannot rebuild the server's arrays
    ├── ReplyError                   one node's reply that cannot be used
    ├── QuorumError                  too few nodes, for too long
    ├── CrashError                   a crash of the server that a fault schedule asks for
    ├── MemoryBudgetError            a client that would take more memory than its device has for it
    ├── StateError                   state that cannot be written or read
    └── LaunchError                  a Flower process that did not start, or a run that failed
        └── OutcomeError             a run that ended without an error, but is of no use
"""

from typing import Final

__all__ = [
    "LACKING",
    "CodecError",
    "ConfigError",
    "CrashError",
    "FedkitError",
    "LaunchError",
    "MemoryBudgetError",
    "OutcomeError",
    "QuorumError",
    "ReplyError",
    "SchemaMismatchError",
    "StateError",
    "UnsupportedVersionError",
    "VersionError",
    "WireFormatError",
]

LACKING: Final = (
    "the ClientApp lacks this strategy's mod, or has another before it that needs arrays, or WarmWorker after it: "
    "give it mods=[AquilaMod(), ErrorFeedbackMod(), SafariMod(), TacMod()], or the one of them, first."
)
"""What to say about a node whose mods, or whose app, got a frame instead of arrays."""


class FedkitError(Exception):
    """Any error that fedkit raises on purpose."""


class ConfigError(FedkitError, ValueError):
    """An option that can never work."""


class CodecError(FedkitError, ValueError):
    """Bytes or values that cannot be coded."""


class WireFormatError(CodecError):
    """Bytes that are not a frame, or a damaged one."""


class UnsupportedVersionError(CodecError):
    """A frame of a format that this fedkit does not know."""


class SchemaMismatchError(CodecError):
    """Arrays of other names or shapes than expected."""


class VersionError(FedkitError):
    """A client that cannot rebuild the server's arrays from what it was sent."""


class ReplyError(FedkitError):
    """One node's reply that cannot be used."""


class QuorumError(FedkitError):
    """Too few nodes, for too long."""


class CrashError(FedkitError):
    """A crash of the server that a fault schedule asks for."""


class MemoryBudgetError(FedkitError):
    """A client that would take more memory than its device has for it."""


class StateError(FedkitError):
    """State that cannot be written or read."""


class LaunchError(FedkitError):
    """A Flower process that did not start, or a run that failed."""


class OutcomeError(LaunchError):
    """A run that ended without an error, but is of no use: the app must be fixed and run again."""

"""What can go wrong through no fault of fourge's own.

    FourgeError
    |-- CheckpointError   a file or tensor is missing, truncated, unknown, misshapen, not finite
    |-- ConfigError       config.json describes a model that fourge does not know
    |-- RecipeError       a recipe is malformed or names what does not exist
    |-- DataError         calibration data is missing, unreadable, or has too many unusable records
    |-- BudgetError       memory or disk cannot hold what the run needs
    |-- LaunchError       an engine cannot be launched as asked, or a launch command cannot be read
    |-- OutputError       the target cannot be written, or holds something else
    |-- EngineError       the engine cannot be set up as asked, or has stopped
    `-- RequestError      a request to the engine cannot be served; the engine goes on

Every message is one sentence or two: what was found, what was needed, what to do. The command
line prints it and exits with status 2; a bug of fourge's own is an ``assert`` and a traceback.
"""


class FourgeError(Exception):
    """The root: everything that a user can mend."""


class CheckpointError(FourgeError):
    """A file or tensor of a checkpoint cannot be used."""


class ConfigError(FourgeError):
    """config.json describes a model that fourge does not know."""


class RecipeError(FourgeError):
    """A recipe is malformed or names what does not exist."""


class DataError(FourgeError):
    """Calibration data is missing, unreadable, or has too many unusable records."""


class BudgetError(FourgeError):
    """Memory or disk cannot hold what the run needs."""


class LaunchError(FourgeError):
    """An engine cannot be launched as asked, or a launch command cannot be read."""


class OutputError(FourgeError):
    """The target cannot be written, or holds something else."""


class EngineError(FourgeError):
    """The engine cannot be set up as asked, or has stopped."""


class RequestError(FourgeError):
    """A request to the engine cannot be served; the engine goes on."""

"""The one exception that the command line shows as a sentence instead of a traceback."""


class CommandError(Exception):
    """What the user asked for cannot be done; the message says why and what to do instead."""

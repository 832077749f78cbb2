"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """Something only the user can mend: a bad config, missing data, a checkpoint of another method.

    `main.py` prints its text as one line and exits with code 2, without a traceback. The text names the thing, the
    place (file, key, row) and the way out.
    """

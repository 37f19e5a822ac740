"""The one error that a user of a plug-in sees: a refusal in one line."""

from __future__ import annotations


class PluginError(ValueError):
    """A refusal: one line that says where, why, and what to do instead.

    Args:
        where: What was refused, in the user's own words (``--plugin sarathi: tbt_slo_ms``).
        reason: Why it cannot work.
        mend: What the user can change so that it does.
    """

    def __init__(self, where: str, reason: str, mend: str) -> None:
        super().__init__(f"{where}: {reason}; {mend}")
        self.where = where
        self.reason = reason
        self.mend = mend

    def __reduce__(self) -> tuple[type[PluginError], tuple[str, str, str]]:
        # Exceptions cross process boundaries when an engine process refuses to start.
        return (type(self), (self.where, self.reason, self.mend))

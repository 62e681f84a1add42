"""Checks tokens before they are sent."""

from __future__ import annotations

import re

from ..errors import OptionError

__all__ = ["check_token"]


def check_token(token: str | bool | None, origin: str = "--token") -> None:
    """Check that a token can be sent in a header.

    Args:
        token: The token; or False for none, True or None for the cached login.
        origin: Where it is from, for the message.

    Raises:
        OptionError: If it cannot. The message does not contain the token.
    """
    if not isinstance(token, str) or re.fullmatch(r"[!-~]+", token):
        return
    if not token.strip():
        raise OptionError(
            f"{origin}: the token is empty; if it is from a variable, check that it is set, or "
            "leave the option out to use the cached login"
        )
    raise OptionError(
        f"{origin}: the token is malformed: it has a space, a line end or another character that "
        "no token has; copy it again"
    )

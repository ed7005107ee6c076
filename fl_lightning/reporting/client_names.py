"""Which clients are logged, and the names that they have on disk."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypeAlias
from urllib.parse import quote

from fl_lightning.errors import MisconfigurationException
from fl_lightning.types import ClientId

__all__ = ["AUTO_CLIENTS", "LogClients", "client_filter", "first_wanted", "safe_name"]

LogClients: TypeAlias = bool | int | str | Sequence[ClientId]
"""``"auto"``, a count, ids, a pattern, or all (``True``) and none (``False``)."""

AUTO_CLIENTS = 100
"""As many curves as TensorBoard draws without a pause."""

_SCANNED = 10_000  # ids that are looked at, at most, where a pattern must be turned into a list
_LONGEST = 100  # most file systems take 255 bytes, of which other tools want some
_NUMBER = re.compile(r"-?\d+\Z")


def safe_name(client_id: ClientId) -> str:
    """Return a folder name for a client: readable for an ordinary id, different for different ids.

    Letters, digits, ``-``, ``_`` and ``.`` stand for themselves, everything else for its percent-encoded UTF-8. A
    string that would then read like a number (``"1"`` beside ``1``), be hidden or be empty starts with ``~``; one that
    is too long keeps its beginning and a hash, and starts with ``~~``.

    Args:
        client_id: any client id.

    Example:
        >>> [safe_name(client_id) for client_id in (7, "site-a", "7", "a/b", "..")]
        ['7', 'site-a', '~7', 'a%2Fb', '~..']
    """
    if isinstance(client_id, str):
        # "~" never comes out of the quoting, so it can mark what is special
        name = quote(client_id.encode("utf-8", "surrogatepass"), safe="").replace("~", "%7E")
        if not name or name.startswith(".") or _NUMBER.match(name):
            name = f"~{name}"
    else:
        name = str(int(client_id))
    if len(name) > _LONGEST:
        digest = hashlib.sha256(repr(client_id).encode("utf-8", "surrogatepass")).hexdigest()[:32]
        name = f"~~{name[:60]}~{digest}"
    return name


def client_filter(log_clients: LogClients, client_ids: Sequence[ClientId]) -> Callable[[ClientId], bool]:
    """Return the pure rule that says whether a client's curves are kept.

    Args:
        log_clients: ``"auto"``: everyone in a population of at most 100, otherwise its first 100 ids (of those that
            take part, :class:`~fl_lightning.reporting.ClientCurves` adds); a count: the
            first so many ids; ids: those; another string: a glob over ``str(id)``, or a regular expression that must
            match all of it after ``"re:"``; ``True`` and ``False``: all and none.
        client_ids: the population, of which only the first ids are looked at.

    Raises:
        MisconfigurationException: for anything else, and for ids that the population does not have.

    Example:
        >>> wants = client_filter(2, range(10**6))
        >>> wants(1), wants(2)
        (True, False)
    """
    if isinstance(log_clients, bool):
        return lambda client_id: log_clients
    if isinstance(log_clients, int):
        if log_clients < 0:
            raise MisconfigurationException(
                f"Expected log_clients of 0 or more, got {log_clients}. Use False for none."
            )
        return frozenset(islice(client_ids, log_clients)).__contains__
    if isinstance(log_clients, str):
        if log_clients == "auto":
            return frozenset(islice(client_ids, AUTO_CLIENTS)).__contains__
        matches = _pattern(log_clients).fullmatch
        return lambda client_id: matches(str(client_id)) is not None
    if not isinstance(log_clients, Sequence):
        raise MisconfigurationException(
            f"Expected log_clients as 'auto', a count, a list of client ids, a pattern, True or False, got "
            f"{log_clients!r}. Write log_clients='auto' for the first {AUTO_CLIENTS} clients."
        )
    _require_known(log_clients, client_ids)
    return frozenset(log_clients).__contains__


def first_wanted(
    log_clients: LogClients, client_ids: Sequence[ClientId], wants: Callable[[ClientId], bool], most: int
) -> frozenset[ClientId]:
    """Return the first ``most`` clients that are wanted, in the order of the list or of the population.

    Where one run holds the curves of all clients, a rule without a bound (all, a pattern) needs one.
    """
    listed = isinstance(log_clients, Sequence) and not isinstance(log_clients, str)
    ids = log_clients if listed else islice(client_ids, _SCANNED)
    assert not isinstance(ids, (bool, int, str))
    return frozenset(islice(filter(wants, ids), most))


def _pattern(text: str) -> re.Pattern[str]:
    if not text.startswith("re:"):
        return re.compile(fnmatch.translate(text))
    try:
        return re.compile(text[3:])
    except re.error as error:
        raise MisconfigurationException(
            f"Expected a regular expression after 're:' in log_clients, got {text[3:]!r} ({error}). "
            "Mend it, or use a glob such as 'site-*'."
        ) from error


def _require_known(wanted: Sequence[ClientId], client_ids: Sequence[ClientId]) -> None:
    if not isinstance(client_ids, range) and len(client_ids) > _SCANNED:
        return  # a membership test in a list of a million ids is a scan of it
    known = client_ids if isinstance(client_ids, range) else frozenset(client_ids)
    # `True in range(5)` and `1.0 in range(5)` hold as well, which is right: they are equal ids
    unknown = [client_id for client_id in wanted if client_id not in known]
    if unknown and len(client_ids):
        raise MisconfigurationException(
            f"Expected log_clients to name clients of the population ({client_ids[0]!r}, …), got unknown ids "
            f"{unknown[:5]!r}. 1 and '1' are different clients; a pattern such as 'site-*' also names clients that "
            "come later."
        )

"""Which versions of the protocol nodes speak, and whether they can live together.

Each node says in its entry of the membership which version it speaks and the oldest that it understands. Who joins
compares both ways: nobody else can, since those who are there may be older than the rule that refuses them.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from convener.core.membership import Member
from convener.errors import ConfigurationError
from convener.version import OLDEST_PROTOCOL, PROTOCOL


class Spoken(msgspec.Struct):
    """What nodes go by of a member's info. 0.1.0 does not say `oldest`, nor `acts`: for how many ms after a renewal it
    may act.
    """

    name: str = ""
    version: str = ""
    protocol: int = 1
    oldest: int = 1
    acts: int = 0


def spoken(member: Member) -> Spoken:
    """What a member says of itself; what cannot be read says nothing."""
    try:
        return msgspec.json.decode(member.info, type=Spoken)
    except msgspec.MsgspecError:
        return Spoken()


def check_protocols(members: Mapping[str, Member], *, protocol: int = PROTOCOL, oldest: int = OLDEST_PROTOCOL) -> None:
    """Refuse to live beside members that would misunderstand this node, or that it would.

    Args:
        members: incarnation → member, of all that are not buried.

    Raises:
        ConfigurationError: names one of them, and what to do.
    """
    for incarnation, member in members.items():
        other = spoken(member)
        who = f"node {other.name or incarnation} (convener {other.version or 'of an unknown version'})"
        if other.protocol < oldest:
            raise ConfigurationError(
                f"{who} speaks protocol {other.protocol}, and this version understands {oldest} and newer: upgrade the "
                "cluster to a version between them first"
            )
        if protocol < other.oldest:
            raise ConfigurationError(
                f"{who} understands protocol {other.oldest} and newer, and this version speaks {protocol}: it is too "
                "old for this cluster"
            )

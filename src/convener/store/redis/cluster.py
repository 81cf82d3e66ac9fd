"""A Redis Cluster: the keys are shared out by hash slot, a `Link` to each primary.

The map of the slots is asked of any server when something is not where it should be, and now and then. What a
server says with MOVED counts at once. When a slot changes hands, order is kept (`lanes`): nothing of a group goes
to the new server before the old one has answered everything that it was sent.

While a slot is moved key by key, a script that removes a key's last element and then touches the key again would be
stopped in its middle. So every script names one more key of its group that never exists: the servers refuse it
before it begins (TRYAGAIN) until the slot has moved. With slots that move in one step (Valkey 9) nothing of this
happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from convener.errors import ConfigurationError, ConvenerError, StoreUnavailable
from convener.store.redis.address import Host
from convener.store.redis.connection import Link, LinkStatistics, Patience
from convener.store.redis.endpoint import Argument, Endpoint, Target
from convener.store.redis.errors import CLUSTER_CODES, NotRun, Redirect
from convener.store.redis.history import History, Identity
from convener.store.redis.home import Home
from convener.store.redis.lanes import Lanes, Stopped
from convener.store.redis.scripts import Script
from convener.store.redis.slots import SlotMap, ask_for_slots, changes, name_of, replaced
from convener.store.redis.topology import Told, call_hook, tell, together
from convener.store.redis.wire import Again, Call, Reply, slot_of, tag_of

_log = logging.getLogger(__name__)

LOOK_INTERVAL: Final = 20.0
"""Seconds after which the map is asked at the latest."""

_CALM: Final = 0.5
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 1.0
_ASKED: Final = 8
"""Servers that are asked for the map, at most, before the next pause."""


class Cluster:
    """A `Topology` of several primaries.

    Args:
        seeds: servers to ask first.
        server: credentials and options for all.
        on_reconnect, on_new_history: see `topology.Single`.
    """

    def __init__(
        self,
        seeds: Sequence[Host],
        server: Endpoint,
        patience: Patience,
        *,
        max_in_flight: int,
        on_reconnect: Callable[[], None] | None,
        on_new_history: Told | None,
    ) -> None:
        self._seeds = tuple(seeds)
        self.server = server
        self._patience = patience
        self._max_in_flight = max_in_flight
        self._on_reconnect = on_reconnect
        self._on_new_history = on_new_history
        self._links: dict[str, Link] = {}
        self._seen = SlotMap()
        self._owners: list[str | None] = list(self._seen.owners)
        self._hosts: Mapping[str, Host] = {}
        self._hint: Host | None = None
        self.version = 0
        """Counts changes of the map."""
        self._histories: dict[str, History] = {}
        self._heirs: dict[str, str] = {}
        self._lanes = Lanes(self, patience, max_in_flight)
        self._watchers: list[Callable[[], None]] = []
        self._doubt = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._retired = LinkStatistics(connected=True, connects=0, in_flight=0, expired=0, reloads=0)

    async def open(self) -> None:
        """See `Topology.open`."""
        self._loop = asyncio.get_running_loop()
        found = await self._look(self._seeds)
        for name in found.primaries():
            self._links[name] = self._link(found.hosts[name])
        try:
            await together([link.open() for link in self._links.values()])
        except BaseException:
            await self.close()
            raise
        self._seen, self._owners, self._hosts = found, list(found.owners), found.hosts
        self._task = self._loop.create_task(self._follow(), name="convener-store-cluster")

    async def close(self) -> None:
        """See `Topology.close`."""
        self._loop = None
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        for link in list(self._links.values()):
            await link.close()
        await self._lanes.close()

    def _link(self, host: Host) -> Link:
        target = self.server.at(*host)
        return Link(target, self._patience, self, CLUSTER_CODES, max_in_flight=self._max_in_flight, primary=False)

    # -- commands --------------------------------------------------------------------------------------------

    def call(self, script: Script, keys: tuple[str, ...], *arguments: Argument) -> asyncio.Future[Reply]:
        """See `Topology.call`."""
        never = f"{{{tag_of(keys[0])}}}:never"
        words = ("EVALSHA", script.sha, len(keys) + 1, *keys, never, *arguments)
        return self._submit(script, keys[0], words)

    def execute(self, key: str, *parts: Argument) -> asyncio.Future[Reply]:
        """See `Topology.execute`."""
        if key:
            return self._submit(None, key, parts)
        links = list(self._links.values())
        if not links:
            raise StoreUnavailable("the store is not open")
        return next((link for link in links if link.connected), links[0]).execute("", *parts)

    def each(self, *parts: Argument) -> Sequence[asyncio.Future[Reply]]:
        """See `Topology.each`."""
        return [self._links[name].execute("", *parts) for name in sorted(self.targets())]

    def places(self) -> Sequence[str]:
        """See `Topology.places`."""
        return sorted(self.targets())

    def _submit(self, script: Script | None, key: str, parts: Sequence[Argument]) -> asyncio.Future[Reply]:
        if self._loop is None:
            raise StoreUnavailable("the store is not open")
        call = Call(self._loop.create_future(), script, key, parts, self._patience.expiry(), slot_of(key))
        if self._lanes and self._lanes.take(call):
            return call.future
        link = self.home(call.slot)
        if link is not None:
            return link.submit(call)
        self._lanes.put_first(tag_of(key), [Stopped(call)])
        return call.future

    def route(self, call: Call) -> None:
        """See `lanes.Router.route`."""
        try:
            link = self.home(call.slot)
            if link is not None:
                link.submit(call)
            else:
                self._lanes.put_first(tag_of(call.key), [Stopped(call)])
        except ConvenerError as error:
            call.fail(error)

    def _route_again(self, calls: Iterable[Call]) -> None:
        """Commands that were made before whatever waits in the lanes, and have not run."""
        groups: dict[str, list[Stopped]] = {}
        for call in calls:
            tag = tag_of(call.key)
            if call.alone:
                call.fail(NotRun("TRYAGAIN", call.name))
            elif self._lanes.has(tag):
                groups.setdefault(tag, []).append(Stopped(call))
            else:
                self.route(call)
        for tag, stopped in groups.items():
            self._lanes.put_first(tag, stopped)

    # -- Topology: places ------------------------------------------------------------------------------------

    def slot(self, key: str) -> int:
        """The hash slot."""
        return slot_of(key)

    def place(self, slot: int) -> str | None:
        """The primary's host and port."""
        return self._owners[slot]

    def targets(self) -> Mapping[str, Target]:
        """All primaries that have slots."""
        return {name: self._links[name].target for name in set(self._owners) if name is not None}

    def target(self, key: str) -> Target:
        """The primary that has the key's slot at the time."""
        return Home(self, slot_of(key))

    def host(self, slot: int) -> Host | None:
        """Where a slot is; may be called from any thread."""
        owner = self._owners[slot]
        return None if owner is None else self._hosts[owner]

    def others(self) -> list[Host]:
        """Known servers in no order; may be called from any thread."""
        hosts = [*self._hosts.values()]
        return random.sample(hosts, len(hosts))

    def reachable(self, place: str) -> bool:
        """Whether the link to that server has a connection."""
        link = self._links.get(place)
        return link is not None and link.connected

    def watch(self, changed: Callable[[], None]) -> None:
        """See `Topology.watch`."""
        self._watchers.append(changed)

    def histories(self) -> Mapping[str, History]:
        """See `Topology.histories`."""
        return dict(self._histories)

    def statistics(self) -> LinkStatistics:
        """See `Topology.statistics`."""
        parts = [self._retired, *(link.statistics() for link in self._links.values())]
        return LinkStatistics(
            connected=all(part.connected for part in parts),
            connects=sum(part.connects for part in parts),
            in_flight=sum(part.in_flight for part in parts) + len(self._lanes),
            expired=sum(part.expired for part in parts),
            reloads=sum(part.reloads for part in parts),
        )

    # -- lanes.Router ----------------------------------------------------------------------------------------

    def home(self, slot: int) -> Link | None:
        """The link to the server that has a slot."""
        owner = self._owners[slot]
        return None if owner is None else self._links[owner]

    def link_to(self, host: Host) -> Link:
        """The link to a server, which is made if there is none."""
        name = name_of(host)
        link = self._links.get(name)
        if link is None:
            link = self._links[name] = self._link(host)
            link.begin()
        return link

    def redirected(self, redirect: Redirect) -> None:
        """See `Topology.redirected`."""
        host, slot = (redirect.host, redirect.port), redirect.slot
        before, now = self._owners[slot], name_of(host)
        self._hint = host
        self.doubt()
        if before == now or self._loop is None:
            return
        self._hosts = {**self._hosts, now: host}
        if before is not None and now in self._seen.replicas.get(before, ()) and now not in self._links:
            self._heirs[now] = before
        self.link_to(host)
        self._owners[slot] = now
        self._moved({} if before is None else {before: {slot}})

    def doubt(self) -> None:
        """See `Topology.doubt`."""
        self._doubt.set()

    # -- LinkOwner -------------------------------------------------------------------------------------------

    def connected(self, link: Link, identity: Identity) -> None:
        """Compare the server's data with those of its connection before, or of the primary that it replaces."""
        name = link.target.place
        old = self._histories.get(name)
        if name in self._heirs:
            old = self._histories.pop(self._heirs.pop(name), old)
        self._histories[name] = identity.history
        if old is not None:
            tell(self._on_new_history, old, identity.history)
            call_hook("on_reconnect", self._on_reconnect)
            self._changed()

    def lost(self, link: Link) -> None:
        """What waits for this server may have another one by now."""
        self.doubt()
        self._route_again(link.take_waiting(lambda call: call.slot >= 0 and self.home(call.slot) is not link))
        self._lanes.answered(link)

    def refused(self, link: Link, again: list[Again], held: list[Call]) -> None:
        """Give each group in trouble a lane; the rest goes on."""
        host = link.target.place.rpartition(":")[0]
        groups: dict[str, list[Stopped]] = {}
        for one in again:
            groups.setdefault(tag_of(one.call.key), []).append(Stopped(one.call, one.refusal, host))
        for call in held:
            tag = tag_of(call.key)
            if call.slot >= 0 and not call.alone and (tag in groups or self._lanes.has(tag)):
                groups.setdefault(tag, []).append(Stopped(call))
            elif call.slot >= 0 and not call.alone:
                self.route(call)
            else:
                self._send_back(link, call)
        for tag, stopped in groups.items():
            self._lanes.put_first(tag, stopped)
        self._lanes.answered(link)

    @staticmethod
    def _send_back(link: Link, call: Call) -> None:
        """What was meant for this very server."""
        try:
            link.submit(call)
        except ConvenerError as error:
            call.fail(error)

    # -- the map ---------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Keep the map right."""
        pause = _FIRST_PAUSE
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_INTERVAL * random.uniform(0.5, 1)):
                    await self._doubt.wait()
            self._doubt.clear()
            try:
                self._adopt(await self._look(self.others() or self._seeds))
                await self._retire()
            except (StoreUnavailable, ConfigurationError) as error:
                _log.debug("nobody says who has the hash slots: %s", error)
                self._doubt.set()
            except Exception:
                _log.exception("unexpected error while following the cluster")
                self._doubt.set()
            if all(self.reachable(name) for name in self.targets()):
                pause = _FIRST_PAUSE
                await asyncio.sleep(_CALM * random.uniform(0.5, 1))
            else:
                # A primary is gone, and a replica will take over, sooner or later.
                self._doubt.set()
                await asyncio.sleep(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _look(self, hosts: Sequence[Host]) -> SlotMap:
        """Ask for the map: a server with a connection, preferably whom a redirection named; else any."""
        hint, self._hint = self._hint, None
        links = random.sample(list(self._links.values()), len(self._links))
        if hint is not None:
            links.sort(key=lambda link: link.target.place != name_of(hint))
        limit = self._patience.deadline / 2
        return await ask_for_slots(
            [link for link in links if link.connected][:_ASKED], self.server, hosts[:_ASKED], limit
        )

    def _adopt(self, found: SlotMap) -> None:
        seen, self._seen, self._hosts = self._seen, found, {**self._hosts, **found.hosts}
        for was, now in replaced(seen, found):
            if now not in self._histories:
                self._heirs[now] = was
            elif (old := self._histories.pop(was, None)) is not None:
                tell(self._on_new_history, old, self._histories[now])
        moved = changes(self._owners, found.owners)
        gained = self._owners != found.owners
        for name in found.primaries():
            self.link_to(found.hosts[name])
        self._owners = list(found.owners)
        if gained:
            self._moved(moved)
        kept = set(found.hosts)
        self._hosts = {name: host for name, host in self._hosts.items() if name in kept}

    def _moved(self, moved: Mapping[str, set[int]]) -> None:
        """Slots have left their servers, by name."""
        self.version += 1
        for name, slots in moved.items():
            link = self._links.get(name)
            if link is None:
                continue
            tags = {tag_of(call.key) for call in link.under_way() if call.slot in slots and not call.alone}
            waiting = link.take_waiting(lambda call, slots=slots: call.slot in slots)
            if tags:
                self._lanes.put_behind(tags, link)
                link.stall()
            self._route_again(waiting)
        self._changed()

    def _changed(self) -> None:
        for changed in self._watchers:
            call_hook("what was to be done after a change of the store", changed)

    async def _retire(self) -> None:
        """Close links to servers that have no slots any more, when nothing is under way there."""
        owners = set(self._owners)
        for name, link in list(self._links.items()):
            if name not in owners and link.idle:
                del self._links[name]
                last, sum_ = link.statistics(), self._retired
                self._retired = LinkStatistics(
                    connected=True,
                    connects=sum_.connects + last.connects,
                    in_flight=0,
                    expired=sum_.expired + last.expired,
                    reloads=sum_.reloads + last.reloads,
                )
                if name not in self._heirs.values():
                    self._histories.pop(name, None)
                await link.close()

    def tell_doubt(self) -> None:
        """`doubt`, from any thread."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self.doubt)

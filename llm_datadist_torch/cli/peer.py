# SPDX-License-Identifier: Apache-2.0
"""``doctor --peer``: one instance in another process, examined from both ends of a link."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Iterator, Mapping

import msgspec
import torch

from llm_datadist_torch.api import examination
from llm_datadist_torch.api.addresses import format_address, peer_address, resolve
from llm_datadist_torch.api.keys import BlocksKey
from llm_datadist_torch.api.node import Node
from llm_datadist_torch.api.statistics import read_echo
from llm_datadist_torch.cli import probes
from llm_datadist_torch.cli.remote import connect, look_at
from llm_datadist_torch.cli.report import Finding
from llm_datadist_torch.links.info import LinkInfo
from llm_datadist_torch.links.questions import ECHO_QUERY, EXAMINE_QUERY
from llm_datadist_torch.observe.html import quarantine_text, size, speed_of
from llm_datadist_torch.observe.instance_report import (
    InstanceReport,
    Limits,
    ProbeCache,
    SeenChoice,
)
from llm_datadist_torch.observe.stats import CacheStats, LinkStats, Stats
from llm_datadist_torch.values.status import LLMException, message_of
from llm_datadist_torch.values.versions import NOT_INSTALLED, installed_versions

_DIAL_S = 5.0
_ANSWER_MS = 5000
_PULL_S = 30.0
_ROUND_TRIPS = 200
_ECHO_BYTES = 512 * 1024
_ECHOES = 8
_PULL_BYTES = 64 << 20
_MOST_BLOCK_BYTES = 1 << 30
_CLOCKS_DIFFER_NS = 1_000_000_000


def examine(address: str, available: Mapping[str, str]) -> tuple[list[Finding], bool]:
    """Link to the instance at an address, and look at both ends. Takes some seconds at most.

    It changes nothing there. One of the peer's caches is read, if it has one with a name.

    Args:
        address: Host and port where it listens.
        available: Transports of this machine, and why it does not have the others.

    Returns:
        What was found, and whether the examination came to its end.
    """
    findings: list[Finding] = []
    try:
        host, port = peer_address(address)
        findings.append(_reach(host, port))
        device = "cpu" if probes.default_device().device in ("", "cpu") else "auto"
        node, peer = connect(address, listen=_listen_address(host, port), device=device)
        with node:
            findings += _look(node, peer, address, available)
    except LLMException as error:
        findings.append(Finding(address, "wrong", message_of(error), error.remedy or ""))
    except OSError as error:
        remedy = "start the instance, or open the port in the firewall"
        findings.append(Finding(address, "wrong", f"can't be reached: {error}", remedy))
    except msgspec.DecodeError as error:
        findings.append(Finding(address, "wrong", f"what it answers makes no sense: {error}"))
    else:
        return findings, True
    return findings, False


def _reach(host: str, port: int) -> Finding:
    """Open a TCP connection, apart from all that follows, so that a firewall shows.

    Raises:
        LLMLinkError: The name is not known.
        OSError: Nobody listens there, or it can't be reached.
    """
    (ip, _), *_more = resolve(host, port)
    began = time.perf_counter()
    socket.create_connection((host, port), _DIAL_S).close()
    took = (time.perf_counter() - began) * 1000
    return Finding("port", "ok", f"{format_address(ip, port)} accepts connections in {took:.1f} ms")


def _listen_address(host: str, port: int) -> str:
    """A free port at the address of this host from which the peer is reached."""
    ip = resolve(host, port)[0][0]
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((ip, port))  # which sends nothing
        return format_address(sock.getsockname()[0], 0)


def _look(node: Node, peer: int, address: str, available: Mapping[str, str]) -> Iterator[Finding]:
    listening = node.datadist.listen_address
    mine = b"" if listening is None else b"%d" % listening[1]
    answer = node.datadist.request(peer, EXAMINE_QUERY + b"\0" + mine, timeout=_ANSWER_MS)
    theirs = msgspec.json.decode(answer, type=InstanceReport)
    link = next(info for info in node.datadist.links() if info.peer == peer)
    place = f"process {theirs.pid} on {theirs.host}"
    yield Finding(address, "ok", f"cluster {theirs.cluster_id} on {theirs.device}, {place}")
    yield _versions(theirs)
    yield _secret(link, theirs)
    times, offsets = _round_trips(node, peer)
    yield _clock(min(times), offsets[times.index(min(times))])
    yield from _transports(available, link, theirs)
    yield _dial_back(theirs, link)
    yield from limits(theirs.limits, "there: ")
    yield _latency(times)
    yield _control_speed(node, peer)
    yield _pull(node, peer, theirs.probe)
    yield from _state(look_at(node, peer), node.cluster_id)


def _versions(theirs: InstanceReport) -> Finding:
    mine = installed_versions()
    version = f"llm_datadist_torch {mine['llm_datadist_torch']} on both"
    differing = [
        f"{name} {mine.get(name, NOT_INSTALLED)} here and {found} there"
        for name, found in theirs.versions.items()
        if mine.get(name) != found
    ]
    detail = "; ".join([version, *differing])
    return Finding("versions", "ok", detail)


def _secret(link: LinkInfo, theirs: InstanceReport) -> Finding:
    if theirs.secured:
        return Finding("secret", "ok", "both have the same link_secret")
    if not link.not_local:
        return Finding("secret", "ok", "none; the link does not leave this host")
    return Finding(
        "secret",
        "note",
        "none: the link is neither encrypted nor authenticated",
        "set link_secret on both, or LLM_DATADIST_LINK_SECRET_FILE",
    )


def _clock(round_trip_ns: int, offset_ns: int) -> Finding:
    side = "ahead of" if offset_ns > 0 else "behind"
    detail = (
        f"the peer's is {abs(offset_ns) / 1e6:.3f} ms {side} this one, give or take"
        f" {round_trip_ns / 2e6:.3f} ms"
    )
    if abs(offset_ns) < _CLOCKS_DIFFER_NS:
        return Finding("clock", "ok", detail)
    remedy = "run NTP on both: links don't need it, logs and traces of both sides do"
    return Finding("clock", "note", detail, remedy)


def _transports(
    here: Mapping[str, str], link: LinkInfo, theirs: InstanceReport
) -> Iterator[Finding]:
    """What each side has, and what moves bytes on this link, as both see it."""
    there = {choice.memory: choice for choice in theirs.choices}
    for mine in examination.seen(link):
        other = there.get(mine.memory)
        name = f"{mine.memory} memory"
        if other == mine:
            yield _choice(name, mine, f"{_said(mine)}, seen from both ends")
        else:
            seen = "nothing" if other is None else _said(other)
            yield _choice(name, mine, f"{_said(mine)}; the peer sees {seen}")
    for name in sorted({*here, *theirs.transports, *theirs.unavailable}):
        unknown = "its settings leave it out" if name in here else "not installed"
        why_there = "" if name in theirs.transports else theirs.unavailable.get(name, unknown)
        sides = {"here": here.get(name, "not installed"), "there": why_there}
        if sides["here"] == why_there:
            sides = {"on both sides": why_there}
        said = "; ".join(f"{side}: {why}" for side, why in sides.items() if why)
        if said:
            yield Finding(f"transport {name}", "no", f"not on this link; {said}")
        else:
            yield Finding(f"transport {name}", "ok", "both have it")


def _choice(name: str, mine: SeenChoice, detail: str) -> Finding:
    return Finding(name, "no" if mine.transport is None else "ok", detail)


def _said(choice: SeenChoice) -> str:
    return f"by {choice.transport or 'nothing'} ({choice.reason})"


def _dial_back(theirs: InstanceReport, link: LinkInfo) -> Finding:
    if theirs.dial_back is None:
        why = "the link is a Unix socket" if not link.not_local else "it knows no address"
        return Finding("port back", "ok", f"not tried: {why}")
    if not theirs.dial_back:
        return Finding("port back", "ok", "the peer can connect to a port of this host")
    return Finding(
        "port back",
        "note",
        f"the peer can't connect to {theirs.dial_back}",
        "open the ports between the hosts in both directions if hixl or nixl is to be used, or if"
        " the peer is to connect to instances here",
    )


def limits(found: Limits, where: str = "") -> list[Finding]:
    """What the system lets a process have, as findings."""
    files = found.open_files
    few = files is not None and files < 1024
    locked = "unlimited" if found.locked_bytes is None else size(found.locked_bytes)
    little = found.locked_bytes is not None and found.locked_bytes < _PULL_BYTES
    memory = "no limit" if found.memory_bytes is None else size(found.memory_bytes)
    return [
        Finding(
            f"{where}open files",
            "note" if few else "ok",
            f"ulimit -n: {files or 'unlimited'}; a link takes up to 2, a cache 1",
            "ulimit -n 65536" if few else "",
        ),
        Finding(
            f"{where}locked memory",
            "note" if little else "ok",
            f"ulimit -l: {locked}; page-locked host memory and RDMA count",
            "ulimit -l unlimited, or --ulimit memlock=-1 for a container" if little else "",
        ),
        Finding(
            f"{where}memory",
            "ok",
            f"of the control group: {memory}; caches count, /dev/shm is not used",
        ),
    ]


def _round_trips(node: Node, peer: int) -> tuple[list[int], list[int]]:
    """Nanoseconds of small requests, and how far the peer's clock was ahead in each."""
    times: list[int] = []
    offsets: list[int] = []
    for _ in range(_ROUND_TRIPS):
        sent_at, began = time.time_ns(), time.perf_counter_ns()
        answer = node.datadist.request(peer, ECHO_QUERY, timeout=_ANSWER_MS)
        took = time.perf_counter_ns() - began
        times.append(took)
        offsets.append(read_echo(answer)[0] - sent_at - took // 2)
    return times, offsets


def _latency(times: list[int]) -> Finding:
    ordered = sorted(times)
    p99 = ordered[len(ordered) * 99 // 100] / 1000
    detail = f"p50 {statistics.median(ordered) / 1000:.0f} us, p99 {p99:.0f} us of {len(times)}"
    return Finding("round trip", "ok", f"{detail} requests, answered by Python at the peer")


def _control_speed(node: Node, peer: int) -> Finding:
    payload = ECHO_QUERY + b"\0" + bytes(_ECHO_BYTES)
    began = time.perf_counter_ns()
    for _ in range(_ECHOES):
        node.datadist.request(peer, payload, timeout=_ANSWER_MS)
    speed = speed_of(2 * _ECHOES * _ECHO_BYTES, time.perf_counter_ns() - began)
    detail = f"{speed}, {size(_ECHO_BYTES)} there and back, {_ECHOES} times"
    return Finding("control connection", "ok", detail)


def _pull(node: Node, peer: int, probe: ProbeCache | None) -> Finding:
    """Time a pull of blocks that exist at the peer; it reads them."""
    if probe is None:
        detail = "not measured: the peer has no blocks cache with a name that peers may read"
        return Finding("pull", "note", detail, "allocate it with name=, then run this again")
    a_block = probe.tensors * probe.block_bytes
    if a_block > _MOST_BLOCK_BYTES:
        return Finding("pull", "note", f"not measured: a block has {size(a_block)}")
    count = min(probe.blocks, max(1, _PULL_BYTES // a_block))
    local = node.allocate(
        layers=probe.tensors,
        tensors_per_layer=1,
        blocks=count,
        shape=(probe.block_bytes,),
        dtype=torch.uint8,
    )
    key, blocks = BlocksKey(probe.model_id), list(range(count))
    try:
        # The first pull resolves the key, and maps or connects what its path needs.
        for _ in range(2):
            node.peer(peer).pull(key, local, blocks, blocks, timeout_s=_PULL_S)
    except LLMException as error:
        return Finding("pull", "wrong", message_of(error), error.remedy or "")
    done = node.stats().recent[-1]
    speed = speed_of(done.nbytes, done.took_ns)
    detail = f"{size(done.nbytes)} of cache {probe.cache_id} on {probe.device} in"
    return Finding("pull", "ok", f"{detail} {done.took_ns / 1e6:.2f} ms, {speed}, by {done.path}")


def _state(stats: Stats, us: int) -> Iterator[Finding]:
    """What the peer's other links and its caches are like."""
    yield from (_link(link) for link in stats.links if link.peer != us)
    yield from (_forgotten(cache) for cache in stats.caches if cache.dropped)
    if stats.quarantine.leases:
        remedy = "it ends when the peers link again, or their processes end"
        yield Finding("quarantine", "note", quarantine_text(stats), remedy)


def _link(link: LinkStats) -> Finding:
    if link.state == "linked":
        paths = ", ".join(f"{kind}: {name}" for kind, name in link.transports.items() if name)
        return Finding(f"link to cluster {link.peer}", "ok", paths)
    return Finding(f"link to cluster {link.peer}", "note", f"{link.state}: {link.reason}")


def _forgotten(cache: CacheStats) -> Finding:
    names = ", ".join(cache.names) or "no keys"
    return Finding(
        f"cache {cache.cache_id}",
        "note",
        f"the program has dropped its handle; {size(cache.nbytes)}, {names}",
        "it stays because peers may name it; deallocate or unregister caches before dropping them",
    )

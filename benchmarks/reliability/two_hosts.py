"""What becomes of a run on two hosts when the network or a host fails? `sudo python benchmarks/reliability/two_hosts.py`

Two network namespaces with a veth pair between them are the hosts (Linux, root, iproute2). torchrun runs in each: 2 pipeline ranks
across, 2 replicas inside, so every step's messages pass the link. Both commands are started again when they ended, on a whole
link, until the run is done; its losses must be those of a run on one host, to the last bit.

    slow      20 Mbit/s and 30 ms each way (tc netem), from the start
    broken    nothing passes for 8 s, less than runtime.timeout_s, in mid-run
    cut       nothing passes any more from mid-run on
    killed    every process of the second host is killed in mid-run
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from run import STEPS, losses, prepared

HOSTS, ADDRESSES = ("helix0", "helix1"), ("10.77.0.1", "10.77.0.2")
TIMEOUT_S = 20
OPTIONS = "--schedule.family 1f1b --schedule.ranks 2 --mesh.dp 2 --schedule.microbatches 2"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def inside(host: str, *words: str) -> list[str]:
    return ["ip", "netns", "exec", host, *words]


class Network:
    """Two hosts and a link."""

    def __enter__(self) -> Network:
        self.__exit__()
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", "veth0", "netns", HOSTS[0], "type", "veth", "peer", "name", "veth1", "netns", HOSTS[1])
        for number, (host, address) in enumerate(zip(HOSTS, ADDRESSES, strict=True)):
            for device, words in (("lo", ()), (f"veth{number}", (address,))):
                if words:
                    ip("-n", host, "addr", "add", f"{address}/24", "dev", device)
                ip("-n", host, "link", "set", device, "up")
        return self

    def __exit__(self, *error: object) -> None:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)

    def shape(self, *words: str) -> None:
        """Give the link `tc netem`'s words, both ways; none makes it whole."""
        for number, host in enumerate(HOSTS):
            device = f"veth{number}"
            subprocess.run(inside(host, "tc", "qdisc", "del", "dev", device, "root"), capture_output=True)
            if words:
                add = inside(host, "tc", "qdisc", "add", "dev", device, "root", "netem", *words)
                subprocess.run(add, check=True, capture_output=True)


@dataclass
class Attempt:
    """Both hosts' commands, started together."""

    folder: Path
    port: int

    def __post_init__(self) -> None:
        self.begun = time.monotonic()
        self.processes = [self._start(number) for number in range(len(HOSTS))]

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        start = [
            "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", "--node-rank", str(number),
            "--master-addr", ADDRESSES[0], "--master-port", str(self.port), "-m", "helixpipe", "train",
            "small.toml", "--resume", "--runtime.timeout_s", str(TIMEOUT_S), *OPTIONS.split(),
        ]  # fmt: skip
        environment = os.environ | {"GLOO_SOCKET_IFNAME": f"veth{number}", "OMP_NUM_THREADS": "1"}
        with (self.folder / f"err{number}").open("w") as err:
            return subprocess.Popen(
                inside(HOSTS[number], sys.executable, "-m", *start), cwd=self.folder, stdout=subprocess.DEVNULL,
                stderr=err, stdin=subprocess.DEVNULL, env=environment,
            )  # fmt: skip

    def step(self) -> int:
        found = losses(self.folder)
        return max((step for step, _, _ in found), default=-1)

    def until(self, step: int) -> None:
        while self.step() < step and any(each.poll() is None for each in self.processes):
            time.sleep(0.02)

    def wait(self, limit_s: float = 180.0) -> list[int | None]:
        deadline = time.monotonic() + limit_s
        while any(each.poll() is None for each in self.processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        codes = [each.poll() for each in self.processes]
        for host in HOSTS:
            kill(host)
        return codes

    def said(self) -> list[str]:
        """Lines of ours, of each host."""
        texts = [(self.folder / f"err{number}").read_text(errors="replace") for number in range(len(HOSTS))]
        lines = [line for text in texts for line in text.splitlines() if "helixpipe: error" in line]
        return list(dict.fromkeys(lines)) + ["a traceback of ours" for text in texts if "/helixpipe/" in text]


def kill(host: str) -> None:
    found = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout.split()
    for each in found:
        try:
            os.kill(int(each), signal.SIGKILL)
        except ProcessLookupError:
            continue


def broken(network: Network, attempt: Attempt) -> None:
    attempt.until(STEPS // 3)
    network.shape("loss", "100%")
    time.sleep(8)
    network.shape()


def cut(network: Network, attempt: Attempt) -> None:
    attempt.until(STEPS // 3)
    network.shape("loss", "100%")


def killed(network: Network, attempt: Attempt) -> None:
    attempt.until(STEPS // 3)
    kill(HOSTS[1])


def nothing(network: Network, attempt: Attempt) -> None:
    pass


SCENES: dict[str, tuple[tuple[str, ...], Callable[[Network, Attempt], None]]] = {
    "whole": ((), nothing),
    "slow": (("rate", "20mbit", "delay", "30ms"), nothing),
    "broken": ((), broken),
    "cut": ((), cut),
    "killed": ((), killed),
}


def scene(network: Network, name: str, port: int) -> tuple[list[tuple[int, str, float]], str]:
    shaped, strike = SCENES[name]
    told: list[str] = []
    with tempfile.TemporaryDirectory() as folder_name:
        folder = prepared(Path(folder_name))
        for number in range(4):
            network.shape(*(shaped if number == 0 else ()))
            attempt = Attempt(folder, port + number)
            if number == 0:
                strike(network, attempt)
            struck = time.monotonic()
            codes = attempt.wait()
            ended_s = time.monotonic() - (struck if number == 0 and name in ("cut", "killed") else attempt.begun)
            told.append(f"{codes[0]}, {codes[1]} after {ended_s:.0f} s at step {attempt.step()}")
            told += [f"    {line}" for line in attempt.said()]
            if codes == [0, 0]:
                break
        return losses(folder), "\n  ".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SCENES))
    parser.add_argument("--port", type=int, default=29611)
    args = parser.parse_args()
    if os.geteuid():
        sys.exit("two_hosts: network namespaces need root")
    with tempfile.TemporaryDirectory() as name:
        folder = prepared(Path(name))
        train = [sys.executable, "-m", "helixpipe", "train", "small.toml", *OPTIONS.split()]
        subprocess.run(train, cwd=folder, check=True, capture_output=True)
        expected = losses(folder)
    failed = False
    with Network() as network:
        for number, name in enumerate(args.only.split(",")):
            found, told = scene(network, name, args.port + 10 * number)
            same = found == expected
            failed |= not same
            print(f"{name}: {'losses are those of one host' if same else 'LOSSES DIFFER'}\n  {told}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()

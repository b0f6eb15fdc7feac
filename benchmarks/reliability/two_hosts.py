"""What becomes of a run on two hosts when the network or a host fails? `sudo python benchmarks/reliability/two_hosts.py`

Two network namespaces with a veth pair between them are the hosts (Linux, root, iproute2). torchrun runs in each: 2 pipeline ranks
across, 2 replicas inside, so every step's messages pass the link. Both commands are started again when they ended, on a whole
link, until the run is done; its losses must be those of a run on one host, to the last bit.

    whole     nothing, to compare with
    slow      20 Mbit/s and 30 ms each way (tc netem, or tbf where the kernel has no netem), from its first seconds on
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

    def slow(self) -> str:
        """Narrow the link both ways; in words, how: kernels without netem have no delay but that of a queue."""
        for words in ("netem rate 20mbit delay 30ms", "tbf rate 20mbit burst 4kb latency 400ms"):
            add = (["tc", "qdisc", "replace", "dev", f"veth{end}", "root", *words.split()] for end in range(len(HOSTS)))
            if not any(
                subprocess.run(inside(host, *line), capture_output=True).returncode
                for host, line in zip(HOSTS, add, strict=True)
            ):
                return words
        raise OSError("tc knows neither netem nor tbf")

    def cut(self) -> None:
        """Nothing passes, and nobody is told: frames go to a card that does not exist."""
        for end, host in enumerate(HOSTS):
            words = ("neigh", "replace", ADDRESSES[1 - end], "lladdr", "02:00:00:00:00:99", "dev", f"veth{end}")
            ip("-n", host, *words, "nud", "permanent")

    def mend(self) -> None:
        """The link as it was at first."""
        for end, host in enumerate(HOSTS):
            subprocess.run(["ip", "-n", host, "neigh", "flush", "all", "nud", "permanent"], capture_output=True)
            subprocess.run(inside(host, "tc", "qdisc", "del", "dev", f"veth{end}", "root"), capture_output=True)


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


def whole(network: Network, attempt: Attempt) -> str:
    return ""


def slow(network: Network, attempt: Attempt) -> str:
    return network.slow()


def broken(network: Network, attempt: Attempt) -> str:
    attempt.until(STEPS // 3)
    network.cut()
    time.sleep(8)
    network.mend()
    return ""


def cut(network: Network, attempt: Attempt) -> str:
    attempt.until(STEPS // 3)
    network.cut()
    return ""


def killed(network: Network, attempt: Attempt) -> str:
    attempt.until(STEPS // 3)
    kill(HOSTS[1])
    return ""


SCENES = {each.__name__: each for each in (whole, slow, broken, cut, killed)}


def scene(network: Network, name: str, port: int) -> tuple[list[tuple[int, str, float]], str]:
    told: list[str] = []
    with tempfile.TemporaryDirectory() as folder_name:
        folder = prepared(Path(folder_name))
        for number in range(4):
            network.mend()
            attempt = Attempt(folder, port + number)
            try:
                how = SCENES[name](network, attempt) if number == 0 else ""
                struck = time.monotonic()
                codes = attempt.wait()
            finally:
                for host in HOSTS:
                    kill(host)
            since = struck if number == 0 and name in ("cut", "killed") else attempt.begun
            told.append(f"{codes[0]}, {codes[1]} after {time.monotonic() - since:.0f} s at step {attempt.step()} {how}")
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
